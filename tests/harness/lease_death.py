"""Killed at every step of the lease cycle: scenes for simulated and for real GPUs, each brought to its step."""

from __future__ import annotations

import signal
from collections.abc import Callable

from broker_harness import Program, Site, wait_until

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
"""The last one only where the GPU is as large as Scene takes it to be."""


class Scene:
    """A GPU of 64 units, a program brought to a certain step of the lease cycle, and another one that shares it."""

    def __init__(self, site: Site, step: str, **changes: str | None) -> None:
        site.start("1x64MiB", "--quantum", "0", "--driver-tier", "off")
        self.site = site
        self.other = site.program(**changes, ACB_NAME="other")
        self.program = site.program(**changes, ACB_NAME="victim")
        getattr(self, "bring_to_" + step.replace(" ", "_"))()

    def load(self, program: Program, size: int) -> None:
        program.do("enter")
        program.do("add", "model", size * self.site.unit)
        program.do("leave")

    def bring_to_waiting(self) -> None:
        self.other.do("enter")
        self.other.do("add", "model", 40 * self.site.unit)
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
        self.program.do("add", "model", 40 * self.site.unit)
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
        self.other.do("enter", 40 * self.site.unit)
        self.other.do("add", "model", 40 * self.site.unit)
        self.other.do("leave")
        self.other.do("hold", "evacuate")
        self.program.do("enter", 10 * self.site.unit)
        self.program.begin("add", "model", 30 * self.site.unit)
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


def kill_a_client(site: Site, step: str) -> None:
    """Its lease and its memory are free at once."""
    scene = Scene(site, step)
    assert scene.program.kill() == -signal.SIGKILL
    wait_until("its end to be noticed", gone(site, scene.program))
    others = 0 if step in ("resident", "evacuating") else 40 * site.unit
    wait_until("its memory to be free", lambda: site.used() <= others + site.slack)
    scene.other_goes_on(step)
    fresh = site.program()
    scene.load(fresh, 60)  # only if neither the lease nor memory is kept by the dead
    scene.other.do("region", 3)
    report = site.report()
    assert report is not None
    assert {client["pid"] for client in report["clients"]} == {scene.other.pid, fresh.pid}
    assert scene.program.pid not in site.processes()
    assert site.violations() == []
    for program in (scene.other, fresh):
        assert program.finish() == 0
        assert site.complaints(program) == ""


def kill_the_broker(site: Site, step: str) -> None:
    """Its clients keep what they hold, and tell the next one."""
    scene = Scene(site, step)
    site.kill_broker()
    site.start("1x64MiB", "--quantum", "0", "--driver-tier", "off")
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
        assert site.complaints(program) == ""
