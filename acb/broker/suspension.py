"""Suspension: what the driver's answers mean for the clients whose memory it moves.

    on the GPU ──Suspend──▶ suspending ──▶ suspended ──lease, Resume──▶ resuming ──▶ runs
                                ▲              ▲                             │ not possible: again later, or
        in doubt (see `doubts`) ┘              └─────────────────────────────┘ behind the others; lost: refused
                   ▲                                                         │
                   └─────────────────────────────────────────────────────────┘ nobody knows, and others wait

A suspended client hears of its lease only when its memory is back. One of which the driver does not say whether it has
its memory gives its lease back when its time is over; until that is known, its memory counts on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from acb.broker.doubts import Doubts
from acb.broker.leases import Leases
from acb.broker.room import Room
from acb.broker.schedule import Scheduler
from acb.broker.state import Client, Found, Gpu
from acb.protocol import Message, Refused


class Suspension:
    """See the module."""

    def __init__(
        self,
        gpus: Sequence[Gpu],
        clients: Mapping[int, Client],
        room: Room,
        leases: Leases,
        scheduler: Scheduler,
        send: Callable[[int, Message], None],
    ) -> None:
        self._gpus = list(gpus)
        self._room = room
        self._leases = leases
        self._scheduler = scheduler
        self._send = send
        self.doubts = Doubts(clients, room, self._park)
        """Those of whom the driver has to be asked what it has; suspended() takes the answer."""

    def available(self, available: bool, *, migrates: bool) -> None:
        """Whether the driver can move what frameworks cannot; and whether it can bring it back on another GPU."""
        self._room.driver, self._room.migrates = available, available and migrates
        for client in list(self._room.unmovable.values()):
            self._room.cannot_move(client, client.unmovable)
        self._scheduler.touch_all()

    # --- the driver's answers ---------------------------------------------------------------------------------------

    def suspended(self, client: Client, problem: str, seconds: float, now: float, *, lost: bool) -> None:
        """Answer to Suspend, or about a client in doubt: its memory is on the host, '' being the problem; else it is
        where it was, or `lost`."""
        in_doubt = client.id in self.doubts
        if not (client.suspending or in_doubt):
            return
        client.unclear = False
        if in_doubt:
            self.doubts.told(client, suspended=lost or not problem)
            if lost:
                self._lose(client, problem, now)
        else:
            client.evacuating = client.suspending = False
            client.driver_problem = problem
            if not problem:
                self._park(client, client.resident)
                client.evacuation_seconds += max(0.0, seconds)
        self._room.cannot_move(client, client.unmovable)
        if client.unit.wanting():  # it may have been taken out of the line
            self._scheduler.enqueue(client.unit, now)
        self._scheduler.requeue(client.unit, now)
        self._scheduler.touch(*client.gpus)

    def unclear(self, client: Client, now: float) -> None:
        """The driver has been asked what it has of the client, for long, and does not say: let others get on meanwhile.

        Its memory counts as staying on the GPU, as that of a client that nothing can move.
        """
        if not (client.suspending or client.id in self.doubts):
            return
        client.unclear = True
        self._room.settle(client)
        if client.waiting:
            self._scheduler.enqueue(client.unit, now)  # or rather, out of it
        self._scheduler.touch(*client.gpus)

    def resumed(self, client: Client, problem: str, now: float, *, lost: bool, kept: bool) -> None:
        """Answer to Resume: the client's memory is back, '' being the problem; else it is asked for again later.

        `lost`: nothing can bring it back. What the client asks for is refused from now on. `kept`: it is on the host as
        before, for sure, and may still come back on any GPU. When its time is over then, others have theirs first.
        When neither is known, and its time is over, it is in doubt.
        """
        if not client.resuming:
            return
        if not problem:
            back, client.parked = client.parked, 0
            client.evacuated -= back
            self._room.measure(client, client.resident + back)  # the driver has found room, whatever the books say
            self._leases.resumed(client, now)
        elif lost:
            self._lose(client, problem, now)
        elif kept and client.origin is not None:
            self._stay(client, client.origin, now)
        elif client.unit.preempt_at is not None and client.unit.preempt_at <= now:
            self._step_back(client, now, kept=kept)
        else:
            self._scheduler.resume_later(client, now)

    def _lose(self, client: Client, problem: str, now: float) -> None:
        """Nothing can bring its memory back: what it asks for is refused."""
        client.refusal = (
            f"the memory of process {client.pid} is lost, and its program has to be started again: the driver cannot "
            f"bring it back: {problem}"
        )
        asks = client.resuming or client.waiting
        client.resuming = client.lease = client.waiting = False
        del self._room.suspended[client.id]
        client.promised = 0
        for gpu in client.gpus:
            gpu.holders.discard(client.id)
        self._room.settle(client)
        if asks:
            self._send(client.id, Refused(client.refusal))
        self._scheduler.vacate(client.unit, now)
        if client.unit.queued and not client.unit.wanting():
            self._scheduler.dequeue(client.unit, now)
        self._scheduler.touch(*client.gpus)

    def _stay(self, client: Client, home: Gpu, now: float) -> None:
        """It could not be brought back on another GPU: it waits where its memory was, and in its old place."""
        unit, asked_at = client.unit, client.unit.asked_at
        self._take_lease(client, now)
        self._scheduler.move(client, home)
        client.waiting = client.stays = True
        self._scheduler.enqueue(unit, now)
        unit.asked_at = asked_at
        self._scheduler.requeue(unit, now)

    def _step_back(self, client: Client, now: float, *, kept: bool) -> None:
        """It could not be brought back in its time, and others wait: it does so again, behind them."""
        unit = client.unit
        self._take_lease(client, now)
        if not kept:
            self.doubts.begin(client)
        if unit.active:  # others of its gang have not stopped yet
            self._scheduler.pause(client, now)
        self._scheduler.wait(client, now)

    def _take_lease(self, client: Client, now: float) -> None:
        """From one that is still suspended, and has not heard of it."""
        for gpu in client.gpus:
            gpu.holders.discard(client.id)
        client.resuming = client.lease = client.revoked = False
        client.headroom = client.promised = 0
        self._room.settle(client)
        self._scheduler.vacate(client.unit, now)

    # --- what is in the driver's hands ------------------------------------------------------------------------------

    def find(self, client: Client, found: Found) -> None:
        """A broker before this one had the driver move its memory, or was about to."""
        if not client.gpus or client.lease:
            return
        self._park(client, found.nbytes)
        for gpu in self._gpus:
            if found.onto and gpu.visible == found.onto and gpu not in client.gpus and client.unit.size == 1:
                self._scheduler.move(client, gpu)
                client.stays = True
        self.doubts.begin(client)

    def forget(self, client: Client) -> None:
        """It is gone."""
        self._room.suspended.pop(client.id, None)
        self.doubts.end(client)

    def _park(self, client: Client, nbytes: int) -> None:
        """The driver has so much of it on the host."""
        client.suspended, client.emptied, client.stays, client.unclear = True, False, False, False
        client.evacuating = client.suspending = client.in_pieces = False
        self._room.suspended[client.id] = client
        client.parked = min(nbytes, min(gpu.capacity for gpu in client.gpus) - client.evacuated)
        client.evacuated += client.parked
        client.resident = 0
        self._room.settle(client)
