"""What the devices are told of leases, and what they tell of memory; the journal is told of leases, too.

A simulated card checks every operation, and says at any moment what a process has there. A real one is asked by the
meter, now and then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from acb.broker.core import Broker
from acb.broker.journal import Journal, Place
from acb.broker.meter import Meter
from acb.broker.state import Client, Gpu
from acb.protocol import Evacuated, Holds, Message, MoreRoom, Restored, Yield


class Referee(Protocol):
    """What the server tells a device of its leases, and asks it; the simulated card checks every operation."""

    def set_holders(self, pids: Iterable[int] | None) -> None:
        """These processes, and no others, may use the GPU from now on; None: there is no broker any more."""

    def holds(self, pid: int) -> int:
        """Bytes that a process has there at this moment, whatever it says itself."""


class Referees:
    """Those of the core's GPUs, in their order, if these are simulated; `pool` is then the folder of the cards."""

    def __init__(
        self, core: Broker, referees: Sequence[Referee], meter: Meter | None, journal: Journal, pool: str
    ) -> None:
        self._core = core
        self._referees = {gpu.ordinal: referee for gpu, referee in zip(core.gpus, referees, strict=False)}
        self._meter = meter
        self._journal = journal
        self._pool = pool
        self._holders: list[set[int] | None] = [None for _ in core.gpus]  # as they were told; None: not yet
        self._silent: set[int] = set()

    def tell(self, silent: set[int]) -> None:
        """Before a client hears that it has a lease. `silent`: processes that may hold one of the broker before."""
        changed = False
        for index, gpu in enumerate(self._core.gpus):
            if self._holders[index] is None and self._core.recovering and not gpu.holders:
                continue  # who held the lease of the broker that died may run on meanwhile
            if gpu.holders != self._holders[index]:
                self._holders[index], changed = set(gpu.holders), True
                if gpu.ordinal in self._referees:
                    self._referees[gpu.ordinal].set_holders(self._pids(gpu))
        if changed or silent != self._silent:
            self._silent = silent
            self._journal.held_by(silent.union(*(self._pids(gpu) for gpu in self._core.gpus)))

    def _pids(self, gpu: Gpu) -> list[int]:
        return [self._core.clients[number].pid for number in sorted(gpu.holders)]

    def note_place(self, client: Client) -> None:
        """Let the next broker know where the client's memory is, should the client not be able to say so."""
        if client.bound:
            visible = [gpu.visible for gpu in client.unit.gpus]
            self._journal.bound(client.pid, Place(visible, client.name, client.unit.gang, client.rank, self._pool))

    def dismiss(self) -> None:
        """There is no broker any more."""
        for referee in self._referees.values():
            referee.set_holders(None)

    # --- memory ------------------------------------------------------------------------------------------------------

    def holds(self, gpu: Gpu, pid: int) -> int | None:
        """Bytes that a process has on a GPU now; None: nobody knows."""
        if gpu.ordinal in self._referees:
            return self._referees[gpu.ordinal].holds(pid)
        return self._meter.holds(gpu, pid) if self._meter is not None else None

    def held(self) -> Mapping[int, int]:
        """Bytes that clients, by id, have on the GPU now, as far as the devices say: the books lag behind a holder."""
        if self._meter is not None:
            return self._meter.held(self._core.gpus, self._core.clients)
        held: dict[int, int] = {}
        for client in self._core.clients.values() if self._referees else ():
            sizes = [self._referees[gpu.ordinal].holds(client.pid) for gpu in client.gpus]
            held |= {client.id: max(sizes)} if sizes else {}
        return held

    def corrected(self, client: Client | None, message: Message) -> Message:
        """The client's message with what the device says that it has there, where it can say."""
        if client is not None and self._referees and isinstance(message, (Yield, Evacuated, Restored, Holds, MoreRoom)):
            gpus = [gpu for gpu in client.gpus if gpu.ordinal in self._referees]
            held = [self._referees[gpu.ordinal].holds(client.pid) for gpu in gpus]
            if held and max(held) != message.resident:
                return replace(message, resident=max(held))
        return message
