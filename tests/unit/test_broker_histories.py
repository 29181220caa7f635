"""The broker's core over random histories: its invariants hold after every event, and nobody waits for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from acb.broker.core import Broker, Client, Gpu
from acb.broker.policies import POLICIES
from acb.broker.state import Found, Resume, Send, Suspend
from acb.protocol import (
    VERSION,
    Evacuate,
    Evacuated,
    Grant,
    Headroom,
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
)  # fmt: skip

CAPACITY = 1000
ABSENT = 10_000
"""And more: ids of those who have not spoken."""


def stays(client: Client) -> bool:
    """Whether only the end of a program can free its memory, or the context that it has left."""
    return client.stuck or (client.emptied and client.resident > 0 and not client.waiting)


class Program:
    """A well-behaved client as the broker should see it: it keeps its own books and answers what it is told."""

    def __init__(self, size: int, residue: int, gang: str = "") -> None:
        self.size, self.residue, self.gang = size, residue, gang
        self.resident = self.evacuated = self.peak = 0
        self.gpus: tuple[int, ...] = ()
        self.lease = self.waiting = self.revoked = self.evacuate = self.restoring = self.refused = False
        self.room_answers = self.room_asked = 0
        self.suspend = self.resume = False
        self.parked = self.headroom = 0
        self.following = False
        self.onto = ""  # the GPU on which the driver is bringing its memory back, another than before
        self.moved = False  # its memory is back on another GPU, which it has not heard of
        self.doubt = ""  # what the driver had begun when the broker died, and has not told the next one

    @property
    def free(self) -> bool:
        """Whether it may ask."""
        return not (self.lease or self.waiting or self.refused)

    @property
    def movable(self) -> bool:
        """Whether the driver may move it: it has memory on the GPU, and nobody else is at it."""
        return bool(self.resident) and not (
            self.lease or self.waiting or self.evacuate or self.suspend or self.resume or self.parked or self.doubt
        )

    @property
    def ready(self) -> bool:
        """Whether it is its turn to do something."""
        if (
            self.refused
            or self.waiting
            or self.suspend
            or self.doubt
            or self.resume
            or self.room_asked != self.room_answers
        ):
            return self.evacuate
        return not self.following

    def park(self) -> None:
        """The driver has moved its memory, or at least its context, which the program does not count."""
        self.parked, self.resident = self.resident or 1, 0

    def take(self, message: Message) -> None:
        if isinstance(message, Grant):
            assert self.waiting
            assert not self.lease
            assert not self.evacuate
            assert not self.doubt
            assert not self.parked, "it is still stopped"
            gpus = tuple(map(int, message.gpus.split(","))) if message.gpus else (message.gpu,)
            assert self.moved or self.gpus in ((), gpus), "it was moved to other GPUs"
            assert not self.moved or self.gpus != gpus
            self.gpus, self.moved = gpus, False
            self.lease, self.waiting, self.restoring = True, False, self.evacuated > 0
            self.headroom, self.following = message.headroom, message.coming > 0
            assert self.restoring or not self.following, "what is it to bring back?"
        elif isinstance(message, Headroom):
            assert self.lease
            assert self.following
            assert message.headroom >= self.headroom
            self.headroom, self.following = message.headroom, message.coming > 0
        elif isinstance(message, Revoke):
            self.revoked = True
        elif isinstance(message, Uncontended):
            self.revoked = False
        elif isinstance(message, Evacuate):
            assert not self.lease
            assert not self.parked, "the driver has its memory"
            self.evacuate = True
        elif isinstance(message, Suspend):
            assert not self.lease
            assert not self.parked
            assert not self.doubt
            self.suspend = True
        elif isinstance(message, Resume):
            assert self.waiting
            assert self.parked
            assert not self.doubt
            assert not message.source or (int(message.source),) == self.gpus
            assert self.onto in ("", message.target), "nobody knows whether it is there already"
            self.resume, self.onto = True, message.target
        elif isinstance(message, Room):
            self.room_answers += 1
        elif isinstance(message, Refused):
            self.refused, self.waiting = True, False
        else:
            assert isinstance(message, Welcome)


def suspend(broker: Broker, client: int, now: float) -> list[Send]:
    """As if the driver had been asked to move its memory, and has."""
    view = broker.clients[client]
    view.evacuating = view.suspending = True
    return broker.suspended(client, "", 0.0, now)


def some(flag: str):
    """The rule is for programs of which this is true: it is not tried, in vain, while there is none."""
    return precondition(lambda self: any(getattr(program, flag) for program in self.programs.values()))


class Histories(RuleBasedStateMachine):
    """Programs of random sizes, alone, on several GPUs and in gangs, come, ask, compute, yield, are evacuated, refuse,
    and die, in any order; the broker may die, too."""

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        slots=st.integers(1, 2),
        driver=st.sampled_from(["", "moves", "migrates"]),
        sizes=st.lists(st.sampled_from([CAPACITY, CAPACITY, CAPACITY // 2]), min_size=1, max_size=3),
        context=st.sampled_from([0, 0, 50]),
    )
    def start(self, policy: str, slots: int, driver: str, sizes: list[int], context: int) -> None:
        self.set_up(policy, slots, driver, sizes, context)

    def set_up(self, policy: str, slots: int, driver: str, sizes: list[int], context: int = 0) -> None:
        def make() -> Broker:
            gpus = [Gpu(i, size, str(i), slots, kind="H100") for i, size in enumerate(sizes)]
            broker = Broker(gpus, POLICIES[policy](None), context=context)
            broker.driver_tier(bool(driver), 0.0, migrates=driver == "migrates")
            return broker

        self.make, self.driver = make, driver
        self.broker = self.make()
        self.count, self.largest = len(sizes), max(sizes)
        self.programs: dict[int, Program] = {}
        self.hellos: dict[int, Hello] = {}
        self.silent: dict[int, Program] = {}
        self.now, self.next_id = 0.0, 1

    def tell(self, client: int, message: Message) -> None:
        self.now += 0.001
        self.deliver(self.broker.handle(client, message, self.now))

    def deliver(self, sends: list) -> None:
        for client, message in sends:
            if client >= ABSENT:
                assert isinstance(message, (Welcome, Revoke, Uncontended)), "nobody hears it"
            else:
                self.programs[client].take(message)

    def pick(self, data: st.DataObject, condition) -> tuple[int, Program] | None:
        fitting = [(i, p) for i, p in self.programs.items() if condition(p)]
        return data.draw(st.sampled_from(fitting)) if fitting else None

    def come_as(self, program: Program, **fields) -> None:
        client, self.next_id = self.next_id, self.next_id + 1
        self.programs[client] = program
        self.hellos[client] = Hello(VERSION, 1000 + client, f"p{client % 3}", **fields)
        self.tell(client, self.hellos[client])

    def ask_as(self, client: int, program: Program) -> None:
        program.waiting = True
        self.tell(client, Request())

    def turn(self, client: int, program: Program, nbytes: int) -> None:
        """Ask, allocate so much, and give the lease back, if it is granted at once."""
        self.ask_as(client, program)
        headroom = self.broker.clients[client].headroom
        if program.lease and not program.restoring:
            program.resident = min(program.size, headroom, program.resident + nbytes)
            program.peak = max(program.peak, program.resident)
            program.lease = program.revoked = False
            self.tell(client, Yield(program.resident, program.peak))

    def find_suspended(self, client: int, program: Program) -> None:
        program.park()
        self.now += 0.001
        self.deliver(suspend(self.broker, client, self.now))

    @rule(
        size=st.integers(0, CAPACITY),
        hint=st.sampled_from([0, 0, 300, CAPACITY, CAPACITY + 1]),
        residue=st.sampled_from([0, 30]),
        priority=st.sampled_from([0, 0, 5, -5]),
        weight=st.sampled_from([1.0, 4.0]),
        count=st.sampled_from([1, 1, 1, 2, 3]),
        chosen=st.sampled_from([False, False, False, True]),
    )
    def come(self, size: int, hint: int, residue: int, priority: int, weight: float, count: int, chosen: bool) -> None:
        if len(self.programs) < 7:
            program = Program(min(size, hint) if hint else size, residue)
            self.come_as(program, memory_hint=hint, priority=priority, weight=weight, count=count, chosen=chosen)

    @rule(data=st.data(), size=st.integers(0, 400), gang=st.sampled_from(["a", "b"]), rank=st.integers(0, 1))
    def come_as_a_member(self, data: st.DataObject, size: int, gang: str, rank: int) -> None:
        if len(self.programs) < 7:
            self.come_as(Program(size, 0, gang), gang=gang, gang_size=2, rank=rank)

    @some("free")
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        if found := self.pick(data, lambda p: p.free):
            self.ask_as(*found)

    @some("lease")
    @rule(data=st.data(), wants=st.booleans(), fraction=st.floats(0, 1))
    def compute_and_yield(self, data: st.DataObject, wants: bool, fraction: float) -> None:
        if found := self.pick(data, lambda p: p.lease and not p.restoring and p.room_asked == p.room_answers):
            client, program = found
            headroom = self.broker.clients[client].headroom
            program.peak = max(program.peak, min(program.size, headroom))
            program.resident = max(min(program.residue, headroom), int(min(program.size, headroom) * fraction))
            program.lease = program.revoked = False
            program.waiting = wants
            self.tell(client, Yield(program.resident, program.peak, wants))

    @some("free")
    @rule(data=st.data(), nbytes=st.integers(1, 600), asks=st.booleans())
    def take_a_turn(self, data: st.DataObject, nbytes: int, asks: bool) -> None:
        """The most usual history of all in one step, so that there is time for what comes of it."""
        if found := self.pick(data, lambda p: p.free):
            self.turn(*found, nbytes)
            if asks and found[1].free:
                self.ask_as(*found)

    @some("restoring")
    @rule(data=st.data())
    def restored(self, data: st.DataObject) -> None:
        if found := self.pick(data, lambda p: p.restoring and not p.following):
            client, program = found
            program.resident, moved, program.evacuated = program.resident + program.evacuated, program.evacuated, 0
            program.restoring = False
            self.tell(client, Restored(program.resident, moved, 0.1))

    @some("evacuate")
    @rule(data=st.data(), refuse=st.sampled_from([False, False, False, True]))
    def evacuated(self, data: st.DataObject, refuse: bool) -> None:
        if found := self.pick(data, lambda p: p.evacuate):
            client, program = found
            program.evacuate = False
            moved = 0 if refuse else max(0, program.resident - program.residue)
            program.resident -= moved
            program.evacuated += moved
            self.tell(client, Evacuated(program.resident, moved, 0.1, "no host memory" if refuse else ""))

    @some("evacuate")
    @rule(data=st.data(), fraction=st.floats(0, 1))
    def evacuated_in_part(self, data: st.DataObject, fraction: float) -> None:
        if found := self.pick(data, lambda p: p.evacuate):
            client, program = found
            moved = int(fraction * max(0, program.resident - program.residue))
            program.resident -= moved
            program.evacuated += moved
            self.tell(client, Evacuated(program.resident, moved, 0.1, more=True))

    @some("restoring")
    @rule(data=st.data(), fraction=st.floats(0, 1))
    def restores_no_further(self, data: st.DataObject, fraction: float) -> None:
        """Preempted, or without room, in the middle of bringing its memory back."""
        if found := self.pick(data, lambda p: p.restoring and p.revoked and p.room_asked == p.room_answers):
            client, program = found
            room = max(0, self.broker.clients[client].headroom - program.resident)
            moved = min(room, int(fraction * (program.evacuated - 1)))
            program.resident += moved
            program.evacuated -= moved
            program.lease = program.revoked = program.restoring = program.following = False
            program.waiting = True
            self.tell(client, Yield(program.resident, program.peak, True))

    @some("suspend")
    @rule(data=st.data(), problem=st.sampled_from(["", "", "timeout"]))
    def driver_suspends(self, data: st.DataObject, problem: str) -> None:
        if found := self.pick(data, lambda p: p.suspend):
            client, program = found
            program.suspend = False
            if not problem:
                program.park()
            self.now += 0.001
            self.deliver(self.broker.suspended(client, problem, 0.1, self.now))

    @some("resume")
    @rule(data=st.data(), problem=st.sampled_from(["", "", "room", "lost", "helper"]))
    def driver_resumes(self, data: st.DataObject, problem: str) -> None:
        """With the problem "helper" nobody knows what has become of it."""
        if found := self.pick(data, lambda p: p.resume):
            client, program = found
            program.resume = False
            if not problem:
                program.resident, program.parked = program.resident + program.parked, 0
                program.moved = bool(program.onto)
            if problem != "helper":
                program.onto = ""
            self.now += 0.001
            lost, kept = problem == "lost", problem == "room"
            self.deliver(self.broker.resumed(client, problem, self.now, lost=lost, kept=kept))
            if self.broker.in_doubt(client):
                program.doubt = "resuming"

    @precondition(lambda self: any(program.doubt or program.suspend for program in self.programs.values()))
    @rule(data=st.data())
    def driver_does_not_tell(self, data: st.DataObject) -> None:
        if found := self.pick(data, lambda p: p.doubt or p.suspend):
            self.now += 0.001
            self.deliver(self.broker.unclear(found[0], self.now))

    @some("doubt")
    @rule(data=st.data(), done=st.booleans(), lost=st.sampled_from([False, False, False, True]))
    def driver_tells(self, data: st.DataObject, done: bool, lost: bool) -> None:
        """What has become of what it, or a helper that has died, had begun."""
        if found := self.pick(data, lambda p: bool(p.doubt)):
            self.clear_up(*found, done, lost)

    def clear_up(self, client: int, program: Program, done: bool, lost: bool = False) -> None:
        if program.doubt == "suspending" and done:
            program.park()
        elif program.doubt == "resuming" and done:
            program.resident, program.parked = program.resident + program.parked, 0
            program.moved = bool(program.onto)
        program.doubt = ""
        if lost:  # whatever it had
            program.parked, program.resident, program.refused = program.resident + program.parked, 0, True
        self.now += 0.001
        problem = "it is failed" if lost else "" if program.parked else "it runs"
        self.deliver(self.broker.suspended(client, problem, 0.0, self.now, lost=lost))

    @precondition(lambda self: self.driver)
    @some("resident")
    @rule(data=st.data(), asks=st.booleans())
    def is_found_suspended(self, data: st.DataObject, asks: bool) -> None:
        """The shortest way to what the driver does after a refused evacuation."""
        if found := self.pick(data, lambda p: p.movable):
            self.find_suspended(*found)
            if asks and found[1].free:
                self.ask_as(*found)

    @some("parked")
    @rule(data=st.data(), asks=st.booleans())
    def blocked(self, data: st.DataObject, asks: bool) -> None:
        """A program is stopped in the driver, and cannot ask; or it seemed so, and does."""
        if found := self.pick(data, lambda p: p.parked and not (p.lease or p.refused or p.doubt)):
            client, program = found
            program.waiting = True
            self.now += 0.001
            self.deliver(self.broker.blocked(client, self.now))
            if asks and not program.lease:
                self.tell(client, Request())

    @rule(data=st.data(), steps=st.integers(5, 40), sizes=st.sampled_from([1.0, 1.0, 0.6]))
    def go_on(self, data: st.DataObject, steps: int, sizes: float) -> None:
        """The programs do for a while what they exist for, in any order: memory goes and comes, mostly in pieces."""
        for _ in range(steps):
            ready = {i: p for i, p in self.programs.items() if p.ready}
            if not ready:
                return
            client = data.draw(st.sampled_from(sorted(ready)))
            program = ready[client]
            if program.evacuate:
                self._evacuate_on(client, program, data.draw(st.sampled_from([0.3, 0.5, 1.0])))
            elif program.restoring:
                program.resident, moved = program.resident + program.evacuated, program.evacuated
                program.evacuated, program.restoring = 0, False
                self.tell(client, Restored(program.resident, moved, 0.1))
            elif program.lease:
                held = min(int(program.size * sizes), self.broker.clients[client].headroom)
                program.resident, program.peak = held, max(program.peak, held)
                program.lease = program.revoked = False
                self.tell(client, Yield(held, program.peak))
            else:
                program.waiting = True
                self.tell(client, Request())

    def _evacuate_on(self, client: int, program: Program, fraction: float) -> None:
        moved = int(fraction * max(0, program.resident - program.residue))
        program.resident -= moved
        program.evacuated += moved
        program.evacuate = program.resident > program.residue
        self.tell(client, Evacuated(program.resident, moved, 0.1, more=program.evacuate))

    @some("lease")
    @rule(data=st.data(), nbytes=st.integers(1, CAPACITY))
    def more_room(self, data: st.DataObject, nbytes: int) -> None:
        if found := self.pick(data, lambda p: p.lease and p.room_asked == p.room_answers and not p.restoring):
            found[1].room_asked += 1
            self.tell(found[0], MoreRoom(found[1].resident, nbytes))

    @precondition(lambda self: any(program.resident or program.parked for program in self.programs.values()))
    @rule(data=st.data(), truth=st.integers(0, CAPACITY))
    def observe(self, data: st.DataObject, truth: int) -> None:
        """The device says that a program has lied; or, of one that is suspended, what it had a moment before."""
        if found := self.pick(data, lambda p: not (p.lease or p.evacuate or p.suspend or p.doubt) and p.gpus):
            self.now += 0.001
            self.deliver(self.broker.observed(found[0], truth, self.now))
            found[1].resident = self.broker.clients[found[0]].resident

    @rule(seconds=st.sampled_from([0.3, 10.0, 500.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        if self.broker.wake_at is not None and self.broker.wake_at <= self.now:
            self.deliver(self.broker.tick(self.now))
            assert self.broker.wake_at is None or self.broker.wake_at > self.now

    @precondition(lambda self: self.programs)
    @rule(data=st.data(), dies=st.sampled_from([False, False, False, True]))
    def die(self, data: st.DataObject, dies: bool) -> None:
        if dies and (found := self.pick(data, lambda p: True)):
            del self.programs[found[0]]
            self.now += 0.001
            self.deliver(self.broker.gone(found[0], self.now))

    @rule(data=st.data())
    def broker_dies(self, data: st.DataObject) -> None:
        """All tell the next one what they hold, in any order; some die before that."""
        if not data.draw(st.sampled_from([False, False, True])):
            return
        if any(program.moved and program.parked for program in self.programs.values()):
            return  # the second broker that dies before it has heard where it is: nobody notes so much
        self.broker = self.make()
        self.programs |= self.silent
        self.silent.clear()
        self.broker.recover({1000 + client for client in self.programs})
        for client in data.draw(st.permutations(sorted(self.programs))):
            program = self.programs[client]
            if data.draw(st.sampled_from([False, False, False, True])):
                del self.programs[client]
                self.deliver(self.broker.recovered({1000 + client}, self.now))
                continue
            note = None
            if program.suspend or program.resume or program.parked or program.moved or program.doubt:
                under_way = (
                    "suspending" if program.suspend else "resuming" if program.resume or program.onto else "done"
                )
                program.doubt = program.doubt or under_way
                note = Found(program.resident + program.parked, program.onto)
            program.evacuate = program.revoked = program.suspend = program.resume = program.following = False
            program.room_asked = program.room_answers = 0
            if note is None and program.gpus and data.draw(st.sampled_from([False, False, True])):
                self.silent[client] = self.programs.pop(client)
                self.now += 0.001
                hello = replace(self.hello_again(client, program), memory_hint=0, evacuated=0, peak=0)
                self.deliver(self.broker.absent(ABSENT + client, hello, self.now))
            else:
                self.come_again(client, program, note)
        for client, program in list(self.programs.items()):
            if program.waiting:
                self.tell(client, Request())

    def hello_again(self, client: int, program: Program) -> Hello:
        gpu = -1
        if program.gpus:
            gpu = program.gpus[self.hellos[client].rank if program.gang and len(program.gpus) > 1 else 0]
        return replace(
            self.hellos[client],
            gpu=gpu,
            gpus=",".join(map(str, program.gpus)) if len(program.gpus) > 1 else "",
            holding=program.lease,
            resident=program.resident,
            evacuated=program.evacuated,
            peak=program.peak,
        )

    def come_again(self, client: int, program: Program, note: Found | None = None) -> None:
        self.now += 0.001
        sends = self.broker.handle(client, self.hello_again(client, program), self.now, note)
        [welcome] = [m for c, m in sends if c == client and isinstance(m, Welcome)]
        if program.lease and not welcome.lease:
            program.lease, program.waiting, program.restoring = False, False, False
        self.deliver([send for send in sends if send.message is not welcome])
        program.doubt = program.doubt if self.broker.in_doubt(client) else ""

    @precondition(lambda self: self.silent)
    @rule(data=st.data(), dies=st.sampled_from([False, False, True]))
    def speaks_at_last(self, data: st.DataObject, dies: bool) -> None:
        """A program that lives, and said nothing to the broker after the one that died; or it dies, too."""
        client = data.draw(st.sampled_from(sorted(self.silent)))
        program = self.silent.pop(client)
        if dies:
            self.now += 0.001
            self.deliver(self.broker.gone(ABSENT + client, self.now))
            return
        self.programs[client] = program
        held = program.lease
        self.come_again(client, program)
        assert program.lease == held, "its lease was another's meanwhile"
        assert self.broker.clients[client].resident >= program.resident, "its memory's room was another's meanwhile"
        if program.waiting:
            self.tell(client, Request())

    @precondition(lambda self: self.programs)
    @rule(
        data=st.data(),
        nonsense=st.sampled_from(
            [Yield(5, 10**9), Evacuated(3, 10**6), Restored(0), Room(True), Hello(VERSION, 1, "x")]
        ),
    )
    def talk_nonsense(self, data: st.DataObject, nonsense: Message) -> None:
        """What a confused client says out of turn changes nothing (a Refused to it is not a refusal of its request)."""
        if found := self.pick(data, lambda p: not (p.lease or p.evacuate or p.suspend or p.waiting)):
            self.now += 0.001
            self.deliver(
                [s for s in self.broker.handle(found[0], nonsense, self.now) if not isinstance(s.message, Refused)]
            )

    @invariant()
    def rules_hold(self) -> None:
        if hasattr(self, "broker"):
            self.broker.check()
            for client, program in self.programs.items():
                view = self.broker.clients[client]
                said = (False, True) if view.resuming else (view.lease, view.waiting)
                assert said == (program.lease, program.waiting), self.broker.log
                assert view.resident <= CAPACITY

    def teardown(self) -> None:
        """From any state: when everybody goes on and finishes, everybody who waits gets a lease (or a refusal)."""
        if not hasattr(self, "broker"):
            return
        for client in self.silent:  # the user ends it, as he was told
            self.deliver(self.broker.gone(ABSENT + client, self.now))
        waited = {i for i, p in self.programs.items() if p.waiting}
        for _ in range(60 * (len(self.programs) + 1)):
            if not waited:
                break
            self.wait(1.0)
            for client, program in list(self.programs.items()):
                if self.broker.clients[client].unclear:
                    del self.programs[client]  # the user ends it, as he was told
                    self.deliver(self.broker.gone(client, self.now))
                elif program.doubt:
                    self.clear_up(client, program, True)
                elif program.suspend:
                    program.suspend = False
                    program.park()
                    self.deliver(self.broker.suspended(client, "", 0.1, self.now))
                elif program.resume:
                    program.resume, program.moved, program.onto = False, bool(program.onto), ""
                    program.resident, program.parked = program.resident + program.parked, 0
                    self.deliver(self.broker.resumed(client, "", self.now))
                elif program.evacuate:
                    program.evacuate = False
                    program.evacuated, program.resident = program.evacuated + program.resident, 0
                    self.tell(client, Evacuated(0, program.evacuated, 0.1))
                elif program.restoring and not program.following:
                    program.restoring, program.resident = False, program.resident + program.evacuated
                    moved, program.evacuated = program.evacuated, 0
                    self.tell(client, Restored(program.resident, moved, 0.1))
                elif (program.lease and not program.following) or stays(self.broker.clients[client]):
                    program.lease = False
                    del self.programs[client]  # its work is done; what nobody can move goes only so
                    self.now += 0.001
                    self.deliver(self.broker.gone(client, self.now))
                self.broker.check()
            waited = {i for i in waited if i in self.programs and self.programs[i].waiting}
        assert not waited, "\n".join(self.broker.log)


Histories.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHistories = pytest.mark.timeout(300)(Histories.TestCase)
