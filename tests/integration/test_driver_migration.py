"""The server's end of the driver tier takes a process to another GPU: a real helper process, and a fake driver."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from acb.broker.drivertier import Done, DriverTier
from acb.broker.journal import Journal, Suspended
from acb.cli.gpu_assigner.pool import Pool
from acb.devices.rooms import CONTEXT

UNIT = Path(__file__).resolve().parents[1] / "unit"  # where the fake driver lies
sys.path.insert(0, str(UNIT))
from fake_driver import GIB, A, B  # noqa: E402

PID = os.getpid()

Make = Callable[..., "Tier"]


class Tier:
    """This process has 3 GiB on the GPU A, as far as the driver knows."""

    def __init__(self, directory: Path, **scenario: Any) -> None:
        scenario.setdefault("held", {PID: {A: 3 * GIB}})
        self.path = directory / "journal"
        self.journal = Journal(self.path)
        self.journal.came(PID)
        environment = {
            "PYTHONPATH": str(UNIT),
            "FAKE_DRIVER": json.dumps(scenario),
            "CRASHED": str(directory / "crashed"),
        }
        self.tier = DriverTier(self.journal, "fake_driver:tier", environment, migrates=True)

    def done(self) -> Done:
        """The next answer."""
        poller = select.poll()
        poller.register(self.tier, select.POLLIN)
        while not (found := self.tier.done()):
            assert poller.poll(60_000)
        [answer] = found
        return answer

    def suspend(self) -> Done:
        self.tier.suspend(1, PID, 3 * GIB, {A: 3 * GIB})
        return self.done()

    def resume(self, source: str = "", target: str = "") -> Done:
        self.tier.resume(1, PID, source, target)
        return self.done()

    def written(self) -> Suspended | None:
        """What the next broker will read."""
        journal = Journal(self.path)
        assert journal.read()
        return journal.suspended(PID)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Tier] = []

    def tier(**scenario: Any) -> Tier:
        made.append(Tier(tmp_path, **scenario))
        return made[-1]

    yield tier
    for one in made:
        one.tier.close()


def test_it_comes_back_on_the_other_gpu_and_is_suspended_there_next_time(make: Make) -> None:
    it = make()
    assert it.suspend().problem == ""
    assert it.written() == Suspended(3 * GIB, {A: 3 * GIB})
    assert it.resume(A, B)[:3] == (1, "resume", "")
    assert it.written() is None
    assert it.suspend().problem == ""
    assert it.written() == Suspended(3 * GIB, {B: 3 * GIB})
    assert it.resume(B, A).problem == ""
    assert it.suspend().problem == ""
    assert it.written() == Suspended(3 * GIB, {A: 3 * GIB})


def test_the_target_is_in_the_journal_before_the_driver_is_asked(make: Make) -> None:
    it = make()
    it.suspend()
    it.tier.resume(1, PID, A, B)
    assert it.written() == Suspended(3 * GIB, {A: 3 * GIB}, B)
    assert it.done().problem == ""


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ({"others": {B: 79 * GIB}}, "are free"),
        ({"fails": {"restore": 2}}, "safe on the host"),
        ({"cuda": 12080}, "580"),
    ],
    ids=["a stranger has the room", "the driver cannot", "an older driver"],
)
def test_one_that_is_on_the_host_still_may_come_back_anywhere(make: Make, scenario: dict[str, Any], words: str) -> None:
    it = make(**scenario)
    it.suspend()
    answer = it.resume(A, B)
    assert words in answer.problem
    assert (answer.kept, answer.lost) == (True, False)
    assert it.written() == Suspended(3 * GIB, {A: 3 * GIB})
    if "fails" not in scenario:
        assert it.resume().problem == ""


def test_one_of_which_nobody_knows_is_still_on_its_way(make: Make) -> None:
    it = make(kind="crashes once")
    it.suspend()
    answer = it.resume(A, B)
    assert "is not known" in answer.problem
    assert (answer.kept, answer.lost) == (False, False)
    assert it.written() == Suspended(3 * GIB, {A: 3 * GIB}, B)
    assert json.loads((it.path.parent / "crashed").read_text()) == [[A, B]]
    assert it.resume(A, B).problem == ""  # it was there already, and only locked
    assert it.written() is None


def test_where_nvml_does_not_know_it_what_the_broker_counts_and_a_context_is_needed(make: Make) -> None:
    it = make(knows_pids=False, others={A: 78 * GIB - GIB})
    it.suspend()
    assert it.written() == Suspended(3 * GIB, {A: 3 * GIB + CONTEXT})
    assert "4GiB" in it.resume().problem


def test_a_journal_of_before_has_no_target(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text(json.dumps({"options": {}, "clients": {}, "suspended": {"7": [5, {A: 5}], "8": [6, {A: 6}, B]}}))
    journal = Journal(path)
    assert journal.read()
    assert journal.suspended(7) == Suspended(5, {A: 5})
    assert journal.suspended(8) == Suspended(6, {A: 6}, B)


@pytest.mark.parametrize(
    ("version", "migrates"),
    [("580.95.05", True), ("610.1", True), ("575.57.08", False), (None, False)],
)
def test_only_a_driver_of_580_or_later_is_asked_to(tmp_path: Path, version: str | None, migrates: bool) -> None:
    tier = Pool([], "", driver_version=version).driver_tier("on", Journal(tmp_path / "journal"))
    assert tier is not None
    assert tier.migrates is migrates
    tier.close()
