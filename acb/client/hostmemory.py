"""An evacuation is not begun where host memory would run out half-way: that would cost the program."""

from __future__ import annotations

from acb.client.evacuation import EvacuationError
from acb.config import format_size
from acb.hostmemory import RESERVE, available_bytes

__all__ = ["RESERVE", "available_bytes", "require"]


def require(nbytes: int) -> None:
    """Raise EvacuationError unless `nbytes` fit into host memory."""
    free = available_bytes()
    if free is not None and free < nbytes + RESERVE:
        raise EvacuationError(
            f"{format_size(nbytes)} do not fit into host memory, of which {format_size(max(0, free))} are available"
        )
