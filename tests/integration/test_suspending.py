"""The driver tier end to end, on simulated GPUs: a real broker, its helper, and programs that nothing else can move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from broker_harness import Site, wait_until
from suspending import SCENES, immovable

from acb.devices import simulated_file as layout
from acb.devices.cuda import State


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_that(site: Site, scene: Callable[[Site], None]) -> None:
    scene(site)


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


def test_one_of_which_the_driver_does_not_say_whether_it_is_back_makes_way_when_its_time_is_over(site: Site) -> None:
    site.start("1x64MiB", "--driver-tier", "on", "--quantum", "0")
    held, other = immovable(site), site.program()
    other.do("enter")
    other.do("leave")
    with site.card() as card:
        [slot] = [slot for slot, owner in card._file.slots() if owner == held.pid]
        card._file.set_state(slot, State.RESTORING)
        held.begin("enter")
        wait_until("its lease", lambda: site.client(held)["state"] == "restoring")
        other.begin("enter")
        wait_until("the end of its time", lambda: not site.client(held)["suspended"])
        assert site.client(other)["state"] == "waiting", "its memory may lie on the GPU"
        card._file.set_state(slot, State.CHECKPOINTED)
        other.end("enter")
    other.do("leave")
    held.end("enter")
    held.do("operate")
    held.do("leave")
    assert site.violations() == []
    assert site.broker_log().count(f"process {held.pid} cannot be resumed") == 1, "the same is said once"
    for program in (held, other):
        assert program.finish() == 0, program.errors


def test_one_that_the_driver_does_not_know_any_more_is_told_and_the_others_go_on(site: Site) -> None:
    site.start("1x64MiB", "--driver-tier", "on")
    held, other = immovable(site), site.program()
    other.do("enter")
    other.do("leave")
    with site.card() as card:
        [slot] = [slot for slot, owner in card._file.slots() if owner == held.pid]
        card._file.set_state(slot, layout.MOVED)
        kind, reason = held.fails("enter")
    assert kind == "LeaseRefused"
    assert f"the memory of process {held.pid} is lost" in reason
    assert f"process {held.pid} cannot be resumed" in site.broker_log()
    other.do("enter")
    other.do("leave")
    assert other.finish() == 0
    held.kill()
