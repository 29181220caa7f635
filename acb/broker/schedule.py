"""Scheduling: who stands in line where, who is let in, who is revoked for whom.

Only GPUs on which something has changed are looked at (`touch`), and of the waiting only the first; so a decision costs
the logarithm of how many wait, whatever the pool's size. A unit of several GPUs stands in the line of each with the
same key. It is let in when it is the first on all of them, and all at once: since the lines agree on the order, no two
units can hold a part each and wait for the other's.
"""

from __future__ import annotations

import enum
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence

from acb.broker import migration
from acb.broker.leases import Leases
from acb.broker.migration import EVEN
from acb.broker.policies import Policy
from acb.broker.preemption import Preemption
from acb.broker.room import Room
from acb.broker.state import Client, Gpu, Unit
from acb.config import format_size
from acb.protocol import Message, Revoke
from acb.protocol import Room as RoomAnswer

PATIENCE = 0.25
"""Seconds that a preempted member of a gang stands still before it may go on, so that the others can stop, too.

They may be unable to: a collective operation waits for that very member. Then it has to go a step further.
"""

RETRY = 1.0
"""Seconds until the driver is asked again to bring memory back to a GPU on which a stranger has the room."""

MIN_PATIENCE, MAX_PATIENCE = 5.0, 60.0
"""Seconds until those who could not be moved, and whose memory keeps everybody out, are asked again."""

DEPTH = 16
"""So many of those who wait are looked at for one that is done before the first one's turn."""

LEAST_LOAD = 0.05
"""GPUs: what the lightest program counts for."""


class Admission(enum.Enum):
    """What came of trying to let a waiting unit in."""

    GRANTED = enum.auto()
    COMING = enum.auto()
    """A holder is to go, an evacuation is under way, or somebody is before it on another of its GPUs."""
    STUCK = enum.auto()
    """Clients that cannot be moved keep the room."""


class Scheduler:
    """The lines of all GPUs."""

    def __init__(
        self,
        gpus: Sequence[Gpu],
        clients: Mapping[int, Client],
        policy: Policy,
        room: Room,
        leases: Leases,
        send: Callable[[int, Message], None],
    ) -> None:
        self._gpus = list(gpus)
        self._clients = clients
        self._policy = policy
        self._room = room
        self._leases = leases
        self._send = send
        self._preemption = Preemption(policy, room, send)
        self._order = itertools.count(1)
        self._dirty: dict[Gpu, None] = {}
        self._paused: dict[int, Client] = {}
        self._timers: list[tuple[float, int]] = []

    # --- lines ------------------------------------------------------------------------------------------------------

    def touch(self, *gpus: Gpu) -> None:
        """Something has changed there."""
        for gpu in gpus:
            self._dirty[gpu] = None

    def touch_all(self) -> None:
        """Everything may have changed."""
        self.touch(*self._gpus)

    def wait(self, client: Client, now: float) -> None:
        """The client asks for a lease."""
        client.waiting, client.asked_at = True, now
        self.enqueue(client.unit, now)

    def enqueue(self, unit: Unit, now: float) -> None:
        """A member waits. Its GPUs are chosen now if they have not been."""
        if unit.queued and unit.unclear:
            self.dequeue(unit, now)
        if unit.queued or unit.active or unit.unclear:
            self.touch(*unit.gpus)
            return
        if not unit.gpus:
            self._assign(unit)
        unit.asked_at, unit.order, unit.queued = now, next(self._order), True
        self._policy.joined(unit, now)
        self._line_up(unit, now)

    def requeue(self, unit: Unit, now: float) -> None:
        """What its place depends on may have changed."""
        if unit.queued and unit.asked_at - self._policy.advantage(unit, now) != unit.key:
            self._line_up(unit, now)

    def _line_up(self, unit: Unit, now: float) -> None:
        unit.key, unit.ticket = unit.asked_at - self._policy.advantage(unit, now), unit.ticket + 1
        for gpu in unit.gpus:
            (gpu.line if unit.bound else gpu.newcomers).add(unit)
        self.touch(*unit.gpus)

    def dequeue(self, unit: Unit, now: float) -> None:
        """Nobody of it waits any more."""
        if unit.queued:
            self._policy.left(unit, now)
        unit.queued, unit.ticket = False, unit.ticket + 1
        self.touch(*unit.gpus)

    def vacate(self, unit: Unit, now: float) -> None:
        """A member has given its lease back: with the last one the unit's slots are free."""
        if not unit.active or any(client.lease for client in unit.members.values()):
            return
        unit.active = unit.backfilled = False
        unit.preempt_at = unit.contender = None
        for gpu in unit.gpus:
            gpu.units.remove(unit)
        self.touch(*unit.gpus)
        self._policy.served(unit, now - unit.granted_at, now)
        self._policy.left(unit, now)
        for client in unit.wanting():
            self.wait(client, now)

    def _assign(self, unit: Unit) -> None:
        """Choose GPUs: a single unit may still go elsewhere until it has been let in, several GPUs are for good."""
        floor = max((self._room.floor(client) for client in unit.wanting()), default=0)
        fitting = self._policy.gpus([gpu for gpu in self._gpus if gpu.capacity >= floor])
        unit.load = self._expected_load(unit)
        self.place(unit, sorted(fitting[: unit.size], key=lambda gpu: gpu.ordinal), bound=unit.size > 1)

    @staticmethod
    def _expected_load(unit: Unit) -> float:
        shares = [client.profile.share() for client in unit.members.values()]
        return max([LEAST_LOAD, *(1.0 if share is None else share for share in shares)])

    def weigh(self, unit: Unit) -> None:
        """More may be known of how much the unit uses its GPUs."""
        load = self._expected_load(unit)
        if abs(load - unit.load) > 0.1 * unit.load:
            for gpu in unit.gpus:
                gpu.load += load - unit.load
            unit.load = load

    def place(self, unit: Unit, gpus: Sequence[Gpu], *, bound: bool) -> None:
        """Put the unit on these GPUs; none: take it away from all."""
        unit.load = unit.load or 1.0
        for gpu in unit.gpus:
            gpu.load -= unit.load
            gpu.bound.difference_update(client.id for client in unit.members.values())
        unit.gpus, unit.bound = list(gpus), bound
        for gpu in unit.gpus:
            gpu.load += unit.load
        for client in unit.members.values():
            for gpu in client.gpus:
                gpu.bound.add(client.id)

    # --- timers -----------------------------------------------------------------------------------------------------

    @property
    def wake_at(self) -> float | None:
        """When run() is to be called although nothing has happened; None: not."""
        return self._timers[0][0] if self._timers else None

    def pause(self, client: Client, now: float) -> None:
        """A member of a gang that is to stop has stopped, and wants to go on while others still run."""
        self._paused[client.id] = client
        heapq.heappush(self._timers, (now + PATIENCE, client.id))

    def _expire(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            _, number = heapq.heappop(self._timers)
            client = self._paused.pop(number, None)
            if number < 0:
                gpu = self._gpus[-1 - number]
                gpu.asks_again = False
                self._room.ask_again(gpu)
                self.touch(gpu)
            elif client is not None:
                self.touch(*client.gpus)
            elif number in self._clients and self._clients[number].resuming:
                self._send(number, migration.resume(self._clients[number]))

    def _ask_again_later(self, gpu: Gpu, now: float) -> None:
        """What could not be moved keeps everybody out there: that may change, as host memory comes and goes."""
        if not gpu.asks_again and self._room.refused(gpu):
            gpu.asks_again = True
            heapq.heappush(self._timers, (now + gpu.patience, -1 - self._gpus.index(gpu)))
            gpu.patience = min(MAX_PATIENCE, 2 * gpu.patience)

    def paused(self, client: Client) -> bool:
        """Whether the client waits for its gang to stop."""
        return client.id in self._paused

    # --- decisions --------------------------------------------------------------------------------------------------

    def run(self, now: float) -> None:
        """Decide all that can be decided now."""
        self._expire(now)
        seen: dict[Gpu, None] = {}
        while self._dirty:
            gpu = next(iter(self._dirty))
            del self._dirty[gpu]
            seen[gpu] = None
            self._serve(gpu, now)
            if gpu.challenger is not None:  # what keeps it out may be on another of its GPUs
                self.touch(*[other for other in gpu.challenger.gpus if other not in seen])
        concerned: dict[Unit, None] = {}
        gpus = list(seen)
        for gpu in gpus:  # it grows: where others share with a unit, another may be the first to go now, and so on
            for unit in gpu.units:
                if unit not in concerned:
                    concerned[unit] = None
                    gpus += [other for other in unit.gpus if other not in seen]
                    seen |= dict.fromkeys(unit.gpus)
        for unit in concerned:
            self._preemption.contend(unit, now)

    def _serve(self, gpu: Gpu, now: float) -> None:
        """Answer those who run there; then let in whoever is next while it fits, else make way for him."""
        for running in gpu.units:
            for client in running.members.values():
                if client.promised:
                    self._leases.advance(client, gpu, now)
                if client.room_wanted and not client.promised and gpu in client.gpus:
                    self._answer_room(client, now)
                elif client.waiting and gpu in client.gpus and client.id not in self._paused:
                    self._admit_member(client, now)
        gpu.challenger, gpu.crowded = None, False
        while True:
            unit = gpu.next()
            if unit is None:
                if gpu.full or not (self._take_newcomer(gpu) or self._take_suspended(gpu)):
                    return
                continue
            admission = self._admit(unit, now)
            if admission is Admission.GRANTED:
                continue
            if admission is Admission.STUCK:
                if self._let_overtake(gpu, unit, now):
                    continue
                self._ask_again_later(gpu, now)
            gpu.challenger = unit
            gpu.crowded = gpu.full or any(
                place is gpu and client is not None and bool(gpu.units) and self._room.kept_by_holders(gpu, client)
                for place, client in unit.places()
            )
            if gpu.full:
                self.touch(*migration.targets(gpu, self._gpus, self._room))
            if admission is Admission.COMING and self._policy.backfills and not gpu.full:
                self._backfill(gpu, unit, now)
            return

    def _answer_room(self, client: Client, now: float) -> None:
        """Grant, refuse or further the request of a running client for more room."""
        wanted, capacity = client.room_wanted, min(gpu.capacity for gpu in client.gpus)
        what = f"process {client.pid} asks for {format_size(wanted)} of GPU memory in all"
        if wanted > capacity:
            reason = f"{what}, but its GPU has {format_size(capacity)}; ask for less"
            self._send(client.id, RoomAnswer(False, reason))
        elif self._beyond_the_books(client, now):
            return
        elif self._room.make_all([(gpu, client, wanted) for gpu in client.gpus], now):
            client.headroom = max(client.headroom, wanted)
            self._room.settle(client)
            self._send(client.id, RoomAnswer(True))
        elif any(self._room.coming(gpu, client) or self._room.awaited(gpu) for gpu in client.gpus):
            return
        else:
            reason = (
                f"{what}, but programs that cannot be evacuated hold the rest; ask for less, or when they have ended"
            )
            self._send(client.id, RoomAnswer(False, reason))
        client.room_wanted = 0

    def _beyond_the_books(self, client: Client, now: float) -> bool:
        """Whether others are to make way first for a client that came short of what it had been promised.

        The books do not show all that lies on a GPU: contexts, what programs of nobody's hold. The client knows better.
        """
        if client.room_short:
            short, client.room_short = client.room_short, 0
            self._room.make_all([(gpu, client, self._room.free(gpu, client) + short) for gpu in client.gpus], now)
            client.room_coming = True
        client.room_coming = client.room_coming and any(self._room.coming(gpu, client) for gpu in client.gpus)
        return client.room_coming

    def _admit(self, unit: Unit, now: float, *, overtaking: bool = False) -> Admission:
        """Let the unit in if it can be, else further it."""
        for gpu in unit.gpus:
            if gpu.full or not (overtaking or gpu.next() is unit):
                return Admission.COMING
        wanting = [(gpu, client) for gpu, client in unit.places() if client is not None and client.waiting]
        if any(client.evacuating for _, client in wanting):
            return Admission.COMING
        there = self._room.make_all([(gpu, client, self._room.want(client, gpu)) for gpu, client in wanting], now)
        if not there and any(self._room.coming(gpu, client) for gpu, client in wanting):
            if overtaking or not self._leases.follow(*wanting[0]):
                return Admission.COMING
        else:
            # What one has must have room in any case; with less than one needs, one may try where others cannot move.
            least = Client.all_memory if there else self._room.floor
            floors = [(gpu, client, least(client)) for gpu, client in wanting]
            if any(floor > self._room.free(gpu, client) or not (there or floor) for gpu, client, floor in floors):
                return Admission.STUCK
        unit.queued, unit.ticket = False, unit.ticket + 1
        unit.active = unit.bound = True
        unit.granted_at, unit.preempt_at, unit.contender = now, None, None
        for gpu in unit.gpus:
            gpu.units.append(unit)
            gpu.patience = MIN_PATIENCE
        for client in dict.fromkeys(client for _, client in wanting):
            self._leases.grant(client, now)
        if unit.size > 1:
            self.touch(*unit.gpus)  # there, too, somebody else is the first now
        return Admission.GRANTED

    def _admit_member(self, client: Client, now: float) -> None:
        """Let in a member of a gang that runs; at worst with the room that there is."""
        if client.evacuating:
            return
        needs = [(gpu, client, self._room.want(client, gpu)) for gpu in client.gpus]
        if not self._room.make_all(needs, now) and any(self._room.coming(gpu, client) for gpu in client.gpus):
            return
        self._leases.grant(client, now)
        if client.unit.preempt_at is not None:
            self._send(client.id, Revoke(max(0.0, client.unit.preempt_at - now)))
            client.revoked = True

    def resume_later(self, client: Client, now: float) -> None:
        """The driver could not yet: try again."""
        heapq.heappush(self._timers, (now + RETRY, client.id))

    def _let_overtake(self, gpu: Gpu, first: Unit, now: float) -> bool:
        """Nothing can be done to let the first one in: let those go before it whose memory, or context, which cannot be
        moved, keeps it out, for only their end can help it; else whoever can use the GPU.
        """
        keeping = [c.unit for c in gpu.occupants.values() if (c.stuck or c.emptied) and c.waiting and c.resident]
        keeping.sort(key=lambda unit: (unit.key, unit.order))
        others = [unit for line in (gpu.line, gpu.newcomers) for unit in line.first(DEPTH) if unit.size == 1]
        others.sort(key=lambda unit: (unit.key, unit.order))
        return any(
            self._admit(unit, now, overtaking=True) is Admission.GRANTED
            for unit in dict.fromkeys([*keeping, *others])
            if unit.queued and unit is not first
        )

    def _take_newcomer(self, gpu: Gpu) -> bool:
        """Take over a waiting newcomer, who is bound to no GPU yet, from where the load is higher."""
        for other in sorted(self._gpus, key=lambda other: (-other.load, other.ordinal)):
            if other.load <= gpu.load:
                return False
            unit = other.newcomers.head()
            if unit is None or other.load - unit.load < gpu.load + EVEN:
                continue  # it would be no better, and the other GPU could want it back
            if max(self._room.floor(client) for client in unit.members.values()) > gpu.capacity:
                continue
            unit.ticket += 1
            self.place(unit, [gpu], bound=False)
            gpu.newcomers.add(unit)
            self.touch(other)
            return True
        return False

    def _take_suspended(self, gpu: Gpu) -> bool:
        """Take over a client that waits to be resumed, from a GPU of the same kind that is taken."""
        client = migration.candidate(gpu, self._room) if self._room.migrates else None
        if client is None:
            return False
        self.touch(*client.gpus)
        self.move(client, gpu)
        return True

    def passed_over(self, gpu: Gpu) -> bool:
        """Whether it is idle although somebody waits elsewhere who could be resumed here; for checks."""
        idle = not gpu.units and gpu.next() is None
        return idle and self._room.migrates and migration.candidate(gpu, self._room) is not None

    def move(self, client: Client, gpu: Gpu) -> None:
        """The driver is to bring the client's memory back on this GPU."""
        unit, origin = client.unit, client.origin or client.gpus[0]
        client.origin = None if gpu is origin else origin
        self.place(unit, [gpu], bound=True)
        if unit.queued:
            unit.ticket += 1
            gpu.line.add(unit)

    # --- ahead of turn ----------------------------------------------------------------------------------------------

    def _backfill(self, gpu: Gpu, first: Unit, now: float) -> None:
        """The first one cannot be let in yet: let somebody in who will be done before that, if there is one."""
        left = self._preemption.delay(first, now)
        room = gpu.capacity - gpu.in_use + sum([o.resident for o in gpu.occupants.values() if o.evacuating])
        for place, client in first.places():
            if place is gpu and client is not None:
                room -= self._room.want(client, gpu) - client.booked[0]
        for unit in gpu.line.first(DEPTH):
            if unit is first or unit.size > 1:
                continue
            client = unit.members[0]
            phase = client.profile.phase_seconds()
            if phase is None or phase > left or client.evacuating or client.evacuated:
                continue
            extra = self._room.want(client, gpu) - client.booked[0]
            if extra <= min(room, gpu.capacity - gpu.in_use) and self._admit(unit, now, overtaking=True) is (
                Admission.GRANTED
            ):
                gpu.crowded = unit.backfilled = client.revoked = True
                unit.preempt_at = now + left
                self._send(client.id, Revoke(left, 0.0))
                return
