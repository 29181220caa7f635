"""Who keeps others waiting because its process is stopped, by Ctrl-Z say: a person must be told, who alone can help.

Nothing is taken from a stopped process: its memory is on the GPU, and it may be in the middle of a computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from acb import processes
from acb.broker.state import Client, Gpu

EVERY = 2.0
"""Seconds that a client may leave a question of the broker's unanswered before it is looked at, and between looks."""


class Stopped:
    """Looks at the processes from which an answer is expected; `is_stopped` tells by the process id."""

    def __init__(self, is_stopped: Callable[[int], bool] = processes.stopped) -> None:
        self._is_stopped = is_stopped
        self._next: float | None = None
        self._known: dict[int, Client] = {}

    def due(self, gpus: list[Gpu], now: float) -> float | None:
        """When to look next, in the seconds of `now`; None: nobody owes an answer."""
        if not self._known and not any(_owes(client) for gpu in gpus for client in gpu.occupants.values()):
            self._next = None
        elif self._next is None:
            self._next = now + EVERY
        return self._next

    def look(self, gpus: list[Gpu], clients: Mapping[int, Client], now: float) -> Iterator[str]:
        """A sentence for each client that is found stopped, once until it goes on, and one then; none before it is
        due()."""
        if self._next is None or now < self._next:
            return
        self._next = now + EVERY
        owing = {client.id: client for gpu in gpus for client in gpu.occupants.values() if _owes(client)}
        asked = owing | {number: client for number, client in self._known.items() if number in clients}
        found = {number: client for number, client in sorted(asked.items()) if self._is_stopped(client.pid)}
        known, self._known = self._known, found
        for number, client in found.items():
            if number not in known:
                yield words(client)
        for number, client in known.items():
            if number in clients and number not in found:
                yield f"process {client.pid} ({client.name}) goes on"


def words(client: Client) -> str:
    """One sentence for a person."""
    what = "has its memory on" if client.evacuating else "holds"
    which = " and ".join(str(gpu.ordinal) for gpu in client.gpus)
    return (
        f"process {client.pid} ({client.name}) is stopped and {what} GPU {which}, for which others wait; "
        f"{processes.going_on(client.pid)}"
    )


def _owes(client: Client) -> bool:
    """Whether it is to give its lease back, or to move its memory; of who is absent a person has been told."""
    return not client.absent and ((client.lease and client.revoked) or (client.evacuating and not client.suspending))
