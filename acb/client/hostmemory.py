"""An evacuation is not begun where host memory would run out half-way: that would cost the program.

Memory that is only set aside, and not written to yet, is available still as far as the kernel can tell. So what an
evacuation is going to write is claimed, for others of the same program, which may be another framework's, to leave it.
"""

from __future__ import annotations

import os

from acb import hostmemory
from acb.client.evacuation import EvacuationError
from acb.config import format_size
from acb.hostmemory import RESERVE

__all__ = ["RESERVE", "Claim", "available_bytes"]

_claims: list[Claim] = []


class Claim:
    """Host memory that will be written to, of `nbytes`. Until it is closed others of this process do not count on it.

    Only one thread of a process evacuates at a time, so there is no lock.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        _claims.append(self)

    def cover(self, nbytes: int) -> None:
        """Make it at least this much. Raises EvacuationError, with nothing changed, where that would not fit."""
        free = available_bytes()
        more = nbytes - self.nbytes
        if more <= 0:
            return
        if free is not None and free < more + RESERVE:
            raise EvacuationError(
                f"{format_size(nbytes)} do not fit into host memory, of which "
                f"{format_size(max(0, free + self.nbytes))} are available"
            )
        self.nbytes = nbytes

    def written(self, nbytes: int) -> None:
        """So much of it is in use now, which the kernel knows."""
        self.nbytes = max(0, self.nbytes - nbytes)

    def close(self) -> None:
        """Nothing more will be written. May be called again."""
        if self in _claims:
            _claims.remove(self)


os.register_at_fork(after_in_child=_claims.clear)  # a child has no part in what its parent was about to do


def available_bytes() -> int | None:
    """Host memory that this process could still take, beyond what is claimed; None when the kernel does not say."""
    free = hostmemory.available_bytes()
    return None if free is None else free - sum(claim.nbytes for claim in list(_claims))
