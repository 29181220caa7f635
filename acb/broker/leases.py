"""Leases: how one is granted, at once or piece by piece, and kept."""

from __future__ import annotations

from collections.abc import Callable

from acb.broker import migration
from acb.broker.policies import Policy
from acb.broker.room import Room
from acb.broker.state import Client, Gpu
from acb.protocol import Grant, Headroom, Message, Revoke


class Leases:
    """See the module."""

    def __init__(self, policy: Policy, room: Room, send: Callable[[int, Message], None]) -> None:
        self._policy = policy
        self._room = room
        self._send = send

    def grant(self, client: Client, now: float) -> None:
        """Give the client the lease with the room that there is; it hears of it when its memory is not the driver's."""
        gpus = client.gpus
        client.headroom = min([min(self._room.want(client, gpu), self._room.free(gpu, client)) for gpu in gpus])
        client.waiting, client.lease, client.emptied = False, True, False
        client.granted_at = client.started_at = now
        client.peak_before = client.peak
        self._room.settle(client)
        for gpu in gpus:
            gpu.holders.add(client.id)
        if client.suspended:
            client.resuming = True
            self._send(client.id, migration.resume(client))
        else:
            self._tell_granted(client)

    def _tell_granted(self, client: Client) -> None:
        gpus, unit = client.gpus, client.unit
        several = len(unit.gpus) > 1
        visible = ",".join([gpu.visible for gpu in unit.gpus]) if several else gpus[0].visible
        ordinals = ",".join([str(gpu.ordinal) for gpu in unit.gpus]) if several else ""
        coming = max(0, client.promised - client.headroom)
        beside = self._room.beside(client)
        self._send(client.id, Grant(gpus[0].ordinal, visible, client.headroom, ordinals, coming, beside))

    def follow(self, gpu: Gpu, client: Client) -> bool:
        """Whether the client may come in behind those who are leaving: it can, a piece is there, and all will be."""
        leaving = [other for other in gpu.occupants.values() if other.leaving and other is not client]
        want = self._room.want(client, gpu)
        if (
            not self._room.follows(gpu, client)
            or not any(other.in_pieces for other in leaving)
            or want > self._room.free(gpu, client) + sum([other.resident for other in leaving])
        ):
            return False
        client.promised = want
        return True

    def advance(self, client: Client, gpu: Gpu, now: float) -> None:
        """Hand a client that brings its memory back what others have left since; at last with what there is."""
        promised = min(client.promised, max(client.headroom, self._room.want(client, gpu)))
        complete = self._room.make(gpu, client, promised, now)
        headroom = max(client.headroom, min(promised, self._room.free(gpu, client)))
        client.promised = promised if not complete and self._room.coming(gpu, client) else 0
        if headroom > client.headroom or not client.promised:
            client.headroom = headroom
            self._room.settle(client)
            self._send(client.id, Headroom(headroom, max(0, client.promised - headroom)))

    def resumed(self, client: Client, now: float) -> None:
        """The driver has brought the memory of a client that has the lease back: now it may go on."""
        client.resuming = client.suspended = False
        client.origin = None
        del self._room.suspended[client.id]
        client.started_at = now
        self._tell_granted(client)
        if client.unit.preempt_at is not None:
            self._send(client.id, Revoke(max(0.0, client.unit.preempt_at - now)))

    def keep(self, client: Client, now: float, *, alone: bool) -> bool:
        """A client of a broker before this one says that it holds the lease: whether it may keep it.

        Unless it is `alone`, others have still to say what they have, and it is promised no more than it has needed.
        """
        unit = client.unit
        if not unit.active:
            if any(gpu.full for gpu in unit.gpus):
                return False
            unit.active, unit.granted_at = True, now
            self._policy.joined(unit, now)
            for gpu in unit.gpus:
                gpu.units.append(unit)
        client.lease, client.granted_at, client.started_at = True, now, now
        client.peak_before = client.peak
        for gpu in client.gpus:
            gpu.holders.add(client.id)
        self.widen(client, None if alone else max(client.resident, client.peak))
        return True

    def widen(self, client: Client, most: int | None = None) -> None:
        """Promise a holder what it should have, as far as there is room, or at most so much."""
        gpus = client.gpus
        room = min([min(self._room.want(client, gpu), self._room.free(gpu, client)) for gpu in gpus])
        client.headroom = max(client.headroom, room if most is None else min(room, most))
        self._room.settle(client)
