"""Gangs: which clients are one unit, that is, get their leases together."""

from __future__ import annotations

from acb.broker.schedule import Scheduler
from acb.broker.state import Client, Unit
from acb.protocol import Hello


class Gangs:
    """See the module."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._units: dict[str, Unit] = {}  # by the gang's name

    def join(self, client: Client, hello: Hello, now: float) -> None:
        """Find the client's unit, or make it one."""
        gang = hello.gang if 1 < hello.gang_size <= 4096 and 0 <= hello.rank < hello.gang_size else ""
        if hello.gpu >= 0 and not hello.gpus:
            gang = ""  # to the broker before this one it was no member
        unit = self._units.get(gang) if gang else None
        if unit is not None:
            other = unit.members.get(hello.rank)
            if other is not None and hello.gpus and not other.resident and not other.lease:
                self._part(other, now)  # this one was the member, to the broker before
            elif other is not None or unit.size != hello.gang_size:
                # A child of a member, or somebody of the same name: it is not one of those that run together.
                gang, unit = "", None
        if unit is None:
            size = hello.gang_size if gang else max(1, hello.count)
            weight = hello.weight if 0 < hello.weight < 1e6 else 1.0
            unit = Unit(size, gang, min(1000, max(-1000, hello.priority)), weight)
            if gang:
                self._units[gang] = unit
        if gang and hello.count not in (0, hello.gang_size):
            client.refusal = (
                f"process {client.pid} was started with --gpus {hello.count} and is one of {hello.gang_size} that run "
                f"together, each on a GPU of its own; leave --gpus out, or make it {hello.gang_size}"
            )
        client.rank = hello.rank if gang else 0
        client.unit = unit
        unit.members[client.rank] = client
        for gpu in client.gpus:
            gpu.bound.add(client.id)

    def forget(self, unit: Unit) -> None:
        """Its last member is gone."""
        if unit.gang:
            del self._units[unit.gang]

    def _part(self, client: Client, now: float) -> None:
        """Take a client that has nothing out of its gang."""
        gang = client.unit
        for gpu in client.gpus:
            gpu.bound.discard(client.id)
        del gang.members[client.rank]
        if not gang.wanting():
            self._scheduler.dequeue(gang, now)
        client.rank, client.unit = 0, Unit(1, "", gang.priority, gang.weight, {0: client})
        if client.waiting:
            self._scheduler.enqueue(client.unit, now)
