"""Clients of which nobody knows whether the driver has moved their memory, until the driver has told.

Either the broker before this one noted so, a note that is made before the driver is asked, and struck out after it has
answered: it may be wrong. Or the driver had it, and an attempt to bring it back has ended without anybody knowing how.

As long as clients of the broker before are still to come, the memory counts as on the host, so that what they hold
finds its place in the books. Before anything is granted it counts as on the GPU, as far as it can be there, as that of
a client that is just being suspended: so nobody is given its room, nor is it granted or asked for anything, before the
driver has told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from acb.broker.room import Room
from acb.broker.state import Client, Gpu


class _Doubt(NamedTuple):
    nbytes: int
    origin: Gpu | None


class Doubts:
    """See the module. `park` books that the driver has so many bytes of a client on the host."""

    def __init__(self, clients: Mapping[int, Client], room: Room, park: Callable[[Client, int], None]) -> None:
        self._clients = clients
        self._room = room
        self._park = park
        self._doubts: dict[int, _Doubt] = {}

    def __contains__(self, client: int) -> bool:
        return client in self._doubts

    def begin(self, client: Client) -> None:
        """It has been parked, and may be on the GPU all the same."""
        self._doubts[client.id] = _Doubt(client.parked, client.origin)

    def end(self, client: Client) -> None:
        """It is gone."""
        self._doubts.pop(client.id, None)

    def book(self, now: float) -> None:
        """Before anything is granted: count on the GPU what may be there, next to what the others have by now."""
        for number, doubt in self._doubts.items():
            client = self._clients[number]
            if client.suspended:
                self._take_back(client)
                client.evacuating = client.suspending = True
                client.evacuation_at = now
            client.resident = self._fitting(client, doubt)
            self._room.settle(client)

    def told(self, client: Client, *, suspended: bool) -> None:
        """The driver has its memory on the host, or not."""
        doubt = self._doubts.pop(client.id)
        if suspended:
            if not client.suspended:
                self._park(client, doubt.nbytes)
                client.origin, client.stays = doubt.origin, doubt.origin is not None
            return
        if client.suspended:
            self._take_back(client)
        client.evacuating = client.suspending = False
        self._room.measure(client, self._fitting(client, doubt))

    def _take_back(self, client: Client) -> None:
        """What _park() has booked."""
        client.suspended, client.origin = False, None
        del self._room.suspended[client.id]
        client.evacuated -= client.parked
        client.parked = 0

    def _fitting(self, client: Client, doubt: _Doubt) -> int:
        return min([doubt.nbytes, *(self._room.free(gpu, client) for gpu in client.gpus)])
