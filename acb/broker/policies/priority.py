"""priority: higher ``--priority`` first; whoever waits gains a step a minute."""

from __future__ import annotations

from typing import TYPE_CHECKING

from acb.broker.policies.base import Policy

if TYPE_CHECKING:
    from acb.broker.state import Unit

STEP = 60.0
"""Seconds of waiting that weigh as much as one step of priority (aging)."""

SWAPS = 3
"""So many times the swap a lower priority runs at least: preempted all the time, it still makes some headway."""


class Priority(Policy):
    """A unit of priority N is treated as though it had asked N minutes earlier."""

    names = ("priority",)

    def advantage(self, unit: Unit, now: float) -> float:
        """See the class."""
        return STEP * unit.priority

    def quantum(self, holder: Unit, waiting: Unit, swap: float) -> float:
        """A lower priority is preempted as soon as it has run for a few times what the swap costs: no thrashing."""
        if waiting.priority > holder.priority and self.fixed_quantum is None:
            return SWAPS * swap
        return super().quantum(holder, waiting, swap)

    def lets_finish(self, holder: Unit, waiting: Unit) -> bool:
        """A higher priority does not wait for that."""
        return waiting.priority <= holder.priority and super().lets_finish(holder, waiting)
