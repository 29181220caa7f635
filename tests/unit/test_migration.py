"""A suspended client whose GPU is taken comes back on another one of the same kind that is free."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from test_broker_histories import CAPACITY, Histories, Program, suspend

from acb.broker.core import Broker, Gpu
from acb.broker.meter import Meter
from acb.broker.migration import gpu_map
from acb.broker.policies import POLICIES
from acb.broker.state import Found, Resume, Suspend
from acb.protocol import (
    VERSION,
    Evacuate,
    Evacuated,
    Grant,
    Hello,
    Message,
    Refused,
    Request,
    Restored,
    Revoke,
    Uncontended,
    Yield,
)


class Node:
    """Two GPUs. Client 1 has been suspended with 600 bytes on the first, which client 2 holds; the second is free."""

    def __init__(
        self, there: int = CAPACITY, kind: str = "H100", *, migrates: bool = True, chosen: bool = False, onto: str = ""
    ) -> None:
        gpus = [Gpu(0, CAPACITY, "GPU-a", kind="H100"), Gpu(1, there, "GPU-b", kind=kind)]
        self.broker = Broker(gpus, POLICIES["fifo"]())
        self.broker.driver_tier(True, 0.0, migrates=migrates)
        for client in (1, 2):
            hello = Hello(VERSION, 100 + client, f"p{client}", gpu=0, chosen=chosen)
            self.broker.handle(client, hello, 0.0, Found(600, onto) if client == 1 else None)
        self.broker.suspended(1, "", 0.0, 0.0)
        self.broker.handle(2, Request(), 0.0)
        self.broker.check()

    def ask(self, now: float = 1.0) -> list[tuple[int, Message]]:
        sends = self.broker.handle(1, Request(), now)
        self.broker.check()
        return list(sends)

    def resumed(self, problem: str = "", now: float = 2.0, **how: bool) -> list[tuple[int, Message]]:
        sends = self.broker.resumed(1, problem, now, **how)
        self.broker.check()
        return list(sends)

    def yields(self, client: int, now: float, message: Yield = Yield(0, 100)) -> list[tuple[int, Message]]:  # noqa: B008
        sends = self.broker.handle(client, message, now)
        self.broker.check()
        return list(sends)


THERE = (1, Resume("GPU-a", "GPU-b"))


def test_it_is_resumed_where_nobody_is() -> None:
    node = Node()
    assert node.ask() == [THERE]
    assert node.broker.clients[1].state == "restoring"
    assert node.resumed() == [(1, Grant(1, "GPU-b", CAPACITY))]
    assert [gpu.in_use for gpu in node.broker.gpus] == [CAPACITY, CAPACITY]
    node.yields(1, 3.0, Yield(600, 600))
    assert node.broker.clients[1].state == "resident"
    assert node.broker.gpus[1].in_use == 600


def test_the_holder_of_its_old_gpu_is_not_revoked_for_it() -> None:
    node = Node()
    assert not any(isinstance(message, Revoke) for _, message in node.ask())
    node.resumed()
    assert node.broker.handle(1, Yield(600, 600), 3.0) == []


def test_it_waits_in_its_line_until_the_other_gpu_is_free() -> None:
    node = Node()
    node.broker.handle(3, Hello(VERSION, 103, "p3", gpu=1), 0.5)
    node.broker.handle(3, Request(), 0.5)
    [(revoked, revoke)] = node.ask()
    assert (revoked, type(revoke)) == (2, Revoke)
    sends = node.broker.gone(3, 2.0)
    node.broker.check()
    assert sorted(sends, key=lambda send: send.client) == [THERE, (2, Uncontended())]


def test_it_is_as_well_taken_for_its_old_gpu_when_that_is_free_first() -> None:
    node = Node()
    node.broker.handle(3, Hello(VERSION, 103, "p3", gpu=1), 0.5)
    node.broker.handle(3, Request(), 0.5)
    node.ask()
    assert node.yields(2, 2.0) == [(1, Resume())]
    assert node.resumed(now=3.0) == [(1, Grant(0, "GPU-a", CAPACITY))]


def test_what_moves_to_another_gpu_must_not_crowd_it() -> None:
    node = Node()
    for client in (3, 4):  # both at home on the other one, and idle now
        node.broker.handle(client, Hello(VERSION, 100 + client, f"p{client}", gpu=1), 0.5)
    [(revoked, _)] = node.ask()
    assert revoked == 2
    assert node.broker.gone(4, 2.0)[0] == THERE


@pytest.mark.parametrize(
    "how",
    [{"migrates": False}, {"chosen": True}, {"kind": "A100"}, {"kind": ""}, {"there": CAPACITY * 2}],
    ids=["an older driver", "the user has chosen", "another kind", "an unknown kind", "another size"],
)
def test_it_stays_where_it_was(how: dict[str, Any]) -> None:
    node = Node(**how)
    [(revoked, revoke)] = node.ask()
    assert (revoked, type(revoke)) == (2, Revoke)
    assert node.yields(2, 2.0) == [(1, Resume())]


def test_one_that_could_not_be_moved_waits_where_it_was_in_its_old_place() -> None:
    node = Node()
    node.ask(1.0)
    node.broker.handle(3, Hello(VERSION, 103, "p3", gpu=0), 1.2)
    node.broker.handle(3, Request(), 1.2)  # later than client 1
    sends = node.resumed("there is no room", 2.0, kept=True)
    assert not any(isinstance(message, (Resume, Grant)) for _, message in sends)
    client = node.broker.clients[1]
    assert (client.state, client.gpu, client.evacuated) == ("waiting", 0, 600)
    assert [gpu.in_use for gpu in node.broker.gpus] == [CAPACITY, 0]
    assert node.yields(2, 3.0)[0] == (1, Resume())
    assert node.resumed(now=4.0)[0] == (1, Grant(0, "GPU-a", CAPACITY))


def test_it_may_be_moved_again_when_it_is_suspended_again() -> None:
    node = Node()
    node.ask(1.0)
    node.resumed("there is no room", 2.0, kept=True)
    node.yields(2, 3.0)
    node.resumed(now=4.0)
    node.yields(1, 5.0, Yield(600, 600))
    suspend(node.broker, 1, 6.0)
    node.broker.handle(2, Request(), 7.0)
    assert node.ask(8.0) == [THERE]


def test_when_nobody_knows_what_has_become_of_it_only_the_same_is_tried_again() -> None:
    node = Node()
    node.ask(1.0)
    assert node.resumed("the helper has died", 2.0) == []
    wake = node.broker.wake_at
    assert wake is not None
    node.broker.gone(2, 2.5)  # its old GPU is free, but it may not be there any more
    assert node.broker.tick(wake) == [THERE]
    assert node.resumed(now=wake + 1) == [(1, Grant(1, "GPU-b", CAPACITY))]


def test_memory_that_is_lost_on_the_way_keeps_nobody_out() -> None:
    node = Node()
    node.ask(1.0)
    [(refused, refusal)] = node.resumed("it is failed", lost=True)
    assert (refused, type(refusal)) == (1, Refused)
    assert node.broker.gpus[1].in_use == 0


def test_what_its_framework_has_evacuated_comes_back_there_too() -> None:
    broker = Broker([Gpu(n, CAPACITY, f"GPU-{name}", kind="H100") for n, name in enumerate("ab")], POLICIES["fifo"]())
    broker.driver_tier(True, 0.0, migrates=True)
    broker.handle(1, Hello(VERSION, 101, "first", gpu=0, memory_hint=600), 0.0)
    broker.handle(1, Request(), 0.0)
    broker.handle(1, Yield(600, 600), 1.0)
    broker.handle(2, Hello(VERSION, 102, "large", gpu=0, memory_hint=CAPACITY), 1.0)
    assert broker.handle(2, Request(), 1.0) == [(1, Evacuate())]
    assert broker.handle(1, Evacuated(50, 550, 0.1), 1.1) == [(1, Suspend())]
    broker.suspended(1, "", 0.1, 1.2)
    assert broker.handle(1, Request(), 2.0) == [THERE]
    [(_, grant)] = broker.resumed(1, "", 2.1)
    assert grant == Grant(1, "GPU-b", 660)
    assert (broker.clients[1].state, broker.clients[1].resident) == ("restoring", 50)
    broker.handle(1, Restored(600, 550, 0.1), 2.2)
    broker.check()
    assert (broker.clients[1].state, broker.clients[1].resident) == ("running", 600)


def test_one_that_dies_on_the_way_leaves_both_gpus() -> None:
    node = Node()
    node.ask(1.0)
    node.broker.gone(1, 2.0)
    node.broker.check()
    assert [gpu.in_use for gpu in node.broker.gpus] == [CAPACITY, 0]


def test_the_next_broker_goes_on_with_what_the_one_before_has_begun() -> None:
    node = Node(onto="GPU-b")
    assert node.broker.clients[1].gpu == 1
    assert node.ask() == [THERE]
    assert node.resumed() == [(1, Grant(1, "GPU-b", CAPACITY))]


def test_and_with_nothing_else_although_its_old_gpu_is_free() -> None:
    node = Node(onto="GPU-b")
    node.broker.gone(2, 0.5)
    node.broker.handle(3, Hello(VERSION, 103, "p3", gpu=1), 0.5)
    node.broker.handle(3, Request(), 0.5)
    assert [type(message) for _, message in node.ask()] == [Revoke]
    assert node.broker.gone(3, 2.0) == [THERE]


def test_what_the_next_broker_could_not_finish_either_waits_where_it_was() -> None:
    node = Node(onto="GPU-b")
    node.ask()
    node.resumed("there is no room", kept=True)
    assert node.yields(2, 3.0) == [(1, Resume())]


def test_what_came_back_there_although_nobody_has_heard_of_it_is_counted_there() -> None:
    gpus = [Gpu(n, CAPACITY, f"GPU-{name}", kind="H100") for n, name in enumerate("ab")]
    broker = Broker(gpus, POLICIES["fifo"]())
    broker.driver_tier(True, 0.0, migrates=True)
    broker.handle(1, Hello(VERSION, 101, "p1", gpu=0, resident=600), 0.0, Found(600, "GPU-b"))
    broker.check()
    assert [gpu.in_use for gpu in gpus] == [0, 600]
    broker.suspended(1, "it runs", 0.0, 1.0)
    broker.check()
    assert [gpu.in_use for gpu in gpus] == [0, 600]
    assert broker.handle(1, Request(), 2.0) == [(1, Grant(1, "GPU-b", CAPACITY))]


def test_the_meter_looks_for_it_on_its_new_gpu() -> None:
    node = Node()
    node.ask()
    node.resumed()
    node.yields(1, 3.0, Yield(600, 600))
    meter = Meter({"GPU-a": {102: 300}, "GPU-b": {101: 650}}.__getitem__)
    assert list(meter.look(node.broker.gpus, node.broker.clients, 4.0)) == [(1, 650)]
    node.broker.observed(1, 650, 4.0)
    assert [gpu.in_use for gpu in node.broker.gpus] == [CAPACITY, 650]
    node.broker.check()


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (["a"], {"a": "b"}),
        ([], {"a": "b"}),
        (["a", "c"], {"a": "b", "c": "c"}),
        (["a", "b", "c"], {"a": "b", "b": "a", "c": "c"}),
    ],
)
def test_every_gpu_is_named_and_no_two_become_one(held: list[str], expected: dict[str, str]) -> None:
    assert gpu_map(held, "a", "b") == expected


class Migrations(Histories):
    """Histories that begin with several programs on each of several like GPUs, and a driver that can take them from one
    to another."""

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        slots=st.sampled_from([1, 1, 2]),
        sizes=st.sampled_from([[CAPACITY] * 2, [CAPACITY] * 3, [CAPACITY, CAPACITY, CAPACITY // 2]]),
    )
    def start(self, policy: str, slots: int, sizes: list[int]) -> None:
        self.set_up(policy, slots, "migrates", sizes)
        for _ in range(2 * len(sizes)):
            program = Program(400, 0)
            self.come_as(program, memory_hint=400)
            self.turn(self.next_id - 1, program, 400)

    @rule(data=st.data())
    def ask_for_a_gpu_that_is_taken(self, data: st.DataObject) -> None:
        """One asks, and is suspended already; another of the same GPU has it."""
        bound = lambda p: p.free and len(p.gpus) == 1  # noqa: E731
        if first := self.pick(data, lambda p: bound(p) and not p.parked):
            self.ask_as(*first)
            if second := self.pick(data, lambda p: bound(p) and p.gpus == first[1].gpus and p.movable):
                self.find_suspended(*second)
                self.ask_as(*second)


Migrations.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestMigrations = pytest.mark.timeout(300)(Migrations.TestCase)
