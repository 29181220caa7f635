"""One program's memory comes in behind another's that leaves: both are on the GPU for a while, and only one runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from broker_harness import MIB, FakeBroker, Program, Site, wait_until

from acb.config import SimulatedSpec
from acb.devices.simulated import create_cards
from acb.protocol import (
    VERSION,
    Evacuate,
    Evacuated,
    Grant,
    Headroom,
    Hello,
    MoreRoom,
    Request,
    Restored,
    Revoke,
    Room,
    Welcome,
    Yield,
)

BLOCK = 100 * MIB
BLOCKS = 8


def load(program: Program) -> None:
    """Eight blocks of 100 MiB."""
    program.do("enter")
    for number in range(BLOCKS):
        program.do("add", f"block{number}", BLOCK)
    program.do("leave")


def half_way(site: Site) -> tuple[Program, Program]:
    """On a GPU of 1 GiB, of two programs of 800 MiB the first is leaving, the second coming in: both have a part."""
    site.start("1x1GiB", "--quantum", "0")
    leaving, coming = site.program(ACB_NAME="leaving"), site.program(ACB_NAME="coming")
    load(coming)
    load(leaving)
    site.wait_for(coming, "evacuated")
    leaving.do("hold", "evacuate", "piece")
    coming.begin("region")
    leaving.holds_at("evacuate")
    for _ in range(4):  # it stands before its fourth piece
        leaving.begin("!step")
        said = [leaving.next(), leaving.next()]  # in any order
        assert {"step": "piece"} in said, said
    site.wait_for(coming, "restoring")
    wait_until("a part of it to come in", lambda: site.card().used() == 5 * BLOCK + 5 * BLOCK)
    return leaving, coming


def test_both_have_a_part_of_the_gpu_and_one_runs_in_the_end(site: Site) -> None:
    leaving, coming = half_way(site)
    seen = site.client(leaving)
    assert (seen["state"], seen["resident"], seen["evacuated"]) == ("evacuating", 5 * BLOCK, 3 * BLOCK)
    assert coming.do("!facts")["closed"], "it must not run before all its memory is there"
    leaving.do("!release")
    coming.end("region")
    assert coming.do("held") == BLOCKS * BLOCK
    leaving.do("region", 3)
    coming.do("region", 3)
    assert site.violations() == []


def test_the_rest_comes_at_once_when_the_one_that_leaves_is_killed(site: Site) -> None:
    leaving, coming = half_way(site)
    leaving.kill()
    coming.end("region")
    assert site.card().used() == BLOCKS * BLOCK
    assert site.violations() == []


def test_the_one_that_leaves_comes_back_when_the_one_that_comes_in_is_killed(site: Site) -> None:
    leaving, coming = half_way(site)
    coming.kill()
    leaving.do("!release")
    leaving.do("region", 3)
    assert site.card().used() == BLOCKS * BLOCK
    assert site.violations() == []


def test_both_go_on_when_the_broker_is_killed(site: Site) -> None:
    leaving, coming = half_way(site)
    site.kill_broker()
    leaving.do("!release")
    site.start("1x1GiB", "--quantum", "0")
    coming.end("region")
    leaving.do("region", 3)
    coming.do("region", 3)
    assert site.violations() == []


def test_what_cannot_leave_after_all_keeps_nobody_waiting_for_ever(site: Site) -> None:
    leaving, coming = half_way(site)
    leaving.do("!fail", "piece", "memory")
    leaving.do("!release")
    seen = wait_until("the refusal", lambda: (c := site.client(leaving))["unmovable"] and c)
    assert (seen["resident"], seen["evacuated"]) == (5 * BLOCK, 3 * BLOCK)
    leaving.do("region", 3)  # it goes first: nobody else can, before it is done
    leaving.finish()
    coming.end("region")
    assert site.violations() == []


# --- against a broker that says things in rare orders ----------------------------------------------------------------

CARD = 1024 * MIB


@pytest.fixture
def broker(site: Site) -> Iterator[FakeBroker]:
    create_cards(site.directory / "simulated-1x1GiB", SimulatedSpec((CARD,)))
    fake = FakeBroker(site.socket)
    yield fake
    fake.close()


def evacuated(site: Site, broker: FakeBroker) -> Program:
    """A program of 800 MiB that was evacuated in pieces of at least 200 MiB, and wants to go on."""
    program = site.program()
    program.begin("enter")
    broker.accept()
    assert isinstance(broker.receive(), Hello)
    broker.send(Welcome(VERSION, 1))
    assert broker.receive() == Request()
    broker.send(Grant(0, "0", CARD))
    program.end("enter")
    for number in range(BLOCKS):
        program.do("add", f"block{number}", BLOCK)
    program.do("leave")
    broker.send(Revoke(0.0))
    assert isinstance(broker.receive(), Yield)
    broker.send(Evacuate(150 * MIB))
    pieces = [broker.receive() for _ in range(5)]
    assert [(p.resident, p.moved, p.more) for p in pieces if isinstance(p, Evacuated)] == [
        (600 * MIB, 200 * MIB, True),
        (400 * MIB, 200 * MIB, True),
        (200 * MIB, 200 * MIB, True),
        (0, 200 * MIB, True),
        (0, 0, False),
    ]
    program.begin("&region", 1)
    assert broker.receive() == Request()
    return program


def held(program: Program) -> int:
    return int(program.do("!held"))


def test_memory_comes_back_as_far_as_there_is_room_and_runs_with_the_last_word(site: Site, broker: FakeBroker) -> None:
    program = evacuated(site, broker)
    broker.send(Grant(0, "0", 250 * MIB, "", 774 * MIB))
    wait_until("two blocks", lambda: held(program) == 200 * MIB)
    broker.send(Headroom(300 * MIB, 724 * MIB), Headroom(CARD - 1, 1))
    wait_until("all blocks", lambda: held(program) == 800 * MIB)
    assert broker.silent()
    assert program.do("!facts")["closed"]
    broker.send(Headroom(CARD))
    restored = broker.receive()
    assert isinstance(restored, Restored)
    assert (restored.resident, restored.moved) == (800 * MIB, 800 * MIB)
    program.end("region")


def test_a_program_whose_quantum_ends_while_it_comes_in_runs_before_it_gives_way(
    site: Site, broker: FakeBroker
) -> None:
    program = evacuated(site, broker)
    broker.send(Grant(0, "0", 250 * MIB, "", 774 * MIB))
    wait_until("two blocks", lambda: held(program) == 200 * MIB)
    broker.send(Revoke(0.0), Headroom(400 * MIB, 624 * MIB))
    wait_until("another block", lambda: held(program) == 400 * MIB)  # or all that has moved would have been for nothing
    broker.send(Headroom(CARD))
    restored, gave = broker.receive(), broker.receive()
    assert isinstance(restored, Restored)
    assert restored.resident == 800 * MIB
    assert isinstance(gave, Yield)
    assert gave.resident == 800 * MIB
    program.end("region")


def test_a_program_that_comes_in_asks_the_next_broker_for_the_rest(site: Site, broker: FakeBroker) -> None:
    program = evacuated(site, broker)
    other = site.card()
    other.allocate(700 * MIB)  # somebody who leaves, and is in no hurry
    broker.send(Grant(0, "0", 250 * MIB, "", 774 * MIB))
    wait_until("two blocks", lambda: held(program) == 200 * MIB)
    broker.hang_up()
    broker.accept()
    hello = broker.receive()
    assert isinstance(hello, Hello)
    assert hello.holding
    broker.send(Welcome(VERSION, 2, lease=True))
    assert isinstance(broker.receive(), MoreRoom)
    other.free(700 * MIB)
    broker.send(Room(True))
    restored = broker.receive()
    assert isinstance(restored, Restored)
    assert restored.resident == 800 * MIB
    program.end("region")


def test_what_does_not_come_is_asked_for(site: Site, broker: FakeBroker) -> None:
    program = evacuated(site, broker)
    other = site.card()
    other.allocate(700 * MIB)
    broker.send(Grant(0, "0", 250 * MIB, "", 774 * MIB))
    wait_until("two blocks", lambda: held(program) == 200 * MIB)
    broker.send(Headroom(300 * MIB))
    asked = broker.receive()
    assert isinstance(asked, MoreRoom)
    assert (asked.resident, asked.nbytes) == (300 * MIB, 500 * MIB)
    other.free(700 * MIB)
    broker.send(Room(True))
    assert isinstance(broker.receive(), Restored)
    program.end("region")
