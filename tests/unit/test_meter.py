"""What the device says each process holds corrects the broker's books."""

from __future__ import annotations

import itertools
import select
import socket
from pathlib import Path

from acb.broker.connection import Connection
from acb.broker.core import Broker, Gpu, Send
from acb.broker.journal import Journal
from acb.broker.meter import EVERY, LONGEST_PAUSE, Meter
from acb.broker.policies import POLICIES
from acb.broker.server import Server
from acb.protocol import VERSION, Evacuate, Evacuated, Grant, Hello, Request, Restored, Yield

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


# --- contexts ---------------------------------------------------------------------------------------------------------

CONTEXT = 100


def _with_contexts(resident: int, observed: int) -> Broker:
    """As _broker(), where a context takes 100 bytes at most, and the device says what client 1 has in all."""
    broker = Broker([Gpu(0, CAPACITY, "GPU-x")], POLICIES["fifo"](), context=CONTEXT)
    broker.handle(1, Hello(VERSION, 101, "p"), 0.0)
    broker.handle(1, Request(), 0.0)
    broker.context(1, resident, observed)
    broker.handle(1, Yield(resident, resident), 1.0)
    assert broker.gpus[0].in_use == observed
    return broker


def _ask(broker: Broker, client: int, hint: int) -> list[Send]:
    broker.handle(client, Hello(VERSION, 100 + client, f"p{client}", memory_hint=hint), 2.0)
    return broker.handle(client, Request(), 2.0)


def test_a_newcomer_is_given_room_for_the_context_that_it_will_have() -> None:
    assert _ask(_with_contexts(350, 360), 2, 540) == [(2, Grant(0, "GPU-x", 640, beside=360))]  # all that is free
    assert _ask(_with_contexts(350, 360), 2, 530) == [(2, Grant(0, "GPU-x", 630, beside=360))]
    assert _ask(_with_contexts(350, 360), 2, 600) == [(1, Evacuate())]


def test_a_program_of_the_whole_gpu_has_the_whole_gpu() -> None:
    broker = _with_contexts(0, 0)
    broker.gone(1, 1.5)
    assert _ask(broker, 2, CAPACITY) == [(2, Grant(0, "GPU-x", CAPACITY))]
    broker.handle(2, Yield(CAPACITY, CAPACITY), 3.0)
    assert broker.handle(2, Request(), 4.0) == [(2, Grant(0, "GPU-x", CAPACITY))]
    broker.check()


def test_room_for_a_context_is_not_waited_for_in_vain() -> None:
    broker = _with_contexts(350, 360)
    assert _ask(broker, 2, 600) == [(1, Evacuate())]
    assert broker.handle(1, Evacuated(350, 0, 0.0, "captured CUDA graphs"), 3.0) == [(2, Grant(0, "GPU-x", 640))]
    broker.check()


def test_a_context_that_is_known_counts_before_the_device_is_asked_again() -> None:
    broker = _with_contexts(350, 360)
    assert _ask(broker, 2, 600) == [(1, Evacuate())]
    [(client, grant)] = broker.handle(1, Evacuated(0, 350, 0.1), 3.0)
    assert (client, grant.headroom) == (2, 700)
    assert broker.gpus[0].left_behind == 10
    broker.handle(2, Yield(0, 600), 4.0)
    broker.handle(1, Request(), 5.0)
    broker.handle(1, Restored(350, 350, 0.1), 5.1)
    broker.handle(1, Yield(400, 400), 6.0)
    assert (broker.clients[1].resident, broker.clients[1].evacuated, broker.clients[1].peak) == (410, 0, 400)
    broker.observed(1, 405, 7.0)
    assert broker.clients[1].context == 5
    broker.check()


def test_what_is_new_after_an_evacuation_is_no_context() -> None:
    broker = _with_contexts(350, 360)
    _ask(broker, 2, 960)
    broker.handle(1, Evacuated(0, 350, 0.1), 3.0)
    meter = Meter(lambda uuid: {101: 10})
    assert list(meter.look(broker.gpus, broker.clients, 3.1)) == [(1, 10)]  # it says what is left
    broker.observed(1, 10, 3.1)
    assert list(meter.look(broker.gpus, broker.clients, 5.0)) == []
    broker.handle(2, Yield(0, 0), 5.1)
    assert broker.handle(2, Request(), 5.2) == [(2, Grant(0, "GPU-x", 990))]
    broker.handle(2, Yield(0, 0), 5.3)
    broker.observed(1, 300, 6.0)
    assert broker.handle(2, Request(), 6.1) == [(1, Evacuate())]


def test_the_device_is_asked_for_a_context_before_the_first_word_of_memory_and_not_again(tmp_path: Path) -> None:
    device = Device()
    server = Server(
        tmp_path / "socket", [Gpu(0, 10 << 30, "GPU-x")], Journal(tmp_path / "journal"), meter=Meter(device)
    )
    ours, theirs = socket.socketpair()
    connection = Connection(1, ours, 101, select.epoll())
    for message in (Hello(VERSION, 101, "p"), Request(), Yield(300, 300), Request(), Yield(200, 300)):
        server._take(connection, message)
    assert server._core.clients[1].resident == 250
    assert device.asked == ["GPU-x"]
    for end in (ours, theirs, connection._poller, server._listener):
        end.close()


def test_a_device_that_does_not_say_or_does_not_know_the_process_changes_nothing() -> None:
    broker = _broker(300)
    for answer in ({101: None}, {}, {7: 900}):
        assert list(Meter(lambda uuid, answer=answer: answer).look(broker.gpus, broker.clients, 2.0)) == []


class Device:
    """Two GPUs, on each of which process 101 has 350 bytes, and process 102 has 450; those of `fails` do not answer."""

    def __init__(self, *fails: str) -> None:
        self.fails = set(fails)
        self.asked: list[str] = []

    def __call__(self, uuid: str) -> dict[int, int | None]:
        self.asked.append(uuid)
        if uuid in self.fails:
            raise OSError("fallen off the bus")
        return {101: 350, 102: 450}


def _two_gpus() -> Broker:
    """Client 1 has left 300 bytes on the first GPU, and client 2 on the second."""
    broker = Broker([Gpu(0, CAPACITY, "GPU-a"), Gpu(1, CAPACITY, "GPU-b")], POLICIES["fifo"]())
    for client in (1, 2):
        broker.handle(client, Hello(VERSION, 100 + client, f"p{client}"), 0.0)
        broker.handle(client, Request(), 0.0)
        broker.handle(client, Yield(300, 300), 1.0)
    assert [broker.clients[client].gpu for client in (1, 2)] == [0, 1]
    return broker


def test_a_gpu_that_does_not_answer_silences_no_other() -> None:
    broker, device = _two_gpus(), Device("GPU-a")
    meter = Meter(device)
    assert list(meter.look(broker.gpus, broker.clients, 2.0)) == [(2, 450)]
    assert meter.due(broker.gpus, broker.clients) == 2.0 + EVERY
    assert meter.held(broker.gpus, broker.clients) == {2: 450}


def test_it_is_asked_again_after_ever_longer_pauses_until_it_answers() -> None:
    broker, device = _broker(300), Device("GPU-x")
    meter = Meter(device)
    moments = [2.0]
    for _ in range(12):
        assert list(meter.look(broker.gpus, broker.clients, moments[-1])) == []
        due = meter.due(broker.gpus, broker.clients)
        assert due is not None
        assert list(meter.look(broker.gpus, broker.clients, due - 0.5)) == []
        moments.append(due)
    assert len(device.asked) == 12, "it is left in peace in between"
    pauses = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (2 * EVERY, LONGEST_PAUSE)
    device.fails.clear()
    assert list(meter.look(broker.gpus, broker.clients, moments[-1])) == [(1, 350)]
    assert meter.due(broker.gpus, broker.clients) == moments[-1] + EVERY
    assert meter.held(broker.gpus, broker.clients) == {1: 350}


def test_it_is_said_once_that_it_does_not_answer_and_once_that_it_does_again() -> None:
    broker, device = _two_gpus(), Device("GPU-b")
    meter = Meter(device)
    news = []
    for now in (10.0, 100.0, 200.0):
        list(meter.look(broker.gpus, broker.clients, now))
        news.append(meter.news())
    assert [len(words) for words in news] == [1, 0, 0]
    assert "GPU 1 does not say" in news[0][0]
    assert "fallen off the bus" in news[0][0]
    device.fails.clear()
    list(meter.look(broker.gpus, broker.clients, 300.0))
    assert meter.news() == ["GPU 1 says again what processes hold there"]
    device.fails.add("GPU-b")
    list(meter.look(broker.gpus, broker.clients, 400.0))
    assert len(meter.news()) == 1, "another time is said again"


def test_of_one_on_two_gpus_nothing_is_believed_while_one_does_not_answer() -> None:
    broker = Broker([Gpu(0, CAPACITY, "GPU-a"), Gpu(1, CAPACITY, "GPU-b")], POLICIES["fifo"]())
    broker.handle(1, Hello(VERSION, 101, "p", count=2), 0.0)
    broker.handle(1, Request(), 0.0)
    broker.handle(1, Yield(600, 600), 1.0)  # on the fuller one, which may be the silent one
    meter = Meter(Device("GPU-b"))
    assert list(meter.look(broker.gpus, broker.clients, 2.0)) == []
    assert meter.held(broker.gpus, broker.clients) == {}


def test_a_person_sees_what_a_holder_has_now() -> None:
    broker = _broker(300)
    broker.handle(1, Request(), 2.0)
    assert Meter(lambda uuid: {101: 350}).held(broker.gpus, broker.clients) == {1: 350}
    assert list(Meter(lambda uuid: {101: 350}).look(broker.gpus, broker.clients, 2.0)) == []
    assert Meter(lambda uuid: {101: None}).held(broker.gpus, broker.clients) == {}
