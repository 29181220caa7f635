"""The agent and brokers that die, hang, refuse or are missing: the program goes on, or is told in one line."""

from __future__ import annotations

import os
import signal

import pytest
from broker_harness import MIB, FakeBroker, Site, wait_until
from lone_program import GRANT, evacuated, granted, is_open, meet

from acb.protocol import (
    VERSION,
    Evacuate,
    Evacuated,
    Goodbye,
    MoreRoom,
    Refused,
    Request,
    Restored,
    Revoke,
    Room,
    Welcome,
    Yield,
)


def test_the_broker_dies_while_memory_that_had_no_room_is_to_come_back(site: Site, broker: FakeBroker) -> None:
    program = evacuated(site, broker)
    program.do("fail", "restore", "memory")
    program.begin("&region", 1)
    assert broker.receive() == Request()
    broker.send(GRANT)
    assert isinstance(broker.receive(), MoreRoom)
    broker.hang_up()
    meet(broker, holding=True)
    broker.send(Welcome(VERSION, 2, lease=True))
    program.end("region")
    program.do("operate")


def test_who_came_short_asks_the_next_broker_when_its_own_dies(site: Site, broker: FakeBroker) -> None:
    program = granted(site, broker)
    program.do("enter")
    program.begin("&ask_in_threads", [5 * MIB, 6 * MIB])
    first = broker.receive()
    assert isinstance(first, MoreRoom)
    broker.hang_up()
    meet(broker, holding=True)
    broker.send(Welcome(VERSION, 2, lease=True))
    assert broker.receive() == first
    broker.send(Room(False, "no"))
    assert isinstance(broker.receive(), MoreRoom)
    broker.send(Room(True))
    assert sorted(program.end("ask_in_threads")) == [False, True]
    program.do("leave")


def test_a_grant_may_be_the_last_that_a_broker_says(site: Site, broker: FakeBroker) -> None:
    program = site.program()
    program.begin("enter")
    meet(broker)
    broker.send(Welcome(VERSION, 1))
    assert broker.receive() == Request()
    broker.send(GRANT)
    broker.hang_up()
    program.end("enter")
    meet(broker, gpu=0, holding=True)
    broker.send(Welcome(VERSION, 2, lease=True), Revoke(0.0))
    wait_until("the gate to close", lambda: not is_open(program))
    program.begin("leave")
    assert isinstance(broker.receive(), Yield)


def test_a_request_is_made_again_to_the_next_broker(site: Site, broker: FakeBroker) -> None:
    program = evacuated(site, broker)
    program.begin("&region", 1)
    for _ in range(3):
        assert broker.receive() == Request()
        broker.hang_up()
        meet(broker, holding=False, gpu=0, evacuated=10 * MIB)
        broker.send(Welcome(VERSION, 2))
    assert broker.receive() == Request()
    broker.send(GRANT)
    assert isinstance(broker.receive(), Restored)
    program.end("region")


def test_an_idle_program_reconnects_and_asks_for_nothing(site: Site, broker: FakeBroker) -> None:
    program = granted(site, broker)
    broker.send(Revoke(0.0))
    assert isinstance(broker.receive(), Yield)
    broker.send(Goodbye(1))
    broker.hang_up()
    meet(broker, holding=False, resident=10 * MIB, gpu=0)
    broker.send(Welcome(VERSION, 2), Evacuate())
    assert isinstance(broker.receive(), Evacuated)
    assert broker.silent()
    assert program.finish() == 0


def test_a_refused_hello_lets_the_program_run_without_broker(site: Site, broker: FakeBroker) -> None:
    program = site.program(ACB_BROKER="auto")
    program.begin("region", 3)
    meet(broker)
    broker.send(Refused("version 2 is spoken here"))
    broker.hang_up()
    program.end("region")
    assert program.finish() == 0
    assert "version 2 is spoken here" in program.errors
    assert program.errors.count("\n") == 1
    broker._listener.settimeout(0)
    with pytest.raises(BlockingIOError):  # it does not come again and again
        broker._listener.accept()


def test_a_refused_hello_brings_evacuated_memory_back_first(site: Site, broker: FakeBroker) -> None:
    program = evacuated(site, broker)
    program.begin("region", 1)
    assert broker.receive() == Request()
    broker.hang_up()
    meet(broker, evacuated=10 * MIB)
    broker.send(Refused("another version"))  # to somebody who insists on a broker
    broker.hang_up()
    kind, message = program.next()["kind"], ""
    assert (kind, message) == ("LeaseRefused", "")
    for _ in range(2):  # but who does not go on without one asks the next
        program.begin("region", 1)
        meet(broker)
        broker.send(Refused("another version"))
        broker.hang_up()
        assert program.next()["kind"] == "LeaseRefused"


def test_a_refused_request_reaches_every_thread_that_waits(site: Site, broker: FakeBroker) -> None:
    program = site.program()
    program.begin("count_refusals", 3)
    meet(broker)
    broker.send(Welcome(VERSION, 1))
    for _ in range(3):
        assert broker.receive() == Request()
        broker.send(Refused("never"))
    assert program.end("count_refusals") == 3
    program.begin("enter")
    assert broker.receive() == Request()
    broker.send(GRANT)
    program.end("enter")


def test_what_a_broker_may_not_say_costs_it_the_connection_and_the_program_nothing(
    site: Site, broker: FakeBroker
) -> None:
    program = granted(site, broker)
    program.do("enter")
    for nonsense in (b"nonsense", b'{"type": "request"}', b'{"type": "grant"}'):
        assert broker._peer is not None
        broker._peer.send(nonsense)
        meet(broker, holding=True)
        broker.send(Welcome(VERSION, 2, lease=True))
        program.do("operate")
    program.do("leave")
    assert program.finish() == 0
    assert program.errors.count("\n") == 1


def test_a_hanging_broker_hinders_only_those_who_wait(site: Site, broker: FakeBroker) -> None:
    holder = granted(site, broker)
    waiting = site.program()
    waiting.begin("enter")  # in the queue of the socket, which nobody looks at
    holder.do("region", 50)
    assert holder.finish() == 0
    assert waiting.kill(signal.SIGINT) == -signal.SIGINT


def test_a_program_ends_while_its_agent_waits_for_a_broker_to_start(site: Site, broker: FakeBroker) -> None:
    broker.close()
    started = site.directory / "started"
    slow = site.directory / "slow"
    slow.write_text(f"#!/bin/sh\necho $$ > {started}\nexec sleep 60\n")
    slow.chmod(0o700)
    program = site.program(ACB_BROKER="auto", ACB_PYTHON=str(slow))
    program.do("enter_on_a_daemon")
    pid = int(wait_until("the start", lambda: started.exists() and started.read_text()))
    try:
        assert program.finish() == 0
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_program_ends_while_its_agent_waits_for_a_broker_that_hangs(site: Site, broker: FakeBroker) -> None:
    broker._listener.listen(0)
    with site.connect():  # the queue is full
        program = site.program()
        program.do("enter_on_a_daemon")
        wait_until("its thread", lambda: "acb-agent" in program.do("!facts")["threads"])
        assert program.finish() == 0


def test_a_program_ends_while_it_waits_for_the_lease(site: Site, broker: FakeBroker) -> None:
    program = site.program()
    program.do("enter_on_a_daemon")
    meet(broker)
    broker.send(Welcome(VERSION, 1))
    assert broker.receive() == Request()
    assert program.finish() == 0


@pytest.mark.parametrize(("setting", "gpu", "chosen"), [("1", 1, True), ("0,1", -1, False), (None, -1, False)])
def test_the_hello_says_whether_the_user_has_chosen_the_gpu(
    site: Site, broker: FakeBroker, setting: str | None, gpu: int, chosen: bool
) -> None:
    program = site.program(
        ACB_SIMULATED=None, ACB_DEVICES="0=GPU-aaaa,1=GPU-bbbb", CUDA_VISIBLE_DEVICES=setting, ACB_QUIET="1"
    )
    program.begin("enter")
    meet(broker, gpu=gpu, chosen=chosen)
    program.kill()


def test_a_broker_that_does_not_answer_the_hello_is_named_once_with_what_ends_it(
    site: Site, broker: FakeBroker
) -> None:
    program = site.program()
    program.begin("enter")
    meet(broker, pid=program.pid)
    wait_until("the program to say so", lambda: program.errors)
    end_it = f"kill -9 $(cat {site.directory}/broker.pid)"
    said = f"acb: the GPU broker at {site.socket} does not answer; end it with: {end_it}\n"
    assert program.errors == said
    broker.send(Welcome(VERSION, 1))  # it was only slow
    assert broker.receive() == Request()
    broker.send(GRANT)
    program.end("enter")
    assert program.errors == said
    program.kill()
