"""What the broker counts."""

from __future__ import annotations

from acb.broker.metrics import Metrics
from acb.protocol import Evacuate, Evacuated, Grant, Request, Restored, Revoke, Uncontended, Yield


def test_nothing_yet() -> None:
    report = Metrics().report()
    assert set(report.values()) == {0}
    assert "waits" not in report


def test_it_counts_what_is_said_and_sent() -> None:
    metrics = Metrics()
    for message in (Request(), Yield(5), Evacuated(0, 10, 1.0), Evacuated(5, 0, 0.0, "refused"), Restored(3, 7)):
        metrics.received(message)
    for _ in range(2):
        metrics.sent(Evacuate(), 0.0)
    metrics.sent(Revoke(1.0), 5.0)
    metrics.sent(Uncontended(), 5.0)
    report = metrics.report()
    assert report["evacuated_bytes"] == 10
    assert report["restored_bytes"] == 7
    assert report["refused_evacuations"] == 1
    assert (report["evacuations"], report["revokes"], report["grants"]) == (2, 1, 0)
    assert report["wait_mean_s"] == 0


def test_waits_are_those_of_the_last_grants() -> None:
    metrics = Metrics()
    metrics.sent(Grant(0, "", 0), 1000.0)
    for hundredth in range(10_000):
        metrics.sent(Grant(0, "", 0), hundredth / 100)
    report = metrics.report()
    assert report["grants"] == 10_001
    assert report["wait_mean_s"] == 49.995
    assert report["wait_p99_s"] == 99.0
