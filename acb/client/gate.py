"""The gate that every GPU entry passes: open while the lease is held, and a flag test then.

It is Dekker's handshake under the GIL. A thread raises its own depth, then looks at `closed`; the agent raises
`closed`, then looks at every thread's depth. Whichever comes second sees the other, so no thread can start GPU work
after the agent has seen a safe point, and an open gate takes no lock. (A free-threaded interpreter gives no such order;
acb runs with the GIL.)
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

MIN_GAP = 0.0005
"""Seconds: shorter gaps between regions are part of computing and are not remembered."""

LONG_GAP = 0.05
"""Seconds: a longer gap ends a phase, unless the agent sits out even longer ones."""


class GateListener(Protocol):
    """Somebody who must know when the gate changes, such as a hook that keeps a framework's own fast path."""

    def watch(self) -> None:
        """Another client waits: from now on every entry must be counted with enter() and exit()."""

    def close(self) -> None:
        """The gate has closed: from now on every entry must stop in enter()."""

    def open(self) -> None:
        """The lease is held and nobody waits: entries may take their fastest way."""


class ThreadState:
    """One thread at the gate: how deep it is in regions (0: outside)."""

    __slots__ = ("__weakref__", "depth", "ident", "marked")

    def __init__(self) -> None:
        self.depth = 0
        self.marked = 0
        self.ident = threading.get_ident()


class _Local(threading.local):
    """Gives each thread its ThreadState on first use."""

    def __init__(self, gate: Gate) -> None:
        self.state = ThreadState()
        self.life = _Life(gate, self.state)
        with gate._joining:  # or a thread that joins meanwhile would be forgotten, and its regions not be seen
            gate._states[:] = [ref for ref in gate._states if ref() is not None]
            gate._states.append(weakref.ref(self.state))


class _Life:
    """Ends with its thread, and with it a phase that the thread began and never ended."""

    __slots__ = ("_gate", "_state")

    def __init__(self, gate: Gate, state: ThreadState) -> None:
        self._gate = gate
        self._state = state

    def __del__(self) -> None:
        if self._state.depth:
            self._state.depth = 0
            try:
                self._gate._idle()
            except Exception:
                pass  # the interpreter is being taken down


class Gate:
    """Lets regions in while the lease is held; tells the agent when no thread is inside.

    `closed` and `watched` are read by hooks without a lock. Only the agent calls watch(), close() and open().
    """

    def __init__(
        self, ask: Callable[[], None], idle: Callable[[], None], listen: Callable[[], bool] = lambda: False
    ) -> None:
        """`ask()` is called, without locks held, by a thread that must wait, and may raise; then `listen()`, which may
        wait on that thread until open() has been called, and returns False if it did not; `idle()` after a watched
        region ends."""
        self.closed = True
        self.watched = False
        self.last_exit = self.last_entry = self.phase_began = time.monotonic()
        self.long_gap = LONG_GAP
        self.last_thread: ThreadState | None = None
        self.gaps: deque[float] = deque(maxlen=64)
        self._refusals = 0
        self._ask = ask
        self._listen = listen
        self._idle = idle
        self._waiting = 0
        self._states: list[weakref.ref[ThreadState]] = []
        self._joining = threading.RLock()
        self._local = _Local(self)
        self._changing = threading.RLock()
        self._opened = threading.Condition(self._changing)
        self._listeners: list[GateListener] = []

    # --- the user's threads ---------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Begin a region on this thread; blocks while the gate is closed. Nests at no cost.

        Follow at once with ``try: ... finally: gate.exit()``.
        """
        state = self._local.state
        if state.depth:
            state.depth += 1
            return
        state.depth = 1
        if self.closed:
            self._wait(state)
        now = time.monotonic()
        gap = now - self.last_exit
        if gap > MIN_GAP:
            self.gaps.append(gap)
            self.last_entry = now
            if gap > self.long_gap:
                self.phase_began = now
        self.last_thread = state

    def exit(self) -> None:
        """End a region on this thread."""
        state = self._local.state
        if state.depth > 1:
            state.depth -= 1
            return
        self.last_exit = time.monotonic()
        state.depth = 0
        if self.watched:
            self._idle()

    def inside(self) -> bool:
        """Whether this thread is in a region."""
        return self._local.state.depth > 0

    def mark(self) -> None:
        """This thread begins something that is surely not GPU work, such as a wait for a child process."""
        state = self._local.state
        state.marked += 1
        if self.watched and not state.depth:
            self._idle()

    def unmark(self) -> None:
        """What mark() announced is over."""
        self._local.state.marked -= 1

    def _wait(self, state: ThreadState) -> None:
        """Block until the gate is open; `state.depth` is 1 and the gate was seen open when this returns."""
        state.depth = 0
        with self._changing:
            if not self._waiting and self.last_thread is not None:
                gap = time.monotonic() - self.last_exit  # a pause in which the GPU was given up is one all the same
                if gap > MIN_GAP:
                    self.gaps.append(gap)
            self._waiting += 1
        try:
            while not sys.is_finalizing():  # then the agent's thread is gone, and nothing will open the gate any more
                if self.watched:
                    self._idle()  # the agent may have seen this thread inside for a moment
                refusals = self._refusals
                self._ask()
                if not self._listen():
                    with self._opened:
                        # The time limit only so that a lease is asked for again when the connection broke in between.
                        end = time.monotonic() + 1.0
                        while self.closed and self._refusals == refusals and (left := end - time.monotonic()) > 0:
                            self._opened.wait(left)
                state.depth = 1
                if not self.closed:
                    return
                state.depth = 0
            state.depth = 1
        finally:
            with self._changing:
                self._waiting -= 1

    # --- the agent -------------------------------------------------------------------------------------------------

    def add_listener(self, listener: GateListener) -> None:
        """Tell `listener` of every change from now on, beginning with the present state."""
        with self._changing:
            self._listeners.append(listener)
            if self.closed:
                self._tell("close", [listener])
            elif self.watched:
                self._tell("watch", [listener])

    def watch(self) -> None:
        """Ask to be told, through `idle`, whenever a region ends."""
        with self._changing:
            self.watched = True
            self._tell("watch", self._listeners)

    def close(self) -> None:
        """Let no further region begin. Regions already open go on: wait for busy() to say no."""
        with self._changing:
            self.watched = True
            self.closed = True
            self._tell("close", self._listeners)

    def open(self, *, watched: bool = False) -> None:
        """Let regions in, and wake who waits; with `watched`, as after watch()."""
        with self._changing:
            self.watched = watched
            self._tell("watch" if watched else "open", self._listeners)
            now = time.monotonic()
            if self.closed:
                self.phase_began = now
            self.last_exit = now  # waiting for the lease is no gap of the program's
            self.closed = False
            self._opened.notify_all()

    def refuse(self) -> None:
        """Wake who waits, to ask again: the agent has an answer that is no lease."""
        with self._changing:
            self._refusals += 1
            self._opened.notify_all()

    def busy(self) -> bool:
        """Whether any thread is in a region."""
        for ref in self._states[:]:
            state = ref()
            if state is not None and state.depth > 0:
                return True
        return False

    def waiting(self) -> bool:
        """Whether a thread stands at the gate."""
        return self._waiting > 0

    def expected(self) -> bool:
        """Whether a thread that waited at the gate is about to come in: it is open, but the thread has not run yet."""
        return self._waiting > 0 and not self.closed

    def marked(self) -> bool:
        """Whether the thread that last used the GPU has said that it does something else now."""
        thread = self.last_thread
        return thread is not None and thread.marked > 0

    def _tell(self, change: str, listeners: list[GateListener]) -> None:
        """Call one method of these listeners; one that raises is not told anything any more."""
        for listener in list(listeners):
            try:
                getattr(listener, change)()
            except Exception as error:
                self._listeners.remove(listener)
                from acb.client.runtime import warn_once

                warn_once(
                    f"listener:{listener!r}", f"{type(listener).__name__} does not work and is left out: {error!r}"
                )
