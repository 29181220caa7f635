"""Real programs that run short of memory, or cannot move it, or bring it back: more room, refusals, another try."""

from __future__ import annotations

import pytest
from broker_harness import MIB, Program, Site, quiet_end, wait_until

from acb.client.memory import TRIES


def test_who_runs_short_gets_more_room_and_others_are_evacuated_for_it(site: Site) -> None:
    site.start("1x64MiB")
    first, second = site.program(ACB_GPU_MEMORY="40MiB"), site.program(ACB_GPU_MEMORY="10MiB")
    first.do("enter")
    first.do("add", "model", 40 * MIB)
    first.do("leave")
    second.do("enter")
    assert site.client(first)["state"] == "resident"
    second.do("add", "model", 10 * MIB)
    second.do("add", "more", 30 * MIB)
    assert site.client(first)["state"] == "evacuated"
    second.do("leave")
    first.do("region")
    assert site.violations() == []
    quiet_end(first, second)


def test_who_runs_short_beside_memory_that_the_broker_does_not_know_has_others_evacuated(site: Site) -> None:
    """By the broker's books there is room: they show no contexts, and no strangers."""
    site.start("1x64MiB")
    first, second = site.program(ACB_GPU_MEMORY="40MiB"), site.program(ACB_GPU_MEMORY="10MiB")
    first.do("enter")
    first.do("add", "model", 40 * MIB)
    first.do("leave")
    second.do("enter")
    with site.card() as stranger:
        stranger.allocate(8 * MIB)
        for number in range(12):
            second.do("add", f"piece {number}", 2 * MIB)
        assert site.client(first)["state"] == "evacuated"
    second.do("leave")
    first.do("region")
    quiet_end(first, second)


def test_who_asks_for_more_than_the_gpu_has_sees_its_own_error(site: Site) -> None:
    site.start("1x64MiB")
    program = site.program()
    program.do("enter")
    program.do("add", "model", 40 * MIB)
    kind, message = program.fails("add", "more", 30 * MIB)
    assert kind == "CardOutOfMemory"
    assert "30MiB" in message
    program.do("add", "more", 20 * MIB)
    program.do("leave")
    quiet_end(program)


def test_many_threads_ask_for_room_at_once(site: Site) -> None:
    """Each gets its own answer: what fits is granted, what does not is not."""
    site.start("1x64MiB")
    program = site.program()
    program.do("enter")
    assert program.do("ask_in_threads", [MIB, 65 * MIB] * 8) == [True, False] * 8
    program.do("leave")
    quiet_end(program)


def test_more_than_the_gpu_has_is_refused_with_the_sizes(site: Site) -> None:
    site.start("1x64MiB")
    program = site.program()
    kind, message = program.fails("enter", "65MiB")
    assert kind == "LeaseRefused"
    assert "65MiB" in message
    assert "64MiB" in message
    program.do("enter", "64MiB")
    program.do("leave")
    kind, message = program.fails("enter", 65 * MIB)  # now with the lease held
    assert kind == "LeaseRefused"
    assert "65MiB" in message
    program.do("enter")
    program.do("leave")
    hinted = site.program(ACB_GPU_MEMORY="65MiB")
    kind, message = hinted.fails("enter")
    assert kind == "LeaseRefused"
    assert "65MiB" in message
    quiet_end(program, hinted)


def test_a_phase_waits_until_there_is_room_for_what_it_says(site: Site) -> None:
    site.start("1x64MiB")
    first, second = site.program(ACB_GPU_MEMORY="10MiB"), site.program(ACB_GPU_MEMORY="10MiB")
    first.do("enter")
    first.do("add", "model", 10 * MIB)
    first.do("leave")
    second.do("enter", "20MiB")
    assert site.client(first)["state"] == "resident"
    second.do("leave")
    second.do("enter", "60MiB")
    assert site.client(first)["state"] == "evacuated"
    second.do("leave")
    quiet_end(first, second)


@pytest.mark.parametrize("how", ["refuse", "bug", "memory"])
def test_memory_that_cannot_be_moved_stays_and_others_use_the_rest(site: Site, how: str) -> None:
    site.start("1x64MiB")
    fixed, small, large = site.program(), site.program(ACB_GPU_MEMORY="20MiB"), site.program()
    fixed.do("enter")
    fixed.do("add", "model", 40 * MIB)
    fixed.do("leave")
    fixed.do("fail", "evacuate", *[how] * 20)
    small.do("enter")
    small.do("add", "model", 20 * MIB)
    small.do("leave")
    large.begin("enter")
    seen = wait_until("the refusal", lambda: (c := site.client(fixed))["unmovable"] and c)
    assert seen["resident"] == 40 * MIB
    fixed.do("region", 5)  # it may run on, or the others would wait for ever
    shown = site.gpu_assigner("status")
    assert f"process {fixed.pid} could not be evacuated" in shown.stdout
    assert fixed.finish() == 0
    large.end("enter")
    assert site.violations() == []


def evacuated(site: Site) -> tuple[Program, Program]:
    """A program whose memory is in host memory, and the one for which it has made way, and which needs it no more."""
    site.start("1x64MiB")
    first, second = site.program(), site.program()
    first.do("enter")
    first.do("add", "model", 40 * MIB)
    first.do("leave")
    second.do("enter")
    site.wait_for(first, "evacuated")
    second.do("leave")
    return first, second


def test_memory_is_brought_back_when_room_is_made_for_it(site: Site) -> None:
    first, second = evacuated(site)
    first.do("fail", "restore", "memory", "memory")
    first.do("enter")  # granted, without room, asks for it, tries again, and again
    first.do("operate")
    first.do("leave")
    quiet_end(first, second)


def test_a_restore_that_fails_for_any_reason_is_tried_again(site: Site) -> None:
    first, second = evacuated(site)
    first.do("fail", "restore", *["bug"] * (TRIES - 1))
    first.do("enter")
    first.do("operate")
    first.do("leave")
    quiet_end(first, second)


def test_what_cannot_be_restored_at_all_does_not_hang_the_program(site: Site) -> None:
    first, _ = evacuated(site)
    first.do("fail", "restore", *["bug"] * TRIES)
    first.do("enter")
    kind, message = first.fails("operate")
    assert (kind, message) == ("AssertionError", "memory is not on the card")
    assert first.finish() == 0
    assert "cannot be restored" in first.errors
    assert first.errors.count("\n") == 1


def test_two_frameworks_are_evacuated_together_or_not_at_all(site: Site) -> None:
    site.start("1x64MiB")
    first, second = site.program(), site.program(ACB_GPU_MEMORY="10MiB")
    first.do("add_framework")
    first.do("enter")
    first.do("add", "model", 40 * MIB)
    first.do("leave")
    second.do("enter")
    first.do("fail_framework", "evacuate", "refuse")
    second.begin("add", "model", 30 * MIB)
    assert second.next()["kind"] == "CardOutOfMemory"
    assert first.do("held") == 40 * MIB
    second.do("leave")
    first.do("region")
    quiet_end(first)
    second.do("enter")
