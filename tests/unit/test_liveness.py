"""Which silent clients are taken to be blocked in the driver: over a clock and a /proc of the test's own."""

from __future__ import annotations

import pytest

from acb.broker.learning import Profile
from acb.broker.liveness import EVERY, SILENCE, Liveness
from acb.broker.state import Client
from acb.processes import Activity

PID = 101
NOTHING = ([], [])


class Watched:
    """A suspended client whose process is at what the test says, and the broker that looks at it every second."""

    def __init__(self) -> None:
        self.client = Client(1, PID, "program", Profile(), suspended=True)
        self.clients = {1: self.client}
        self.activity: Activity | None = Activity(False, False, 5.0)
        self.liveness = Liveness(lambda pid: self.activity if pid == PID else None)
        self.now = 100.0

    def look(self) -> tuple[list[int], list[int]]:
        due = self.liveness.due(self.clients)
        assert due is not None
        self.now = max(self.now, due)
        return self.liveness.look(self.clients, self.now)

    def uses(self, seconds: float) -> None:
        assert self.activity is not None
        self.activity = self.activity._replace(seconds=self.activity.seconds + seconds)

    def looks_until_blocked(self) -> int:
        for count in range(1, 20):
            if self.look().blocked:
                return count
        return 0


@pytest.fixture
def it() -> Watched:
    return Watched()


def test_who_answers_is_asked_again_and_never_blocked(it: Watched) -> None:
    for _ in range(10):
        assert it.look() == ([1], [])
        it.liveness.answered(1)


def test_who_is_silent_and_does_nothing_is_blocked_after_a_while(it: Watched) -> None:
    assert it.look() == ([1], [])
    assert it.looks_until_blocked() == int(SILENCE / EVERY)


def test_it_is_asked_once_for_it_reads_nothing(it: Watched) -> None:
    assert it.look() == ([1], [])
    assert [it.look().ping for _ in range(10)] == [[]] * 10


def test_a_thread_that_waits_for_the_interpreter_uses_a_little(it: Watched) -> None:
    it.look()
    for _ in range(int(SILENCE / EVERY) - 1):
        it.uses(0.01)
        assert it.look() == NOTHING
    it.uses(0.01)
    assert it.look() == ([], [1])


def test_who_computes_is_not_blocked_before_it_stops(it: Watched) -> None:
    it.look()
    for _ in range(10):
        it.uses(0.9)
        assert it.look() == NOTHING
    assert it.looks_until_blocked() == int(SILENCE / EVERY)


@pytest.mark.parametrize(
    "activity",
    [Activity(True, False, 5.0), Activity(False, True, 5.0), None],
    ids=["stopped", "waits for a CPU", "of another pid namespace"],
)
def test_who_cannot_run_or_cannot_be_seen_is_not_blocked(it: Watched, activity: Activity | None) -> None:
    it.look()
    it.activity = activity
    assert it.looks_until_blocked() == 0
    it.activity = Activity(False, False, 5.0)
    assert it.looks_until_blocked() > 0


def test_nobody_is_looked_at_who_waits_already_or_runs_or_is_lost(it: Watched) -> None:
    it.look()
    for name, value in (("waiting", True), ("lease", True), ("refusal", "its memory is lost"), ("suspended", False)):
        before = getattr(it.client, name)
        setattr(it.client, name, value)
        assert it.liveness.due(it.clients) is None
        assert it.liveness.look(it.clients, it.now + 100) == NOTHING
        setattr(it.client, name, before)
    assert it.look() == ([1], [])  # from the beginning


def test_an_answer_of_somebody_else_is_no_answer(it: Watched) -> None:
    it.look()
    it.liveness.answered(2)
    assert it.looks_until_blocked() > 0
