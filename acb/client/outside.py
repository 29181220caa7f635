"""Calls of the driver outside regions, such as page-locking a batch: they need no lease until the program is suspended.

The driver makes such a call wait then, and nobody would ask for the lease that ends this. Were each of them to ask, a
data loader would fetch the GPU back for every batch that it prepares in a CPU phase. So they are only noted, and one
that lasts from one of the broker's pings, which only suspended programs get, to the next counts as asking.

Only calls that let the interpreter's lock go are worth noting: of one that keeps it the broker hears no answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Outside:
    """The calls of this kind that the program's threads are in."""

    def __init__(self) -> None:
        self._calls: set[object] = set()
        self._pinged: set[object] = set()  # those of them that the last ping found

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function`, which is such a call."""
        call = object()
        self._calls.add(call)
        try:
            return function(*args, **kwargs)
        finally:
            self._calls.discard(call)

    def stuck(self) -> bool:
        """At a ping: whether a thread is still in a call in which it was at the last one."""
        before, self._pinged = self._pinged, self._calls.copy()
        return not before.isdisjoint(self._pinged)
