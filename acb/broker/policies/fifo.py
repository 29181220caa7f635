"""fifo: first come, first served."""

from __future__ import annotations

from acb.broker.policies.base import Policy


class Fifo(Policy):
    """Nobody overtakes anybody."""

    names = ("fifo", "simple")
