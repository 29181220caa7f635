"""The driver tier in the core: what frameworks cannot move is suspended by the driver, and resumed before it runs."""

from __future__ import annotations

import pytest

from acb.broker.core import Broker, Gpu
from acb.broker.meter import Meter
from acb.broker.policies import POLICIES
from acb.broker.schedule import RETRY
from acb.broker.state import Found, Resume, Suspend
from acb.protocol import VERSION, Evacuate, Evacuated, Grant, Hello, Refused, Request, Restored, Revoke, Yield

CAPACITY = 1000


@pytest.fixture
def broker() -> Broker:
    """Client 1 holds 600 bytes that its framework cannot move, and client 2 waits for most of the GPU."""
    broker = Broker([Gpu(0, CAPACITY, "GPU-x")], POLICIES["fifo"]())
    broker.driver_tier(True, 0.0)
    for client in (1, 2):
        broker.handle(client, Hello(VERSION, 100 + client, f"p{client}"), 0.0)
    broker.handle(1, Request(), 0.0)
    broker.handle(1, Yield(600, 600), 1.0)
    assert broker.handle(2, Request(), 1.0) == [(1, Evacuate())]
    assert broker.handle(1, Evacuated(600, 0, 0.0, "captured CUDA graphs"), 1.1) == [(1, Suspend())]
    broker.check()
    return broker


def test_what_the_framework_refuses_the_driver_moves(broker: Broker) -> None:
    assert broker.suspended(1, "", 0.5, 1.6) == [(2, Grant(0, "GPU-x", CAPACITY))]
    broker.check()
    assert broker.clients[1].state == "evacuated"


def test_a_device_that_lists_a_moment_too_long_what_the_driver_has_moved_changes_nothing(broker: Broker) -> None:
    def still_lists(uuid: str) -> dict[int, int | None]:
        return {101: 600}

    broker.suspended(1, "", 0.5, 1.6)
    broker.handle(2, Yield(0, 100), 3.0)
    assert list(Meter(still_lists).look(broker.gpus, broker.clients, 3.1)) == []
    assert broker.observed(1, 600, 3.1) == []  # asked for before it was suspended
    broker.check()
    assert broker.handle(2, Request(), 4.0) == [(2, Grant(0, "GPU-x", CAPACITY))]  # nothing is in its way
    broker.handle(2, Yield(0, 0), 5.0)
    assert broker.handle(1, Request(), 6.0) == [(1, Resume())]
    broker.resumed(1, "", 6.5)
    assert (broker.clients[1].resident, broker.clients[1].evacuated) == (600, 0)
    broker.check()


def test_it_is_resumed_before_it_hears_of_its_lease(broker: Broker) -> None:
    broker.suspended(1, "", 0.5, 1.6)
    broker.handle(1, Request(), 2.0)
    assert broker.handle(2, Yield(0, 100), 3.0) == [(1, Resume())]
    assert broker.clients[1].state == "restoring"
    broker.check()
    broker.handle(2, Request(), 3.1)
    granted, revoked = broker.resumed(1, "", 3.5)
    assert granted == (1, Grant(0, "GPU-x", CAPACITY))
    assert isinstance(revoked.message, Revoke)
    assert broker.clients[1].resident == 600
    broker.check()


def test_a_resume_that_finds_no_room_is_tried_again(broker: Broker) -> None:
    broker.suspended(1, "", 0.5, 1.6)
    broker.gone(2, 2.0)
    assert broker.handle(1, Request(), 2.0) == [(1, Resume())]
    assert broker.resumed(1, "a stranger has the room", 3.0) == []
    assert broker.wake_at == 3.0 + RETRY
    assert broker.tick(3.0 + RETRY) == [(1, Resume())]
    assert broker.resumed(1, "", 5.0) == [(1, Grant(0, "GPU-x", CAPACITY))]
    broker.check()


def test_a_client_whose_memory_is_lost_is_told_and_keeps_nobody_out(broker: Broker) -> None:
    broker.suspended(1, "", 0.5, 1.6)
    broker.handle(1, Request(), 2.0)
    broker.handle(2, Yield(0, 100), 3.0)
    broker.handle(2, Request(), 3.1)
    refused, granted = broker.resumed(1, "it is failed", 4.0, lost=True)
    assert isinstance(refused.message, Refused)
    assert "101" in refused.message.reason
    assert granted == (2, Grant(0, "GPU-x", CAPACITY))
    broker.check()
    [(_, again)] = broker.handle(1, Request(), 5.0)
    assert isinstance(again, Refused)


def test_what_the_driver_cannot_move_either_stays(broker: Broker) -> None:
    assert broker.suspended(1, "did not come to rest", 0.0, 1.6) == []
    assert broker.clients[2].waiting
    broker.check()
    assert broker.handle(1, Request(), 2.0)[0] == (1, Grant(0, "GPU-x", CAPACITY))  # it overtakes, to its end
    broker.check()


def test_contexts_make_way_only_for_who_must_have_the_room() -> None:
    broker = Broker([Gpu(0, CAPACITY, "GPU-x")], POLICIES["fifo"]())
    broker.driver_tier(True, 0.0)
    broker.handle(1, Hello(VERSION, 101, "first"), 0.0)
    broker.handle(1, Request(), 0.0)
    broker.handle(1, Yield(600, 600), 1.0)
    broker.handle(2, Hello(VERSION, 102, "modest"), 1.0)
    broker.handle(2, Request(), 1.0)
    assert broker.handle(1, Evacuated(50, 550, 0.1), 1.1) == [(2, Grant(0, "GPU-x", CAPACITY - 50))]
    broker.gone(2, 2.0)
    broker.handle(3, Hello(VERSION, 103, "large", memory_hint=CAPACITY), 2.0)
    assert broker.handle(3, Request(), 2.0) == [(1, Suspend())]
    assert broker.suspended(1, "", 0.1, 2.2) == [(3, Grant(0, "GPU-x", CAPACITY))]
    broker.handle(1, Request(), 2.3)
    assert broker.handle(3, Yield(0, CAPACITY), 3.0) == [(1, Resume())]
    assert broker.resumed(1, "", 3.1)[0].message == Grant(0, "GPU-x", CAPACITY)
    assert broker.clients[1].state == "restoring"
    broker.handle(1, Restored(600, 550, 0.1), 3.2)
    assert broker.clients[1].resident == 600
    broker.check()


def test_a_holder_makes_way_when_the_driver_cannot_move_what_another_has_left() -> None:
    broker = Broker([Gpu(0, CAPACITY, "GPU-x", slots=2)], POLICIES["fifo"]())
    broker.driver_tier(True, 0.0)
    for client in (1, 2, 3):
        broker.handle(client, Hello(VERSION, 100 + client, f"p{client}", memory_hint=500 if client < 3 else 0), 0.0)
    broker.handle(1, Request(), 0.0)
    broker.handle(1, Yield(500, 500), 1.0)
    broker.handle(2, Request(), 1.0)
    sends = broker.handle(3, Request(), 2.0)
    assert [(send.client, type(send.message)) for send in sends] == [(1, Evacuate), (2, Revoke)]
    broker.handle(1, Evacuated(0, 500, 0.1), 2.1)
    broker.observed(1, 500, 2.2)  # the framework has moved it, and yet it is there
    broker.handle(2, Request(), 2.3)
    broker.suspended(1, "did not come to rest", 0.0, 2.4)
    broker.check()
    assert broker.clients[2].revoked


def test_who_is_blocked_in_the_driver_waits_as_if_it_had_asked(broker: Broker) -> None:
    broker.suspended(1, "", 0.5, 1.6)
    [(revoked, revoke)] = broker.blocked(1, 2.0)
    assert (revoked, type(revoke)) == (2, Revoke)
    assert broker.clients[1].state == "waiting"
    assert broker.handle(1, Request(), 2.5) == []  # it could ask after all: nothing is doubled
    assert broker.blocked(1, 2.6) == []
    assert broker.handle(2, Yield(0, 100), 3.0) == [(1, Resume())]
    assert broker.blocked(1, 3.1) == []
    assert broker.resumed(1, "", 3.5) == [(1, Grant(0, "GPU-x", CAPACITY))]
    assert broker.blocked(1, 3.6) == []
    broker.check()


def test_who_is_not_suspended_does_not_block_in_the_driver(broker: Broker) -> None:
    assert broker.blocked(1, 1.5) == []  # it is being suspended
    broker.suspended(1, "did not come to rest", 0.0, 1.6)
    assert broker.blocked(1, 2.0) == []
    assert broker.clients[1].state == "resident"
    broker.check()


def test_without_the_driver_nothing_is_suspended() -> None:
    broker = Broker([Gpu(0, CAPACITY, "GPU-x")], POLICIES["fifo"]())
    for client in (1, 2):
        broker.handle(client, Hello(VERSION, 100 + client, f"p{client}"), 0.0)
    broker.handle(1, Request(), 0.0)
    broker.handle(1, Yield(600, 600), 1.0)
    broker.handle(2, Request(), 1.0)
    assert broker.handle(1, Evacuated(600, 0, 0.0, "graphs"), 1.1) == []
    broker.check()
    assert broker.driver_tier(True, 2.0) == [(1, Suspend())]


def test_a_suspended_client_is_found_again_by_the_next_broker() -> None:
    broker = Broker([Gpu(0, CAPACITY, "GPU-x")], POLICIES["fifo"]())
    broker.driver_tier(True, 0.0)
    broker.handle(1, Hello(VERSION, 101, "suspended", gpu=0, resident=0, peak=600), 0.0, Found(600))
    broker.check()
    assert broker.in_doubt(1)
    broker.suspended(1, "", 0.0, 0.5)
    assert not broker.in_doubt(1)
    broker.check()
    assert broker.handle(1, Request(), 1.0) == [(1, Resume())]
    broker.resumed(1, "", 2.0)
    assert broker.clients[1].resident == 600
    broker.check()
    broker.gone(1, 3.0)
    assert broker.gpus[0].in_use == 0


def _next_broker() -> Broker:
    """Client 2, who waits, has said hello to it; then comes client 1, whose 600 bytes the driver may have."""
    broker = Broker([Gpu(0, CAPACITY, "GPU-x")], POLICIES["fifo"]())
    broker.driver_tier(True, 0.0)
    broker.recover({101, 102})
    broker.handle(2, Hello(VERSION, 102, "waits"), 0.1)
    broker.handle(2, Request(), 0.2)
    [(welcomed, _)] = broker.handle(1, Hello(VERSION, 101, "found", gpu=0, resident=600, peak=600), 0.3, Found(600))
    assert welcomed == 1, "nobody is asked to make way, nor granted anything"
    broker.check()
    return broker


def test_one_that_is_found_suspended_is_not_evacuated_and_its_room_is_the_next_ones() -> None:
    broker = _next_broker()
    assert broker.suspended(1, "", 0.0, 0.4) == [(2, Grant(0, "GPU-x", CAPACITY))]
    broker.check()
    [(revoked, _)] = broker.handle(1, Request(), 1.0)
    assert revoked == 2
    assert broker.handle(2, Yield(0, 100), 2.0) == [(1, Resume())]
    assert broker.resumed(1, "", 3.0) == [(1, Grant(0, "GPU-x", CAPACITY))]
    broker.check()


def test_one_that_was_not_suspended_after_all_makes_way_as_usual() -> None:
    broker = _next_broker()
    assert broker.suspended(1, "it runs", 0.0, 0.4) == [(1, Evacuate())]
    assert broker.clients[1].resident == 600
    broker.check()
    assert broker.handle(1, Evacuated(0, 600, 0.1), 1.0) == [(2, Grant(0, "GPU-x", CAPACITY))]
    broker.check()


def test_one_that_asks_before_it_is_known_gets_no_lease() -> None:
    broker = _next_broker()
    broker.handle(1, Request(), 0.4)
    broker.gone(2, 0.5)
    assert not broker.clients[1].lease
    broker.check()
    assert broker.suspended(1, "", 0.0, 1.0) == [(1, Resume())]
    broker.check()


def test_one_that_dies_before_it_is_known_leaves_its_room() -> None:
    broker = _next_broker()
    assert broker.gone(1, 0.5) == [(2, Grant(0, "GPU-x", CAPACITY))]
    broker.check()


@pytest.mark.parametrize("problem", ["", "it runs"])
def test_what_the_holder_has_finds_its_place_beside_one_in_doubt(problem: str) -> None:
    broker = Broker([Gpu(0, CAPACITY, "GPU-x")], POLICIES["fifo"]())
    broker.driver_tier(True, 0.0)
    broker.recover({101, 102})
    broker.handle(1, Hello(VERSION, 101, "found", gpu=0, resident=600, peak=600), 0.1, Found(600))
    broker.handle(2, Hello(VERSION, 102, "holds", gpu=0, resident=900, peak=900, holding=True), 0.2)
    broker.check()
    assert broker.clients[2].resident == 900
    broker.handle(3, Hello(VERSION, 103, "new", memory_hint=500), 0.3)
    broker.handle(3, Request(), 0.3)
    assert broker.handle(2, Yield(100, 900), 1.0) == []  # client 1 may have the rest
    assert broker.clients[1].resident == 600
    broker.check()
    sends = broker.suspended(1, problem, 0.0, 2.0)
    assert sends == [(3, Grant(0, "GPU-x", 500, beside=100))] if not problem else sends[0].message == Evacuate()
    broker.check()
    if not problem:
        broker.gone(2, 3.0)
        broker.gone(3, 3.0)
        broker.handle(1, Request(), 3.0)
        broker.resumed(1, "", 4.0)
        assert broker.clients[1].resident == 600


def test_one_that_cannot_be_brought_back_gives_others_their_turn(broker: Broker) -> None:
    broker.suspended(1, "", 0.5, 1.6)
    broker.handle(1, Request(), 2.0)
    assert broker.handle(2, Yield(0, 100), 3.0) == [(1, Resume())]
    broker.handle(2, Request(), 3.1)
    assert broker.resumed(1, "a stranger has the room", 3.2, kept=True) == []  # its time is not over
    until = broker.clients[1].unit.preempt_at
    assert until is not None
    now = until + 0.5
    assert broker.tick(now) == [(1, Resume())]
    granted, revoked = broker.resumed(1, "a stranger has the room", now, kept=True)
    assert granted == (2, Grant(0, "GPU-x", CAPACITY))
    assert isinstance(revoked.message, Revoke)
    assert broker.clients[1].state == "waiting"
    assert broker.suspended_clients
    broker.check()
    assert broker.tick(now + 2 * RETRY) == []  # it is not tried beside the holder
    assert broker.handle(2, Yield(0, 100), now + 5) == [(1, Resume())]
    assert broker.resumed(1, "", now + 6) == [(1, Grant(0, "GPU-x", CAPACITY))]
    broker.check()


def test_while_nobody_waits_it_keeps_trying(broker: Broker) -> None:
    broker.suspended(1, "", 0.5, 1.6)
    broker.gone(2, 2.0)
    broker.handle(1, Request(), 2.0)
    for now in (1000.0, 2000.0):
        assert broker.resumed(1, "a stranger has the room", now, kept=True) == []
        assert broker.tick(now + RETRY) == [(1, Resume())]


def _in_doubt(broker: Broker) -> Broker:
    """Client 1's time is over, client 2 waits, and nobody knows what has become of client 1 when it was resumed."""
    broker.suspended(1, "", 0.5, 1.6)
    broker.handle(1, Request(), 2.0)
    assert broker.handle(2, Yield(0, 100), 3.0) == [(1, Resume())]
    broker.handle(2, Request(), 3.1)
    assert broker.resumed(1, "the helper has died", 3.2) == []
    assert broker.clients[1].lease, "its time is not over"
    assert not broker.in_doubt(1)
    assert broker.resumed(1, "the helper has died", 1000.0) == []
    assert broker.in_doubt(1)
    assert (broker.clients[1].lease, broker.clients[1].resident) == (False, 600)  # which it may have on the GPU
    broker.check()
    return broker


def test_of_which_nobody_knows_where_it_is_is_in_doubt_when_its_time_is_over(broker: Broker) -> None:
    _in_doubt(broker)
    assert broker.suspended(1, "", 0.0, 1001.0)[0] == (2, Grant(0, "GPU-x", CAPACITY))
    broker.check()
    assert broker.handle(2, Yield(0, 100), 2000.0) == [(1, Resume())]  # it has not been forgotten
    assert broker.resumed(1, "", 2001.0) == [(1, Grant(0, "GPU-x", CAPACITY))]
    broker.check()


def test_and_makes_way_if_it_runs_after_all(broker: Broker) -> None:
    _in_doubt(broker)
    assert broker.suspended(1, "it runs", 0.0, 1001.0) == [(1, Suspend())]
    broker.check()


def test_and_is_refused_if_its_memory_is_lost(broker: Broker) -> None:
    _in_doubt(broker)
    refused, granted = broker.suspended(1, "it is failed", 0.0, 1001.0, lost=True)
    assert isinstance(refused.message, Refused)
    assert granted == (2, Grant(0, "GPU-x", CAPACITY))
    broker.check()


def test_while_the_driver_does_not_say_others_take_turns_beside_what_may_be_there(broker: Broker) -> None:
    _in_doubt(broker)
    assert broker.unclear(1, 1031.0) == [(2, Grant(0, "GPU-x", CAPACITY - 600))]
    broker.check()
    broker.handle(3, Hello(VERSION, 103, "p3", memory_hint=300), 1032.0)
    [(revoked, _)] = broker.handle(3, Request(), 1032.0)
    assert revoked == 2
    assert broker.handle(2, Yield(0, 100), 1040.0) == [(3, Grant(0, "GPU-x", 300))]
    assert broker.handle(1, Request(), 1041.0) == []  # nobody is revoked for it
    broker.check()
    broker.handle(3, Yield(0, 300), 1042.0)
    assert broker.suspended(1, "", 0.0, 1050.0) == [(1, Resume())]  # it has waited all the time
    broker.check()


def test_who_needs_its_room_gets_it_when_the_user_has_ended_it(broker: Broker) -> None:
    _in_doubt(broker)
    broker.unclear(1, 1031.0)
    broker.handle(2, Yield(0, 100), 1032.0)
    broker.handle(3, Hello(VERSION, 103, "p3", memory_hint=CAPACITY), 1033.0)
    assert broker.handle(3, Request(), 1033.0) == []
    broker.check()
    assert broker.gone(1, 1034.0) == [(3, Grant(0, "GPU-x", CAPACITY))]
    broker.check()


def test_others_of_its_gang_wait_for_it_only_until_it_is_gone() -> None:
    gpus = [Gpu(n, CAPACITY, f"GPU-{n}") for n in range(2)]
    broker = Broker(gpus, POLICIES["fifo"]())
    broker.driver_tier(True, 0.0)
    broker.recover({101})
    gang = {"gang": "g", "gang_size": 2}
    broker.handle(1, Hello(VERSION, 101, "p1", gpu=0, gpus="0,1", resident=600, **gang), 0.0, Found(600))
    broker.handle(2, Hello(VERSION, 102, "p2", rank=1, **gang), 0.0)
    for client in (1, 2):
        broker.handle(client, Request(), 0.1)
    broker.unclear(1, 31.0)
    broker.handle(3, Hello(VERSION, 103, "p3", memory_hint=300), 32.0)
    assert broker.handle(3, Request(), 32.0)[0].client == 3  # whatever the gang waits for
    broker.check()
    broker.handle(3, Yield(0, 300), 33.0)
    assert [client for client, _ in broker.gone(1, 34.0)] == [2]
    broker.check()


def test_a_member_of_a_gang_that_cannot_be_brought_back_lets_its_gang_go() -> None:
    gpus = [Gpu(n, CAPACITY, f"GPU-{n}") for n in range(2)]
    broker = Broker(gpus, POLICIES["fifo"]())
    broker.driver_tier(True, 0.0)
    for client in (1, 2):
        hello = Hello(VERSION, 100 + client, f"p{client}", gang="g", gang_size=2, rank=client - 1)
        broker.handle(client, hello, 0.0)
        broker.handle(client, Request(), 0.0)
    assert [client for gpu in gpus for client in gpu.holders] == [1, 2]
    broker.handle(3, Hello(VERSION, 103, "other", memory_hint=CAPACITY, chosen=True, gpu=0), 0.0)
    for client in (1, 2):
        broker.handle(client, Yield(600, 600), 1.0)
    broker.handle(3, Request(), 1.0)
    assert broker.handle(1, Evacuated(600, 0, 0.0, "graphs"), 1.1) == [(1, Suspend())]
    broker.suspended(1, "", 0.1, 1.2)
    for client in (1, 2):
        broker.handle(client, Request(), 2.0)
    broker.check()
    sends = broker.handle(3, Yield(0, CAPACITY), 3.0)
    assert {(client, type(message)) for client, message in sends} == {(1, Resume), (2, Grant)}
    broker.handle(3, Request(), 3.1)
    broker.check()
    until = broker.clients[1].unit.preempt_at
    assert until is not None
    broker.resumed(1, "a stranger has the room", until + 1, kept=True)
    broker.check()
    assert broker.clients[1].waiting
    sends = broker.handle(2, Yield(600, 600, wants=True), until + 1.1)
    assert sends[0] == (3, Grant(0, "GPU-0", CAPACITY))
    broker.check()
    broker.gone(3, until + 5)
    sends = broker.tick(until + 6)
    broker.check()
    assert broker.clients[1].resuming
