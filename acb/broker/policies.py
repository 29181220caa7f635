"""Policies: which waiting client is next, on which GPU, who makes room, and how long a lease is protected.

A policy ranks and performs nothing: it is given the broker's view and returns an order or a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from acb.config import ASSUMED_BANDWIDTH

if TYPE_CHECKING:
    from acb.broker.core import Client, Gpu

MIN_QUANTUM = 1.0
"""Seconds: the least a lease is protected for, so that programs that never pause do not change places all the time."""

MAX_QUANTUM = 60.0
"""Seconds: the most, so that a waiting client's patience has a bound."""

SWAPS_PER_QUANTUM = 10
"""A lease runs at least this many times what the swap costs: preemption then takes at most about a tenth of the time.

nvshare's own measurement: a quantum of a few swaps lost a quarter of the throughput, one that dwarfs the swap nothing.
"""


class Policy(Protocol):
    """What the core asks. All arguments are the core's own objects: read them, never change them."""

    name: str

    def order(self, waiting: Iterable[Client]) -> Sequence[Client]:
        """The waiting clients, the next one first."""

    def gpus(self, client: Client, gpus: Sequence[Gpu]) -> Sequence[Gpu]:
        """The GPUs on which the client may get its lease, best first."""

    def victims(self, candidates: Iterable[Client]) -> Sequence[Client]:
        """Clients that could be evacuated, the first to go first."""

    def quantum(self, holder: Client, waiting: Client) -> float:
        """Seconds from its grant during which the holder is not preempted in the middle of its work."""


class Fifo:
    """First come, first served; room is made by those whose lease is longest past."""

    name = "fifo"

    def __init__(self, quantum: float | None = None) -> None:
        """With `quantum`, in seconds, every lease is protected for just so long, whatever swapping costs."""
        self.fixed_quantum = quantum

    def order(self, waiting: Iterable[Client]) -> Sequence[Client]:
        """In the order of their requests."""
        return sorted(waiting, key=lambda client: client.asked_order)

    def gpus(self, client: Client, gpus: Sequence[Gpu]) -> Sequence[Gpu]:
        """The GPU that the process is bound to; for a new one those with a free slot first, then the least crowded."""
        if client.gpu is not None:
            return [gpu for gpu in gpus if gpu.ordinal == client.gpu]
        return sorted(gpus, key=lambda gpu: (len(gpu.holders) >= gpu.slots, len(gpu.bound), gpu.ordinal))

    def victims(self, candidates: Iterable[Client]) -> Sequence[Client]:
        """Least recently used first."""
        return sorted(candidates, key=lambda client: client.yielded_at)

    def quantum(self, holder: Client, waiting: Client) -> float:
        """A multiple of what changing places costs, within bounds; or what was fixed."""
        if self.fixed_quantum is not None:
            return self.fixed_quantum
        swap = _swap_seconds(holder) + _swap_seconds(waiting)
        return min(MAX_QUANTUM, max(MIN_QUANTUM, SWAPS_PER_QUANTUM * swap))


def _swap_seconds(client: Client) -> float:
    """Seconds to move the client's memory out and in again: as measured, else estimated from its size."""
    if client.swap_seconds is not None:
        return client.swap_seconds
    return 2 * max(client.peak, client.resident + client.evacuated) / ASSUMED_BANDWIDTH


POLICIES: dict[str, Callable[[float | None], Policy]] = {"fifo": Fifo, "simple": Fifo}
"""By the names that ``--scheduler`` takes; each is made with the ``--quantum`` (None: from measured swap costs)."""
