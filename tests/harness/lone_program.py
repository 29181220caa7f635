"""A program that talks to a broker of the test's own, brought to where a test begins."""

from __future__ import annotations

from broker_harness import MIB, FakeBroker, Program, Site

from acb.protocol import (
    VERSION,
    Evacuate,
    Evacuated,
    Grant,
    Hello,
    Request,
    Revoke,
    Welcome,
    Yield,
)

GRANT = Grant(0, "0", 64 * MIB)


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
    """Whether its gate is."""
    return not program.do("!facts")["closed"]
