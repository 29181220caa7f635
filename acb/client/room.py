"""Room: how much GPU memory the broker has promised this process, and how more is asked for.

A thread of the program asks and waits, inside a region, and so does the agent when memory cannot come back. An answer
does not say whose it is; so only one thread asks at a time, and of several answers only the last counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from acb.client.connection import OUTAGE, Connection
from acb.client.memory import Memory
from acb.protocol import Grant, Headroom, MoreRoom
from acb.protocol import Room as RoomAnswer


class Room:
    """See the module. With `lock` held, the agent's, but for missing() and ask()."""

    def __init__(
        self, lock: threading.RLock, connection: Connection, memory: Memory, may_ask: Callable[[], bool]
    ) -> None:
        """`may_ask`: whether the lease is held, and a broker may answer, now or later."""
        self.headroom = 0
        self.coming = 0
        """Bytes of headroom that are still to come; until then memory may come back, but nothing run."""
        self.due = 0
        """Questions that the broker has not answered."""
        self._connection = connection
        self._memory = memory
        self._may_ask = may_ask
        self._lock = lock
        self._answer: RoomAnswer | None = None
        self._changed = threading.Condition(lock)
        self._asking = threading.RLock()  # one thread at a time

    def granted(self, grant: Grant | Headroom) -> None:
        """The broker says what there is."""
        self.headroom, self.coming = grant.headroom, grant.coming

    def missing(self, nbytes: int) -> int:
        """Bytes beyond what is held, for `nbytes` in all; 0: they have been promised."""
        with self._lock:
            resident = self._memory.resident()
            return nbytes - resident if nbytes > max(self.headroom, resident) else 0

    def ask(self, nbytes: int) -> str | None:
        """Ask for `nbytes` beyond what is held and wait: why there is no room; '' when there is; None when nobody
        answers. Without the lock, and not on the agent's thread."""
        with self._asking, self._lock:
            while self._may_ask():
                if self._connection.welcomed:
                    self._answer = None
                    self._send(nbytes)
                    while self._answer is None and self._connection.welcomed:
                        self._changed.wait()
                    if self._answer is not None:
                        granted, reason = self._answer.granted, self._answer.reason
                        if granted:
                            self.headroom = max(self.headroom, self._memory.resident() + nbytes)
                        return "" if granted else reason or "there is no room"
                # The broker died. Its successor will know more.
                lost_at = self._connection.lost_at
                left = OUTAGE if lost_at is None else lost_at + OUTAGE - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(left)
            return None

    def ask_to_restore(self) -> None:
        """There is no room for the memory that must come back: have the broker make some."""
        self._send(self._memory.evacuated)

    def _send(self, nbytes: int) -> None:
        self.due += 1
        self._connection.send(MoreRoom(self._memory.resident(), nbytes))

    def answered(self, answer: RoomAnswer) -> None:
        """The broker has answered one question."""
        self.due = max(0, self.due - 1)
        if not self._memory.unrestored and not self.due:  # else it is to a question that nobody waits with
            self._answer = answer
            self._changed.notify_all()

    def lost(self) -> None:
        """The broker is gone."""
        self.due = self.coming = 0
        self._changed.notify_all()

    def wake(self) -> None:
        """Whoever waits is to look again whether he may ask."""
        self._changed.notify_all()
