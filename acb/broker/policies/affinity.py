"""affinity: prefers whoever has its memory on the GPU still, since that costs no swap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from acb.broker.policies.base import MAX_QUANTUM, SWAPS_PER_QUANTUM, Policy, swap_seconds

if TYPE_CHECKING:
    from acb.broker.state import Unit


class Affinity(Policy):
    """A resident unit is treated as though it had asked earlier by so many times its swap that swapping takes 3 %."""

    names = ("affinity", "gpu-affinity")

    def advantage(self, unit: Unit, now: float) -> float:
        """See the class; at most MAX_QUANTUM."""
        clients = unit.members.values()
        if not unit.bound or any(client.evacuated or client.evacuating for client in clients):
            return 0.0
        swap = max((swap_seconds(client) for client in clients if client.resident), default=0.0)
        return min(MAX_QUANTUM, SWAPS_PER_QUANTUM * swap)
