"""fair: GPU time in proportion to ``--weight``.

Each unit has an account of the GPU time that it has used, divided by its weight; a clock runs as fast as the account of
somebody would who always had a fair share. Whoever is behind the clock has an advantage (start-time fair queueing:
Goyal, Vin, Cheng, 1996), so that programs that use the GPU little need not queue behind those that never let it go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from acb.broker.policies.base import Policy

if TYPE_CHECKING:
    from acb.broker.state import Unit

MOST = 300.0
"""Seconds that a unit can be ahead of its share, or behind: what lies further back is forgiven."""


class Fair(Policy):
    """The account of a unit is its `used`."""

    names = ("fair", "gpu-sharing")

    def __init__(self, quantum: float | None = None) -> None:
        super().__init__(quantum)
        self._clock = 0.0
        self._weight = 0.0

    def joined(self, unit: Unit, now: float) -> None:
        """A newcomer begins even. Nobody saves up more than MOST by staying away, nor owes more."""
        self._weight += unit.weight
        used = self._clock if unit.used is None else unit.used
        unit.used = min(self._clock + MOST, max(self._clock - MOST, used))

    def left(self, unit: Unit, now: float) -> None:
        """See Policy."""
        self._weight = max(0.0, self._weight - unit.weight)

    def served(self, unit: Unit, seconds: float, now: float) -> None:
        """The account grows, and with it the clock, so that it passes everybody who waits in the end."""
        seconds *= unit.size
        unit.used = (unit.used or 0.0) + seconds / unit.weight
        self._clock += seconds / max(self._weight, unit.weight)

    def advantage(self, unit: Unit, now: float) -> float:
        """How far it is behind its share, in seconds of GPU time a weight of one."""
        running = max(0.0, now - unit.granted_at) * unit.size if unit.active else 0.0
        ahead = (unit.used or 0.0) - self._clock + running * (1 / unit.weight - 1 / max(self._weight, unit.weight))
        return min(MOST, max(-MOST, -ahead))

    def outranked_in(self, holder: Unit, waiting: Unit, now: float) -> float:
        """As for all, but the holder's account grows meanwhile."""
        rate = 1 + holder.size * (1 / holder.weight - 1 / max(self._weight, holder.weight))
        return super().outranked_in(holder, waiting, now) / rate
