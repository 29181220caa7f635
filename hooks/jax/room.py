"""Repeats what ran out of GPU memory, once the broker has made room; otherwise the program sees jax's own error."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from acb.client import runtime
from acb.hooks.jax.internals import like, thread

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_ASKED = re.compile(r"allocat(?:e|ing)\s+([\d.]+)\s*(?:([KMGT])i?)?(?:B|bytes)", re.IGNORECASE)


def out_of_memory(error: BaseException) -> bool:
    """Whether jax says that a device's memory is exhausted: in errors of several classes, a plain ValueError of its C++
    fast path among them.
    """
    return str(error).startswith("RESOURCE_EXHAUSTED")


TRIES = 3
"""Times that a call is tried again."""


def asked_for(error: BaseException) -> int:
    """The bytes that an out-of-memory error says were wanted; 0 when it does not say."""
    match = _ASKED.search(str(error))
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0


def again_with_more_room(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same callable, called by call_with_room()."""

    @like(original)
    def roomy(*args: Any, **kwargs: Any) -> Any:
        return call_with_room(original, args, kwargs)

    return roomy


def call_with_room(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call it; out of memory, ask for room and call it again, unless that would not be the same call.

    A failed computation may have consumed donated arguments already; then it is not repeated.
    """
    for _ in range(TRIES):
        try:
            return function(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            if thread.passes or not out_of_memory(error) or _consumed((args, kwargs)):
                raise
            if not runtime.client().more_room(asked_for(error) or 1):
                raise
    return function(*args, **kwargs)  # the room is there by the broker's books, but not for this: jax's own error


def _consumed(arguments: Any) -> bool:
    """Whether any array in these, however deep in a tree that jax knows, no longer has its data."""
    from jax.tree_util import tree_leaves

    try:
        return any(map(_deleted, tree_leaves(arguments)))
    except Exception:  # a tree of the program's own cannot be taken apart: nobody can tell
        return True


def _deleted(leaf: Any) -> bool:
    try:
        return bool(leaf.is_deleted())
    except Exception:  # no array
        return False
