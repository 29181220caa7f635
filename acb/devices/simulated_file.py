"""The file behind a simulated GPU: its layout, its lock, and which of the processes in it still live.

The file is mapped by every process that uses the GPU. Each process writes only its own slot; whatever must agree across
processes (claiming a slot, charging memory, changing the holders) happens under flock(2), which the kernel lets go of
when a process dies, at whatever point.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

from acb.config import format_size
from acb.processes import start_time

MAGIC = int.from_bytes(b"acbcard\0", "little")
VERSION = 2

# Places in the file, in words of eight bytes.
CAPACITY, BANDWIDTH, SPEED, ORDINAL = 2, 3, 4, 5
HIGH_WATER = 6  # slots at and above this one were never used
GENERATION = 7  # raised whenever the holders change
HOLDERS_COUNT = 8  # one more than the number of holders; 0: no broker, no referee
VIOLATIONS_COUNT = 9
CHECKPOINTS = 10  # slots whose process is checkpointed: its memory is not on the card
HOLDERS = 16
MAX_HOLDERS = 64

SLOTS = 256
PIDS = HOLDERS + MAX_HOLDERS
STARTS = PIDS + SLOTS
HELD = STARTS + SLOTS
ACTIVE = HELD + SLOTS  # operations running now
STATES = ACTIVE + SLOTS  # 0 running, 1 locked, 2 checkpointed, as the CUDA driver numbers them; or moved_to()
NAMES = STATES + SLOTS  # of the operation begun last, NAME_BYTES each
NAME_BYTES = 64

MOVED = 1 << 32  # and above it, a state: the driver has taken the process to another card

MAX_VIOLATIONS = 256
VIOLATIONS = NAMES + SLOTS * NAME_BYTES // 8
VIOLATION = struct.Struct(f"=qdq8q{NAME_BYTES}s")  # pid, time, holders' count, holders, operation
WORDS = VIOLATIONS + MAX_VIOLATIONS * VIOLATION.size // 8
SIZE = WORDS * 8


def moved_to(ordinal: int, slot: int) -> int:
    """The state of a slot whose process is in another one now, of the card with this ordinal."""
    return MOVED + ordinal * SLOTS + slot


def moved_from(state: int) -> tuple[int, int]:
    """(ordinal, slot) of moved_to()."""
    return divmod(state - MOVED, SLOTS)


class CardError(Exception):
    """A simulated GPU cannot be made or used: one sentence for a person."""


class CardOutOfMemory(Exception):
    """The card has no room for `requested` bytes: `in_use` of its `capacity` are taken, by all processes together."""

    def __init__(self, requested: int, in_use: int, capacity: int) -> None:
        super().__init__(
            f"the simulated GPU has no room for {format_size(requested)}: "
            f"{format_size(in_use)} of {format_size(capacity)} are in use"
        )
        self.requested = requested
        self.in_use = in_use
        self.capacity = capacity


class Violation(NamedTuple):
    """An operation by process `pid` that did not hold the lease; `time_s` since the epoch, `holders` at most eight."""

    pid: int
    operation: str
    time_s: float
    holders: tuple[int, ...]


class CardFile:
    """One mapped file: `words` are its 64-bit words, `raw` its bytes. Raises CardError when it is no card."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CardError(
                f"there is no simulated GPU at {path}; make one with: gpu_assigner start --simulate-gpus 1x2GiB"
            ) from None
        except OSError as error:
            raise CardError(f"cannot open the simulated GPU {path}: {error.strerror or error}") from None
        try:
            if os.fstat(self._fd).st_size != SIZE:
                raise CardError(f"{path} is not a simulated GPU of this version of acb; remove it")
            self.raw = mmap.mmap(self._fd, SIZE)
        except BaseException:
            os.close(self._fd)
            raise
        self.words = memoryview(self.raw).cast("Q")
        if self.words[0] != MAGIC or self.words[1] != VERSION:
            self.close()
            raise CardError(f"{path} is not a simulated GPU of this version of acb; remove it")

    def lock(self) -> None:
        """Exclude all other processes (not threads) until unlock()."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def unlock(self) -> None:
        """End what lock() began."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def reopen(self) -> None:
        """In a forked child: get a lock of its own, for a descriptor kept from the parent shares the parent's."""
        mine = os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)
        os.close(self._fd)
        self._fd = mine

    def close(self) -> None:
        """Unmap the file; using it afterwards raises ValueError."""
        if self._fd >= 0:
            self.words.release()
            self.raw.close()
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError, BufferError):
            self.close()

    # --- processes --------------------------------------------------------------------------------------------------

    def slots(self) -> list[tuple[int, int]]:
        """(slot, process id) of every claimed slot, dead processes included."""
        pids = self.words[PIDS : PIDS + self.words[HIGH_WATER]].tolist()
        return [(slot, pid) for slot, pid in enumerate(pids) if pid]

    def alive(self, slot: int) -> bool:
        """Whether the process that claimed `slot` still runs (and is not another one with its number)."""
        pid = self.words[PIDS + slot]
        return pid != 0 and start_time(pid) == self.words[STARTS + slot]

    def clear(self, slot: int) -> None:
        """Give a slot back, and with it the memory that it holds; under lock()."""
        self.set_state(slot, 0)
        for column in (HELD, ACTIVE, STARTS, PIDS):
            self.words[column + slot] = 0

    def used(self) -> int:
        """Bytes on the card, of dead processes too; under lock()."""
        count = self.words[HIGH_WATER]
        total: int = sum(self.words[HELD : HELD + count])
        if self.words[CHECKPOINTS]:
            total -= sum(self.words[HELD + slot] for slot in range(count) if self.words[STATES + slot] == 2)
        return total

    def set_state(self, slot: int, state: int) -> None:
        """Lock, checkpoint or let go the process in `slot`; under lock()."""
        before = self.words[STATES + slot]
        self.words[CHECKPOINTS] += (state == 2) - (before == 2)
        self.words[STATES + slot] = state

    def reclaim(self) -> None:
        """Clear the slots of dead processes; under lock()."""
        for slot, _ in self.slots():
            if not self.alive(slot):
                self.clear(slot)

    def claim(self, others: set[int]) -> int:
        """A slot for this process, beside the `others` that it has; under lock().

        Raises CardError when there are too many processes.
        """
        pid = os.getpid()
        for slot, owner in self.slots():
            if owner == pid and slot not in others:
                self.clear(slot)  # of the program that this process ran before an exec
        return self.adopt(pid)

    def adopt(self, pid: int) -> int:
        """A new slot for a process; under lock(). Raises CardError when there are too many processes."""
        start = start_time(pid)
        for attempt in range(2):
            for slot in range(SLOTS):
                if self.words[PIDS + slot] == 0:
                    self.words[STARTS + slot] = start or 0
                    self.words[PIDS + slot] = pid
                    self.words[HIGH_WATER] = max(self.words[HIGH_WATER], slot + 1)
                    return slot
            if attempt == 0:
                self.reclaim()
        raise CardError(f"the simulated GPU {self.path} is used by {SLOTS} processes already; end some of them")

    # --- the referee -------------------------------------------------------------------------------------------------

    def holders(self) -> tuple[int, ...] | None:
        """Who may use the GPU; None: anybody. Under lock()."""
        count = self.words[HOLDERS_COUNT]
        return None if count == 0 else tuple(self.words[HOLDERS : HOLDERS + count - 1].tolist())

    def set_holders(self, pids: tuple[int, ...] | None) -> None:
        """Change who may use the GPU; under lock()."""
        for i, pid in enumerate(pids or ()):
            self.words[HOLDERS + i] = pid
        self.words[HOLDERS_COUNT] = 0 if pids is None else len(pids) + 1
        self.words[GENERATION] += 1

    def name(self, slot: int) -> str:
        """The operation that the process in `slot` began last."""
        at = NAMES * 8 + slot * NAME_BYTES
        return self.raw[at : at + NAME_BYTES].rstrip(b"\0").decode("utf-8", "replace")

    def set_name(self, slot: int, name: str) -> None:
        """Remember the operation that the process in `slot` begins."""
        at = NAMES * 8 + slot * NAME_BYTES
        self.raw[at : at + NAME_BYTES] = name.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")

    def add_violation(self, pid: int, time_s: float, holders: tuple[int, ...], name: str) -> None:
        """Record one; the first MAX_VIOLATIONS are kept, all are counted. Under lock()."""
        count = self.words[VIOLATIONS_COUNT]
        if count < MAX_VIOLATIONS:
            kept = holders[:8] + (0,) * (8 - len(holders))
            at = VIOLATIONS * 8 + count * VIOLATION.size
            VIOLATION.pack_into(self.raw, at, pid, time_s, min(len(holders), 8), *kept, name.encode()[:NAME_BYTES])
        self.words[VIOLATIONS_COUNT] = count + 1

    def violation(self, index: int) -> tuple[int, float, tuple[int, ...], str]:
        """What add_violation() recorded: pid, time, holders (the first eight), operation."""
        pid, time_s, count, *rest = VIOLATION.unpack_from(self.raw, VIOLATIONS * 8 + index * VIOLATION.size)
        return pid, time_s, tuple(rest[:count]), rest[8].rstrip(b"\0").decode("utf-8", "replace")


def write_card(path: Path, ordinal: int, capacity: int, bandwidth: int, speed: float) -> None:
    """Put a new, empty card at `path` in one step; whoever has an older one there open keeps that. Raises CardError."""
    content = bytearray(SIZE)
    words = memoryview(content).cast("Q")
    words[0], words[1], words[CAPACITY], words[BANDWIDTH], words[ORDINAL] = MAGIC, VERSION, capacity, bandwidth, ordinal
    struct.pack_into("=d", content, SPEED * 8, speed)
    temporary = ""
    try:
        fd, temporary = tempfile.mkstemp(prefix=".card-", dir=path.parent)
        with open(fd, "wb") as file:
            file.write(content)  # every byte, so that a full disk is noticed here and not as a SIGBUS later
            file.flush()
        with contextlib.suppress(FileExistsError):  # somebody else has made the same card just now
            os.link(temporary, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CardError(
                f"no space for the simulated GPU {path}; free some, or set ACB_RUNTIME_DIR to another directory"
            ) from None
        raise CardError(f"cannot write the simulated GPU {path}: {error.strerror or error}") from None
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
