"""The driver tier in the core: what frameworks cannot move is suspended by the driver, and resumed before it runs."""

from __future__ import annotations

import pytest

from acb.broker.core import Broker, Gpu
from acb.broker.policies import POLICIES
from acb.broker.schedule import RETRY
from acb.broker.state import Resume, Suspend
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
    broker.handle(1, Hello(VERSION, 101, "suspended", gpu=0, resident=0, peak=600), 0.0)
    broker.found_suspended(1, 600, 0.0)
    broker.check()
    assert broker.handle(1, Request(), 1.0) == [(1, Resume())]
    broker.resumed(1, "", 2.0)
    assert broker.clients[1].resident == 600
    broker.check()
    broker.gone(1, 3.0)
    assert broker.gpus[0].in_use == 0
