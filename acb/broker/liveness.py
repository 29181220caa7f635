"""Whether suspended clients that do not ask for their lease can still ask: one that is blocked in the driver cannot.

A call that no hook sees, of ctypes or a C++ extension, is stopped by the driver and not at the gate. Where it holds the
interpreter's lock, no thread of the program runs any more, the agent's neither, and nobody would ever ask. So the
broker pings such clients. One that is silent, although it is neither stopped nor short of a CPU, and that computes
nothing, is taken to be blocked there, which counts as asking. A mistake costs a swap.

Not seen: a blocked call that has let the lock go, for the agent answers then (and asks by itself, if it knows of the
call: acb.client.outside), and a program whose other threads compute on without the lock, as long as they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from acb import processes
from acb.broker.state import Client

EVERY = 1.0
"""Seconds between two looks."""

SILENCE = 3.0
"""Seconds without an answer, in which the process also does nothing, until it is taken to be blocked."""

IDLE = 0.1
"""CPUs: what a process uses at most that computes nothing. Every thread that waits for the interpreter's lock wakes
200 times a second to look for it."""


class Findings(NamedTuple):
    """Ids of clients: whom to send a Ping, and who is blocked."""

    ping: list[int]
    blocked: list[int]


@dataclass(slots=True)
class _Watch:
    """Of one client. `pinged`: it owes an answer; `quiet_since`: since when it has used no more CPU than `seconds`."""

    pinged: bool = False
    quiet_since: float = 0.0
    seconds: float = 0.0


class Liveness:
    """Watches the clients that the driver has suspended; `now` is time.monotonic()'s."""

    def __init__(self, activity: Callable[[int], processes.Activity | None] = processes.activity) -> None:
        self._activity = activity
        self._watched: dict[int, _Watch] = {}
        self._next = 0.0

    def due(self, suspended: Mapping[int, Client]) -> float | None:
        """When to look next; None: there is nobody to look at."""
        return self._next if any(_silent(client) for client in suspended.values()) else None

    def answered(self, client: int) -> None:
        """The client has sent a Pong."""
        watch = self._watched.get(client)
        if watch is not None:
            watch.pinged = False

    def look(self, suspended: Mapping[int, Client], now: float) -> Findings:
        """Who is to be asked, and who has been silent for too long; when due() has come."""
        self._next = now + EVERY
        found = Findings([], [])
        silent = {number: client for number, client in suspended.items() if _silent(client)}
        self._watched = {number: self._watched.get(number) or _Watch() for number in silent}
        for number, client in silent.items():
            watch = self._watched[number]
            if not watch.pinged:
                watch.pinged = True
                self._begin(watch, self._activity(client.pid), now)
                found.ping.append(number)
            elif self._blocked(watch, self._activity(client.pid), now):
                found.blocked.append(number)
        return found

    @staticmethod
    def _begin(watch: _Watch, activity: processes.Activity | None, now: float) -> None:
        watch.quiet_since, watch.seconds = now, activity.seconds if activity is not None else 0.0

    def _blocked(self, watch: _Watch, activity: processes.Activity | None, now: float) -> bool:
        quiet = now - watch.quiet_since
        if activity is None:
            return False  # it ends, or is of another pid namespace: nobody can tell
        if activity.stopped or activity.running or activity.seconds - watch.seconds > max(IDLE * quiet, 0.02):
            self._begin(watch, activity, now)
            return False
        return quiet >= SILENCE


def _silent(client: Client) -> bool:
    """Whether it should ask when it wants to go on, and has not."""
    return client.suspended and not (client.lease or client.waiting or client.refusal)
