"""Killed at every step of the lease cycle: clients, whose lease and memory are free at once, and brokers, whose clients
keep what they hold and tell the next one."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from broker_harness import MIB, Program, Site, wait_until

STEPS = [
    "waiting",
    "running",
    "inside",
    "resident",
    "evacuating",
    "evacuated",
    "restoring",
    "waiting evacuated",
    "short",
]


class Scene:
    """A GPU of 64 MiB, a program brought to a certain step of the lease cycle, and another one that shares the GPU."""

    def __init__(self, site: Site, step: str, **changes: str | None) -> None:
        site.start("1x64MiB", "--quantum", "0")
        self.site = site
        self.other = site.program(**changes, ACB_NAME="other")
        self.program = site.program(**changes, ACB_NAME="victim")
        getattr(self, "bring_to_" + step.replace(" ", "_"))()

    def load(self, program: Program, size: int) -> None:
        program.do("enter")
        program.do("add", "model", size * MIB)
        program.do("leave")

    def bring_to_waiting(self) -> None:
        self.other.do("enter")
        self.other.do("add", "model", 40 * MIB)
        self.program.begin("region")
        self.site.wait_for(self.program, "waiting")

    def bring_to_running(self) -> None:
        """It holds the lease, idle."""
        self.load(self.other, 40)
        self.load(self.program, 40)
        assert self.site.client(self.program)["state"] == "running"

    def bring_to_inside(self) -> None:
        """It is in the middle of a region, and the other one waits."""
        self.load(self.other, 40)
        self.program.do("enter")
        self.program.do("add", "model", 40 * MIB)
        self.other.begin("region")
        self.site.wait_for(self.other, "waiting")

    def bring_to_resident(self) -> None:
        self.load(self.program, 40)
        self.other.do("region")  # the whole GPU is granted, but the program's memory is only moved ...
        self.site.wait_for(self.program, "evacuated")
        self.other.do("region")
        self.program.do("region")
        self.program.do("fail", "evacuate", "refuse")  # ... when it can be
        self.other.begin("region")
        wait_until("the refusal", lambda: self.site.client(self.program)["unmovable"])
        assert self.site.client(self.program)["state"] == "resident"

    def bring_to_evacuating(self) -> None:
        self.load(self.program, 40)
        self.program.do("hold", "evacuate")
        self.other.begin("region")
        self.program.holds_at("evacuate")
        self.site.wait_for(self.program, "evacuating")

    def bring_to_evacuated(self) -> None:
        self.load(self.program, 40)
        self.load(self.other, 40)
        self.site.wait_for(self.program, "evacuated")

    def bring_to_restoring(self) -> None:
        self.bring_to_evacuated()
        self.program.do("hold", "restore")
        self.program.begin("region")
        self.program.holds_at("restore")
        self.site.wait_for(self.program, "restoring")

    def bring_to_waiting_evacuated(self) -> None:
        self.bring_to_evacuated()
        self.other.do("enter")
        self.program.begin("region")
        self.site.wait_for(self.program, "waiting")

    def bring_to_short(self) -> None:
        """It is in a region and waits for more room, which the other one is to make."""
        self.other.do("enter", 40 * MIB)
        self.other.do("add", "model", 40 * MIB)
        self.other.do("leave")
        self.other.do("hold", "evacuate")
        self.program.do("enter", 10 * MIB)
        self.program.begin("add", "model", 30 * MIB)
        self.other.holds_at("evacuate")

    def other_goes_on(self, step: str) -> None:
        """Whatever the other one was about is done."""
        if step in ("waiting", "waiting evacuated"):
            self.other.do("leave")
        elif step in ("inside", "resident", "evacuating"):
            self.other.end("region")
        elif step == "short":
            self.other.do("!release")

    def program_goes_on(self, step: str) -> None:
        """Whatever the program was about is done, and its memory is there."""
        if step in ("waiting", "waiting evacuated"):
            self.program.end("region")
        elif step == "restoring":
            self.program.do("!release")
            self.program.end("region")
        elif step == "inside":
            self.program.do("operate")
            self.program.do("leave")
        elif step == "short":
            self.program.end("add")
            self.program.do("leave")
        elif step == "evacuating":
            self.program.do("!release")


def gone(site: Site, program: Program) -> Callable[[], bool]:
    return lambda: site.report() is not None and not site.client(program)


@pytest.mark.parametrize("step", STEPS)
def test_a_client_is_killed(site: Site, step: str) -> None:
    scene = Scene(site, step)
    assert scene.program.kill() == -signal.SIGKILL
    wait_until("its end to be noticed", gone(site, scene.program))
    scene.other_goes_on(step)
    fresh = site.program()
    scene.load(fresh, 60)  # only if neither the lease nor memory is kept by the dead
    scene.other.do("region", 3)
    report = site.report()
    assert report is not None
    assert {client["pid"] for client in report["clients"]} == {scene.other.pid, fresh.pid}
    with site.card() as card:
        assert scene.program.pid not in dict(card.processes())
    assert site.violations() == []
    for program in (scene.other, fresh):
        assert program.finish() == 0
        assert program.errors == ""


@pytest.mark.parametrize("step", STEPS)
def test_the_broker_is_killed(site: Site, step: str) -> None:
    scene = Scene(site, step)
    site.kill_broker()
    site.start("1x64MiB", "--quantum", "0")
    first, second = scene.other_goes_on, scene.program_goes_on
    if step in ("inside", "evacuating", "restoring"):  # the other one waits for it
        first, second = second, first
    first(step)
    second(step)
    scene.other.do("region", 3)
    scene.program.do("region", 3)
    fresh = site.program()
    scene.load(fresh, 60)
    for program in (scene.other, scene.program):
        program.do("region", 3)
    assert site.violations() == []
    for program in (scene.other, scene.program, fresh):
        assert program.finish() == 0, program.errors
        assert program.errors == ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_holds_the_lease_is_undisturbed_and_nobody_else_gets_it_meanwhile(site: Site, number: int) -> None:
    scene = Scene(site, "inside")
    scene.program.send_signal(signal.SIGSTOP)  # so that the other one is the first to find the new broker
    site.kill_broker(number)
    site.start("1x64MiB", "--quantum", "0")
    site.wait_for(scene.other, "waiting")
    scene.program.send_signal(signal.SIGCONT)
    site.wait_for(scene.program, "running")
    scene.program.do("operate", 50)
    site.kill_broker(number)
    scene.program.do("operate", 50)
    site.start("1x64MiB", "--quantum", "0")
    site.wait_for(scene.program, "running")
    site.wait_for(scene.other, "waiting")
    scene.program.do("operate", 50)
    assert site.violations() == []
    scene.program.do("leave")
    scene.other.end("region")
    assert site.violations() == []


def test_the_new_broker_does_not_wait_for_the_dead(site: Site) -> None:
    scene = Scene(site, "waiting")
    site.kill_broker()
    scene.other.kill()
    site.start("1x64MiB", "--quantum", "0")
    scene.program.end("region")
    assert site.violations() == []


def test_brokers_die_time_and_again_under_work(site: Site) -> None:
    site.start("1x64MiB", "--quantum", "0")
    programs = [site.program() for _ in range(3)]
    for program in programs:
        program.begin("take_turns", 60, 40 * MIB)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        wait_until("work", lambda: any(c["state"] == "restoring" or c["evacuated"] for c in site.report()["clients"]))  # type: ignore[index]
        site.kill_broker(number)
        site.start("1x64MiB", "--quantum", "0")
        for program in programs:
            wait_until("it to come back", lambda program=program: site.client(program))  # type: ignore[misc]
    for program in programs:
        program.end("take_turns")
    assert site.violations() == []
    for program in programs:
        assert program.finish() == 0
        assert program.errors == ""


def test_clients_start_a_new_broker_with_the_options_of_the_one_that_died(site: Site) -> None:
    scene = Scene(site, "waiting evacuated", ACB_BROKER="auto")
    site.kill_broker()
    report = wait_until("a new broker", site.report)
    assert report["pid"] != site.brokers[-1].pid
    assert [gpu["capacity"] for gpu in report["gpus"]] == [64 * MIB]
    scene.other_goes_on("waiting evacuated")
    scene.program_goes_on("waiting evacuated")
    for program in (scene.other, scene.program):
        assert program.finish() == 0
        assert program.errors == ""
    assert site.violations() == []
    assert site.gpu_assigner("stop").returncode == 0


def test_a_broker_that_was_stopped_on_purpose_is_not_started_again(site: Site) -> None:
    scene = Scene(site, "waiting", ACB_BROKER="auto")
    assert site.gpu_assigner("stop").returncode == 0
    scene.other.do("operate", 3)
    scene.other.do("leave")
    scene.other.do("region")  # it keeps what it holds
    facts = scene.program.do("!facts")
    assert facts["closed"]
    assert site.report() is None
    site.start("1x64MiB")
    scene.program.end("region")
    assert site.violations() == []
