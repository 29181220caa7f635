"""The policies: who is next, for how long, who makes room, and that nobody waits for ever under any of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from acb.broker.core import Broker, Gpu
from acb.broker.policies import POLICIES
from acb.broker.policies.base import MAX_QUANTUM, MIN_QUANTUM, SWAPS_PER_QUANTUM, Policy
from acb.broker.policies.fair import MOST
from acb.broker.policies.priority import STEP
from acb.protocol import VERSION, Evacuate, Evacuated, Grant, Hello, Holds, Request, Restored, Revoke, Yield

GIB = 1 << 30


class World:
    """A broker of small programs that do what they are told at once."""

    def __init__(self, policy: str, gpus: int = 1, capacity: int = 10 * GIB, slots: int = 1) -> None:
        self.broker = Broker([Gpu(i, capacity, f"u{i}", slots) for i in range(gpus)], POLICIES[policy](None))
        self.now = 0.0
        self.numbers = itertools.count(1)
        self.resident: dict[int, int] = {}
        self.quantum: dict[int, float] = {}
        self.copies = 0

    def come(self, size: int = 0, **fields) -> int:
        client = next(self.numbers)
        self.resident[client] = 0
        fields.setdefault("memory_hint", size)
        self.take(self.broker.handle(client, Hello(VERSION, client, f"p{client}", **fields), self.now))
        return client

    def take(self, sends: list) -> None:
        for client, message in sends:
            if isinstance(message, Grant):
                view = self.broker.clients[client]
                if view.evacuated:
                    moved, self.resident[client] = view.evacuated, view.evacuated
                    self.take(self.broker.handle(client, Restored(moved, moved, moved / (10 * GIB)), self.now))
            elif isinstance(message, Evacuate):
                moved, self.resident[client] = self.resident[client], 0
                self.copies += 1
                self.take(self.broker.handle(client, Evacuated(0, moved, moved / (10 * GIB)), self.now))
            elif isinstance(message, Revoke):
                self.quantum[client] = message.quantum
        self.broker.check()

    def ask(self, client: int) -> None:
        self.take(self.broker.handle(client, Request(), self.now))

    def give(self, client: int, size: int = 0, *, wants: bool = False) -> None:
        self.resident[client] = size
        self.take(self.broker.handle(client, Yield(size, size, wants), self.now))

    def die(self, client: int) -> None:
        self.take(self.broker.gone(client, self.now))

    def holders(self) -> list[int]:
        return sorted(client.id for client in self.broker.clients.values() if client.lease)


def test_the_names_of_the_issue_all_name_a_policy() -> None:
    assert {"fifo", "fair", "priority", "backfill", "affinity", "simple", "gpu-sharing", "gpu-affinity"} == set(
        POLICIES
    )


def test_the_quantum_is_a_multiple_of_the_swap_within_bounds_or_what_was_fixed() -> None:
    world = World("fifo")
    holder, waiting = (world.broker.clients[world.come()].unit for _ in range(2))
    quantum = POLICIES["fifo"](None).quantum
    assert quantum(holder, waiting, 0.0) == MIN_QUANTUM
    assert quantum(holder, waiting, 1.0) == SWAPS_PER_QUANTUM
    assert quantum(holder, waiting, 1e6) == MAX_QUANTUM
    assert POLICIES["fifo"](2.5).quantum(holder, waiting, 1e6) == 2.5


def test_a_program_that_may_hold_much_is_protected_until_it_says_what_it_holds() -> None:
    world = World("fifo", capacity=80 * GIB)
    unknown, other = world.come(), world.come()
    world.ask(unknown)
    world.ask(other)
    assert world.quantum[unknown] == MAX_QUANTUM
    world.take(world.broker.handle(unknown, Holds(GIB, GIB), world.now))
    assert world.quantum[unknown] == pytest.approx(SWAPS_PER_QUANTUM * 0.5 * 2 / 8)


def test_a_phase_that_is_about_to_end_is_not_cut_short() -> None:
    world = World("fifo")
    holder, other = world.come(GIB), world.come(GIB)
    for _ in range(4):
        world.ask(holder)
        world.now += 20.0
        world.give(holder, GIB)
        world.now += 5.0
    world.ask(holder)
    world.now += 1.0
    world.ask(other)
    assert world.quantum[holder] == pytest.approx(20.0)


def test_priority_goes_first_and_preempts() -> None:
    world = World("priority")
    low, equal, high = world.come(), world.come(), world.come(priority=3)
    world.ask(low)
    world.take(world.broker.handle(low, Holds(0, 0), world.now))
    world.now = 0.5
    world.ask(equal)
    assert world.quantum[low] == MIN_QUANTUM
    world.ask(high)
    assert world.quantum[low] == 0.0
    world.give(low, wants=True)
    assert world.holders() == [high]
    world.give(high)
    assert world.holders() == [equal]


def test_a_lower_priority_preempts_only_after_it_has_waited_for_its_steps() -> None:
    world = World("priority")
    high, low = world.come(priority=2), world.come()
    world.ask(high)
    world.ask(low)
    assert world.quantum[high] == pytest.approx(2 * STEP)


def test_fair_gives_gpu_time_by_weight_to_those_who_always_want_it() -> None:
    world = World("fair")
    heavy, light = world.come(weight=3.0), world.come(weight=1.0)
    used = {heavy: 0.0, light: 0.0}
    world.ask(heavy)
    world.ask(light)
    for _ in range(400):
        [holder] = world.holders()
        world.now += world.quantum.pop(holder)
        used[holder] = used[holder] + world.now - world.broker.clients[holder].granted_at
        world.give(holder, wants=True)
    assert used[heavy] / used[light] == pytest.approx(3.0, rel=0.1)


def test_fair_lets_a_rare_user_in_before_those_who_use_it_all_the_time() -> None:
    world = World("fair")
    hogs = [world.come(), world.come(), world.come()]
    for hog in hogs:
        world.ask(hog)
    rare = world.come()
    world.ask(rare)
    while rare not in world.holders():
        world.now += 1.0
        world.give(world.holders()[0], wants=True)
    world.give(rare)
    for _ in range(60):
        world.now += 1.0
        world.give(world.holders()[0], wants=True)
    world.ask(rare)
    world.now += 1.0
    world.give(world.holders()[0], wants=True)
    assert world.holders() == [rare]


def test_affinity_prefers_whose_memory_is_there() -> None:
    def copies(policy: str) -> int:
        world = World(policy, capacity=10 * GIB)
        jobs = [world.come(4 * GIB) for _ in range(3)]  # two fit
        for job in jobs:
            world.ask(job)
        for _ in range(60):
            world.now += 0.5
            [holder] = world.holders()
            world.give(holder, 4 * GIB)
            world.now += 0.01
            world.ask(holder)
        return world.copies

    assert copies("affinity") < 0.2 * copies("fifo")


def test_who_is_expected_back_last_makes_room() -> None:
    world = World("fifo", capacity=10 * GIB)
    often, rare, new = world.come(4 * GIB), world.come(4 * GIB), world.come(4 * GIB)
    for client, gap in ((often, 1.0), (rare, 100.0)):
        for _ in range(4):
            world.ask(client)
            world.give(client, 4 * GIB)
            world.now += gap
    world.ask(rare)
    world.give(rare, 4 * GIB)
    world.ask(often)
    world.give(often, 4 * GIB)  # the last to have run, but soon back
    world.ask(new)
    assert world.resident[rare] == 0
    assert world.resident[often] == 4 * GIB


def test_who_waits_already_makes_room_last() -> None:
    world = World("fifo", capacity=10 * GIB)
    first, second, idle = world.come(4 * GIB), world.come(5 * GIB), world.come(4 * GIB)
    world.ask(idle)
    world.give(idle, 4 * GIB)
    world.now = 5.0
    world.ask(first)
    world.ask(second)
    world.give(first, 4 * GIB, wants=True)  # the one that used it last, but it wants it back
    assert world.resident[idle] == 0
    assert world.resident[first] == 4 * GIB
    assert world.holders() == [second]


def test_backfill_lets_a_short_phase_use_a_gpu_that_waits_for_a_gang() -> None:
    started = {}
    for policy in ("fifo", "backfill"):
        world = World(policy, gpus=2)
        long, short, gang = world.come(), world.come(), world.come(count=2)
        world.ask(long)  # on GPU 0
        for _ in range(4):  # on GPU 1: its phases are learned to take a tenth of a second
            world.ask(short)
            world.now += 0.1
            world.give(short)
        world.ask(gang)
        world.ask(short)
        started[policy] = world.holders() == [long, short]
        if started[policy]:
            assert world.quantum[short] <= world.quantum[long] + 1e-6
        world.give(long)
        if policy == "backfill":
            assert world.quantum[short] == 0.0  # now it would delay the gang
            world.give(short, wants=True)
        assert world.holders() == [gang]
    assert started == {"fifo": False, "backfill": True}


def test_backfill_does_not_delay_the_first_by_a_long_phase() -> None:
    world = World("backfill", gpus=2)
    long, other, gang = world.come(), world.come(), world.come(count=2)
    for _ in range(4):
        world.ask(other)
        world.now += 500.0
        world.give(other)
    world.ask(long)
    world.ask(gang)
    world.ask(other)
    assert world.holders() == [long]


def _favoured(policy: str) -> Iterator[dict]:
    """The hellos of those whom a policy favours most."""
    return itertools.repeat({"priority": 3} if policy == "priority" else {"weight": 50.0})


BOUND = {"fifo": 0.0, "backfill": 0.0, "priority": 6 * STEP, "fair": 2 * MOST, "affinity": MAX_QUANTUM}
"""Seconds by which somebody who asks later can be ahead, at most: twice the advantage where it can be negative."""


@pytest.mark.parametrize("policy", sorted({kind.names[0] for kind in POLICIES.values()}))
def test_nobody_starves(policy: str) -> None:
    """Favoured newcomers without end, each as long as a second, against one who has used much and has no favour."""
    world = World(policy, capacity=10 * GIB)
    poor = world.come(8 * GIB, priority=-3 if policy == "priority" else 0, weight=0.02)
    world.ask(poor)
    world.now += 3600.0
    world.give(poor, 8 * GIB)
    favoured = _favoured(policy)
    stream = [world.come(GIB, **next(favoured)) for _ in range(3)]
    for client in stream:
        world.ask(client)
    asked = world.now
    world.ask(poor)
    while poor not in world.holders():
        assert world.now - asked <= BOUND[policy] + 10, f"it has waited for {world.now - asked} s"
        world.now += 1.0
        [holder] = world.holders()
        world.die(holder)
        client = world.come(GIB, **next(favoured))
        world.ask(client)


def test_newcomers_are_spread_over_the_gpus_and_stay() -> None:
    world = World("fifo", gpus=4)
    jobs = [world.come() for _ in range(16)]
    for job in jobs:
        world.ask(job)
    for _ in range(3):
        for holder in world.holders():
            world.give(holder, GIB, wants=True)
    assert sorted(len(gpu.bound) for gpu in world.broker.gpus) == [4, 4, 4, 4]


def test_an_idle_gpu_takes_a_newcomer_that_waits_elsewhere() -> None:
    world = World("fifo", gpus=2)
    jobs = [world.come() for _ in range(4)]  # two on each GPU
    for job in jobs:
        world.ask(job)
    on_first = [job for job in jobs if world.broker.clients[job].gpu == 0]
    for job in on_first:
        world.die(job)
    assert len(world.holders()) == 2


def test_a_job_goes_only_where_it_fits() -> None:
    broker = Broker([Gpu(0, 4 * GIB), Gpu(1, 16 * GIB)], POLICIES["fifo"](None))
    for client in (1, 2):
        broker.handle(client, Hello(VERSION, client, "big", memory_hint=10 * GIB), 0.0)
    [(_, grant)] = broker.handle(1, Request(), 0.0)
    assert isinstance(grant, Grant)
    assert grant.gpu == 1
    broker.handle(2, Request(), 0.0)
    assert broker.clients[2].gpu == 1


def test_two_slots_let_two_run_at_once_only_if_their_memory_fits() -> None:
    world = World("fifo", capacity=10 * GIB, slots=2)
    small, other, big = world.come(4 * GIB), world.come(4 * GIB), world.come(8 * GIB)
    world.ask(small)
    world.ask(other)
    assert world.holders() == [small, other]
    world.give(small, 4 * GIB)
    world.ask(big)
    assert world.holders() == [other]
    assert other in world.quantum
    world.give(other, 4 * GIB)
    assert world.holders() == [big]


def test_every_policy_says_what_it_is() -> None:
    for kind in POLICIES.values():
        assert issubclass(kind, Policy)
        assert kind.__doc__
        assert kind(None).name == kind.names[0]
