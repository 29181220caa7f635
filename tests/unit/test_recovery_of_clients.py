"""Recovery: for which clients of the broker before a new one waits, by what the journal and the device know of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from acb.broker.core import Broker, Gpu
from acb.broker.journal import Journal, Place, Suspended
from acb.broker.policies import POLICIES
from acb.broker.recovery import PATIENCE, Recovery

CAPACITY = 1000


class Next:
    """A new broker of GPU-a and GPU-b, after one whose only client was a process that lives."""

    def __init__(self, path: Path, child: subprocess.Popen[bytes]) -> None:
        self.child = child
        self.journal = Journal(path)
        self.journal.begin({})
        self.journal.came(child.pid)
        self.held: dict[str, int | None] = {}
        self.finds: list[tuple[int, int]] = []

    def begin(self, pool: str = "", *, driver: bool = False) -> None:
        self.core = Broker([Gpu(n, CAPACITY, f"GPU-{name}") for n, name in enumerate("ab")], POLICIES["fifo"]())
        self.core.driver_tier(driver, 0.0)
        self.recovery = Recovery(
            self.core, self.journal, pool, lambda gpu, pid: self.held.get(gpu.visible, 0), lambda: 1, driver=driver
        )
        self.recovery.begin(0.0)

    def look(self, now: float) -> None:
        self.recovery.look(now, lambda sends: None, lambda client, pid: self.finds.append((client, pid)))
        self.core.check()


@pytest.fixture
def next_broker(tmp_path: Path) -> Iterator[Next]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield Next(tmp_path / "broker.journal", child)
        child.communicate(b"\n")


def test_nobody_waits_for_who_has_had_no_lease_or_holds_nothing_or_elsewhere(next_broker: Next) -> None:
    pid = next_broker.child.pid
    next_broker.begin()
    assert next_broker.recovery.due() is None
    next_broker.journal.bound(pid, Place(["GPU-a"]))
    next_broker.begin()
    assert not next_broker.core.recovering
    for place, pool in ((Place(["GPU-c"]), ""), (Place(["GPU-a"], pool="/cards"), "/others"), (Place(["GPU-a"]), "/x")):
        next_broker.held = {"GPU-a": 300}
        next_broker.journal.bound(pid, place)
        next_broker.journal.held_by({pid})
        next_broker.begin(pool)
        assert not next_broker.core.recovering
        assert next_broker.recovery.silent_holders() == {pid}  # for a broker to come that has its GPU


@pytest.mark.parametrize("nbytes", [300, None])
def test_memory_counts_where_the_device_says_and_all_where_it_does_not(next_broker: Next, nbytes: int | None) -> None:
    pid = next_broker.child.pid
    next_broker.held = {"GPU-b": nbytes}
    next_broker.journal.bound(pid, Place(["GPU-b"], "train"))
    next_broker.begin()
    assert next_broker.core.recovering == {pid}
    next_broker.look(PATIENCE - 0.1)
    assert next_broker.core.recovering == {pid}
    next_broker.look(PATIENCE)
    assert not next_broker.core.recovering
    client = next_broker.core.clients[1]
    assert (client.name, client.state, client.gpu) == ("train", "resident", 1)
    assert [gpu.in_use for gpu in next_broker.core.gpus] == [0, nbytes or CAPACITY]
    next_broker.recovery.spoke(pid)
    assert next_broker.recovery.due() is None


def test_a_holder_of_several_gpus_keeps_all(next_broker: Next) -> None:
    next_broker.journal.bound(next_broker.child.pid, Place(["GPU-a", "GPU-b"]))
    next_broker.journal.held_by({next_broker.child.pid})
    next_broker.begin()
    next_broker.look(PATIENCE)
    assert all(gpu.full for gpu in next_broker.core.gpus)
    next_broker.child.kill()
    os.waitid(os.P_PID, next_broker.child.pid, os.WEXITED | os.WNOWAIT)
    next_broker.look(PATIENCE + 1)
    assert not next_broker.core.clients
    assert not any(gpu.units for gpu in next_broker.core.gpus)


def test_the_driver_is_asked_for_what_it_may_have(next_broker: Next) -> None:
    pid = next_broker.child.pid
    next_broker.journal.bound(pid, Place(["GPU-a"]))
    next_broker.journal.held_by({pid})  # it was just to be brought back
    next_broker.journal.suspends(pid, Suspended(600, {"GPU-a": 700}))
    next_broker.begin(driver=True)
    next_broker.look(PATIENCE)
    assert next_broker.finds == [(1, pid)]
    client = next_broker.core.clients[1]
    assert (client.lease, client.resident) == (False, 600)  # until it has said
    next_broker.core.suspended(1, "", 0.0, PATIENCE + 1)
    next_broker.core.check()
    assert (client.state, client.resident, client.evacuated) == ("evacuated", 0, 600)
