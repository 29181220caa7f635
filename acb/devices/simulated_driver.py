"""The CUDA driver's checkpoint calls for processes on simulated GPUs, so that the driver tier runs without a GPU.

It is for acb.devices.checkpoint what libcuda is on a real one, and NVML besides. A locked process stops at its next
operation on the card, and a checkpointed one's memory does not count there, wherever its bytes really lie.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from acb.devices import simulated_file as layout
from acb.devices.checkpoint import Checkpointer
from acb.devices.cuda import CudaError, Result, State
from acb.devices.simulated import Card, _Locked, card_paths

_POLL = 0.001
"""Seconds between two looks at whether a process's operations have ended."""


def tier() -> Checkpointer:
    """For the checkpoint helper: the cards in the directory that ``ACB_SIMULATED`` names."""
    driver = SimulatedDriver(Path(os.environ["ACB_SIMULATED"]))
    return Checkpointer(driver, driver)


class SimulatedDriver:
    """See acb.devices.cuda.Driver, and acb.devices.rooms.Memory. A GPU's UUID is its ordinal."""

    def __init__(self, directory: Path) -> None:
        self._cards = {str(card.ordinal): card for card in map(Card.open, card_paths(directory))}

    def version(self) -> int:
        """As a driver of the branch 580."""
        return 13000

    def devices(self) -> list[str]:
        """See Driver."""
        return list(self._cards)

    def state(self, pid: int) -> int:
        """See Driver."""
        return max(self._word(card, slot) for card, slot in self._slots("cuCheckpointProcessGetState", pid))

    def restore_thread(self, pid: int) -> int:
        """Any thread will do."""
        return pid

    def lock(self, pid: int, timeout_ms: int) -> None:
        """See Driver."""
        slots = self._move("cuCheckpointProcessLock", pid, State.RUNNING, State.LOCKED)
        deadline = time.monotonic() + timeout_ms / 1000
        while any(card._words[layout.ACTIVE + slot] for card, slot in slots):
            if time.monotonic() > deadline:
                self._move("cuCheckpointProcessUnlock", pid, State.LOCKED, State.RUNNING)
                raise _error("cuCheckpointProcessLock", Result.NOT_READY)
            time.sleep(_POLL)

    def checkpoint(self, pid: int) -> None:
        """See Driver."""
        slots = self._move("cuCheckpointProcessCheckpoint", pid, State.LOCKED, State.CHECKPOINTED)
        for card, slot in slots:
            card.copied(card._words[layout.HELD + slot])

    def restore(self, pid: int, pairs: Sequence[tuple[str, str]] = ()) -> None:
        """See Driver. A GPU that is not named stays; another one must be of the same size."""
        call = "cuCheckpointProcessRestore"
        names = dict(pairs)
        moves = [
            (card, slot, self._cards[names.get(str(card.ordinal), str(card.ordinal))])
            for card, slot in self._slots(call, pid)
        ]
        incoming: dict[int, int] = {}
        for card, slot, target in moves:
            if self._word(card, slot) != State.CHECKPOINTED:
                raise _error(call, Result.ILLEGAL_STATE)
            if target.capacity != card.capacity:
                raise _error(call, Result.INVALID_VALUE)
            incoming[target.ordinal] = incoming.get(target.ordinal, 0) + card._words[layout.HELD + slot]
        for ordinal, nbytes in incoming.items():
            target = self._cards[str(ordinal)]
            with _Locked(target):
                if target._file.used() + nbytes > target.capacity:
                    raise _error(call, Result.OUT_OF_MEMORY)
        for card, slot, target in moves:
            nbytes = card._words[layout.HELD + slot]
            if target is card:
                with _Locked(card):
                    card._file.set_state(slot, State.LOCKED)
            else:
                self._take_over(pid, card, slot, target)
            target.copied(nbytes)

    def unlock(self, pid: int) -> None:
        """See Driver."""
        self._move("cuCheckpointProcessUnlock", pid, State.LOCKED, State.RUNNING)

    def free(self, which: str) -> int:
        """See Memory."""
        card = self._cards[which]
        return max(0, card.capacity - card.used())

    def most(self, which: str) -> int:
        """See Memory."""
        return self._cards[which].capacity

    def processes(self, which: str) -> Mapping[int, int | None]:
        """See Memory."""
        return dict(self._cards[which].processes())

    @staticmethod
    def _take_over(pid: int, card: Card, slot: int, target: Card) -> None:
        """The process's memory is on the target now; the process finds out when it next uses the card."""
        first, second = sorted((card, target), key=lambda card: card.ordinal)
        with _Locked(first), _Locked(second):
            there = target._file.adopt(pid)
            target._words[layout.HELD + there] = card._words[layout.HELD + slot]
            target._file.set_state(there, State.LOCKED)
            card._words[layout.HELD + slot] = 0
            card._file.set_state(slot, layout.moved_to(target.ordinal, there))

    @staticmethod
    def _word(card: Card, slot: int) -> int:
        state: int = card._words[layout.STATES + slot]
        return state

    def _slots(self, call: str, pid: int) -> list[tuple[Card, int]]:
        found = []
        for card in self._cards.values():
            with _Locked(card):
                for slot, owner in card._file.slots():
                    if owner == pid and card._file.alive(slot) and self._word(card, slot) < layout.MOVED:
                        found.append((card, slot))
        if not found:
            raise _error(call, Result.INVALID_VALUE)
        return found

    def _move(self, call: str, pid: int, before: State, after: State) -> list[tuple[Card, int]]:
        slots = self._slots(call, pid)
        if any(self._word(card, slot) != before for card, slot in slots):
            raise _error(call, Result.ILLEGAL_STATE)
        for card, slot in slots:
            with _Locked(card):
                card._file.set_state(slot, after)
        return slots


def _error(call: str, result: Result) -> CudaError:
    return CudaError(call, result, f"CUDA_ERROR_{result.name}")
