"""What the device says each process holds corrects the broker's books."""

from __future__ import annotations

from acb.broker.core import Broker, Gpu
from acb.broker.meter import EVERY, Meter
from acb.broker.policies import POLICIES
from acb.protocol import VERSION, Evacuate, Evacuated, Hello, Request, Yield

CAPACITY = 1000


def _broker(resident: int) -> Broker:
    """Client 1, process 101, has given its lease back and says that it holds `resident` bytes."""
    broker = Broker([Gpu(0, CAPACITY, "GPU-x")], POLICIES["fifo"]())
    broker.handle(1, Hello(VERSION, 101, "p"), 0.0)
    broker.handle(1, Request(), 0.0)
    broker.handle(1, Yield(resident, resident), 1.0)
    return broker


def test_a_context_that_no_framework_counts_is_seen() -> None:
    broker = _broker(300)
    meter = Meter({"GPU-x": {101: 350, 999: 5}}.__getitem__)
    assert meter.due(broker.gpus, broker.clients) == 0.0
    assert list(meter.look(broker.gpus, broker.clients, 2.0)) == [(1, 350)]
    assert meter.due(broker.gpus, broker.clients) == 2.0 + EVERY
    broker.observed(1, 350, 2.0)
    assert broker.gpus[0].in_use == 350
    assert list(meter.look(broker.gpus, broker.clients, 3.0)) == []
    broker.check()


def test_more_than_a_client_admits_to_is_evacuated_before_another_is_let_in() -> None:
    broker = _broker(1)
    for client, nbytes in Meter(lambda uuid: {101: 600}).look(broker.gpus, broker.clients, 2.0):
        broker.observed(client, nbytes, 2.0)
    broker.handle(2, Hello(VERSION, 102, "q", memory_hint=800), 3.0)
    assert broker.handle(2, Request(), 3.0) == [(1, Evacuate())]


def test_nothing_is_asked_while_nobody_has_used_the_gpu_and_left_it() -> None:
    def never(uuid: str) -> dict[int, int | None]:
        raise AssertionError("asked")

    broker = Broker([Gpu(0, CAPACITY, "GPU-x")], POLICIES["fifo"]())
    broker.handle(1, Hello(VERSION, 101, "p"), 0.0)
    assert Meter(never).due(broker.gpus, broker.clients) is None
    broker.handle(1, Request(), 2.0)
    assert Meter(never).due(broker.gpus, broker.clients) is None
    assert list(Meter(never).look(broker.gpus, broker.clients, 2.0)) == []


def test_the_context_of_one_that_has_evacuated_all_is_seen_and_it_is_not_asked_to_evacuate_that() -> None:
    broker = _broker(900)
    meter = Meter({"GPU-x": {101: 70}}.__getitem__)
    broker.handle(2, Hello(VERSION, 102, "q", memory_hint=800), 2.0)
    assert broker.handle(2, Request(), 2.0) == [(1, Evacuate())]
    broker.handle(1, Evacuated(0, 900, 0.1), 3.0)
    assert list(meter.look(broker.gpus, broker.clients, 3.5)) == [(1, 70)]
    broker.observed(1, 70, 3.5)
    assert (broker.clients[1].resident, broker.clients[1].evacuated) == (70, 900)
    broker.handle(2, Yield(800, 800), 4.0)
    broker.handle(3, Hello(VERSION, 103, "r", memory_hint=930), 5.0)
    assert broker.handle(3, Request(), 5.0) == [(2, Evacuate())]  # and client 1 keeps its 70
    broker.check()
    assert broker.observed(1, 500, 6.0) == [(1, Evacuate())]  # there is something new
    broker.check()


def test_a_device_that_does_not_say_or_does_not_know_the_process_changes_nothing() -> None:
    broker = _broker(300)
    for answer in ({101: None}, {}, {7: 900}):
        assert list(Meter(lambda uuid, answer=answer: answer).look(broker.gpus, broker.clients, 2.0)) == []


def test_a_device_that_fails_is_not_asked_again() -> None:
    def fails(uuid: str) -> dict[int, int | None]:
        raise OSError("fallen off the bus")

    broker = _broker(300)
    meter = Meter(fails)
    assert list(meter.look(broker.gpus, broker.clients, 2.0)) == []
    assert meter.problem == "fallen off the bus"
    assert meter.due(broker.gpus, broker.clients) is None


def test_a_person_sees_what_a_holder_has_now() -> None:
    broker = _broker(300)
    broker.handle(1, Request(), 2.0)
    assert Meter(lambda uuid: {101: 350}).held(broker.gpus, broker.clients) == {1: 350}
    assert list(Meter(lambda uuid: {101: 350}).look(broker.gpus, broker.clients, 2.0)) == []
    assert Meter(lambda uuid: {101: None}).held(broker.gpus, broker.clients) == {}
