"""The simulated driver takes a process from one simulated card to another, and the process finds out by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from acb.config import SimulatedSpec
from acb.devices.cuda import CudaError, Result, State
from acb.devices.simulated import Card, CardOutOfMemory, create_cards
from acb.devices.simulated_driver import SimulatedDriver

MIB = 1 << 20
PID = os.getpid()


class Machine:
    """Three cards, the third one larger. This process has 40 MiB on the first."""

    def __init__(self, directory: Path) -> None:
        create_cards(directory, SimulatedSpec((100 * MIB, 100 * MIB, 200 * MIB)))
        self.directory = directory
        self.card = self.open(0)
        self.card.allocate(40 * MIB)
        self.driver = SimulatedDriver(directory)

    def open(self, ordinal: int) -> Card:
        return Card.open(self.directory, ordinal)

    def checkpoint(self, pid: int = PID) -> None:
        self.driver.lock(pid, 1000)
        self.driver.checkpoint(pid)

    def move(self, *pairs: tuple[str, str], pid: int = PID) -> None:
        self.checkpoint(pid)
        self.driver.restore(pid, pairs)
        self.driver.unlock(pid)

    def used(self) -> list[int]:
        """By card, as somebody else sees it."""
        return [self.driver._cards[str(ordinal)].used() for ordinal in range(3)]


@pytest.fixture
def it(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_its_memory_counts_there_at_once_and_the_process_follows(it: Machine) -> None:
    it.move(("0", "1"))
    assert it.used() == [0, 40 * MIB, 0]
    assert it.driver.state(PID) == State.RUNNING
    it.card.allocate(20 * MIB)
    assert (it.card.ordinal, it.card.held()) == (1, 60 * MIB)
    assert it.used() == [0, 60 * MIB, 0]
    it.card.free(60 * MIB)
    assert it.used() == [0, 0, 0]


def test_and_back_again_before_the_process_has_noticed(it: Machine) -> None:
    it.move(("0", "1"))
    it.move(("1", "0"))
    assert it.used() == [40 * MIB, 0, 0]
    it.card.free(10 * MIB)
    assert (it.card.held(), it.card.ordinal) == (30 * MIB, 0)
    assert it.used() == [30 * MIB, 0, 0]


def test_two_cards_change_places(it: Machine) -> None:
    other = it.open(1)
    other.allocate(10 * MIB)
    it.move(("0", "1"), ("1", "0"))
    assert it.used() == [10 * MIB, 40 * MIB, 0]
    assert (it.card.held(), other.held()) == (40 * MIB, 10 * MIB)
    assert (it.card.ordinal, other.ordinal) == (1, 0)
    assert it.used() == [10 * MIB, 40 * MIB, 0]


def test_what_was_freed_before_it_noticed_is_free_there(it: Machine) -> None:
    it.move(("0", "1"))
    it.card.free(30 * MIB)
    assert it.card.held() == 10 * MIB
    assert it.used() == [0, 10 * MIB, 0]


def test_the_referee_of_the_new_card_looks_at_it(it: Machine) -> None:
    it.driver._cards["0"].set_holders([PID])
    it.driver._cards["1"].set_holders([])
    with it.card.operation("before"):
        pass
    it.move(("0", "1"))
    with it.card.operation("too soon"):
        pass
    it.driver._cards["1"].set_holders([PID])
    with it.card.operation("after"):
        pass
    assert [v.operation for v in it.driver._cards["1"].violations()] == ["too soon"]
    assert it.driver._cards["0"].violations() == []


def test_a_thread_that_is_stopped_goes_on_there(it: Machine) -> None:
    it.checkpoint()
    seen: list[int] = []

    def operate() -> None:
        with it.card.operation("stopped"):
            seen.append(it.card.ordinal)

    threads = [threading.Thread(target=operate) for _ in range(4)]
    for thread in threads:
        thread.start()
    it.driver.restore(PID, [("0", "1")])
    assert seen == []  # it is locked still
    it.driver.unlock(PID)
    for thread in threads:
        thread.join()
    assert seen == [1] * 4
    assert it.driver._cards["1"].processes() == [(PID, 40 * MIB)]


def test_another_view_of_the_new_card_does_not_take_it_for_a_leftover(it: Machine) -> None:
    it.move(("0", "1"))
    other = it.open(1)
    other.allocate(5 * MIB)
    assert it.used() == [0, 45 * MIB, 0]
    assert it.card.held() == 40 * MIB


@pytest.mark.parametrize(
    ("target", "code"), [("1", Result.OUT_OF_MEMORY), ("2", Result.INVALID_VALUE)], ids=["full", "of another size"]
)
def test_where_it_cannot_go_it_stays_checkpointed(it: Machine, target: str, code: int) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        card = it.driver._cards["1"]
        slot = card._file.adopt(stranger.pid)
        card._words[card_held(slot)] = 70 * MIB
        it.checkpoint()
        with pytest.raises(CudaError) as raised:
            it.driver.restore(PID, [("0", target)])
        assert raised.value.code == code
        assert it.driver.state(PID) == State.CHECKPOINTED
        it.driver.restore(PID)
        it.driver.unlock(PID)
        assert it.card.held() == 40 * MIB
        assert it.used() == [40 * MIB, 70 * MIB, 0]
        with pytest.raises(CardOutOfMemory):
            it.card.allocate(70 * MIB)
        stranger.kill()


def card_held(slot: int) -> int:
    from acb.devices import simulated_file

    return simulated_file.HELD + slot


def test_a_process_that_is_killed_before_it_noticed_leaves_nothing(it: Machine) -> None:
    code = "import sys\nfrom acb.devices.simulated import *\ncard = Card.open(sys.argv[1])\ncard.allocate(30 << 20)\n"
    command = [sys.executable, "-c", code + "print(flush=True)\ninput()", str(it.directory / "gpu0.card")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        it.move(("0", "1"), pid=process.pid)
        assert it.used() == [40 * MIB, 30 * MIB, 0]
        process.kill()
    assert it.used() == [40 * MIB, 0, 0]
    assert it.driver._cards["0"].processes() == [(PID, 40 * MIB)]
