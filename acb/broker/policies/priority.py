"""priority: higher ``--priority`` first; whoever waits gains a step a minute."""

from __future__ import annotations

from typing import TYPE_CHECKING

from acb.broker.policies.base import Policy

if TYPE_CHECKING:
    from acb.broker.state import Unit

STEP = 60.0
"""Seconds of waiting that weigh as much as one step of priority (aging)."""


class Priority(Policy):
    """A unit of priority N is treated as though it had asked N minutes earlier."""

    names = ("priority",)

    def advantage(self, unit: Unit, now: float) -> float:
        """See the class."""
        return STEP * unit.priority

    def quantum(self, holder: Unit, waiting: Unit, swap: float) -> float:
        """A lower priority is preempted as soon as it has run for what the swap costs: no thrashing, but no more."""
        if waiting.priority > holder.priority and self.fixed_quantum is None:
            return swap
        return super().quantum(holder, waiting, swap)
