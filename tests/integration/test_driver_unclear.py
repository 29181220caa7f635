"""A process of which nobody knows whether the driver has stopped it: real helpers, and a fake driver."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from acb.broker import checkpointing, drivertier
from acb.broker.drivertier import Done, DriverTier
from acb.broker.journal import Journal, Suspended
from acb.devices.cuda import State

UNIT = Path(__file__).resolve().parents[1] / "unit"  # where the fake driver lies
sys.path.insert(0, str(UNIT))
from fake_driver import GIB, A  # noqa: E402

PID = os.getpid()

Make = Callable[..., "Tier"]


class Tier:
    """This process has 3 GiB on a GPU, and the helper dies while it suspends it."""

    def __init__(self, directory: Path, afterwards: list[int], **scenario: Any) -> None:
        self.journal = Journal(directory / "journal")
        self.journal.came(PID)
        scenario = {"kind": "loses", "held": {PID: {A: 3 * GIB}}, "afterwards": afterwards, **scenario}
        environment = {
            "PYTHONPATH": str(UNIT),
            "FAKE_DRIVER": json.dumps(scenario),
            "CRASHED": str(directory / "crashed"),
        }
        self.tier = DriverTier(self.journal, "fake_driver:tier", environment)

    def next(self) -> Done | None:
        """The next answer; None: it waits until it asks again."""
        poller = select.poll()
        poller.register(self.tier, select.POLLIN)
        while not (found := self.tier.done()):
            if self.tier._again:
                return None
            due = self.tier.due()
            assert poller.poll(60_000 if due is None else max(0.0, 1000 * (due - time.monotonic()))) or due is not None
        [answer] = found
        return answer

    def suspend(self) -> Done | None:
        self.tier.suspend(1, PID, 3 * GIB, {A: 3 * GIB})
        return self.next()

    def suspended(self) -> Suspended | None:
        return self.journal.suspended(PID)

    def ask_again(self) -> Done | None:
        """The pause is over."""
        [(_, order, request)] = self.tier._again
        self.tier._again = [(0.0, order, request)]
        assert self.tier.due() == 0.0
        return self.next()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Tier] = []

    def tier(afterwards: list[int], **scenario: Any) -> Tier:
        made.append(Tier(tmp_path, afterwards, **scenario))
        return made[-1]

    yield tier
    for one in made:
        one.tier.close()


def test_it_is_asked_for_until_its_memory_is_on_the_host(make: Make) -> None:
    it = make([State.CHECKPOINTING, State.CHECKPOINTING, State.CHECKPOINTED])
    assert it.suspend() is None
    assert it.suspended() is not None
    assert it.ask_again() is None
    assert it.suspended() is not None
    done = it.ask_again()
    assert done is not None
    assert (done.op, done.problem) == ("suspend", "")
    assert it.suspended() is not None


def test_or_until_it_runs_on(make: Make) -> None:
    it = make([State.CHECKPOINTING, State.LOCKED, State.RUNNING])
    assert it.suspend() is None
    done = it.ask_again()
    assert done is not None
    assert "died" in done.problem
    assert it.suspended() is None


@pytest.mark.parametrize("state", [State.FAILED, State.RUNNING])
def test_one_of_which_that_is_known_is_not_asked_for_again(make: Make, state: int) -> None:
    it = make([state])
    done = it.suspend()
    assert done is not None
    assert "died" in done.problem
    assert it.suspended() is None


def test_one_that_cannot_be_let_go_yet_stays_in_the_journal(make: Make) -> None:
    it = make([State.LOCKED, State.LOCKED, State.LOCKED, State.LOCKED, State.RUNNING], fails={"unlock": 999})
    assert it.suspend() is None
    assert it.ask_again() is None
    assert it.suspended() is not None
    done = it.ask_again()
    assert done is not None
    assert "died" in done.problem
    assert it.suspended() is None


def test_one_that_was_left_locked_although_the_driver_cannot_move_it_is_let_go(make: Make) -> None:
    """The first answer says that it is not supported, and yet the process is stopped."""
    it = make([], kind="", fails={"checkpoint": 801, "unlock": 999})
    assert it.suspend() is None
    assert it.suspended() is not None


def test_the_pauses_grow(make: Make) -> None:
    it = make([State.CHECKPOINTING])
    assert it.suspend() is None
    pauses = []
    for _ in range(4):
        [(due, _, _)] = it.tier._again
        pauses.append(due - time.monotonic())
        assert it.ask_again() is None
    assert pauses == sorted(pauses)


def test_it_is_asked_for_and_brought_back_although_no_helper_was_to_be_started_any_more(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "DEATHS", 1)
    monkeypatch.setattr(drivertier, "REVIVAL", 0.0)
    it = make([State.CHECKPOINTED])
    assert it.suspend() is None
    assert "has died" in it.tier.unavailable
    done = it.ask_again()
    assert done is not None
    assert done.problem == ""
    it.tier.suspend(2, os.getppid(), GIB, {A: GIB})  # but nobody else is suspended any more
    refused = it.next()
    assert refused is not None
    assert "has died" in refused.problem
    it.tier.resume(1, PID)
    back = it.next()
    assert back is not None
    assert (back.op, back.problem) == ("resume", "")


@pytest.mark.parametrize(
    ("states", "problem"),
    [([State.CHECKPOINTED], ""), ([State.CHECKPOINTING, State.CHECKPOINTED], ""), ([State.RUNNING], "not suspended")],
)
def test_what_a_broker_before_has_noted_is_asked_for(
    make: Make, tmp_path: Path, states: list[int], problem: str
) -> None:
    (tmp_path / "crashed").touch()
    it = make(states)
    note = Suspended(3 * GIB, {A: 3 * GIB})
    it.journal.suspends(PID, note)
    it.tier.find(1, PID)
    done = it.next()
    if len(states) > 1:
        assert done is None
        done = it.ask_again()
    assert done is not None
    assert done.op == "find"
    assert problem in done.problem
    assert bool(done.problem) == bool(problem)
    assert it.suspended() == (None if problem else note)


def test_one_that_may_have_come_back_elsewhere_is_noted_until_it_has_heard_of_it(make: Make, tmp_path: Path) -> None:
    (tmp_path / "crashed").touch()
    it = make([State.RUNNING])
    note = Suspended(3 * GIB, {A: 3 * GIB}, "GPU-b")
    it.journal.suspends(PID, note)
    it.tier.find(1, PID)
    done = it.next()
    assert done is not None
    assert done.problem
    assert it.suspended() == note


def test_a_restore_that_kills_the_helper_leaves_what_is_on_the_host_there(make: Make) -> None:
    it = make([], kind="crashes at restore")
    it.journal.suspends(PID, Suspended(3 * GIB, {A: 3 * GIB}))
    it.tier.resume(1, PID)
    done = it.next()
    assert done is not None
    assert "died" in done.problem
    assert (done.kept, done.lost) == (True, False)


def test_one_that_cannot_even_be_asked_for_is_where_it_was(make: Make) -> None:
    it = make([], kind="", fails={"state": 999})
    it.journal.suspends(PID, Suspended(3 * GIB, {A: 3 * GIB}, "GPU-b"))
    it.tier.resume(1, PID)
    done = it.next()
    assert done is not None
    assert (done.kept, done.lost) == (True, False)
    assert "CUDA_ERROR_UNKNOWN" in done.problem
    assert "safe on the host" in done.problem
    assert it.suspended() == Suspended(3 * GIB, {A: 3 * GIB}), "it is not on another GPU either"


def test_one_that_the_driver_does_not_know_any_more_has_lost_its_memory(make: Make) -> None:
    it = make([], kind="", fails={"state": 1})
    it.journal.suspends(PID, Suspended(3 * GIB, {A: 3 * GIB}))
    it.tier.resume(1, PID)
    done = it.next()
    assert done is not None
    assert (done.kept, done.lost) == (False, True)
    assert f"knows no CUDA process {PID}" in done.problem


@pytest.mark.parametrize("kind", ["silent after restore", "fails at restore"])
def test_after_a_restore_was_begun_silence_means_nothing(
    make: Make, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    it = make([], kind=kind)
    it.journal.suspends(PID, Suspended(3 * GIB, {A: 3 * GIB}))
    for _ in range(2):  # the second attempt does not get so far, and yet it is not known to be where it was
        it.tier.resume(1, PID)
        done = it.next()
        assert done is not None
        assert done.problem
        assert (done.kept, done.lost, done.unclear) == (False, False, False)
    it.tier.find(1, PID, moved=True)
    assert it.next() is None
    for _ in range(drivertier.SILENCE - 1):
        assert it.ask_again() is None
    done = it.ask_again()
    assert done is not None
    assert (done.op, done.unclear) == ("find", True)
    assert f"kill -9 {PID}" in capfd.readouterr().err
    assert it.ask_again() is None, "it is said once, and asked for all the same"
    assert it.suspended() is not None


@pytest.mark.parametrize(
    ("scenario", "moved", "lost"),
    [
        ({"fails": {"state": 1}}, True, True),
        ({"fails": {"state": 1}}, False, False),
        ({"kind": "loses"}, False, True),
    ],
    ids=["unknown, and was suspended", "unknown, and may not have been", "failed"],
)
def test_one_that_is_asked_for_may_be_found_lost(
    make: Make, tmp_path: Path, scenario: dict[str, Any], moved: bool, lost: bool
) -> None:
    (tmp_path / "crashed").touch()
    it = make([State.FAILED], **{"kind": "", **scenario})
    it.journal.suspends(PID, Suspended(3 * GIB, {A: 3 * GIB}))
    it.tier.find(1, PID, moved=moved)
    done = it.next()
    assert done is not None
    assert (bool(done.problem), done.lost) == (True, lost)
