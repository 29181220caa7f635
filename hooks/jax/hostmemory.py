"""Whether there is host memory for an evacuation, before it starts: running out half-way would cost the program its
life.
"""

from __future__ import annotations

from acb.client.evacuation import EvacuationError

_MARGIN = 64 << 20
"""Bytes that must stay available."""


def available() -> int | None:
    """Bytes of host memory that can be had without swapping; None where the kernel does not say."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None


def require_host_memory(nbytes: int) -> None:
    """Raise EvacuationError unless `nbytes` fit into host memory."""
    free = available()
    if free is not None and free < nbytes + _MARGIN:
        raise EvacuationError(f"{nbytes} bytes do not fit into host memory, of which {free} bytes are available")
