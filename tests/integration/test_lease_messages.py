"""The agent against a broker that says things in rare orders: what crosses, is withdrawn, comes late or never."""

from __future__ import annotations

import os
import signal

from broker_harness import MIB, FakeBroker, Site, wait_until
from lone_program import GRANT, evacuated, granted, is_open, meet

from acb.protocol import (
    VERSION,
    Evacuate,
    Evacuated,
    MoreRoom,
    Ping,
    Pong,
    Request,
    Restored,
    Revoke,
    Room,
    Uncontended,
    Welcome,
    Yield,
)


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


def test_who_came_short_and_loses_the_lease_sees_its_own_error(site: Site, broker: FakeBroker) -> None:
    program = granted(site, broker)
    program.do("enter")
    program.begin("&ask_in_threads", [5 * MIB])
    assert isinstance(broker.receive(), MoreRoom)
    broker.hang_up()
    meet(broker, holding=True)
    broker.send(Welcome(VERSION, 2, lease=False))
    assert program.end("ask_in_threads") == [False]


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
