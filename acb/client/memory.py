"""The program's GPU memory as the agent sees it: all frameworks' together; moved to the host and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from acb.client.evacuation import EvacuationError, Evacuator, evacuate_all
from acb.client.phases import SwapCost

MAX_RETRY = 2.0
"""Seconds, at most, between tries to bring memory back to a GPU on which somebody acb knows nothing of takes room."""

TRIES = 6
"""Failures in a row, for another reason than that there is no room, after which memory is thought to be lost."""


class Moved(NamedTuple):
    """What a move came to: bytes and seconds, and why it is not all, or ''."""

    nbytes: int
    seconds: float
    reason: str = ""


class Memory:
    """What the frameworks hold. Methods that move are called with the agent's lock held, and no thread is inside."""

    def __init__(self, evacuators: list[Evacuator]) -> None:
        self.evacuated = 0
        """Bytes in host memory."""
        self.swap = SwapCost()
        self.unrestored = False
        """The lease is held, but there was no room for the memory that must come back."""
        self.restore_at = 0.0
        """When to try again."""
        self.last_resident = self.last_peak = 0
        """What resident() and peak() said last. Asking anew needs the driver, which may have suspended us."""
        self._restore_wait = 0.0
        self._failures = 0  # of restore(), in a row, for another reason than room
        self._back = Moved(0, 0.0)
        self._evacuators = evacuators

    def granted(self) -> None:
        """A new lease: patience begins anew."""
        self._restore_wait = 0.0
        self._back = Moved(0, 0.0)

    def resident(self) -> int:
        """Bytes on the GPU."""
        self.last_resident = self._sum("resident")
        return self.last_resident

    def peak(self) -> int:
        """The most bytes that there have been since reset_peak()."""
        self.last_peak = self._sum("peak")
        return self.last_peak

    def reset_peak(self) -> None:
        """Forget the peak."""
        self._sum("reset_peak")

    def synchronize(self) -> None:
        """Wait for the device."""
        for evacuator in self._evacuators:
            try:
                evacuator.synchronize()
            except Exception:
                pass  # a device that fails is done with its work; the program will see the error itself

    def evacuate(self, piece: int = 0, gone: Callable[[Moved], None] = lambda moved: None) -> Moved:
        """Move all memory to the host: what was moved since the last call of `gone`; `reason` says why it is not all.

        `piece`: call `gone` whenever about so many bytes have left; 0: all leaves at once, or nothing.
        """
        begun = start = time.monotonic()
        reason = ""
        moved = 0
        try:
            for evacuator in self._evacuators:
                evacuator.synchronize()
            for nbytes in evacuate_all(self._evacuators, piece):
                self.evacuated += nbytes
                moved += nbytes
                if piece:
                    now = time.monotonic()
                    gone(Moved(moved, now - start))
                    start, moved = now, 0
        except EvacuationError as error:
            self.evacuated += error.moved
            moved, reason = moved + error.moved, str(error) or "refused"
        except Exception as error:
            reason = f"failed: {error!r}"
        now = time.monotonic()
        if not reason:
            self.swap.moved(now - begun)
        return Moved(moved, now - start, reason)

    def restore(self, limit: int | None = None) -> Moved:
        """Bring all memory back, or at most `limit` bytes: what has come back under this lease. Raises MemoryError when
        there is no room for it: restore_at says when to try again, at ever longer intervals.

        Any other failure is taken for that, too, at first: the memory is safe on the host, and a driver that is out of
        memory says so in many ways. After TRIES the program goes on, and what it touches of that raises its own error.
        """
        before = self.resident()
        start = time.monotonic()
        moved = 0
        try:
            for evacuator in self._evacuators:
                try:
                    moved += int(evacuator.restore(None if limit is None else max(0, limit - moved)))
                except MemoryError:
                    raise
                except Exception as error:
                    self._failed(evacuator.name, error)
        except MemoryError:
            self._came_back(max(0, self.resident() - before), start)
            self.restore_at = time.monotonic() + self._restore_wait
            self._restore_wait = min(MAX_RETRY, 2 * self._restore_wait + 0.05)
            raise
        self._came_back(moved, start)
        if limit is None:
            self.evacuated, self.unrestored, self._failures = 0, False, 0
        return self._back

    def _failed(self, name: str, error: Exception) -> None:
        """A framework could not bring its memory back. Raises MemoryError as long as it is to be tried again."""
        self._failures += 1
        if self._failures < TRIES:
            raise MemoryError(str(error)) from error
        from acb.client.runtime import warn_once

        warn_once(f"restore:{name}", f"memory of {name} cannot be restored: {error!r}")

    def _came_back(self, moved: int, start: float) -> None:
        """So many bytes, since `start`, and perhaps not all."""
        seconds = time.monotonic() - start
        self._back = Moved(self._back.nbytes + moved, self._back.seconds + seconds)
        self.swap.moved(seconds)
        self.evacuated, self.unrestored = max(1, self.evacuated - moved), True

    def _sum(self, what: str) -> int:
        """Bytes, over all frameworks; one that cannot say counts nothing."""
        total = 0
        for evacuator in self._evacuators:
            try:
                total += int(getattr(evacuator, what)() or 0)  # a framework's own kind of integer cannot be sent
            except Exception as error:
                from acb.client.runtime import warn_once

                warn_once(f"{what}:{evacuator.name}", f"memory of {evacuator.name} cannot be measured: {error!r}")
        return total
