"""The simulated card: a GPU's memory, its users and its referee, shared between processes through one mapped file.

It computes nothing. Whoever simulates a framework's operations charges memory here, runs each operation inside
operation(), and reports copies; the broker says who holds the lease, and every operation of somebody else is recorded.
"""

from __future__ import annotations

import os
import select
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from acb.config import SimulatedSpec
from acb.devices import simulated_file as layout
from acb.devices.simulated_file import CardError, CardFile, CardOutOfMemory, Violation

__all__ = ["Card", "CardError", "CardOutOfMemory", "Violation", "card_paths", "create_cards"]

_SHORTEST_WAIT = 0.0005
"""Seconds: waits for the bus are gathered up to this, for the system's timer is no finer."""

_LOCK_POLL = 0.001
"""Seconds between two looks at whether the driver has let this process go."""


def create_cards(directory: Path, spec: SimulatedSpec) -> list[Path]:
    """Make the cards of `spec`, ``gpu0.card`` and so on; existing ones with the same values are kept.

    Cards with other values are replaced when no live process uses them. Raises CardError otherwise.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CardError(f"cannot make the directory of simulated GPUs {directory}: {error.strerror or error}") from None
    paths = [directory / f"gpu{ordinal}.card" for ordinal in range(len(spec.capacities))]
    for ordinal, (path, capacity) in enumerate(zip(paths, spec.capacities, strict=True)):
        if path.exists() and not _matches(path, capacity, spec):
            path.unlink(missing_ok=True)
        if not path.exists():
            layout.write_card(path, ordinal, capacity, spec.bandwidth or 0, spec.speed or 0.0)
    for path in card_paths(directory)[len(paths) :]:
        if not _in_use(path):
            path.unlink(missing_ok=True)
    return paths


def card_paths(directory: Path) -> list[Path]:
    """The cards in `directory`, by ordinal."""
    found = [(path.stem.removeprefix("gpu"), path) for path in directory.glob("gpu*.card")]
    return [path for _, path in sorted((int(number), path) for number, path in found if number.isdigit())]


def _matches(path: Path, capacity: int, spec: SimulatedSpec) -> bool:
    """Whether an existing card has this capacity and the values of `spec`; raises CardError when not and in use."""
    with Card.open(path) as card:
        if (card.capacity, card.bandwidth, card.speed) == (capacity, spec.bandwidth, spec.speed):
            return True
        users = card.processes()
    if users:
        raise CardError(
            f"the simulated GPU {path} has other values and is used by process {users[0][0]}; "
            f"end that process or choose another directory"
        )
    return False


def _in_use(path: Path) -> bool:
    with Card.open(path) as card:
        return bool(card.processes())


class Card:
    """One process's view of a simulated GPU; any thread may call anything.

    `capacity` is in bytes, `bandwidth` in bytes a second between host and card (None: not limited), `speed` the
    fraction of the CPU's own speed at which operations appear to run (None: as fast as the CPU).
    """

    def __init__(self, path: Path) -> None:
        self._map(CardFile(path), path)
        self._debt = 0.0  # seconds of waiting for the bus not done yet
        self._before: CardFile | None = None
        self._forget()
        _cards.add(self)

    def _map(self, file: CardFile, path: Path) -> None:
        words = file.words
        self._file, self._words, self.path = file, words, path
        self.capacity: int = words[layout.CAPACITY]
        self.bandwidth: int | None = words[layout.BANDWIDTH] or None
        self.speed: float | None = struct.unpack_from("=d", file.raw, layout.SPEED * 8)[0] or None
        self.ordinal: int = words[layout.ORDINAL]

    def _forget(self) -> None:
        """Begin as a process that holds nothing: when opened, and in a forked child."""
        # Reentrant: a garbage collection inside may run a finalizer that comes back here on the same thread.
        self._mutex = threading.RLock()
        self._inside = 0
        self._pending: deque[int] = deque()
        self._pid = os.getpid()
        self._slot: int | None = None
        self._held = 0
        self._peak = 0
        self._active = 0
        self._generation = -1
        self._barred = False
        self._refereed = False

    def _after_fork(self) -> None:
        self._forget()
        self._file.reopen()

    @classmethod
    def open(cls, directory_or_path: Path, ordinal: int = 0) -> Card:
        """The card in a file, or the one with this ordinal in a directory. Raises CardError."""
        path = Path(directory_or_path)
        return cls(path / f"gpu{ordinal}.card" if path.is_dir() else path)

    def close(self) -> None:
        """Give back this process's memory and unmap the card."""
        _cards.discard(self)
        with _Locked(self):
            if self._slot is not None:
                self._file.clear(self._slot)
                self._slot = None
        self._file.close()

    def __enter__(self) -> Card:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- memory -------------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> None:
        """Charge `nbytes` to this process.

        Raises CardOutOfMemory when all processes together would exceed the capacity, CardError when there are too many.
        """
        if nbytes < 0:
            raise ValueError(f"cannot allocate {nbytes} bytes")
        self._wait_while_locked()
        with _Locked(self):
            slot = self._claimed()
            words, held = self._words, layout.HELD
            used = self._file.used()
            if used + nbytes > self.capacity:
                self._file.reclaim()
                used = self._file.used()
                if used + nbytes > self.capacity:
                    raise CardOutOfMemory(nbytes, used, self.capacity)
            # No call between reading and writing: the interpreter can run a finalizer, or another thread, only at one.
            self._held += nbytes
            words[held + slot] = self._held
            if self._held > self._peak:
                self._peak = self._held

    def free(self, nbytes: int) -> None:
        """Take back a charge. Never waits, so that finalizers may call it at any moment on any thread."""
        self._pending.append(nbytes)
        self._settle()

    def _settle(self) -> None:
        """Book the pending frees, unless somebody is inside, who will do it on leaving."""
        while self._pending:
            mutex = self._mutex
            if not mutex.acquire(blocking=False):
                return
            try:
                if self._inside or self._moved():
                    return
                self._book()
            finally:
                mutex.release()

    def _book(self) -> None:
        """Book the pending frees; with the mutex held."""
        self._inside += 1
        while self._pending:
            freed = self._pending.popleft()
            self._held = self._held - freed if self._held > freed else 0
        if self._slot is not None:
            self._words[layout.HELD + self._slot] = self._held
        self._inside -= 1

    def _claimed(self) -> int:
        """This process's slot; with everything locked."""
        if self._slot is None:
            others = [card._place() for card in list(_cards) if card is not self]
            self._slot = self._file.claim({slot for ordinal, slot in others if ordinal == self.ordinal})
        return self._slot

    # --- taken to another card by the driver (see simulated_driver) ---------------------------------------------------

    def _moved(self) -> bool:
        slot = self._slot
        return slot is not None and self._words[layout.STATES + slot] >= layout.MOVED

    def _place(self) -> tuple[int, int]:
        """(ordinal, slot) of where this process's memory is; the slot -1: it has none."""
        slot, words = self._slot, self._words
        if slot is None:
            return self.ordinal, -1
        state = words[layout.STATES + slot]
        return layout.moved_from(state) if state >= layout.MOVED else (self.ordinal, slot)

    def _follow(self) -> None:
        """From now on this is the card that the process has been taken to. With the mutex held, and nobody inside."""
        while self._moved():
            assert self._slot is not None
            ordinal, slot = self._place()
            path = self.path.with_name(f"gpu{ordinal}.card")
            file = CardFile(path)
            self._file.clear(self._slot)  # without a lock: nobody else writes there
            self._before = self._file  # stays open: a thread that waits in it may look once more
            self._map(file, path)
            self._slot, self._generation = slot, -1
            self._words[layout.HELD + slot] = self._held

    def held(self, pid: int | None = None) -> int:
        """Bytes held by this process through this Card, or by process `pid`.

        When it returns, whatever this process has freed before is free for others, too; free() alone may leave that to
        a thread of this process that is just waiting to have the card to itself.
        """
        if pid is None:
            with self._mutex:
                if not self._inside:
                    self._follow()
                    self._book()
                return self._held
        return dict(self.processes()).get(pid, 0)

    def holds(self, pid: int) -> int:
        """As held(pid), without looking whether the process still lives: a few microseconds."""
        words = self._words
        count = words[layout.HIGH_WATER]
        pids = words[layout.PIDS : layout.PIDS + count].tolist()
        slots = [slot for slot, owner in enumerate(pids) if owner == pid and words[layout.STATES + slot] != 2]
        return sum(words[layout.HELD + slot] for slot in slots)

    def used(self) -> int:
        """Bytes held by all live processes."""
        return sum(held for _, held in self.processes())

    def peak(self) -> int:
        """The most bytes that this process has held at once since reset_peak()."""
        return self._peak

    def reset_peak(self) -> None:
        """Let the peak begin again at what is held now."""
        self._peak = self.held()

    def processes(self) -> list[tuple[int, int]]:
        """(process id, bytes held) of every live process that has used the card; dead ones' memory is reclaimed."""
        found: dict[int, int] = {}
        with _Locked(self):
            self._file.reclaim()
            for slot, pid in self._file.slots():
                there = self._words[layout.STATES + slot] != 2
                found[pid] = found.get(pid, 0) + there * self._words[layout.HELD + slot]
        return list(found.items())

    # --- the referee --------------------------------------------------------------------------------------------------

    def set_holders(self, pids: Iterable[int] | None) -> None:
        """For the broker: from now on `pids` hold the lease (None: there is no broker, anybody may work).

        Records a violation for every former holder that is in an operation at this moment.
        """
        new = None if pids is None else tuple(pids)
        if new is not None and len(new) > layout.MAX_HOLDERS:
            raise ValueError(f"a card has at most {layout.MAX_HOLDERS} holders, not {len(new)}")
        with _Locked(self):
            old = self._file.holders()
            self._file.set_holders(new)
            if old is None or new is None:
                return
            for slot, pid in self._file.slots():
                if self._words[layout.ACTIVE + slot] and pid in old and pid not in new and self._file.alive(slot):
                    self._file.add_violation(pid, time.time(), new, self._file.name(slot))

    def holders(self) -> tuple[int, ...] | None:
        """Who holds the lease, as the broker has said; None: no broker, no referee."""
        with _Locked(self):
            return self._file.holders()

    def operation(self, name: str) -> _Operation:
        """A context manager to run one operation in: the referee looks at its start, and `speed` stretches it."""
        return _Operation(self, name)

    def _begin(self, name: str) -> None:
        with self._mutex:
            slot = self._slot
            if slot is None:
                with _Locked(self):
                    slot = self._claimed()
            words = self._words
            self._active += 1
            words[layout.ACTIVE + slot] = self._active
        if words[layout.STATES + slot]:
            self._end()
            self._wait_while_locked()
            self._begin(name)
            return
        # After showing itself: then either the broker sees this operation, or this process the new holders.
        if self._words[layout.GENERATION] != self._generation:
            self._read_holders()
        if self._refereed:
            self._file.set_name(slot, name)
            if self._barred:
                self._violate(name)

    def _wait_while_locked(self) -> None:
        """A call into the driver stops while the process is locked or checkpointed (see simulated_driver)."""
        while True:
            with self._mutex:
                if not self._inside:
                    self._follow()
                if self._slot is None or not self._words[layout.STATES + self._slot]:
                    return
            _wait(_LOCK_POLL)

    def _end(self) -> None:
        with self._mutex:
            if self._active and self._slot is not None:  # else begun before a fork
                self._active -= 1
                self._words[layout.ACTIVE + self._slot] = self._active

    def _read_holders(self) -> None:
        with _Locked(self):
            holders = self._file.holders()
            self._generation = self._words[layout.GENERATION]
            self._refereed = holders is not None
            self._barred = holders is not None and self._pid not in holders

    def _violate(self, name: str) -> None:
        with _Locked(self):
            holders = self._file.holders()
            if holders is not None and self._pid not in holders:
                self._file.add_violation(self._pid, time.time(), holders, name)

    def violations(self) -> list[Violation]:
        """The operations that ran without the lease, oldest first; only the first 256 are kept."""
        with _Locked(self):
            count = min(self._words[layout.VIOLATIONS_COUNT], layout.MAX_VIOLATIONS)
            found = [self._file.violation(index) for index in range(count)]
        return [Violation(pid, name, time_s, holders) for pid, time_s, holders, name in found]

    def clear_violations(self) -> None:
        """Forget the violations recorded so far."""
        with _Locked(self):
            self._words[layout.VIOLATIONS_COUNT] = 0

    # --- time ---------------------------------------------------------------------------------------------------------

    def copied(self, nbytes: int) -> None:
        """`nbytes` have crossed the bus between host and card: waits as long as that takes at `bandwidth`."""
        if self.bandwidth is None:
            return
        with self._mutex:
            self._debt += nbytes / self.bandwidth
            if self._debt < _SHORTEST_WAIT:
                return
            wait, self._debt = self._debt, 0.0
        _wait(wait)


class _Locked:
    """Keeps other threads and other processes out, and books the frees that came meanwhile; reentrant."""

    __slots__ = ("_card",)

    def __init__(self, card: Card) -> None:
        self._card = card

    def __enter__(self) -> None:
        card = self._card
        card._mutex.acquire()
        try:
            if card._inside == 0:
                card._file.lock()
                while card._moved():
                    card._file.unlock()
                    card._follow()
                    card._file.lock()
                if card._pending:
                    card._book()
            card._inside += 1
        except BaseException:
            card._mutex.release()
            raise

    def __exit__(self, *exc: object) -> None:
        card = self._card
        try:
            card._inside -= 1
            if card._inside == 0:
                card._file.unlock()
        finally:
            card._mutex.release()
        if card._pending:
            card._settle()


class _OnThread(threading.local):
    timed = False
    """Whether an operation is running that `speed` stretches: one inside it, on whichever card, takes no extra time."""


_on_thread = _OnThread()


class _Operation:
    """One operation on a card, as a context manager."""

    __slots__ = ("_card", "_name", "_outermost", "_started")

    def __init__(self, card: Card, name: str) -> None:
        self._card = card
        self._name = name

    def __enter__(self) -> None:
        card = self._card
        card._begin(self._name)
        if card.speed is not None:
            self._outermost = not _on_thread.timed
            _on_thread.timed = True
            self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        card = self._card
        try:
            if card.speed is not None and self._outermost:
                _on_thread.timed = False
                _wait((time.perf_counter() - self._started) * (1 / card.speed - 1))
        finally:
            card._end()


def _wait(seconds: float) -> None:
    """Sleep by a call that no hook mistakes for the program's own sleeping."""
    if seconds > 0:
        select.select([], [], [], seconds)


_cards: weakref.WeakSet[Card] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for card in list(_cards):
        card._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
