"""The driver tier end to end, on simulated GPUs: a real broker, its helper, and programs that nothing else can move."""

from __future__ import annotations

import os
import signal

import pytest
from broker_harness import MIB, Program, Site, wait_until


def immovable(site: Site, nbytes: int = 40 * MIB) -> Program:
    """A program whose framework refuses to move its memory."""
    program = site.program()
    program.do("fail", "evacuate", *["refuse"] * 20)
    program.do("enter")
    program.do("add", "model", nbytes)
    program.do("leave")
    return program


def suspended(site: Site, program: Program) -> bool:
    return bool(site.client(program).get("suspended"))


def test_what_the_framework_cannot_move_the_driver_moves_and_brings_back(site: Site) -> None:
    site.start("1x64MiB", "--driver-tier", "on")
    held = immovable(site)
    other = site.program()
    other.do("enter")
    other.do("add", "model", 50 * MIB)  # more than is left beside the first
    assert suspended(site, held)
    with site.card() as card:
        assert card.held(held.pid) == 0
    other.do("leave")
    held.do("enter")
    held.do("operate")
    with site.card() as card:
        assert card.held(held.pid) == 40 * MIB
    assert not suspended(site, held)
    held.do("leave")
    assert site.violations() == []
    for program in (held, other):
        assert program.finish() == 0, program.errors


def test_programs_that_only_the_driver_can_move_take_turns(site: Site) -> None:
    site.start("1x64MiB", "--driver-tier", "on", "--quantum", "0")
    programs = [immovable(site) for _ in range(3)]
    for program in programs:
        program.begin("take_turns", 4, 0)
    for program in programs:
        program.end("take_turns")
    assert site.violations() == []
    for program in programs:
        assert program.finish() == 0, program.errors


def test_a_suspended_program_that_is_killed_leaves_nothing(site: Site) -> None:
    site.start("1x64MiB", "--driver-tier", "on")
    held, other = immovable(site), site.program()
    other.do("enter")
    assert suspended(site, held)
    held.kill()
    wait_until("its end to be seen", lambda: not site.client(held))
    other.do("leave")
    assert other.finish() == 0
    with site.card() as card:
        assert card.used() == 0


def test_the_next_broker_resumes_what_the_one_before_has_suspended(site: Site) -> None:
    site.start("1x64MiB", "--driver-tier", "on")
    held, other = immovable(site), site.program()
    other.do("enter")
    assert suspended(site, held)
    site.kill_broker(signal.SIGKILL)
    site.start("1x64MiB", "--driver-tier", "on")
    site.wait_for(other, "running")
    wait_until("it to be known as suspended", lambda: suspended(site, held))
    other.do("leave")
    held.do("enter")
    held.do("operate")
    held.do("leave")
    assert site.violations() == []
    for program in (held, other):
        assert program.finish() == 0, program.errors


def test_a_helper_that_is_killed_is_replaced(site: Site) -> None:
    broker = site.start("1x64MiB", "--driver-tier", "on")
    held, other = immovable(site), site.program()
    other.do("enter")
    assert suspended(site, held)
    children = wait_until("the helper", lambda: site.children(broker))
    for child in children:
        os.kill(child, signal.SIGKILL)
    other.do("leave")
    held.do("enter")
    held.do("operate")
    held.do("leave")
    for program in (held, other):
        assert program.finish() == 0, program.errors


def test_a_suspended_program_that_is_blocked_and_cannot_ask_gets_its_lease(site: Site) -> None:
    site.start("1x64MiB", "--driver-tier", "on")
    held, other = immovable(site), site.program()
    other.do("enter")
    other.do("leave")
    wait_until("it to be suspended", lambda: suspended(site, held))
    fifo = site.log / "driver"
    os.mkfifo(fifo)
    descriptor = os.open(fifo, os.O_RDWR)
    try:
        held.begin("read_in_c", str(fifo))
        held.holds_at("in C")
        wait_until("its memory to be brought back", lambda: not suspended(site, held))
        assert "blocked in the driver" in site.broker_log()
        os.write(descriptor, b"x")  # now the driver lets it go
    finally:
        os.close(descriptor)
    assert held.end("read_in_c") == 1
    held.do("enter")
    held.do("operate")
    held.do("leave")
    assert site.violations() == []
    for program in (held, other):
        assert program.finish() == 0, program.errors


def suspended_on_a_gpu_that_is_taken(site: Site) -> tuple[Program, Program]:
    """A program that the driver has moved off the first GPU, and the one that holds that; the second one is free."""
    held, first = immovable(site), site.program()
    first.do("enter")  # on the other GPU
    holder = site.program()
    holder.do("enter")
    assert [program.do("facts")["gpu"] for program in (held, first, holder)] == [0, 1, 0]
    assert suspended(site, held)
    assert first.finish() == 0
    return held, holder


def test_a_suspended_program_whose_gpu_is_taken_goes_on_on_another(site: Site) -> None:
    site.start("2x64MiB", "--driver-tier", "on")
    held, holder = suspended_on_a_gpu_that_is_taken(site)
    held.do("enter")
    assert held.do("facts")["gpu"] == 1
    held.do("operate")
    held.do("add", "more", 20 * MIB)
    held.do("operate")
    with site.card(0) as old, site.card(1) as new:
        assert (old.held(held.pid), new.held(held.pid)) == (0, 60 * MIB)
    seen = site.client(held)
    assert (seen["gpu"], seen["state"]) == (1, "running")
    assert site.client(holder)["revoked"] is False
    held.do("leave")
    assert site.violations() == []
    for program in (held, holder):
        assert program.finish() == 0, program.errors
    with site.card(0) as old, site.card(1) as new:
        assert (old.used(), new.used()) == (0, 0)


@pytest.mark.parametrize("helper_too", [False, True])
def test_when_the_broker_dies_on_the_way_the_next_one_goes_on_with_the_same_gpu(site: Site, helper_too: bool) -> None:
    gpus = "2x64MiB,bandwidth=20MiB"  # two seconds each way
    broker = site.start(gpus, "--driver-tier", "on")
    held, holder = suspended_on_a_gpu_that_is_taken(site)
    held.begin("enter")
    with site.card(1) as new:
        wait_until("its memory to come back on the other GPU", lambda: new.held(held.pid))
    helpers = site.children(broker)
    site.kill_broker(signal.SIGKILL)
    for helper in helpers if helper_too else []:
        os.kill(helper, signal.SIGKILL)  # and nobody unlocks it
    site.start(gpus, "--driver-tier", "on")
    held.end("enter")
    assert held.do("facts")["gpu"] == 1
    held.do("operate")
    assert site.client(holder)["gpu"] == 0
    held.do("leave")
    assert site.violations() == []
    for program in (held, holder):
        assert program.finish() == 0, program.errors


def test_without_it_such_a_program_keeps_others_out_of_what_it_holds(site: Site) -> None:
    site.start("1x64MiB", "--driver-tier", "off")
    held, other = immovable(site), site.program()
    other.begin("enter")
    wait_until("the refusal", lambda: site.client(held).get("unmovable"))
    assert site.client(other)["state"] == "waiting"
    held.kill()
    other.end("enter")
    other.do("leave")
    assert other.finish() == 0
