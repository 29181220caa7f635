"""Yielding: when a revoked lease is given back.

When the program is idle for the linger, or says that it does something else, or (after the quantum that came with the
revoke) at the next safe point: the gate is closed first, then no thread may be inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from acb.client.gate import LONG_GAP
from acb.client.phases import MAX_LINGER, MIN_LINGER, choose_linger

if TYPE_CHECKING:
    from acb.client.gate import Gate
    from acb.client.memory import Memory

STALL = 0.25
"""Seconds that a thread inside may keep others at the closed gate, at first, before it is thought to wait for them."""

MAX_STALL = 8.0
"""Seconds, at most, of that patience: what takes longer than this inside one region is let go on."""


class Yielding:
    """See the module. With the agent's lock held; `closing` is also read without."""

    def __init__(self, memory: Memory, reopen: Callable[[], None]) -> None:
        """`reopen()`: the lease stays for now, let the program in again."""
        self.revoked = False
        self.closing = False
        """The gate is closed although the lease is held."""
        self.ended_at = 0.0
        """When the program last said that its phase is over."""
        self._memory = memory
        self._reopen = reopen
        self._swap_expected = -1.0  # what the broker expects yielding to cost, in seconds; -1: it does not know
        self._preempt_at = 0.0
        self._closed_at = 0.0  # since when it is closing
        self._stall_after = STALL

    def granted(self) -> None:
        """A new lease: patience begins anew."""
        self.revoked, self._stall_after = False, STALL

    def revoke(self, preempt_at: float, swap: float) -> None:
        """Another waits: the program may go on until `preempt_at`; to yield is expected to cost `swap` seconds."""
        self.revoked, self._preempt_at, self._swap_expected = True, preempt_at, swap

    def consider(self, gate: Gate, now: float) -> float | str:
        """In how many seconds to look again; or why the lease is to be given back now, the gate closed and no thread
        inside. Revoked, and with all memory there."""
        preempt = now >= self._preempt_at
        if self.closing:
            if gate.busy():
                return self._consider_stall(gate, now)  # the gate's idle() wakes the agent before
            return "preempted after its quantum"
        if gate.busy():
            if not preempt:
                return min(self._linger(gate), self._preempt_at - now)
            self.closing, self._closed_at = True, now
            gate.close()
            return 0.0
        if gate.expected() and now - gate.last_exit < MAX_LINGER:
            return MIN_LINGER  # or on a busy machine a lease could go back, time and again, before it was used
        ended = self.ended_at >= gate.last_exit
        said = ended or gate.marked()
        wait = 0.0 if said else self._linger(gate) - (now - gate.last_exit)
        if wait > 0 and not preempt:
            return max(min(wait, self._preempt_at - now), 0.0)
        gate.close()
        if gate.busy():  # a thread was faster
            if preempt:
                self.closing, self._closed_at = True, now
            else:
                self._reopen()
            return MIN_LINGER
        return "the program said so" if ended else "CPU phase" if said else "idle" if wait <= 0 else "preempted"

    def _consider_stall(self, gate: Gate, now: float) -> float:
        """The gate is closed and a thread inside: it may wait for one that stands outside, as a forward does that
        computes on threads of its own. After a while let them in, and try again later, with more patience each time.
        """
        left = self._closed_at + self._stall_after - now
        if left > 0 or not gate.waiting():
            return max(left, STALL)
        self._stall_after = min(MAX_STALL, 2 * self._stall_after)
        self._preempt_at = now + STALL
        self._reopen()
        return STALL

    def _linger(self, gate: Gate) -> float:
        swap = self._swap_expected if self._swap_expected >= 0 else self._memory.swap.estimate(self._memory.resident())
        linger = choose_linger(gate.gaps, swap)
        gate.long_gap = max(LONG_GAP, linger)
        return linger
