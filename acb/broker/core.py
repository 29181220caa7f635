"""The broker's decisions: a pure, deterministic state machine. Messages in, messages out; no I/O, no clock, no threads.

    broker = Broker([Gpu(0, capacity)], POLICIES["fifo"]())
    for send in broker.handle(client_id, message, now): ...

A client is, at any time, in one of these states (`Client.state`):

    detached ──▶ waiting ──▶ restoring ──▶ running ──▶ resident ──▶ evacuating ──▶ evacuated
                    ▲ (also from resident and evacuated)  │  (also straight to detached: nothing on the GPU)
                    └──────────── yields and wants again ─┘                gone from anywhere

*running* stands for "holds the lease": whether a region is open at this moment is the client's own business, until a
Revoke asks for the lease back.

A client is a unit by itself, whether it computes on one GPU or on several; the members of a gang are one unit. A
unit takes a slot on each of its GPUs at once, when a member asks, and gives all back with its last member's lease.

What holds after every event is in `invariants`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from acb.broker import invariants
from acb.broker.gangs import Gangs
from acb.broker.learning import Profile, Programs
from acb.broker.leases import Leases
from acb.broker.limits import impossible, of_another_pool, stranded
from acb.broker.policies import Policy
from acb.broker.room import STEADY, Room
from acb.broker.schedule import Scheduler
from acb.broker.state import Client, Found, Gpu, Send, Unit
from acb.broker.suspension import Suspension
from acb.protocol import (
    VERSION,
    Evacuated,
    Hello,
    Holds,
    Message,
    MoreRoom,
    Refused,
    Request,
    Restored,
    Welcome,
    Yield,
)
from acb.protocol import Room as RoomAnswer

__all__ = ["Broker", "Client", "Gpu", "Send", "Unit"]


class Broker:
    """The state machine for the GPUs of one broker process."""

    def __init__(
        self,
        gpus: Sequence[Gpu],
        policy: Policy,
        programs: Programs | None = None,
        context: int = 0,
        pool: str = "",
    ) -> None:
        """With `programs`, what was learned of them before. `context`: bytes that a process may have on a GPU besides
        what it says, at most; observed() and context() tell how many. `pool`: as in Hello."""
        self.gpus = list(gpus)
        self.policy = policy
        self.programs = programs or Programs()
        self.clients: dict[int, Client] = {}
        self.recovering: set[int] = set()
        self._absent: dict[int, Client] = {}  # by process
        self._narrow = False  # some holders may have been promised less than they should have
        self._pool = pool
        self._by_ordinal = {gpu.ordinal: gpu for gpu in gpus}
        self._log: deque[tuple[float | None, int, Message | str]] = deque(maxlen=200)
        self._out: list[Send] = []
        self._room = Room(policy, self._send, context)
        self._leases = Leases(policy, self._room, self._send)
        self.scheduler = Scheduler(gpus, self.clients, policy, self._room, self._leases, self._send)
        self._gangs = Gangs(self.scheduler)
        self._suspension = Suspension(gpus, self.clients, self._room, self._leases, self.scheduler, self._send)
        self._handlers: dict[type[Message], Callable[[Client, Any, float], None]] = {
            Request: self._request,
            Yield: self._yield,
            Evacuated: self._evacuated,
            Restored: self._restored,
            Holds: self._holds,
            MoreRoom: self._more_room,
        }

    @property
    def log(self) -> list[str]:
        """What came in and went out of late, in words; they are only made here, since a hand-over would wait for it."""
        return [
            f"  -> client {client}: {what}" if now is None
            else f"{now:.6f} {f'client {client}' if client else 'broker'}: {what}"
            for now, client, what in self._log
        ]  # fmt: skip

    @property
    def wake_at(self) -> float | None:
        """When tick() is to be called, in the seconds of `now`; None: not before the next event."""
        return self.scheduler.wake_at

    # --- events ----------------------------------------------------------------------------------------------------

    def handle(self, client_id: int, message: Message, now: float, found: Found | None = None) -> list[Send]:
        """Take in a client's message and return what is to be sent.

        A message that makes no sense is answered Refused. `found`: with a Hello, what a broker before this one has
        noted that the driver may have of the client; see in_doubt().
        """
        self._log.append((now, client_id, message))
        client = self.clients.get(client_id)
        handler = self._handlers.get(type(message))
        if isinstance(message, Hello):
            self._hello(client_id, message, now, found)
        elif client is None:
            self._send(client_id, Refused(f"a {message.type} message before the hello"))
        elif handler is not None:
            handler(client, message, now)
        else:
            self._send(client_id, Refused(f"a client may not send {message.type} messages"))
        return self._finish(now)

    def gone(self, client_id: int, now: float) -> list[Send]:
        """The client's connection is closed: its lease and its memory are free."""
        self._log.append((now, client_id, "gone"))
        client = self.clients.pop(client_id, None)
        if client is not None:
            self._leave(client, now)
            self.scheduler.touch(*self._room.host_memory_freed())
        return self._finish(now)

    def observed(self, client_id: int, resident: int, now: float) -> list[Send]:
        """The device says what a client at rest has there, which counts, whatever the client has said."""
        client = self.clients.get(client_id)
        if client is not None and client.at_rest and (client.resident != resident or client.left_unknown):
            self._log.append((now, client_id, f"observed {resident}"))
            self._room.learn_context(client, resident)
            if client.left < 0:
                client.left = resident
            client.emptied = client.emptied and resident <= client.left  # or there is something new to move
            self._room.measure(client, resident)
            self.scheduler.touch(*client.gpus)
        return self._finish(now)

    def context(self, client_id: int, said: int, resident: int) -> None:
        """The device says what a client has there that is about to say, for the first time, that it has `said`."""
        client = self.clients[client_id]
        client.said = said
        self._room.learn_context(client, resident)

    def driver_tier(self, available: bool, now: float, *, migrates: bool = False) -> list[Send]:
        """Whether the driver can move what frameworks cannot, by the instructions Suspend and Resume; and whether it
        can bring it back on another GPU."""
        self._log.append((now, 0, f"driver tier {'on' if available else 'off'}"))
        self._suspension.available(available, migrates=migrates)
        return self._finish(now)

    def suspended(self, client_id: int, problem: str, seconds: float, now: float, *, lost: bool = False) -> list[Send]:
        """The driver's answer to Suspend, or about a client in doubt; see Suspension.suspended()."""
        self._log.append((now, client_id, f"suspended {problem}"))
        client = self.clients.get(client_id)
        if client is not None:
            self._suspension.suspended(client, problem, seconds, now, lost=lost)
        return self._finish(now)

    def unclear(self, client_id: int, now: float) -> list[Send]:
        """The driver has long not said what it has of a client; see Suspension.unclear()."""
        self._log.append((now, client_id, "unclear"))
        client = self.clients.get(client_id)
        if client is not None:
            self._suspension.unclear(client, now)
        return self._finish(now)

    def resumed(
        self, client_id: int, problem: str, now: float, *, lost: bool = False, kept: bool = False
    ) -> list[Send]:
        """The driver's answer to Resume; see Suspension.resumed()."""
        self._log.append((now, client_id, f"resumed {problem}"))
        client = self.clients.get(client_id)
        if client is not None:
            self._suspension.resumed(client, problem, now, lost=lost, kept=kept)
        return self._finish(now)

    def in_doubt(self, client_id: int) -> bool:
        """Whether it has to be asked what the driver has of the client; suspended() takes the answer."""
        return client_id in self._suspension.doubts

    @property
    def suspended_clients(self) -> Mapping[int, Client]:
        """Those whose memory the driver has moved, and can bring back, by id."""
        return self._room.suspended

    def blocked(self, client_id: int, now: float) -> list[Send]:
        """A suspended client is blocked in the driver, and cannot ask: it waits for its lease as if it had."""
        client = self.clients.get(client_id)
        if client is not None and client.suspended and not impossible(client, self.gpus):
            self._log.append((now, client_id, "blocked in the driver"))
            self._request(client, Request(), now)
        return self._finish(now)

    def tick(self, now: float) -> list[Send]:
        """It is `wake_at`, or later."""
        return self._finish(now)

    def recover(self, pids: set[int]) -> None:
        """Grant nothing until each of these processes, clients of a broker that died, has said hello, or has been given
        up by recovered() or absent()."""
        self.recovering = set(pids)

    def recovered(self, pids: set[int], now: float) -> list[Send]:
        """Wait no longer for these processes: they are dead, or hold nothing."""
        self._log.append((now, 0, f"recovered {sorted(pids)}"))
        self.recovering -= pids
        self.scheduler.touch_all()
        return self._finish(now)

    def absent(self, client_id: int, hello: Hello, now: float, found: Found | None = None) -> list[Send]:
        """Wait no longer for a process that lives and does not speak: what it may hold is kept for it.

        `hello` is what it would say, as far as others know. It is nobody's client to send anything to; its own hello
        takes its place, and gone() ends it.
        """
        self._log.append((now, client_id, hello))
        self._hello(client_id, hello, now, found)
        client = self.clients[client_id]
        client.absent, self._absent[client.pid] = True, client
        self._room.cannot_move(client, "")
        self.scheduler.touch_all()
        return self._finish(now)

    def _finish(self, now: float) -> list[Send]:
        """Decide all that can be decided now, and hand over the instructions."""
        if not self.recovering:
            if self._narrow:
                self._narrow = False
                for client in self.clients.values():
                    if client.lease:
                        self._leases.widen(client)
            self._suspension.doubts.book(now)
            self.scheduler.run(now)
        out, self._out = self._out, []
        return out

    def _send(self, client_id: int, message: Message) -> None:
        self._log.append((None, client_id, message))
        self._out.append(Send(client_id, message))

    # --- coming and going ------------------------------------------------------------------------------------------

    def _hello(self, client_id: int, hello: Hello, now: float, found: Found | None) -> None:
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
        former = self._absent.get(hello.pid)
        if former is not None:
            del self.clients[former.id]
            self._leave(former, now)
        profile = Profile(self.programs[hello.program or hello.name], hello.arguments)
        client = Client(client_id, hello.pid, hello.name, profile, max(0, hello.memory_hint), chosen=hello.chosen)
        client.came_at = client.yielded_at = now
        self.clients[client_id] = client
        self.recovering.discard(hello.pid)
        missing = [n for n in _ordinals(hello) if n not in self._by_ordinal] if hello.gpu >= 0 else []
        if hello.pool not in ("", self._pool):
            client.stranded = of_another_pool(hello)
        elif missing:
            client.stranded = stranded(client, missing, self._by_ordinal)
        if client.stranded:
            hello = replace(hello, gang="")  # the others may still run together, without it
        self._gangs.join(client, hello, now)
        gpus = [] if client.stranded else [self._by_ordinal[n] for n in _ordinals(hello) if n in self._by_ordinal]
        if not client.unit.gpus and len(gpus) == client.unit.size:
            self.scheduler.place(client.unit, gpus, bound=True)
        if client.gpus and hello.gpu >= 0:
            self._room.hear(client, hello.resident, hello.peak)
            client.evacuated = min(min(gpu.capacity for gpu in client.gpus), max(0, hello.evacuated))
            if hello.holding:
                self._leases.keep(client, now, alone=not self.recovering)
                self._narrow = True
        if found is not None:
            self._suspension.find(client, found)
        self.scheduler.touch(*client.gpus)
        self._send(client_id, Welcome(VERSION, client_id, lease=client.lease, stranded=client.stranded))

    def _leave(self, client: Client, now: float) -> None:
        """It is gone: nothing of it remains, but what was learned."""
        unit, gpus = client.unit, client.gpus
        if client.absent:
            del self._absent[client.pid]
        elif client.peak and client.steady < STEADY:
            client.profile.settled(client.peak)
        client.lease = client.waiting = False
        client.resident = 0
        self._room.settle(client)
        self._room.cannot_move(client, "")
        self._suspension.forget(client)
        for gpu in gpus:
            gpu.holders.discard(client.id)
            gpu.bound.discard(client.id)
        del unit.members[client.rank]
        self.scheduler.vacate(unit, now)
        if unit.queued and not unit.wanting():
            self.scheduler.dequeue(unit, now)
        elif unit.wanting():  # of its gang, which it may have kept out of the line
            self.scheduler.enqueue(unit, now)
        if not unit.members:
            self.scheduler.place(unit, [], bound=False)
            self._gangs.forget(unit)
        self.scheduler.touch(*gpus)

    # --- one function a message ------------------------------------------------------------------------------------

    def _request(self, client: Client, request: Request, now: float) -> None:
        if client.lease or client.waiting:
            return  # the client's thread was faster than the answer
        client.need = max(0, request.need)
        if client.stranded:
            client.waiting, client.asked_at = True, now  # in no line
            return
        refusal = impossible(client, self.gpus)
        if refusal:
            self._send(client.id, Refused(refusal))
            return
        if client.gap:
            client.profile.gap(now - client.yielded_at)
            client.gap = False
        self.scheduler.wait(client, now)

    def _yield(self, client: Client, message: Yield, now: float) -> None:
        if not client.lease:
            return
        unit = client.unit
        for gpu in client.gpus:
            gpu.holders.discard(client.id)
        client.lease = client.revoked = False
        client.headroom, client.need, client.promised = 0, 0, 0
        client.yielded_at, client.gap = now, not message.wants
        client.driver_problem = ""  # that was then
        self._room.cannot_move(client, "")
        lease = now - client.started_at
        client.phase_seconds += lease if message.phase < 0 else min(lease, message.phase)
        if not message.wants:
            client.profile.phase(client.phase_seconds)
            client.phase_seconds = 0.0
            self.scheduler.weigh(unit)
        self._partly_back(client, message.resident)
        self._room.hear(client, message.resident, message.peak)
        self._room.settle(client)
        if client.peak > client.peak_before:
            client.surprises += self._room.settled(client)
            client.steady = 0
        else:
            client.steady += 1
        if client.steady == STEADY:
            client.profile.settled(client.peak)
        if client.room_wanted:
            client.room_wanted = 0
            self._send(client.id, RoomAnswer(False, "the lease was given back"))
        revoked = unit.preempt_at is not None
        self.scheduler.vacate(unit, now)
        if message.wants:
            if unit.active and revoked:
                self.scheduler.pause(client, now)
            self.scheduler.wait(client, now)
        self.scheduler.touch(*client.gpus)

    def _partly_back(self, client: Client, said: int) -> None:
        """What has come to the GPU of a client that has not run yet is not in host memory any more."""
        client.evacuated -= max(0, min(client.evacuated, self._room.in_all(client, said) - client.resident))

    def _evacuated(self, client: Client, message: Evacuated, now: float) -> None:
        if not client.evacuating or client.suspending:
            return
        capacity = min(gpu.capacity for gpu in client.gpus)
        client.evacuated = min(capacity, client.evacuated + max(0, message.moved))
        client.said = max(0, message.resident)
        stays = max(client.said, min(self._room.in_all(client, message.resident), capacity - client.evacuated))
        client.resident = min(client.resident, stays)  # in all it fits the GPU, whatever the context was thought to be
        client.evacuation_seconds += max(0.0, message.seconds)
        client.evacuating = client.in_pieces = message.more
        if not message.more:
            self._room.cannot_move(client, message.reason)
            client.emptied, client.left = not message.reason, -1
        self._room.settle(client)
        self.scheduler.requeue(client.unit, now)
        self.scheduler.touch(*client.gpus)

    def _restored(self, client: Client, message: Restored, now: float) -> None:
        if not client.lease:
            return
        self._room.hear(client, message.resident)
        client.evacuated = 0
        client.started_at = now
        client.profile.swapped(message.moved, client.evacuation_seconds + max(0.0, message.seconds))
        client.evacuation_seconds = 0.0
        self.scheduler.touch(*client.gpus, *self._room.host_memory_freed())

    def _holds(self, client: Client, message: Holds, now: float) -> None:
        if client.lease and not client.evacuated:
            self._room.hear(client, message.resident, message.peak)
            client.unit.contender = None  # what it has determines how long it is protected
            self.scheduler.touch(*client.gpus)

    def _more_room(self, client: Client, message: MoreRoom, now: float) -> None:
        if not client.lease:
            self._send(client.id, RoomAnswer(False, "no lease is held"))
            return
        self._partly_back(client, message.resident)
        self._room.hear(client, message.resident)
        if client.room_wanted:
            self._send(client.id, RoomAnswer(False, "it has asked for something else meanwhile"))
        client.room_wanted = max(1, message.resident + message.nbytes)
        client.room_short = max(1, message.nbytes) if client.room_wanted <= client.headroom else 0
        client.room_coming = False
        self.scheduler.touch(*client.gpus)

    # --- for tests and the status ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise InvariantError when a rule of `invariants` is broken."""
        invariants.check(self)


def _ordinals(hello: Hello) -> list[int]:
    """The GPUs that a client of an earlier broker says it is bound to."""
    try:
        return [int(part) for part in hello.gpus.split(",")] if hello.gpus else [hello.gpu]
    except ValueError:
        return [hello.gpu]
