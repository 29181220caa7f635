"""The gate: nothing runs inside while it is closed and was seen empty; who waits comes in when it opens."""

from __future__ import annotations

import gc
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from acb.client.gate import Gate

PATIENCE = 20


class Asked:
    """What a gate calls: counts, and raises when told to."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.idle = 0
        self.refuse: Exception | None = None

    def ask(self) -> None:
        self.asked.release()
        if self.refuse is not None:
            raise self.refuse

    def note_idle(self) -> None:
        self.idle += 1

    def wait(self) -> None:
        assert self.asked.acquire(timeout=PATIENCE)


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def gate(asked: Asked) -> Gate:
    return Gate(asked.ask, asked.note_idle)


class Worker:
    """A thread that does what it is told, one thing after the other."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                self._results.put((task(), None))
            except BaseException as error:
                self._results.put((None, error))

    def begin(self, task: Callable[[], Any]) -> None:
        self._tasks.put(task)

    def end(self) -> Any:
        result, error = self._results.get(timeout=PATIENCE)
        if error is not None:
            raise error
        return result

    def do(self, task: Callable[[], Any]) -> Any:
        self.begin(task)
        return self.end()

    def busy(self) -> bool:
        return self._results.empty()

    def stop(self) -> None:
        self._tasks.put(None)
        self._thread.join(PATIENCE)


@pytest.fixture
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.stop()


def test_it_is_closed_at_first(gate: Gate) -> None:
    assert gate.closed
    assert not gate.busy()
    assert not gate.inside()


def test_an_open_gate_lets_in_and_counts(gate: Gate, asked: Asked, worker: Worker) -> None:
    gate.open()
    gate.enter()
    assert gate.inside()
    assert gate.busy()
    assert not worker.do(gate.inside)
    worker.do(gate.enter)
    gate.exit()
    assert gate.busy()
    worker.do(gate.exit)
    assert not gate.busy()
    assert asked.idle == 0
    assert not asked.asked.acquire(blocking=False)


def test_regions_nest_also_when_the_gate_closes_meanwhile(gate: Gate) -> None:
    gate.open()
    gate.enter()
    gate.close()
    gate.enter()
    gate.enter()
    gate.exit()
    gate.exit()
    assert gate.busy()
    gate.exit()
    assert not gate.busy()


def test_a_closed_gate_asks_once_and_blocks_until_it_opens(gate: Gate, asked: Asked, worker: Worker) -> None:
    worker.begin(gate.enter)
    asked.wait()
    assert worker.busy()
    assert not gate.busy()
    gate.open()
    worker.end()
    assert gate.busy()
    worker.do(gate.exit)


def test_all_who_wait_come_in(gate: Gate, asked: Asked) -> None:
    workers = [Worker() for _ in range(8)]
    for one in workers:
        one.begin(gate.enter)
    for _ in workers:
        asked.wait()
    gate.open()
    for one in workers:
        one.end()
        one.do(gate.exit)
        one.stop()


def test_a_refusal_reaches_who_waits_and_leaves_no_trace(gate: Gate, asked: Asked, worker: Worker) -> None:
    worker.begin(gate.enter)
    asked.wait()
    asked.refuse = PermissionError("never")
    gate.refuse()
    with pytest.raises(PermissionError):
        worker.end()
    assert not gate.busy()
    asked.refuse = None
    gate.open()
    assert not gate.expected()
    worker.do(gate.enter)
    worker.do(gate.exit)


def test_an_interrupt_while_waiting_leaves_no_trace(gate: Gate) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    gate._ask = interrupt
    with pytest.raises(KeyboardInterrupt):
        gate.enter()
    assert not gate.busy()
    assert not gate.inside()
    gate.open()
    assert not gate.expected()


def test_idle_is_told_of_every_watched_end_of_a_region(gate: Gate, asked: Asked) -> None:
    gate.open(watched=True)
    for _ in range(3):
        gate.enter()
        gate.enter()
        gate.exit()
        gate.exit()
    assert asked.idle == 3
    gate.open()
    gate.enter()
    gate.watch()
    gate.exit()
    assert asked.idle == 4
    gate.close()
    assert gate.watched


def test_marks_tell_what_the_last_thread_does(gate: Gate, asked: Asked, worker: Worker) -> None:
    assert not gate.marked()
    gate.open(watched=True)
    worker.do(gate.mark)
    assert not gate.marked()  # it has never used the GPU
    gate.enter()
    gate.exit()
    gate.mark()
    gate.mark()
    assert gate.marked()
    gate.unmark()
    assert gate.marked()
    gate.unmark()
    assert not gate.marked()
    gate.mark()
    worker.do(gate.enter)
    worker.do(gate.exit)
    assert gate.marked()  # the worker was the last one, and is still marked
    worker.do(gate.unmark)
    assert not gate.marked()
    gate.unmark()


def test_a_mark_inside_a_region_waits_for_its_end(gate: Gate, asked: Asked) -> None:
    gate.open(watched=True)
    gate.enter()
    gate.mark()
    assert asked.idle == 0
    gate.unmark()
    gate.exit()
    assert asked.idle == 1


def test_gaps_between_regions_are_remembered_but_not_waits_for_the_lease(gate: Gate) -> None:
    gate.open()
    for _ in range(100):
        gate.enter()
        gate.exit()
    assert all(gap > 0.0005 for gap in gate.gaps)  # what comes at once is part of computing
    gate.gaps.clear()
    gate.last_exit -= 5.0
    gate.enter()
    gate.exit()
    assert [round(gap) for gap in gate.gaps] == [5]
    gate.close()
    gate.last_exit -= 5.0
    gate.open()
    gate.enter()
    assert len(gate.gaps) <= 2
    assert max(gate.gaps) < 6
    gate.exit()


def test_a_thread_that_is_expected_is_known(gate: Gate, asked: Asked, worker: Worker) -> None:
    worker.begin(gate.enter)
    asked.wait()
    assert not gate.expected()  # while it is closed nobody is
    gate.open()
    worker.end()
    assert not gate.expected()
    worker.do(gate.exit)


class Listener:
    def __init__(self, gate: Gate) -> None:
        self.heard: list[tuple[str, bool, bool]] = []
        self._gate = gate

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: self.heard.append((name, self._gate.closed, self._gate.watched))


def test_listeners_hear_every_change_and_before_anybody_is_let_in(gate: Gate) -> None:
    listener = Listener(gate)
    gate.add_listener(listener)
    gate.open(watched=True)
    gate.open()
    gate.watch()
    gate.close()
    assert listener.heard == [
        ("close", True, False),
        ("watch", True, True),  # still closed: who comes now must be counted already
        ("open", False, False),
        ("watch", False, True),
        ("close", True, True),
    ]
    late = Listener(gate)
    gate.open(watched=True)
    gate.add_listener(late)
    assert late.heard == [("watch", False, True)]
    gate.open()
    never = Listener(gate)
    gate.add_listener(never)
    assert never.heard == []


def test_a_listener_that_raises_is_left_out(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    class Bad:
        def __getattr__(self, name: str) -> Callable[[], None]:
            def fail() -> None:
                raise ZeroDivisionError

            return fail

    good = Listener(gate)
    gate.add_listener(Bad())
    gate.add_listener(good)
    gate.open()
    gate.close()
    assert [name for name, _, _ in good.heard] == ["close", "open", "close"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "Bad does not work" in captured.err


def test_a_thread_that_dies_inside_is_not_inside_any_more(gate: Gate, asked: Asked) -> None:
    gate.open(watched=True)
    thread = threading.Thread(target=gate.enter)
    thread.start()
    thread.join()
    gc.collect()
    assert not gate.busy()
    assert asked.idle == 1  # whoever waits for the region's end hears of it


def test_states_of_dead_threads_are_forgotten(gate: Gate) -> None:
    gate.open()
    for _ in range(50):
        thread = threading.Thread(target=lambda: (gate.enter(), gate.exit()))
        thread.start()
        thread.join()
    gate.enter()
    gate.exit()
    assert len(gate._states) < 5


def test_nobody_is_lost_when_two_threads_come_at_once(gate: Gate, worker: Worker) -> None:
    """The list of threads is pruned when one joins: another that joins at that very moment must stay in it."""
    gate.open()
    entered = threading.Event()

    def other() -> None:
        gate.enter()
        entered.set()

    class Reference:
        """Of a dead thread; who looks at it gives the other thread the time to come, if it can."""

        looked = False

        def __call__(self) -> None:
            if not self.looked:
                self.looked = True
                worker.begin(other)
                entered.wait(0.1)

    gate._states.append(Reference())  # type: ignore[arg-type]
    joining = threading.Thread(target=lambda: (gate.enter(), gate.exit()))
    joining.start()
    joining.join()
    worker.end()
    assert gate.busy()
    worker.do(gate.exit)
    assert not gate.busy()


def interrupted(run: Callable[[], object], at: int, agent: Callable[[], None]) -> bool:
    """Call `run()`, with `agent()` between its instructions number `at` and the next one; whether it has so many."""
    left = at
    codes = [function.__code__ for function in (Gate.enter, Gate._wait, Gate.exit)]  # what the program's threads run

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code not in codes:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == -1:
                sys.settrace(None)
                agent()
                sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return left < 0


class Interleaving:
    """A gate that lets in, or refuses at the second question, and an agent that closes it at some moment."""

    def __init__(self, waits: bool) -> None:
        self.gate = Gate(self.ask, self.idle)
        self.questions = 1 if waits else 0
        self.safe = False
        self.idle_seen: list[bool] = []
        if not waits:
            self.gate.open(watched=True)

    def ask(self) -> None:
        self.questions -= 1
        if self.questions < 0:
            raise PermissionError
        self.safe = False
        self.gate.open()

    def idle(self) -> None:
        self.idle_seen.append(self.gate.busy())

    def close(self) -> None:
        self.gate.close()
        self.safe = not self.gate.busy()
        self.gate.refuse()  # let whoever waits ask again at once


@pytest.mark.parametrize("waits", [False, True], ids=["through the open gate", "after waiting"])
def test_whoever_gets_in_is_seen_wherever_the_agent_comes_in_between(waits: bool) -> None:
    """The handshake: the gate may be closed, and looked at, between any two instructions of a thread that enters."""
    outcomes = []
    while True:
        case = Interleaving(waits)
        try:
            if not interrupted(case.gate.enter, len(outcomes), case.close):
                break
            entered = True
        except PermissionError:
            entered = False
        assert not (entered and case.safe), f"it is in, and was not seen, at instruction {len(outcomes)}"
        assert case.gate.busy() == entered
        outcomes.append((entered, case.safe))
    assert len(outcomes) > 10
    assert set(outcomes) >= {(True, False), (False, True)}


def test_whoever_is_in_is_seen_until_it_leaves_wherever_the_agent_looks() -> None:
    seen: list[bool] = []
    while True:
        case = Interleaving(waits=False)
        case.gate.enter()
        before = len(seen)
        if not interrupted(case.gate.exit, before, lambda case=case: seen.append(case.gate.busy())):  # type: ignore[misc]
            break
        assert case.idle_seen == [False]  # it says so when it is out, so that nobody waits for ever
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {True, False}


def test_nothing_is_inside_while_it_is_closed_and_was_seen_empty() -> None:
    """The handshake, under as many switches between threads as the interpreter makes."""
    safe = False
    broken: list[str] = []
    stop = False
    regions = 0

    def program(seed: int) -> None:
        nonlocal regions
        dice = random.Random(seed)
        while not stop:
            gate.enter()
            try:
                if safe:
                    broken.append("a region begins at a safe point")
                for _ in range(dice.randrange(4)):
                    gate.enter()
                    gate.exit()
                if safe:
                    broken.append("a region goes on at a safe point")
                regions += 1
            finally:
                gate.exit()

    gate = Gate(lambda: None, lambda: None)
    threads = [threading.Thread(target=program, args=(seed,)) for seed in range(6)]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    closings = 0
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + PATIENCE
        while closings < 100 and time.monotonic() < deadline:
            gate.open(watched=closings % 2 == 0)
            before = regions
            while regions < before + 5 and time.monotonic() < deadline:
                time.sleep(0)
            gate.close()
            while gate.busy() and time.monotonic() < deadline:
                time.sleep(0)
            safe = True
            for _ in range(20):
                time.sleep(0)
            safe = False
            closings += 1
    finally:
        stop = True
        sys.setswitchinterval(switch)
        gate.open()
        for thread in threads:
            thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert broken == []
    assert closings == 100


class Model(RuleBasedStateMachine):
    """Any sequence of what a program's thread and the agent may do, against a model of what must follow."""

    @initialize()
    def begin(self) -> None:
        self.gate = Gate(self.refuse, lambda: None)
        self.open = False
        self.depth = 0

    def refuse(self) -> None:
        raise PermissionError

    @rule()
    def enter(self) -> None:
        if self.open or self.depth:
            self.gate.enter()
            self.depth += 1
        else:
            with pytest.raises(PermissionError):
                self.gate.enter()

    @precondition(lambda self: self.depth)
    @rule()
    def leave(self) -> None:
        self.gate.exit()
        self.depth -= 1

    @rule()
    def close(self) -> None:
        self.gate.close()
        self.open = False

    @rule()
    def open_up(self) -> None:
        self.gate.open()
        self.open = True

    @rule()
    def watch(self) -> None:
        self.gate.watch()

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "gate"):
            assert self.gate.busy() == self.gate.inside() == (self.depth > 0)
            assert self.gate.closed == (not self.open)
            assert not self.gate.expected()


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestModel = Model.TestCase
