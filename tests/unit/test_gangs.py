"""Several GPUs at once: clients of several GPUs, and gangs, get all leases together and never wait for each other."""

from __future__ import annotations

from acb.broker.core import Broker, Gpu
from acb.broker.policies import POLICIES
from acb.broker.schedule import PATIENCE
from acb.broker.state import Send
from acb.protocol import (
    VERSION,
    Evacuate,
    Evacuated,
    Grant,
    Hello,
    Refused,
    Request,
    Revoke,
    Uncontended,
    Welcome,
    Yield,
)

CAPACITY = 1000


def _broker(gpus: int, *clients: Hello) -> Broker:
    broker = Broker([Gpu(i, CAPACITY, f"u{i}") for i in range(gpus)], POLICIES["fifo"](None))
    for number, hello in enumerate(clients, start=1):
        broker.handle(number, hello, 0.0)
    return broker


def one(hint: int = 0) -> Hello:
    return Hello(VERSION, 1, "one", memory_hint=hint)


def several(count: int, hint: int = 0) -> Hello:
    return Hello(VERSION, 2, "several", memory_hint=hint, count=count)


def member(rank: int, size: int = 2, gang: str = "g", **fields) -> Hello:
    return Hello(VERSION, 10 + rank, "member", gang=gang, gang_size=size, rank=rank, **fields)


def _grants(sends: list[Send]) -> dict[int, Grant]:
    return {client: message for client, message in sends if isinstance(message, Grant)}


def test_a_client_of_two_gpus_gets_both_at_once_and_sees_both() -> None:
    broker = _broker(3, several(2))
    assert broker.handle(1, Request(), 0.0) == [(1, Grant(0, "u0,u1", CAPACITY, "0,1"))]
    assert [gpu.holders for gpu in broker.gpus] == [{1}, {1}, set()]
    broker.handle(1, Yield(300, 300), 1.0)
    assert [gpu.in_use for gpu in broker.gpus] == [300, 300, 0]
    broker.check()


def test_a_client_of_two_gpus_waits_until_both_are_free() -> None:
    broker = _broker(2, one(), one(), several(2))
    broker.handle(1, Request(), 0.0)
    broker.handle(2, Request(), 0.0)
    sends = broker.handle(3, Request(), 0.0)
    assert {client for client, message in sends if isinstance(message, Revoke)} == {1, 2}
    assert _grants(broker.handle(1, Yield(0), 1.0)) == {}
    assert _grants(broker.handle(2, Yield(0), 1.0)) == {3: Grant(0, "u0,u1", CAPACITY, "0,1")}


def test_nobody_who_asks_later_keeps_a_gang_out() -> None:
    broker = _broker(2, one(), several(2), one())
    broker.handle(1, Request(), 0.0)
    broker.handle(2, Request(), 0.0)
    assert broker.clients[1].gpu == 0
    assert broker.handle(3, Request(), 0.0) == []  # GPU 1 is free, and kept for the two
    assert 2 in _grants(broker.handle(1, Yield(0), 1.0))


def test_gangs_that_overlap_never_hold_a_part_each() -> None:
    broker = _broker(2, member(0, gang="a"), member(0, gang="b"), member(1, gang="a"), member(1, gang="b"))
    assert _grants(broker.handle(1, Request(), 0.0)) == {1: Grant(0, "u0,u1", CAPACITY, "0,1")}
    assert _grants(broker.handle(4, Request(), 0.0)) == {}
    assert _grants(broker.handle(3, Request(), 0.0)) == {3: Grant(1, "u0,u1", CAPACITY, "0,1")}
    assert _grants(broker.handle(2, Request(), 0.0)) == {}
    assert _grants(broker.handle(1, Yield(0), 1.0)) == {}
    assert set(_grants(broker.handle(3, Yield(0), 1.0))) == {2, 4}
    broker.check()


def test_a_member_that_comes_late_finds_its_gpu_kept() -> None:
    broker = _broker(2, member(0), one())
    broker.handle(1, Request(), 0.0)
    assert _grants(broker.handle(2, Request(), 0.0)) == {}
    broker.handle(3, member(1), 0.1)
    assert _grants(broker.handle(3, Request(), 0.1)) == {3: Grant(1, "u0,u1", CAPACITY, "0,1")}


def test_a_member_may_go_on_while_others_of_the_gang_hold() -> None:
    broker = _broker(2, member(0), member(1))
    broker.handle(1, Request(), 0.0)
    broker.handle(2, Request(), 0.0)
    broker.handle(1, Yield(10), 0.5)
    assert set(_grants(broker.handle(1, Request(), 0.6))) == {1}


def test_a_preempted_member_stands_still_for_a_moment_and_then_lets_the_others_reach_their_safe_point() -> None:
    broker = _broker(2, member(0), member(1), one())
    broker.handle(1, Request(), 0.0)
    broker.handle(2, Request(), 0.0)
    broker.handle(3, Request(), 0.0)
    assert broker.handle(1, Yield(0, wants=True), 5.0) == []
    assert broker.wake_at == 5.0 + PATIENCE
    assert broker.tick(5.0 + PATIENCE / 2) == []
    granted, revoked = broker.tick(5.0 + PATIENCE)
    assert granted == (1, Grant(0, "u0,u1", CAPACITY, "0,1"))
    assert revoked == (1, Revoke(0.0))
    broker.check()
    broker.handle(2, Yield(0, wants=True), 5.3)
    assert set(_grants(broker.handle(1, Yield(0, wants=True), 5.4))) == {3}
    broker.check()
    assert set(_grants(broker.handle(3, Yield(0), 6.0))) == {1, 2}
    assert broker.wake_at is None or broker.tick(broker.wake_at) == []


def test_memory_of_others_makes_way_on_all_gpus_of_a_gang() -> None:
    broker = _broker(2, one(600), one(600), several(2, 800))
    for client in (1, 2):
        broker.handle(client, Request(), 0.0)
        broker.handle(client, Yield(600, 600), 0.1)
    assert broker.handle(3, Request(), 0.2) == [(1, Evacuate()), (2, Evacuate())]
    assert _grants(broker.handle(1, Evacuated(0, 600), 0.3)) == {}
    assert _grants(broker.handle(2, Evacuated(0, 600), 0.4)) == {3: Grant(0, "u0,u1", 800, "0,1")}


def test_the_holders_of_a_gang_that_dies_in_line_go_on() -> None:
    broker = _broker(2, one(), one(), member(0))
    broker.handle(1, Request(), 0.0)
    broker.handle(2, Request(), 0.0)
    broker.handle(3, Request(), 0.0)
    assert broker.gone(3, 1.0) == [(1, Uncontended()), (2, Uncontended())]
    assert all(gpu.load == 1.0 for gpu in broker.gpus)


def test_a_dead_member_leaves_the_gang_its_gpus() -> None:
    broker = _broker(2, member(0), member(1), one())
    broker.handle(1, Request(), 0.0)
    broker.handle(2, Request(), 0.0)
    broker.handle(3, Request(), 0.0)
    assert _grants(broker.gone(1, 1.0)) == {}
    broker.handle(4, member(0), 1.1)  # torchrun starts it anew
    assert set(_grants(broker.handle(4, Request(), 1.1))) == {4}
    broker.gone(4, 2.0)
    assert set(_grants(broker.gone(2, 2.0))) == {3}
    broker.check()


def test_a_child_of_a_member_is_by_itself() -> None:
    broker = _broker(3, member(0), member(1), member(1))
    broker.handle(1, Request(), 0.0)
    assert _grants(broker.handle(3, Request(), 0.0)) == {3: Grant(2, "u2", CAPACITY)}


def test_a_gang_larger_than_the_pool_is_refused_with_the_numbers() -> None:
    broker = _broker(2, several(3), member(0, size=4))
    for client, wanted in ((1, "3"), (2, "4")):
        [(_, refused)] = broker.handle(client, Request(), 0.0)
        assert isinstance(refused, Refused)
        assert f"{wanted} GPUs at once" in refused.reason
        assert "has 2" in refused.reason


def test_a_gang_too_large_for_enough_gpus_is_refused() -> None:
    broker = Broker([Gpu(0, 1000), Gpu(1, 500)], POLICIES["fifo"](None))
    broker.handle(1, several(2, 800), 0.0)
    [(_, refused)] = broker.handle(1, Request(), 0.0)
    assert isinstance(refused, Refused)
    assert "800B on each of 2" in refused.reason


def test_options_that_contradict_each_other_are_refused() -> None:
    for count in (4, 1):
        broker = _broker(4, member(0, size=2, count=count))
        [(_, refused)] = broker.handle(1, Request(), 0.0)
        assert isinstance(refused, Refused)
        assert f"--gpus {count}" in refused.reason
    broker = _broker(4, member(0, size=2, count=2))
    assert set(_grants(broker.handle(1, Request(), 0.0))) == {1}


def test_a_new_broker_finds_a_gang_where_it_was() -> None:
    broker = _broker(3)
    broker.recover({10, 11})
    broker.handle(1, member(1, gpu=2, gpus="1,2", holding=True, resident=400, peak=400), 0.0)
    broker.handle(2, Hello(VERSION, 12, "new"), 0.0)
    broker.handle(2, Request(), 0.0)
    sends = broker.handle(3, member(0, gpu=1, gpus="1,2", resident=300, peak=300), 0.1)
    assert _grants(sends) == {2: Grant(0, "u0", CAPACITY)}
    assert [gpu.in_use for gpu in broker.gpus] == [CAPACITY, 300, CAPACITY]
    assert [unit.gang for gpu in broker.gpus[1:] for unit in gpu.units] == ["g", "g"]
    assert set(_grants(broker.handle(3, Request(), 0.3))) == {3}
    broker.check()


def test_who_is_bound_to_a_gpu_that_is_not_lent_waits_for_another_broker_and_for_nobody_here() -> None:
    broker = _broker(2)
    [(_, alone)] = broker.handle(1, Hello(VERSION, 7, "one", gpu=3, holding=True, resident=400), 0.0)
    [(_, one_of_two)] = broker.handle(2, member(0, gpu=1, gpus="1,2", holding=True, resident=400), 0.0)
    assert isinstance(alone, Welcome)
    assert isinstance(one_of_two, Welcome)
    assert not alone.lease
    assert not one_of_two.lease
    assert "process 7 is bound to GPU 3" in alone.stranded
    assert "--gpu-list 0,1,3" in alone.stranded
    assert "bound to GPU 2" in one_of_two.stranded
    for client in (1, 2):
        assert broker.handle(client, Request(), 0.0) == []
        assert broker.clients[client].state == "waiting"
        broker.check()
    broker.handle(3, one(), 1.0)
    assert set(_grants(broker.handle(3, Request(), 1.0))) == {3}
    for client in (3, 2, 1):
        assert _grants(broker.gone(client, 2.0)) == {}
        broker.check()


def test_a_member_that_asks_for_too_much_does_not_keep_the_others_waiting() -> None:
    broker = _broker(2, member(0), member(1, memory_hint=CAPACITY + 1))
    assert set(_grants(broker.handle(1, Request(), 0.0))) == {1}
    [(_, refused)] = broker.handle(2, Request(), 0.0)
    assert isinstance(refused, Refused)
    broker.check()
