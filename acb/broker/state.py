"""What the broker's core knows: GPUs, clients, and units, which are the clients that get their leases together.

Sizes are bytes on one GPU; those of a client of several GPUs are what it has on the fullest, and count on each.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from acb.broker.learning import Profile
from acb.protocol import Message


class Send(NamedTuple):
    """An instruction: deliver `message` to the client of this id."""

    client: int
    message: Message


@dataclass(frozen=True, slots=True)
class Suspend(Message):
    """For the broker itself, not on the wire: have the driver move this client's memory (the driver tier)."""

    type: ClassVar[str] = "suspend"


@dataclass(frozen=True, slots=True)
class Resume(Message):
    """For the broker itself, not on the wire: have the driver bring this client's memory back; the room is there.

    From the GPU `source` onto `target`, by what CUDA_VISIBLE_DEVICES calls them; '': onto the GPU that it was on.
    """

    type: ClassVar[str] = "resume"
    source: str = ""
    target: str = ""


class Found(NamedTuple):
    """What a broker before has noted of a process: the driver has moved `nbytes` of it, or was about to.

    `onto`: it was about to have them brought back on this GPU, by Resume.target, and may have.
    """

    nbytes: int
    onto: str = ""


@dataclass(slots=True, eq=False)
class Gpu:
    """A GPU as the core sees it. `capacity` in bytes; `slots`: how many units may run at once."""

    ordinal: int
    capacity: int
    visible: str = ""
    slots: int = 1
    kind: str = ""
    """The driver can take a process from one GPU to another of the same kind and capacity; '': to none."""
    holders: set[int] = field(default_factory=set)
    """Ids of the clients with a lease here."""
    bound: set[int] = field(default_factory=set)
    """Ids of the clients that have their memory here, or will."""
    units: list[Unit] = field(default_factory=list)
    """Those that have a slot, in the order of their grants."""
    occupants: dict[int, Client] = field(default_factory=dict)
    """Clients with memory or headroom here."""
    in_use: int = 0
    """Bytes that they occupy or have been promised."""
    left_behind: int = 0
    """Bytes of these that evacuation has left."""
    unmovable: int = 0
    """Bytes of these, of clients without a lease, that nothing can move."""
    load: float = 0.0
    """Expected GPUs' worth of work of all units assigned to this one."""
    line: Line = field(default_factory=lambda: Line())
    """Units bound here that wait."""
    newcomers: Line = field(default_factory=lambda: Line())
    """Waiting units that are assigned here, but may still go elsewhere."""
    challenger: Unit | None = None
    """The unit that is next, when it cannot be let in yet."""
    crowded: bool = False
    """Whether holders have the room that the challenger needs."""
    asks_again: bool = False
    """Whether those who could not be moved will be asked again by the clock."""
    patience: float = 5.0
    """In how many seconds."""

    @property
    def full(self) -> bool:
        """Whether all slots are taken."""
        return len(self.units) >= self.slots

    def next(self) -> Unit | None:
        """The waiting unit that is to be let in next."""
        first, second = self.line.head(), self.newcomers.head()
        if first is None or second is None:
            return first or second
        return first if (first.key, first.order) < (second.key, second.order) else second


@dataclass(slots=True, eq=False)
class Client:
    """One instrumented process. Sizes in bytes, times in the seconds of `now`."""

    id: int
    pid: int
    name: str
    profile: Profile
    hint: int = 0
    rank: int = 0
    lease: bool = False
    waiting: bool = False
    need: int = 0
    headroom: int = 0
    promised: int = 0
    """Bytes of headroom that it is to have before it runs, and that others are just leaving; 0: it has what it gets."""
    resident: int = 0
    evacuated: int = 0
    peak: int = 0
    peak_before: int = 0
    """As it was when the lease was granted."""
    steady: int = 0
    """Leases in a row without a new peak."""
    surprises: int = 0
    """How often a peak that was believed has been exceeded."""
    measured: bool = False
    """Whether it has said what it holds."""
    said: int = 0
    """Bytes that it has last said it has on the GPU."""
    context: int = -1
    """Bytes that the device counts besides, above all its CUDA context; -1: not known."""
    booked: tuple[int, int, int] = (0, 0, 0)
    """What it counts for in its GPUs' in_use, left_behind and unmovable."""
    evacuating: bool = False
    in_pieces: bool = False
    """It is evacuating, and has said that a part is gone."""
    emptied: bool = False
    """What it still has on the GPU is what evacuating leaves."""
    left: int = -1
    """Bytes that the device first counted of it since it was emptied, above all its CUDA context; -1: not yet."""
    revoked: bool = False
    unmovable: str = ""
    """Why it could not be evacuated."""
    stuck: bool = False
    """Whether the driver cannot move it either."""
    suspending: bool = False
    """It is evacuating, and the driver does it."""
    unclear: bool = False
    """The driver has long not said where its memory is: it counts as staying on the GPU, and the client in no line."""
    suspended: bool = False
    """The driver has moved its memory, and stops it at its next call."""
    resuming: bool = False
    """It has the lease, and hears of it when the driver has brought its memory back."""
    parked: int = 0
    """Bytes that the driver has moved."""
    origin: Gpu | None = None
    """The GPU that it has moved them off, when they are to come back on another one."""
    chosen: bool = False
    """Whether the user has chosen its GPU."""
    stays: bool = False
    """Whether where its memory comes back must not be changed any more: the driver could not, or may already have."""
    driver_problem: str = ""
    """Why the driver cannot move it."""
    refusal: str = ""
    """Why whatever it asks for is refused."""
    stranded: str = ""
    """Why whatever it asks for waits for another broker: this one has not the GPU that it is bound to."""
    absent: bool = False
    """It has not spoken, and is here as what the journal of the broker before and the device know of it."""
    room_wanted: int = 0
    room_short: int = 0
    """Bytes by which it came short although it had been promised what it wants: others are still to make way for it."""
    room_coming: bool = False
    """They do."""
    came_at: float = 0.0
    asked_at: float = 0.0
    granted_at: float = 0.0
    started_at: float = 0.0
    """When its memory was back, and it could run."""
    yielded_at: float = 0.0
    gap: bool = False
    """Whether it has given a lease back without wanting another: the time until it asks again is a gap."""
    evacuation_at: float = 0.0
    evacuation_seconds: float = 0.0
    phase_seconds: float = 0.0
    """Of the phase that it is in, however often it was preempted."""
    unit: Unit = field(default=None, repr=False)  # type: ignore[assignment]  # set as soon as it is made

    @property
    def gpus(self) -> list[Gpu]:
        """Where its memory is, or will be; empty: not decided."""
        unit = self.unit
        return unit.gpus[self.rank : self.rank + 1] if unit.gang else unit.gpus

    @property
    def gpu(self) -> int | None:
        """The ordinal of the first of its GPUs."""
        gpus = self.gpus
        return gpus[0].ordinal if gpus else None

    @property
    def bound(self) -> bool:
        """Whether it can no longer go to another GPU."""
        return self.unit.bound

    @property
    def claim(self) -> int:
        """Bytes of its GPU that it occupies or has been promised."""
        return max(self.headroom, self.resident) if self.lease else self.resident

    @property
    def leaving(self) -> bool:
        """Whether what it has on the GPU will soon be free."""
        return self.evacuating and not self.unclear

    @property
    def left_unknown(self) -> bool:
        """Whether the device has yet to say what evacuating has left of it."""
        return self.emptied and self.left < 0

    @property
    def at_rest(self) -> bool:
        """Whether what the device counts of it now holds good: not of a holder, nor of what the driver has just moved,
        which the device may list a moment too long."""
        return not (self.lease or self.evacuating or self.suspended)

    def all_memory(self) -> int:
        """Bytes that must be on the GPU when it runs."""
        return self.resident + self.evacuated

    def books(self) -> tuple[int, int, int]:
        """What it should count for: see `booked`."""
        resident = self.resident
        if self.lease:
            return max(self.headroom, resident), 0, 0
        if self.emptied:
            return resident, resident, 0
        return resident, 0, resident if self.stuck or self.unclear else 0

    @property
    def state(self) -> str:
        """The word for it in DESIGN's vocabulary."""
        if self.evacuating:
            return "evacuating"
        if self.lease:
            return "restoring" if self.evacuated or self.resuming else "running"
        if self.waiting:
            return "waiting"
        if self.evacuated:
            return "evacuated"
        return "resident" if self.resident else "detached"


@dataclass(slots=True, eq=False)
class Unit:
    """Clients that get their leases together: one client, or the members of a gang, by rank."""

    size: int
    """So many GPUs at once."""
    gang: str = ""
    priority: int = 0
    weight: float = 1.0
    members: dict[int, Client] = field(default_factory=dict)
    gpus: list[Gpu] = field(default_factory=list)
    """As many as `size`, or none: not assigned. By rank in a gang."""
    bound: bool = False
    """Whether it has been let in on these GPUs before."""
    active: bool = False
    """Whether it has a slot on each."""
    queued: bool = False
    key: float = 0.0
    """Its place in line: the seconds at which it asked, less its advantage."""
    order: int = 0
    ticket: int = 0
    """Of its valid entry in the lines."""
    asked_at: float = 0.0
    granted_at: float = 0.0
    preempt_at: float | None = None
    """When it is to stop at a safe point, as it was told; None: it has not been revoked."""
    contender: Unit | None = None
    """For whom it was told so; None: that has to be weighed anew."""
    backfilled: bool = False
    """Whether it was let in ahead of its turn, and must go as soon as that would delay anybody."""
    used: float | None = None
    """Seconds of GPU time, divided by its weight: an account that a policy keeps; None: it has not begun."""
    load: float = 0.0
    """What it counts for in its GPUs' load."""

    def places(self) -> Iterator[tuple[Gpu, Client | None]]:
        """Its GPUs, each with the client that will run there; None: a member that is not there yet."""
        if self.gang:
            for rank, gpu in enumerate(self.gpus):
                yield gpu, self.members.get(rank)
        else:
            client = next(iter(self.members.values()), None)
            for gpu in self.gpus:
                yield gpu, client

    @property
    def unclear(self) -> bool:
        """Whether it cannot be let in, since nobody knows of a member that waits where its memory is."""
        return any(client.unclear and client.waiting for client in self.members.values())

    def leased(self) -> list[Client]:
        """The members that hold the lease."""
        return [client for client in self.members.values() if client.lease]

    def wanting(self) -> list[Client]:
        """The members that wait."""
        return [client for client in self.members.values() if client.waiting]


class Line:
    """Units in the order of their keys. Entries whose ticket is not their unit's any more are skipped."""

    __slots__ = ("_heap",)

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Unit]] = []

    def add(self, unit: Unit) -> None:
        """Put a unit in its place, O(log n)."""
        heapq.heappush(self._heap, (unit.key, unit.order, unit.ticket, unit))

    def head(self) -> Unit | None:
        """The first unit, O(1) but for leaving out what is no longer valid."""
        heap = self._heap
        while heap:
            _, _, ticket, unit = heap[0]
            if unit.queued and unit.ticket == ticket:
                return unit
            heapq.heappop(heap)
        return None

    def first(self, count: int) -> list[Unit]:
        """The first `count` units, O(count log n)."""
        kept: list[tuple[float, int, int, Unit]] = []
        while len(kept) < count and self.head() is not None:
            kept.append(heapq.heappop(self._heap))
        for entry in kept:
            heapq.heappush(self._heap, entry)
        return [entry[3] for entry in kept]

    def __iter__(self) -> Iterator[Unit]:
        """All units that wait here, in no order; for checks."""
        return (unit for _, _, ticket, unit in self._heap if unit.queued and unit.ticket == ticket)
