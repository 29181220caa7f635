"""Tells the framework hooks of every Python thread, on that thread: before the program's own code, and after it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

_at_start: list[Callable[[], None]] = []
_at_end: list[Callable[[], None]] = []


def on_thread_start(start: Callable[[], None], end: Callable[[], None] | None = None) -> None:
    """Run `start()` at the start of every Python thread from now on, and `end()` at its end, on that thread.

    Reaches threads made with `threading` (and so with concurrent.futures, asyncio's executors and pools), and those
    made with `_thread.start_new_thread`; acb's own threads are left out. When `end()` runs, `threading` has already
    forgotten the thread: it must not ask for current_thread().
    """
    if not _at_start:
        _patch_threading()
        _patch_start_new_thread()
    _at_start.append(start)
    if end is not None:
        _at_end.insert(0, end)


def _run(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        try:
            callback()
        except Exception as error:  # a hook must not cost the program its thread
            from acb.client.runtime import warn_once

            warn_once(f"thread:{callback!r}", f"a thread could not be instrumented: {error!r}")


def _patch_threading() -> None:
    """Wrap Thread._bootstrap_inner, where every thread of `threading` begins (subclasses override run(), not this)."""
    original: Any = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    @functools.wraps(original)
    def _bootstrap_inner(self: threading.Thread) -> None:
        if self.name.startswith("acb-"):
            original(self)
            return
        _run(_at_start)
        try:
            original(self)
        finally:
            _run(_at_end)

    threading.Thread._bootstrap_inner = _bootstrap_inner  # type: ignore[attr-defined]


def _patch_start_new_thread() -> None:
    """Wrap _thread.start_new_thread for programs that call it directly; `threading` keeps its own reference to it."""
    import _thread

    original = _thread.start_new_thread

    @functools.wraps(original)
    def start_new_thread(*args: Any, **kwargs: Any) -> int:
        if len(args) < 2 or not callable(args[0]):
            return original(*args, **kwargs)  # which says what is wrong
        function = args[0]

        @functools.wraps(function)
        def begin(*a: Any, **k: Any) -> Any:
            _run(_at_start)
            try:
                return function(*a, **k)
            finally:
                _run(_at_end)

        return original(begin, *args[1:], **kwargs)

    _thread.start_new_thread = start_new_thread
