"""The broker's decisions: a pure, deterministic state machine. Messages in, messages out; no I/O, no clock, no threads.

    broker = Broker([Gpu(0, capacity)], Fifo())
    for send in broker.handle(client_id, message, now): ...

A client is, at any time, in one of these states (`Client.state`):

    detached ──▶ waiting ──▶ restoring ──▶ running ──▶ resident ──▶ evacuating ──▶ evacuated
                    ▲ (also from resident and evacuated)  │  (also straight to detached: nothing on the GPU)
                    └──────────── yields and wants again ─┘                gone from anywhere

*running* stands for "holds the lease": whether a region is open at this moment is the client's own business, until a
Revoke asks for the lease back.

Invariants (checked by check(), after every event in tests):

- a GPU never has more holders than slots;
- what holders may use (their headroom) and what others still have there (their resident bytes) fit its capacity;
- nobody is granted while an evacuation that its room needs is under way (follows from the one above, since memory
  counts as resident until its evacuation is acknowledged);
- every request is granted, refused, or its client is gone: a client that waits is in the queue, and whenever somebody
  waits, something is under way that will let him in (a revoked holder, an evacuation) or a client that cannot be moved
  keeps the room;
- the answers to MoreRoom are never forgotten.
"""

from __future__ import annotations

import enum
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from acb.broker.policies import Policy
from acb.protocol import (
    VERSION,
    Evacuate,
    Evacuated,
    Grant,
    Hello,
    Message,
    MoreRoom,
    Refused,
    Request,
    Restored,
    Revoke,
    Room,
    Uncontended,
    Welcome,
    Yield,
)

MARGIN = 1.1
"""Headroom over the measured peak: the factor that Fujitsu's broker uses on its 99th percentile."""

STEADY = 3
"""So many leases in a row without a new peak, and a client's peak is believed to be the most it needs.

A program's first phases often only load its model. Room that is found short in the middle of a computation cannot be
asked for then, so until the peak has settled the client gets the whole GPU.
"""


class Send(NamedTuple):
    """An instruction: deliver `message` to the client of this id."""

    client: int
    message: Message


class Admission(enum.Enum):
    """What came of trying to let a waiting client in on a GPU."""

    GRANTED = enum.auto()
    COMING = enum.auto()
    """A holder has been revoked, or an evacuation is under way."""
    STUCK = enum.auto()
    """Clients that cannot be moved keep the room."""
    UNFIT = enum.auto()
    """The GPU is too small for the client, ever."""


class InvariantError(AssertionError):
    """The state machine broke one of its own rules; carries the last transitions."""


@dataclass(slots=True)
class Gpu:
    """A GPU as the core sees it. `capacity` in bytes; `slots`: how many clients may run at once."""

    ordinal: int
    capacity: int
    visible: str = ""
    slots: int = 1
    holders: set[int] = field(default_factory=set)
    bound: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Client:
    """One instrumented process. Sizes in bytes, times in the seconds of `now`."""

    id: int
    pid: int
    name: str
    hint: int = 0
    gpu: int | None = None
    lease: bool = False
    waiting: bool = False
    need: int = 0
    headroom: int = 0
    resident: int = 0
    evacuated: int = 0
    peak: int = 0
    steady: int = 0
    evacuating: bool = False
    emptied: bool = False
    revoked: bool = False
    unmovable: str = ""
    room_wanted: int = 0
    swap_seconds: float | None = None
    asked_order: int = 0
    asked_at: float = 0.0
    granted_at: float = 0.0
    yielded_at: float = 0.0
    evacuation_seconds: float = 0.0

    @property
    def state(self) -> str:
        """The word for it in DESIGN's vocabulary."""
        if self.evacuating:
            return "evacuating"
        if self.lease:
            return "restoring" if self.evacuated else "running"
        if self.waiting:
            return "waiting"
        if self.evacuated:
            return "evacuated"
        return "resident" if self.resident else "detached"


class Broker:
    """The state machine for the GPUs of one broker process."""

    def __init__(self, gpus: Sequence[Gpu], policy: Policy) -> None:
        self.gpus = list(gpus)
        self.policy = policy
        self.clients: dict[int, Client] = {}
        self._log: deque[tuple[float | None, int, Message | str]] = deque(maxlen=200)
        self.recovering: set[int] = set()
        self._by_ordinal = {gpu.ordinal: gpu for gpu in gpus}
        self._order = itertools.count(1)
        self._out: list[Send] = []

    @property
    def log(self) -> list[str]:
        """What came in and went out of late, in words; they are only made here, since a hand-over would wait for it."""
        return [
            f"  -> client {client}: {what}" if now is None
            else f"{now:.6f} {f'client {client}' if client else 'broker'}: {what}"
            for now, client, what in self._log
        ]  # fmt: skip

    # --- events ----------------------------------------------------------------------------------------------------

    def handle(self, client_id: int, message: Message, now: float) -> list[Send]:
        """Take in a client's message and return what is to be sent.

        A message that makes no sense is answered Refused.
        """
        self._log.append((now, client_id, message))
        client = self.clients.get(client_id)
        if isinstance(message, Hello):
            self._hello(client_id, message, now)
        elif client is None:
            self._send(client_id, Refused(f"a {message.type} message before the hello"))
        elif isinstance(message, Request):
            self._request(client, message, now)
        elif isinstance(message, Yield):
            self._yield(client, message, now)
        elif isinstance(message, Evacuated):
            self._evacuated(client, message)
        elif isinstance(message, Restored):
            self._restored(client, message)
        elif isinstance(message, MoreRoom):
            self._more_room(client, message)
        else:
            self._send(client_id, Refused(f"a client may not send {message.type} messages"))
        return self._finish(now)

    def gone(self, client_id: int, now: float) -> list[Send]:
        """The client's connection is closed: its lease and its memory are free."""
        self._log.append((now, client_id, "gone"))
        client = self.clients.pop(client_id, None)
        if client is not None:
            for gpu in self.gpus:
                gpu.holders.discard(client_id)
                gpu.bound.discard(client_id)
            self._host_memory_freed()
        return self._finish(now)

    def recover(self, pids: set[int]) -> None:
        """Grant nothing until these processes, clients of a broker that died, have said hello or recovered() has."""
        self.recovering = set(pids)

    def recovered(self, pids: set[int], now: float) -> list[Send]:
        """Wait no longer for these processes: they are dead, or have had their time."""
        self._log.append((now, 0, f"recovered {sorted(pids)}"))
        self.recovering -= pids
        return self._finish(now)

    # --- one function a message ------------------------------------------------------------------------------------

    def _hello(self, client_id: int, hello: Hello, now: float) -> None:
        if hello.version != VERSION:
            self._send(
                client_id,
                Refused(
                    f"process {hello.pid} speaks protocol version {hello.version}, this broker version {VERSION}; "
                    f"use the same release of acb for both, or start a broker of its own with another ACB_RUNTIME_DIR"
                ),
            )
            return
        if client_id in self.clients:
            self._send(client_id, Refused("a second hello on one connection"))
            return
        client = Client(client_id, hello.pid, hello.name, hint=max(0, hello.memory_hint))
        client.yielded_at = now
        self.clients[client_id] = client
        self.recovering.discard(hello.pid)
        gpu = self._by_ordinal.get(hello.gpu)
        if gpu is not None:
            self._bind(client, gpu)
            self._measure(client, hello.resident, hello.peak)
            client.evacuated = min(gpu.capacity, max(0, hello.evacuated))
            if hello.holding and len(gpu.holders) < gpu.slots:
                gpu.holders.add(client_id)
                client.lease, client.granted_at = True, now
                client.headroom = min(self._want(client, gpu), gpu.capacity - self._in_use(gpu, without=client))
        self._send(client_id, Welcome(VERSION, client_id, lease=client.lease))

    def _request(self, client: Client, request: Request, now: float) -> None:
        if client.lease or client.waiting:
            return  # the client's thread was faster than the answer
        client.need = max(0, request.need)
        floor = self._floor(client)
        largest = max((gpu.capacity for gpu in self.policy.gpus(client, self.gpus)), default=0)
        if floor > largest:
            self._send(
                client.id,
                Refused(
                    f"process {client.pid} asks for {floor} bytes of GPU memory, but the largest GPU has {largest}"
                ),
            )
            return
        self._enqueue(client, now)

    def _yield(self, client: Client, message: Yield, now: float) -> None:
        if not client.lease:
            return
        self._gpu(client).holders.discard(client.id)
        client.lease = client.revoked = False
        client.headroom, client.need, client.unmovable, client.yielded_at = 0, 0, "", now
        before = client.peak
        self._measure(client, message.resident, message.peak)
        client.steady = client.steady + 1 if client.peak <= before else 0
        if client.room_wanted:
            client.room_wanted = 0
            self._send(client.id, Room(False, "the lease was given back"))
        if message.wants:
            self._enqueue(client, now)

    def _evacuated(self, client: Client, message: Evacuated) -> None:
        if not client.evacuating:
            return
        client.evacuating = False
        client.resident = min(client.resident, max(0, message.resident))
        client.evacuated = min(self._gpu(client).capacity, client.evacuated + max(0, message.moved))
        client.unmovable, client.emptied = message.reason, not message.reason
        client.evacuation_seconds = max(0.0, message.seconds)

    def _restored(self, client: Client, message: Restored) -> None:
        if not client.lease:
            return
        self._measure(client, message.resident)
        client.evacuated = 0
        swap = client.evacuation_seconds + max(0.0, message.seconds)
        if message.moved:
            client.swap_seconds = swap if client.swap_seconds is None else 0.5 * (client.swap_seconds + swap)
        self._host_memory_freed()

    def _more_room(self, client: Client, message: MoreRoom) -> None:
        if not client.lease:
            self._send(client.id, Room(False, "no lease is held"))
            return
        self._measure(client, message.resident)
        if client.room_wanted:
            self._send(client.id, Room(False, "it has asked for something else meanwhile"))
        client.room_wanted = max(1, message.resident + message.nbytes)

    # --- decisions -------------------------------------------------------------------------------------------------

    def _finish(self, now: float) -> list[Send]:
        """Decide all that can be decided now, and hand over the instructions."""
        if not self.recovering:
            self._answer_room()
            self._schedule(now)
        out, self._out = self._out, []
        return out

    def _answer_room(self) -> None:
        """Grant, refuse or further the requests of running clients for more room."""
        for gpu in self.gpus:
            for client in [self.clients[i] for i in sorted(gpu.holders) if self.clients[i].room_wanted]:
                if client.room_wanted > gpu.capacity:
                    reason = f"{client.room_wanted} bytes are more than the GPU's {gpu.capacity}"
                    self._send(client.id, Room(False, reason))
                elif self._make_room(gpu, client, client.room_wanted):
                    client.headroom = max(client.headroom, client.room_wanted)
                    self._send(client.id, Room(True))
                elif any(c.evacuating for c in self._others(gpu, client)):
                    continue
                else:
                    self._send(
                        client.id, Room(False, "the rest of the GPU is held by clients that cannot be evacuated")
                    )
                client.room_wanted = 0

    def _schedule(self, now: float) -> None:
        """Grant to whoever is next while it fits; else make way: revoke a holder or evacuate who is in the way."""
        revoked: set[int] = set()
        while self._admit_in_order(now, revoked):
            pass  # somebody was let in past others, who may now want him revoked
        for gpu in self.gpus:
            for holder in (self.clients[i] for i in gpu.holders):
                if holder.revoked and holder.id not in revoked:
                    holder.revoked = False
                    self._send(holder.id, Uncontended())

    def _admit_in_order(self, now: float, revoked: set[int]) -> bool:
        """Try everybody who waits, in the policy's order; whether a client was granted past one who stays outside."""
        blocked: dict[int, Admission] = {}
        overtaken = False
        waiting = [client for client in self.clients.values() if client.waiting and not client.evacuating]
        for client in self.policy.order(waiting):
            for gpu in self.policy.gpus(client, self.gpus):
                ahead = blocked.get(gpu.ordinal)
                # Nobody overtakes on a GPU, but for those whose memory, which cannot be moved, keeps the first one out:
                # they must run to their end, or nobody ever will.
                if ahead is Admission.COMING or (
                    ahead is Admission.STUCK and not (client.unmovable and client.resident)
                ):
                    continue
                admission = self._admit(client, gpu, now, revoked)
                if admission is Admission.GRANTED:
                    overtaken = overtaken or ahead is not None
                    break
                if admission is not Admission.UNFIT:
                    blocked[gpu.ordinal] = admission
        return overtaken

    def _admit(self, client: Client, gpu: Gpu, now: float, revoked: set[int]) -> Admission:
        """Grant the client the GPU if there is a slot and room; otherwise set in motion what it waits for."""
        if self._floor(client) > gpu.capacity:
            return Admission.UNFIT
        if len(gpu.holders) >= gpu.slots:
            holder = min((self.clients[i] for i in gpu.holders), key=lambda c: (c.granted_at, c.id))
            revoked.add(holder.id)
            if not holder.revoked:
                holder.revoked = True
                protected = holder.granted_at + self.policy.quantum(holder, client) - now
                self._send(holder.id, Revoke(max(0.0, protected)))
            return Admission.COMING
        headroom = want = self._want(client, gpu)
        if not self._make_room(gpu, client, want):
            if any(other.evacuating for other in self._others(gpu, client)):
                return Admission.COMING
            if self._floor(client) == 0 or not self._make_room(gpu, client, self._floor(client)):
                return Admission.STUCK
            headroom = min(want, gpu.capacity - self._in_use(gpu, without=client))
        client.waiting, client.lease, client.granted_at, client.emptied = False, True, now, False
        client.headroom = headroom
        gpu.holders.add(client.id)
        self._bind(client, gpu)
        self._send(client.id, Grant(gpu.ordinal, gpu.visible, client.headroom))
        return Admission.GRANTED

    def _make_room(self, gpu: Gpu, client: Client, want: int) -> bool:
        """Whether `want` bytes are there for the client now; if not, evacuate others as far as they can be."""
        room = gpu.capacity - self._in_use(gpu, without=client)
        if want <= room:
            return True
        others = self._others(gpu, client)
        coming = sum(other.resident for other in others if other.evacuating)
        movable = [o for o in others if o.resident and not (o.lease or o.evacuating or o.emptied or o.unmovable)]
        for victim in self.policy.victims(movable):
            if want <= room + coming:
                break
            victim.evacuating = True
            coming += victim.resident
            self._send(victim.id, Evacuate())
        return False

    def _want(self, client: Client, gpu: Gpu) -> int:
        """Bytes that the client should have in all: what it said, or its settled peak with a margin.

        Nothing is known: the whole GPU, less what others cannot take with them when they are evacuated.
        """
        clients = self.clients
        others = [clients[i] for i in gpu.bound if i != client.id]
        left_behind = sum([other.resident for other in others if other.emptied])
        # Who cannot be moved may stay for ever: most of a GPU is better than waiting for all of it.
        unmovable = sum([other.resident for other in others if other.unmovable and not other.lease])
        if 2 * unmovable <= gpu.capacity:
            left_behind += unmovable
        if not (client.hint or client.need or client.steady >= STEADY):
            return gpu.capacity - left_behind
        return min(gpu.capacity - left_behind, max(self._floor(client), int(client.peak * MARGIN)))

    def _floor(self, client: Client) -> int:
        """Bytes that the client must have in all to run at all; 0: unknown."""
        return max(client.hint, client.need, client.peak, client.resident + client.evacuated)

    def _measure(self, client: Client, resident: int, peak: int = 0) -> None:
        """Take in what a client says it holds, bounded by what can be there next to the others' memory."""
        if client.gpu is not None:
            gpu = self._gpu(client)
            client.resident = min(max(0, resident), gpu.capacity - self._in_use(gpu, without=client))
            client.peak = max(client.peak, client.resident, min(peak, gpu.capacity))
            # When only a part could be restored, that part is not in host memory any more; in all it fits the GPU.
            client.evacuated = min(client.evacuated, gpu.capacity - client.resident)

    # --- small helpers ---------------------------------------------------------------------------------------------

    def _enqueue(self, client: Client, now: float) -> None:
        client.waiting, client.asked_at, client.asked_order = True, now, next(self._order)

    def _bind(self, client: Client, gpu: Gpu) -> None:
        client.gpu = gpu.ordinal
        gpu.bound.add(client.id)

    def _gpu(self, client: Client) -> Gpu:
        assert client.gpu is not None
        return self._by_ordinal[client.gpu]

    def _others(self, gpu: Gpu, client: Client) -> list[Client]:
        return [self.clients[i] for i in sorted(gpu.bound) if i != client.id]

    def _in_use(self, gpu: Gpu, without: Client) -> int:
        """Bytes of the GPU that are promised or occupied, not counting one client."""
        clients = self.clients
        return sum([_claim(clients[i]) for i in gpu.bound if i != without.id])

    def _host_memory_freed(self) -> None:
        """Host memory may be free again: who could not be evacuated may be asked once more."""
        for client in self.clients.values():
            client.unmovable = ""

    def _send(self, client_id: int, message: Message) -> None:
        self._log.append((None, client_id, message))
        self._out.append(Send(client_id, message))

    def check(self) -> None:
        """Raise InvariantError when a rule of this module's docstring is broken."""
        try:
            for gpu in self.gpus:
                clients = [self.clients[i] for i in gpu.bound]
                assert gpu.holders == {c.id for c in clients if c.lease}, "holders and leases differ"
                assert len(gpu.holders) <= gpu.slots, "more holders than slots"
                assert sum(_claim(c) for c in clients) <= gpu.capacity, "memory is promised twice"
                assert not any(c.evacuating for c in clients if c.lease), "a holder is evacuated"
            for client in self.clients.values():
                assert not (client.lease and client.waiting), "waits for what it holds"
                assert not client.room_wanted or client.lease, "wants room without a lease"
                if client.waiting and not self.recovering:
                    assert self._progress(client), f"client {client.id} waits for nothing"
        except AssertionError as error:
            raise InvariantError(f"{error}\n" + "\n".join(self.log)) from None

    def _progress(self, client: Client) -> bool:
        """Whether something is under way, or somebody stands in the way, that explains why the client waits."""
        gpus = self.policy.gpus(client, self.gpus)
        return client.evacuating or any(
            gpu.holders or any(o.evacuating or o.unmovable for o in self._others(gpu, client)) for gpu in gpus
        )


def _claim(client: Client) -> int:
    """Bytes of its GPU that a client occupies or has been promised."""
    return max(client.headroom, client.resident) if client.lease else client.resident
