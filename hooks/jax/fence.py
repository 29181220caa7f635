"""Waits for calls that were already under way in C++, uncounted, when the fast path was turned off.

Such a call has let go of the interpreter's lock, and nothing in Python says that it is there. But its thread stands
still in Python: at the instruction that made the call. So the fence notes where every thread stands when the option
is turned, and waits until each has moved on. A thread that has not moved within LIMIT is taken to wait for
something else, such as a file or a lock; whatever it calls next is counted.

What this guarantees: no call of a compiled function that takes less than LIMIT to hand its work to the device is
missed. The simulated GPU never takes the fast path, so there nothing is missed at all.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import threading
import time

from acb.client import runtime

LIMIT = 0.05
"""Seconds that the fence waits for a thread that stands still."""

_STEP = 0.0002
_CALLS_OTHERS = {
    "run",
    "_worker",
    "worker",
    "__call__",
    "wrapper",
    "inner",
    "_run",
    "_bootstrap_inner",
    "__get__",
    "call",
}
"""Functions of the standard library that call what a program gave them, straight from C++'s caller's frame."""


@functools.cache
def _harmless_roots() -> tuple[str, ...]:
    """Directories whose code calls no compiled function of jax by itself: the standard library's and acb's."""
    acb = os.path.dirname(os.path.dirname(os.path.abspath(runtime.__file__)))
    return (sysconfig.get_paths()["stdlib"] + os.sep, acb + os.sep)


def _harmless(filename: str, function: str) -> bool:
    known = filename.startswith(_harmless_roots()) and "site-packages" not in filename
    return (known and function not in _CALLS_OTHERS) or filename.startswith("<frozen ")


class Fence:
    """Remembers where threads stood. Used by the agent's thread only."""

    def __init__(self) -> None:
        self._stood: dict[int, tuple[int, int]] = {}
        self._deadline = 0.0

    def begin(self) -> None:
        """Note where every thread stands now."""
        mine = threading.get_ident()
        self._stood = {
            ident: (id(frame), frame.f_lasti)
            for ident, frame in sys._current_frames().items()
            if ident != mine and not _harmless(frame.f_code.co_filename, frame.f_code.co_name)
        }
        self._deadline = time.monotonic() + LIMIT

    def wait(self) -> None:
        """Block until every thread has moved on, or LIMIT has passed since begin()."""
        pause = threading.Event()
        while self._stood:
            now = {ident: (id(frame), frame.f_lasti) for ident, frame in sys._current_frames().items()}
            self._stood = {ident: place for ident, place in self._stood.items() if now.get(ident) == place}
            if not self._stood or time.monotonic() >= self._deadline:
                self._stood = {}
                return
            pause.wait(_STEP)
