"""Absent clients in the broker's core: they live, and have not spoken to it; what they may hold is kept for them."""

from __future__ import annotations

import pytest

from acb.broker.core import Broker, Gpu
from acb.broker.policies import POLICIES
from acb.protocol import VERSION, Evacuate, Grant, Hello, MoreRoom, Request, Room, Welcome, Yield

CAPACITY = 1000


def broker_with_absent(**fields: object) -> Broker:
    """Client 1, process 101, is absent; clients 2 and 3 want the GPU."""
    broker = Broker([Gpu(0, CAPACITY, "GPU-x")], POLICIES["fifo"](0.0))
    broker.recover({101})
    broker.absent(1, Hello(VERSION, 101, "silent", gpu=0, **fields), 5.0)  # type: ignore[arg-type]
    for client in (2, 3):
        broker.handle(client, Hello(VERSION, 100 + client, "p"), 5.0)
    broker.check()
    return broker


def test_an_absent_holders_gpu_is_lent_to_nobody_until_it_has_given_it_back() -> None:
    broker = broker_with_absent(holding=True, resident=300)
    assert [client for client, _ in broker.handle(2, Request(), 6.0)] == [1]  # it is revoked, and does not hear it
    broker.check()
    sends = broker.handle(4, Hello(VERSION, 101, "silent", gpu=0, holding=True, resident=400, peak=400), 70.0)
    assert sends[0] == (4, Welcome(VERSION, 4, lease=True))
    assert [client for client, _ in sends[1:]] == [4]  # now it hears it
    assert set(broker.clients) == {2, 3, 4}
    broker.check()
    assert broker.handle(4, Yield(400, 400), 71.0) == [(4, Evacuate())]


def test_its_end_frees_what_it_had() -> None:
    broker = broker_with_absent(holding=True, resident=300)
    broker.handle(2, Request(), 6.0)
    assert broker.gone(1, 7.0) == [(2, Grant(0, "GPU-x", CAPACITY))]
    broker.check()


@pytest.mark.parametrize("driver", [False, True])
def test_memory_of_an_absent_one_is_not_asked_for_and_the_rest_is_lent(driver: bool) -> None:
    broker = broker_with_absent(resident=300)
    broker.driver_tier(driver, 5.0)
    assert broker.handle(2, Request(500), 6.0) == [(2, Grant(0, "GPU-x", 500))]
    assert broker.handle(2, Yield(0, 500), 7.0) == []
    assert broker.handle(2, Request(800), 8.0) == []  # what is known to be too much waits
    broker.check()
    granted, _ = broker.handle(3, Request(100), 9.0)  # for whoever can use the rest
    assert (granted.client, type(granted.message)) == (3, Grant)
    broker.handle(3, Yield(0, 100), 10.0)
    sends = broker.handle(4, Hello(VERSION, 101, "silent", gpu=0, resident=300, peak=300), 70.0)
    assert sends[1:] == [(4, Evacuate())]
    broker.check()


def test_who_runs_short_is_answered_when_the_absent_one_has_spoken_or_ended() -> None:
    broker = broker_with_absent(resident=300)
    broker.handle(2, Request(), 6.0)
    assert broker.handle(2, MoreRoom(600, 200), 7.0) == []
    broker.check()
    assert broker.gone(1, 8.0) == [(2, Room(True))]
    broker.check()


def test_an_absent_member_is_found_in_its_gang() -> None:
    broker = Broker([Gpu(n, CAPACITY, f"GPU-{n}") for n in range(2)], POLICIES["fifo"]())
    broker.recover({101, 102})
    gang = {"gang": "g", "gang_size": 2, "gpus": "0,1", "holding": True}
    broker.handle(2, Hello(VERSION, 102, "one", gpu=1, rank=1, **gang), 0.0)
    broker.absent(1, Hello(VERSION, 101, "other", gpu=0, resident=300, **gang), 5.0)
    assert broker.clients[1].unit is broker.clients[2].unit
    assert broker.clients[1].lease
    broker.check()
    broker.handle(3, Hello(VERSION, 101, "other", gpu=0, resident=300, **gang), 6.0)
    assert broker.clients[3].unit is broker.clients[2].unit
    assert broker.clients[3].lease
    broker.check()
