"""The driver tier end to end: a real broker, its helper, and programs that nothing else can move.

For simulated GPUs, whose driver is simulated, and for real ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator

from broker_harness import Program, Site, wait_until


def immovable(site: Site) -> Program:
    """A program whose framework refuses to move its memory."""
    program = site.program()
    program.do("enter")
    program.do("add", "model", 40 * site.unit)
    program.do("make_immovable")
    program.do("leave")
    return program


def suspended(site: Site, program: Program) -> bool:
    """Whether the driver has its memory."""
    return bool(site.client(program).get("suspended"))


def what_the_framework_cannot_move_the_driver_moves_and_brings_back(site: Site) -> None:
    site.start("1x64MiB", "--driver-tier", "on")
    held = immovable(site)
    other = site.program()
    other.do("enter")
    other.do("add", "model", 50 * site.unit)  # more than is left beside the first
    assert suspended(site, held)
    assert site.used() <= 50 * site.unit + site.slack
    other.do("leave")
    held.do("enter")
    held.do("operate")
    assert 40 * site.unit <= site.used() <= 40 * site.unit + site.slack
    assert not suspended(site, held)
    held.do("leave")
    assert site.violations() == []
    for program in (held, other):
        assert program.finish() == 0, program.errors


def programs_that_only_the_driver_can_move_take_turns(site: Site) -> None:
    site.start("1x64MiB", "--driver-tier", "on", "--quantum", "0")
    programs = [immovable(site) for _ in range(3)]
    for program in programs:
        program.begin("take_turns", 4, 0)
    for program in programs:
        program.end("take_turns")
    assert site.violations() == []
    for program in programs:
        assert program.finish() == 0, program.errors


def a_suspended_program_that_is_killed_leaves_nothing(site: Site) -> None:
    site.start("1x64MiB", "--driver-tier", "on")
    held, other = immovable(site), site.program()
    other.do("enter")
    assert suspended(site, held)
    held.kill()
    wait_until("its end to be seen", lambda: not site.client(held))
    other.do("leave")
    assert other.finish() == 0
    assert site.used() <= site.slack


def the_next_broker_resumes_what_the_one_before_has_suspended(site: Site) -> None:
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


def what_was_noted_before_the_driver_was_asked_is_not_believed(site: Site) -> None:
    """The broker dies before its helper has done anything: the program's memory is still on the GPU."""
    site.start("1x64MiB", "--driver-tier", "on")
    held, other = site.program(ACB_GPU_MEMORY=str(40 * site.unit)), site.program()
    held.do("enter")
    held.do("add", "model", 40 * site.unit)
    held.do("leave")
    beside = site.program(ACB_GPU_MEMORY=str(10 * site.unit))
    beside.do("enter")
    beside.do("leave")
    assert beside.finish() == 0
    assert site.client(held)["state"] == "resident"
    site.kill_broker(signal.SIGKILL)
    note = site.socket.with_suffix(".journal")
    written = json.loads(note.read_text())
    written["suspended"] = {held.pid: [40 * site.unit, {"0": 40 * site.unit}]}
    note.write_text(json.dumps(written))
    site.start("1x64MiB", "--driver-tier", "on")
    other.do("enter")
    assert not suspended(site, held)
    other.do("add", "model", 50 * site.unit)  # more than is left beside the first
    assert site.used() <= 50 * site.unit + site.slack
    assert json.loads(note.read_text())["suspended"] == {}
    other.do("leave")
    held.do("enter")
    held.do("operate")
    held.do("leave")
    assert site.violations() == []
    for program in (held, other):
        assert program.finish() == 0, program.errors


def a_helper_that_is_killed_is_replaced(site: Site) -> None:
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


@contextlib.contextmanager
def nothing_is_moved(site: Site, broker: int) -> Iterator[None]:
    """The helper is stopped meanwhile, as if the driver took long."""
    [helper] = wait_until("the helper", lambda: site.children(broker))
    os.kill(helper, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(helper, signal.SIGCONT)


def one_that_is_killed_before_it_is_suspended_keeps_nobody_waiting(site: Site) -> None:
    broker = site.start("1x64MiB", "--driver-tier", "on")
    held, other = immovable(site), site.program()
    other.do("region")  # the helper is there now
    held.do("region")
    with nothing_is_moved(site, broker):
        other.begin("region")
        site.wait_for(held, "evacuating")
        held.kill()
    all_is_free(site, held, other)


def one_that_is_killed_before_it_is_resumed_keeps_nobody_waiting(site: Site) -> None:
    broker = site.start("1x64MiB", "--driver-tier", "on")
    held, other = immovable(site), site.program()
    other.do("region")
    assert suspended(site, held)
    with nothing_is_moved(site, broker):
        held.begin("region")
        site.wait_for(held, "restoring")
        other.begin("region")
        held.kill()
    all_is_free(site, held, other)


def all_is_free(site: Site, dead: Program, other: Program) -> None:
    """The other one has its turn, and what the dead one had is nobody's."""
    other.end("region")
    wait_until("its end to be seen", lambda: not site.client(dead))
    fresh = site.program()
    fresh.do("enter")
    fresh.do("add", "model", 60 * site.unit)
    fresh.do("leave")
    assert site.violations() == []
    for program in (other, fresh):
        assert program.finish() == 0, program.errors


def the_broker_dies_before_it_is_moved(site: Site, state: str) -> None:
    """And its helper does what it was asked for, whatever the next broker takes for so."""
    broker = site.start("1x64MiB", "--driver-tier", "on")
    held, other = immovable(site), site.program()
    other.do("region")
    assert suspended(site, held)
    mover = held
    if state == "evacuating":
        held.do("region")
        mover = other
    with nothing_is_moved(site, broker):
        mover.begin("region")
        site.wait_for(held, state)
        site.kill_broker(signal.SIGKILL)
    site.start("1x64MiB", "--driver-tier", "on")
    mover.end("region")
    held.do("region")
    other.do("region")
    assert site.violations() == []
    for program in (held, other):
        assert program.finish() == 0, program.errors


def the_broker_is_killed_before_one_is_suspended(site: Site) -> None:
    the_broker_dies_before_it_is_moved(site, "evacuating")


def the_broker_is_killed_before_one_is_resumed(site: Site) -> None:
    the_broker_dies_before_it_is_moved(site, "restoring")


SCENES = [
    what_the_framework_cannot_move_the_driver_moves_and_brings_back,
    programs_that_only_the_driver_can_move_take_turns,
    a_suspended_program_that_is_killed_leaves_nothing,
    the_next_broker_resumes_what_the_one_before_has_suspended,
    what_was_noted_before_the_driver_was_asked_is_not_believed,
    a_helper_that_is_killed_is_replaced,
    one_that_is_killed_before_it_is_suspended_keeps_nobody_waiting,
    one_that_is_killed_before_it_is_resumed_keeps_nobody_waiting,
    the_broker_is_killed_before_one_is_suspended,
    the_broker_is_killed_before_one_is_resumed,
]
