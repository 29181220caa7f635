"""Who is found stopped: those who owe the broker an answer, once each until they go on."""

from __future__ import annotations

import re

from acb.broker.core import Broker, Gpu
from acb.broker.policies import POLICIES
from acb.broker.stopped import EVERY, Stopped
from acb.protocol import VERSION, Hello, Request, Yield


def test_only_who_keeps_others_waiting_is_looked_at() -> None:
    broker = Broker([Gpu(0, 1000)], POLICIES["fifo"](0.0))
    asked: list[int] = []
    stopped = {101}

    def is_stopped(pid: int) -> bool:
        asked.append(pid)
        return pid in stopped

    watch = Stopped(is_stopped)

    def look(now: float) -> list[int]:
        """Process ids, negative of those that go on."""
        said = [
            re.fullmatch(r"process (\d+) \(p\) (is stopped .*|goes on)", line)
            for line in watch.look(broker.gpus, broker.clients, now)
        ]
        return [int(match[1]) * (-1 if match[2] == "goes on" else 1) for match in said if match]

    for client in (1, 2):
        broker.handle(client, Hello(VERSION, 100 + client, "p"), 0.0)
    broker.handle(1, Request(), 0.0)
    assert watch.due(broker.gpus, 0.0) is None
    assert look(9.0) == []
    broker.handle(2, Request(), 10.0)
    assert watch.due(broker.gpus, 10.0) == 10.0 + EVERY
    assert look(10.0) == []
    assert asked == []
    assert look(10.0 + EVERY) == [101]
    assert watch.due(broker.gpus, 13.0) == 10.0 + 2 * EVERY
    assert look(20.0) == []  # said once
    stopped.clear()
    assert look(30.0) == [-101]
    assert look(35.0) == []
    stopped.add(101)
    assert look(40.0) == [101]  # stopped anew
    broker.handle(1, Yield(600, 600), 41.0)  # its memory is to make way now, and it does not do that either
    assert broker.clients[1].evacuating
    assert look(50.0) == []
    broker.gone(1, 51.0)
    assert look(60.0) == []
    assert watch.due(broker.gpus, 61.0) is None
    assert set(asked) == {101}


def test_that_it_goes_on_is_said_even_when_it_owes_nothing_any_more() -> None:
    broker = Broker([Gpu(0, 1000)], POLICIES["fifo"](0.0))
    stopped = {101}
    watch = Stopped(stopped.__contains__)
    for client in (1, 2):
        broker.handle(client, Hello(VERSION, 100 + client, "p"), 0.0)
        broker.handle(client, Request(), 1.0)
    watch.due(broker.gpus, 1.0)
    [said] = watch.look(broker.gpus, broker.clients, 4.0)
    assert said.startswith("process 101 (p) is stopped and holds GPU 0, for which others wait")
    stopped.clear()
    broker.handle(1, Yield(0, 100), 5.0)
    assert watch.due(broker.gpus, 5.0) is not None
    assert list(watch.look(broker.gpus, broker.clients, 7.0)) == ["process 101 (p) goes on"]
    assert watch.due(broker.gpus, 7.0) is None
