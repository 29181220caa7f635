"""The agent against a broker that says things in rare orders: what crosses, is withdrawn, comes late or never."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from broker_harness import MIB, FakeBroker, Program, Site, wait_until

from acb.config import SimulatedSpec
from acb.devices.simulated import create_cards
from acb.protocol import (
    VERSION,
    Evacuate,
    Evacuated,
    Goodbye,
    Grant,
    Hello,
    MoreRoom,
    Ping,
    Pong,
    Refused,
    Request,
    Restored,
    Revoke,
    Room,
    Uncontended,
    Welcome,
    Yield,
)

GRANT = Grant(0, "0", 64 * MIB)


@pytest.fixture
def broker(site: Site) -> Iterator[FakeBroker]:
    create_cards(site.directory / "simulated-1x64MiB", SimulatedSpec((64 * MIB,)))
    fake = FakeBroker(site.socket)
    yield fake
    fake.close()


def meet(broker: FakeBroker, **expected: object) -> Hello:
    """Accept a program and welcome it; its hello."""
    broker.accept()
    hello = broker.receive()
    assert isinstance(hello, Hello)
    assert hello.version == VERSION
    for field, value in expected.items():
        assert getattr(hello, field) == value, hello
    return hello


def granted(site: Site, broker: FakeBroker, **changes: str | None) -> Program:
    """A program with a lease and 10 MiB on the card, outside of its phase."""
    program = site.program(**changes)
    program.begin("enter")
    meet(broker, pid=program.pid, gpu=-1, holding=False)
    broker.send(Welcome(VERSION, 1))
    assert broker.receive() == Request()
    broker.send(GRANT)
    program.end("enter")
    program.do("add", "model", 10 * MIB)
    program.do("leave")
    return program


def evacuated(site: Site, broker: FakeBroker) -> Program:
    """A program that has given its lease back, and whose memory has been evacuated."""
    program = granted(site, broker)
    broker.send(Revoke(0.0))
    gave = broker.receive()
    assert isinstance(gave, Yield)
    assert (gave.resident, gave.wants) == (10 * MIB, False)
    broker.send(Evacuate())
    done = broker.receive()
    assert isinstance(done, Evacuated)
    assert (done.resident, done.moved, done.reason) == (0, 10 * MIB, "")
    return program


def is_open(program: Program) -> bool:
    return not program.do("!facts")["closed"]


def test_a_revoke_that_crosses_the_yield_is_forgotten(site: Site, broker: FakeBroker) -> None:
    program = granted(site, broker)
    broker.send(Revoke(0.0), Revoke(0.0), Uncontended())
    assert isinstance(broker.receive(), Yield)
    program.begin("enter")
    assert broker.receive() == Request()
    broker.send(Revoke(0.0), Uncontended(), GRANT)
    program.end("enter")
    program.do("leave")
    assert broker.silent()
    assert is_open(program)


def test_a_revoke_withdrawn_in_time_keeps_the_lease(site: Site, broker: FakeBroker) -> None:
    program = granted(site, broker)
    program.do("enter")
    broker.send(Revoke(0.0))
    wait_until("the gate to close", lambda: not is_open(program))
    program.begin("background", 3)  # waits, on another thread
    wait_until("it to wait", lambda: "waiting" in program.do("!facts")["stand"])
    broker.send(Uncontended())
    program.end("background")
    program.do("leave")
    assert broker.silent()
    assert is_open(program)


def test_a_thread_that_waits_behind_a_closing_gate_asks_with_the_yield(site: Site, broker: FakeBroker) -> None:
    program = granted(site, broker)
    program.do("enter")
    broker.send(Revoke(0.0))
    wait_until("the gate to close", lambda: not is_open(program))
    program.begin("&region", 1)
    wait_until("it to wait", lambda: "waiting" in program.do("!facts")["stand"])
    program.begin("leave")
    gave = broker.receive()
    assert isinstance(gave, Yield)
    assert gave.wants
    assert program.end("leave") is None
    broker.send(GRANT)
    program.end("region")
    assert broker.silent()


def test_an_evacuation_waits_for_whoever_is_inside(site: Site, broker: FakeBroker) -> None:
    """A new broker may have lent the GPU to another while a region was open; the safe point still comes first."""
    program = granted(site, broker)
    program.do("enter")
    broker.hang_up()
    meet(broker, holding=True, resident=10 * MIB)
    broker.send(Welcome(VERSION, 2, lease=False), Evacuate())
    wait_until("the gate to close", lambda: not is_open(program))
    program.do("operate")  # its memory is still there
    assert broker.silent()
    program.begin("leave")
    done = broker.receive()
    assert isinstance(done, Evacuated)
    assert (done.moved, done.reason) == (10 * MIB, "")
    program.end("leave")
    assert program.do("held") == 0


def test_evacuation_is_not_refused_because_a_waiting_thread_looks_at_the_gate(site: Site, broker: FakeBroker) -> None:
    program = granted(site, broker)
    broker.send(Revoke(0.0))
    assert isinstance(broker.receive(), Yield)
    program.begin("&look_at_the_gate", 2000)
    for _ in range(50):
        broker.send(Evacuate())
        done = broker.receive()
        while isinstance(done, Request):
            done = broker.receive()
        assert isinstance(done, Evacuated)
        assert done.reason == ""
    program.do("!release")
    broker.send(GRANT)


def test_memory_stays_behind_the_gate_when_a_revoke_is_withdrawn_before_it_is_back(
    site: Site, broker: FakeBroker
) -> None:
    program = evacuated(site, broker)
    program.do("fail", "restore", "memory")
    program.begin("&region", 1)
    assert broker.receive() == Request()
    broker.send(GRANT)
    assert broker.receive() == MoreRoom(0, 10 * MIB)
    broker.send(Revoke(0.0), Uncontended())
    broker.send(Room(True))
    assert isinstance(broker.receive(), Restored)
    program.end("region")  # and finds its memory
    program.do("operate")


def test_without_room_to_restore_the_lease_goes_to_whoever_waits(site: Site, broker: FakeBroker) -> None:
    program = evacuated(site, broker)
    program.do("fail", "restore", *["memory"] * 3)
    program.begin("&region", 1)
    assert broker.receive() == Request()
    broker.send(GRANT, Revoke(0.0))
    answers = 0
    while isinstance(said := broker.receive(), MoreRoom):
        assert said.nbytes == 10 * MIB
        answers += 1
        broker.send(Room(answers == 1, "held by others"))
    assert isinstance(said, Yield)
    assert said.wants
    assert answers == 2  # once room was made and tried, and once it was not
    broker.send(GRANT)
    assert isinstance(broker.receive(), MoreRoom)
    broker.send(Room(True))
    assert isinstance(broker.receive(), Restored)
    program.end("region")


def test_a_lasting_want_of_room_does_not_flood_the_broker(site: Site, broker: FakeBroker) -> None:
    program = evacuated(site, broker)
    program.do("fail", "restore", *["memory"] * 5)
    program.begin("&region", 1)
    assert broker.receive() == Request()
    broker.send(GRANT)
    count = 0
    while isinstance(broker.receive(), MoreRoom):
        count += 1
        broker.send(Room(True))
    assert count == 5
    program.end("region")


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


def test_who_came_short_and_loses_the_lease_sees_its_own_error(site: Site, broker: FakeBroker) -> None:
    program = granted(site, broker)
    program.do("enter")
    program.begin("&ask_in_threads", [5 * MIB])
    assert isinstance(broker.receive(), MoreRoom)
    broker.hang_up()
    meet(broker, holding=True)
    broker.send(Welcome(VERSION, 2, lease=False))
    assert program.end("ask_in_threads") == [False]


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


def test_an_interrupted_wait_leaves_no_lease_behind(site: Site, broker: FakeBroker) -> None:
    """A grant that comes when nobody waits any more is kept until somebody wants it, and given back at once then."""
    program = site.program()
    program.begin("interrupted_enter")
    meet(broker)
    broker.send(Welcome(VERSION, 1))
    assert broker.receive() == Request()
    os.kill(program.pid, signal.SIGINT)
    assert program.end("interrupted_enter") == "KeyboardInterrupt"
    broker.send(GRANT, Revoke(0.0))
    assert isinstance(broker.receive(), Yield)
    program.begin("region")
    assert broker.receive() == Request()
    broker.send(GRANT)
    program.end("region")


def test_a_lease_is_used_before_it_is_given_back(site: Site, broker: FakeBroker) -> None:
    """However quickly it is revoked, the thread that waited comes in first."""
    program = granted(site, broker)
    for _ in range(30):
        broker.send(Revoke(0.0))
        gave = broker.receive()
        assert isinstance(gave, Yield)
        program.begin("region")
        assert broker.receive() == Request()
        broker.send(GRANT)
        program.end("region")


def test_failing_listeners_and_measurements_do_no_harm(site: Site, broker: FakeBroker) -> None:
    program = granted(site, broker)
    program.do("add_failing_listener")
    program.do("fail", "resident", *["bug"] * 50)
    program.do("fail", "synchronize", *["bug"] * 50)
    program.do("fail", "reset_peak", *["bug"] * 50)
    broker.send(Revoke(0.0))
    assert isinstance(broker.receive(), Yield)
    program.begin("region")
    assert broker.receive() == Request()
    broker.send(GRANT)
    program.end("region")
    assert program.finish() == 0
    assert "cannot be measured" in program.errors
    assert "is left out" in program.errors
    assert program.errors.count("\n") == 3


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


def test_a_program_that_can_run_answers_a_ping_with_and_without_the_lease(site: Site, broker: FakeBroker) -> None:
    program = granted(site, broker)
    broker.send(Ping())
    assert broker.receive() == Pong()
    broker.send(Revoke(0.0))
    assert isinstance(broker.receive(), Yield)
    broker.send(Ping())
    assert broker.receive() == Pong()
    program.begin("enter")
    assert broker.receive() == Request()
    broker.send(Ping())  # while a thread waits for the grant, and reads the socket itself
    assert broker.receive() == Pong()
    broker.send(GRANT)
    program.end("enter")
    broker.send(Ping())
    assert broker.receive() == Pong()
    program.do("leave")
    assert program.finish() == 0, program.errors


def test_a_call_of_the_drivers_that_lasts_from_ping_to_ping_asks_for_the_lease(site: Site, broker: FakeBroker) -> None:
    program = evacuated(site, broker)
    fifo = site.log / "driver"
    os.mkfifo(fifo)
    descriptor = os.open(fifo, os.O_RDWR)
    try:
        for _ in range(2):  # each of its own: the driver lets them go
            program.begin("read_outside", str(fifo))
            program.holds_at("outside")
            broker.send(Ping())
            assert broker.receive() == Pong()
            os.write(descriptor, b"x")
            assert program.end("read_outside") == 1
        assert broker.silent()
        program.begin("read_outside", str(fifo))
        program.holds_at("outside")
        for answer in ([Pong()], [Pong(), Request()], [Pong()]):
            broker.send(Ping())
            assert [broker.receive() for _ in answer] == answer
        broker.send(GRANT)
        assert isinstance(broker.receive(), Restored)
        os.write(descriptor, b"x")
        assert program.end("read_outside") == 1
    finally:
        os.close(descriptor)
    broker.send(Revoke(0.0))
    gave = broker.receive()
    assert isinstance(gave, Yield)
    assert not gave.wants
    assert program.finish() == 0, program.errors


def test_a_lease_that_nobody_asked_for_is_given_back_like_any_other(site: Site, broker: FakeBroker) -> None:
    """As after a mistake about a program that seemed to be blocked in the driver."""
    program = evacuated(site, broker)
    broker.send(GRANT)
    assert isinstance(broker.receive(), Restored)
    broker.send(Revoke(0.0))
    yielded = broker.receive()
    assert isinstance(yielded, Yield)
    assert (yielded.resident, yielded.wants) == (10 * MIB, False)
    program.begin("enter")
    assert broker.receive() == Request()
    broker.send(GRANT)
    program.end("enter")
    program.do("operate")
    program.do("leave")
    assert program.finish() == 0, program.errors


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
