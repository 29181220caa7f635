"""Takes every compiled call of jax through the gate, and keeps the C++ fast path while the gate is open.

A call of a compiled function normally never leaves C++. What decides whether it may is a key, and an option of jax
that is part of that key but of nothing else: turning it makes every call miss into Python, where it is counted as a
region, and turning it back brings the old entries, and so the fast path, back. Nothing is compiled again.

A counted call need not be a slow one: within its region the option is off again for this thread alone, so that the
call itself takes the fast path.

The option is also on, with the gate open, while others' memory lies on the GPU that could make way: a call that runs
out of memory in C++ never comes back to where it could be repeated, and a counted one does. That costs microseconds.

A call that began before the option was turned runs on in C++ without being counted. The fence (see there) waits for
it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from acb.client import runtime
from acb.hooks.jax.fence import Fence
from acb.hooks.jax.internals import Internals, on_gated, thread
from acb.hooks.jax.option import make_option
from acb.hooks.jax.room import call_with_room

WORTH_IT = 1 << 30
"""Bytes of others' memory for whose sake calls are counted: with less, what others have is little but CUDA contexts."""


class Miss(NamedTuple):
    """How a call began that has missed into Python."""

    cacheable: bool
    """Its entry may be cached with the fast path: its key surely has the option off."""
    keep: bool
    """Its entry may stay, without the fast path: its key surely has the option on."""


OPEN = Miss(True, True)
UNSURE = Miss(False, False)
NEVER = Miss(False, True)


class _Thread(threading.local):
    """What a thread knows of the option.

    `on_since` and `off_since` are the turns of the fast path in which the thread was last seen: its next call's key
    was made after that. `counted`: it is within a counted call, and the option is off for it.
    """

    on_since = -1
    off_since = -1
    counted = False


class FastPath:
    """The gate's listener: turns the option. Without a backend that is gated it leaves the fast path alone."""

    def __init__(self, internals: Internals) -> None:
        self._here = _Thread()
        self.never = False
        """Whether no call may ever take the fast path (the simulated GPU must see every array)."""
        self._fence = Fence()
        self._active = False
        self._on = True
        self._wanted = True
        self._turns = 0
        self._option = make_option(internals)

    def activate(self) -> None:
        """A gated backend is there: from now on follow the gate."""
        self._active = True
        self._turn(self._wanted)

    def open(self) -> None:
        self._turn(runtime.client().beside < WORTH_IT)

    def watch(self) -> None:
        if self._active and self._on and not self.never:
            # Calls on the fast path leave no trace: the last of them may have ended just now.
            runtime.client().gate.last_exit = time.monotonic()
        self._turn(False)

    def close(self) -> None:
        self._turn(False)
        self._fence.wait()

    def _turn(self, on: bool) -> None:
        self._wanted = on
        if not self._active or on is self._on:
            return
        if on:
            self._option.turn(False)
            self._turns += 1
            self._on = True
        else:
            self._on = False
            self._option.turn(True)
            if not self.never:
                self._fence.begin()

    def begins(self) -> Miss:
        """A call on this thread has missed into Python.

        Its key is sure only if the thread has been seen before since the option was last turned.
        """
        here = self._here
        if here.counted:
            return OPEN
        if self.never:
            return NEVER
        if self._on:
            sure = not self._active or here.on_since == self._turns
            here.on_since = self._turns
            return OPEN if sure else UNSURE
        sure = here.off_since == self._turns
        here.off_since = self._turns
        return NEVER if sure else UNSURE

    def counts(self, args: tuple[Any, ...]) -> bool:
        """Whether a call that has missed can be taken as a region on the fast path: the option is on."""
        return (
            self._active
            and not (self._on or self.never or self._here.counted or thread.passes)
            and any(_holds_gated(value, 3) for value in args)
        )

    def call_counted(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call, as a region, with the option off for this thread."""
        gate = runtime.client().gate
        gate.enter()
        try:
            self._here.counted = True
            try:
                with self._option.off_here():
                    return call_with_room(function, args, kwargs)
            finally:
                self._here.counted = False
        finally:
            gate.exit()


def _holds_gated(value: Any, depth: int) -> bool:
    """Whether an argument surely holds an array on a gated device; looks at the first parts of a tree only."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return depth > 0 and any(_holds_gated(part, depth - 1) for part in value[:2])
    return on_gated(value)
