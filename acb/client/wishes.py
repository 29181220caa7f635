"""What this process wants of the broker: its priority and weight, how many GPUs, and with whom it runs together.

The first three come from the launcher's options. The last is torchrun's doing: its workers on one node compute
together, so none may hold a GPU while another waits for one.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from acb.client import visible


class Wishes(NamedTuple):
    """Fields of the Hello, under its names."""

    priority: int = 0
    weight: float = 1.0
    count: int = 1  # type: ignore[assignment]  # hides tuple.count, which nobody misses; 0: a gang's, not said
    gang: str = ""
    gang_size: int = 0
    rank: int = 0


def of_this_process() -> Wishes:
    """As the environment says; what cannot be understood there counts as not said."""
    environ = os.environ
    wishes = Wishes(
        priority=_whole(environ.get("ACB_PRIORITY"), 0, -1000),
        weight=_positive(environ.get("ACB_WEIGHT")),
        count=_whole(environ.get("ACB_GPUS"), 1, 1),
    )
    if not environ.get("ACB_SIMULATED"):
        wishes = wishes._replace(count=len(visible.chosen(wishes.count)) or wishes.count)
    size, rank = _whole(environ.get("LOCAL_WORLD_SIZE"), 1, 1), _whole(environ.get("LOCAL_RANK"), -1, -1)
    if size > 1 and 0 <= rank < size and "TORCHELASTIC_RUN_ID" in environ:
        # One port a torchrun and node; after a restart of its workers it is still the same gang.
        gang = f"torchrun {environ['TORCHELASTIC_RUN_ID']} {environ.get('MASTER_PORT', '')}"
        count = wishes.count if environ.get("ACB_GPUS") else 0
        return wishes._replace(count=count, gang=gang, gang_size=size, rank=rank)
    return wishes


def visible_gpus() -> int:
    """How many GPUs the program is to see before it is bound to any."""
    wishes = of_this_process()
    return max(wishes.count, wishes.gang_size)


def _whole(text: str | None, otherwise: int, least: int) -> int:
    try:
        number = int(text or otherwise)
    except ValueError:
        return otherwise
    return number if least <= number <= 1000 else otherwise


def _positive(text: str | None) -> float:
    try:
        number = float(text or 1.0)
    except ValueError:
        return 1.0
    return number if 0 < number <= 1000 else 1.0
