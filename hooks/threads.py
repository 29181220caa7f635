"""Tells the framework hooks of every Python thread that starts, on that thread, before the program's own code."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

_callbacks: list[Callable[[], None]] = []


def on_thread_start(callback: Callable[[], None]) -> None:
    """Run `callback()` at the start of every Python thread from now on, on that thread, but for acb's own.

    Reaches threads made with `threading` (and so with concurrent.futures, asyncio's executors and pools), and those
    made with `_thread.start_new_thread`.
    """
    if not _callbacks:
        _patch_threading()
        _patch_start_new_thread()
    _callbacks.append(callback)


def _run_callbacks() -> None:
    for callback in _callbacks:
        try:
            callback()
        except Exception as error:  # a hook must not cost the program its thread
            from acb.client.runtime import warn_once

            warn_once(f"thread-start:{callback!r}", f"a new thread could not be instrumented: {error!r}")


def _patch_threading() -> None:
    """Wrap Thread._bootstrap_inner, where every thread of `threading` begins (subclasses override run(), not this)."""
    original: Any = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    @functools.wraps(original)
    def _bootstrap_inner(self: threading.Thread) -> None:
        if not self.name.startswith("acb-"):
            _run_callbacks()
        original(self)

    threading.Thread._bootstrap_inner = _bootstrap_inner  # type: ignore[attr-defined]


def _patch_start_new_thread() -> None:
    """Wrap _thread.start_new_thread for programs that call it directly; `threading` keeps its own reference to it."""
    import _thread

    original = _thread.start_new_thread

    @functools.wraps(original)
    def start_new_thread(function: Callable[..., Any], args: tuple[Any, ...], *rest: Any) -> int:
        def begin(*a: Any, **k: Any) -> Any:
            _run_callbacks()
            return function(*a, **k)

        return original(begin, args, *rest)

    _thread.start_new_thread = start_new_thread
