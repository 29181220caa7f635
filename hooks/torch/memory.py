"""Out of memory: calls that are safe to repeat ask the broker for room and are tried again."""

from __future__ import annotations

import re
from typing import Any

import torch

TRIES = 3
"""How often a call is repeated before the program sees its own error."""

OutOfMemoryError: Any = getattr(torch, "OutOfMemoryError", None) or torch.cuda.OutOfMemoryError

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB|TiB)")
_UNKNOWN = 256 << 20  # asked for when the error does not say


_NAMES = (
    "to cuda clone contiguous float half double bfloat16 new_empty new_zeros new_ones new_full new_tensor empty_like "
    "zeros_like ones_like full_like rand_like randn_like cat stack empty empty_strided zeros ones full arange eye "
    "linspace logspace rand randn randint randperm tensor as_tensor asarray scalar_tensor"
)
_REPEATABLE = frozenset(_NAMES.split())


def repeatable(func: Any) -> bool:
    """Whether an operation allocates first, changes nothing, and draws no random numbers before it has its memory."""
    return getattr(func, "__name__", "") in _REPEATABLE


def wanted_bytes(error: BaseException) -> int:
    """How many bytes PyTorch failed to allocate, from its message; a guess when it does not say."""
    match = _WANTED.search(str(error))
    return int(float(match[1]) * _UNITS[match[2]]) + 1 if match else _UNKNOWN


def more_room(nbytes: int) -> bool:
    """Ask the broker for room; a seam for tests."""
    from acb.client.runtime import client

    return client().more_room(nbytes)


def with_room(func: Any, args: Any, kwargs: Any) -> Any:
    """Call `func`, inside a region; on out-of-memory make room and call it again, at most TRIES times."""
    for _ in range(TRIES):
        try:
            return func(*args, **kwargs)
        except OutOfMemoryError as error:
            nbytes = wanted_bytes(error)
        # The error is gone here, and with it the failed call's frames and the memory that they held.
        if not _make_room(nbytes):
            break
    return func(*args, **kwargs)  # its error, if any, is the program's own


def _make_room(nbytes: int) -> bool:
    """Give back what the allocator caches and ask for `nbytes` more; a failure to ask is a no."""
    try:
        torch.cuda.empty_cache()
        return more_room(nbytes)
    except Exception:
        return False
