"""What every policy has: a place in line with a bounded head start, a quantum, where to run, and who makes room.

A policy ranks and performs nothing: it is given the broker's view and returns an order or a number. Whoever waits
stands in line by the time at which it asked, less an *advantage* of at most a fixed number of seconds either way. So
nobody is overtaken by anybody who asks later than twice that: waiting is bounded under every policy, by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from acb.config import ASSUMED_BANDWIDTH

if TYPE_CHECKING:
    from acb.broker.state import Client, Gpu, Unit

MIN_QUANTUM = 1.0
"""Seconds: the least a lease is protected for, so that programs that never pause do not change places all the time."""

MAX_QUANTUM = 120.0
"""Seconds: the most, so that a waiting client's patience has a bound."""

SWAPS_PER_QUANTUM = 33
"""A busy program is preempted after this many times what the swap costs: that then takes 3 % of the time at most.

nvshare's own measurement: a quantum of a few swaps lost a quarter of the throughput, one that dwarfs the swap nothing.
"""


class Policy:
    """First come, first served, and what the others build on. The core's objects are to be read, never changed."""

    names: ClassVar[tuple[str, ...]] = ()
    """What ``--scheduler`` calls it, the first for people."""

    backfills: ClassVar[bool] = False
    """Whether a short phase may go ahead of somebody who cannot be let in yet."""

    def __init__(self, quantum: float | None = None) -> None:
        """With `quantum`, in seconds, every lease is protected for just so long, whatever swapping costs."""
        self.fixed_quantum = quantum

    @property
    def name(self) -> str:
        """For people."""
        return self.names[0]

    # --- who is next ------------------------------------------------------------------------------------------------

    def advantage(self, unit: Unit, now: float) -> float:
        """Seconds by which the unit is treated as though it had asked earlier; negative: later. Bounded."""
        return 0.0

    def outranked_in(self, holder: Unit, waiting: Unit, now: float) -> float:
        """Seconds until the holder, if it asked again then, would come after the waiting unit; at most 0: already."""
        return waiting.key + self.advantage(holder, now) - now

    def joined(self, unit: Unit, now: float) -> None:
        """The unit wants the GPU: it waits, and later runs."""

    def left(self, unit: Unit, now: float) -> None:
        """The unit neither waits nor runs any more."""

    def served(self, unit: Unit, seconds: float, now: float) -> None:
        """The unit has held its GPUs for so long."""

    # --- for how long -----------------------------------------------------------------------------------------------

    def quantum(self, holder: Unit, waiting: Unit, swap: float) -> float:
        """Seconds from its grant in which a busy holder is not preempted, when changing places costs `swap` seconds."""
        if self.fixed_quantum is not None:
            return self.fixed_quantum
        return min(MAX_QUANTUM, max(MIN_QUANTUM, SWAPS_PER_QUANTUM * swap))

    def lets_finish(self, holder: Unit, waiting: Unit) -> bool:
        """Whether a phase that is not expected to outlast MAX_QUANTUM may end first."""
        return self.fixed_quantum is None

    # --- where ------------------------------------------------------------------------------------------------------

    def gpus(self, gpus: Sequence[Gpu]) -> Sequence[Gpu]:
        """Where to put a newcomer, for as long as it lives: the least loaded first, then who has most room."""
        return sorted(gpus, key=lambda gpu: (round(gpu.load, 3), gpu.full, gpu.in_use - gpu.capacity, gpu.ordinal))

    # --- who makes room ---------------------------------------------------------------------------------------------

    def victims(self, candidates: Sequence[Client], now: float) -> Sequence[Client]:
        """Clients that could be evacuated, the first to go first: those whose next use is expected last (Belady's rule)

        Whoever waits already will use its memory soonest, in the order of the line; of the others the learned gaps say
        when. One that is overdue is guessed to stay away for as long again.
        """

        def next_use(client: Client) -> tuple[bool, float, float, int]:
            if client.waiting:
                return False, client.unit.key, 0.0, client.id
            away = now - client.yielded_at
            return True, abs((client.profile.gap_seconds() or 0.0) - away), away, -client.id

        return sorted(candidates, key=next_use, reverse=True)


def swap_seconds(client: Client) -> float:
    """Seconds to move the client's memory out and in again: as measured, else estimated from its size.

    Of a client that has not said yet what it holds, that may be all that it was promised.
    """
    nbytes = max(client.peak, client.resident + client.evacuated) if client.measured else client.headroom
    measured = client.profile.swap_seconds(nbytes)
    return 2 * nbytes / ASSUMED_BANDWIDTH if measured is None else measured
