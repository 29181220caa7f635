"""Which stream each piece of GPU memory belongs to.

PyTorch's allocator hands freed memory out again without waiting for the GPU, but only to the stream for which it was
allocated. Memory that comes back from the host has to be that stream's again: under another one, what the program frees
could be overwritten while its own stream still reads it.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

cuda: Any = torch.cuda

DEFAULT = 0
"""The handle (cudaStream_t) of every GPU's default stream."""


class Owners:
    """The streams of an allocator's segments, as a snapshot lists them."""

    def __init__(self, segments: Iterable[Mapping[str, Any]]) -> None:
        spans = sorted((int(s["address"]), int(s["total_size"]), int(s["stream"])) for s in segments)
        self._begins = [address for address, _, _ in spans]
        self._spans = spans

    def of(self, address: int) -> int:
        """The handle of the stream whose memory is at this address; DEFAULT if nobody knows."""
        place = bisect.bisect_right(self._begins, address) - 1
        if place < 0:
            return DEFAULT
        begin, nbytes, stream = self._spans[place]
        return stream if address < begin + nbytes else DEFAULT


def owners() -> Owners:
    """Of all memory of this process as it is now. On failure none are known: all is the default stream's."""
    try:
        return Owners(_segments())
    except Exception:  # it is there for debugging, and no promise of PyTorch's
        return Owners(())


def _segments() -> Any:
    try:
        return cuda.memory_snapshot(include_traces=False)  # much less work, since 2.10
    except TypeError:
        return cuda.memory_snapshot()


class Streams:
    """Contexts in which memory is allocated for a certain stream."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Any] = {}

    def on(self, ordinal: int, handle: int) -> Any:
        """For this stream of that GPU; nothing is ever run on it by way of this."""
        if handle == DEFAULT:
            return contextlib.nullcontext()
        stream = self._known.get((ordinal, handle))
        if stream is None:
            stream = self._known[ordinal, handle] = cuda.ExternalStream(handle, device=ordinal)
        return cuda.stream(stream)
