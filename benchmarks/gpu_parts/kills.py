"""kill -9 at every step of the lease cycle: of a program, and of the broker.

At each step, first the broker is killed: both programs go on with what they have, a new broker learns of it, all is
right. Then the program is brought to the same step again and is killed itself: its memory is free by the GPU's own
count, the other program has its turn, and all is right.

The other program says that it needs nearly the whole GPU, so that nobody stays resident beside it.

First the framework moves the memory. Then the driver does, since the programs have captured graphs: its helper process
is stopped (SIGSTOP) when it is to suspend or to resume a program, and goes on when the broker or the program is dead.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence

from acb.broker.checkpointing import Helper
from acb.devices.checkpoint_probe import Probe
from benchmarks.gpu_parts.casting import Mark, cast, referee
from benchmarks.gpu_parts.part import MIB, Part
from benchmarks.gpu_parts.playing import STOPPED, go_on
from benchmarks.gpu_parts.stage import Program, Stage, StageError, wait_until

STEPS = {
    "holding": "in a region",
    "waiting": "waiting, its memory evacuated",
    "resident": "resident, without the lease",
    "evacuating": "in the midst of its evacuation",
    "restoring": "in the midst of its restoring",
}

OPTIONS = ("--quantum", "0", "--driver-tier", "off")

DRIVER_STEPS = {
    "suspending": "about to be suspended by the driver",
    "suspended": "suspended by the driver",
    "resuming": "about to be resumed by the driver",
}

DRIVER_OPTIONS = ("--quantum", "0", "--driver-tier", "on")

NEEDED = 40.0
"""Seconds for the driver tier's steps, which take 14 on a simulated GPU; real ones have contexts to move."""


def run(part: Part) -> None:
    """The framework tier's steps, then the driver tier's."""
    play(part, Scene, STEPS)
    if part.left() < NEEDED:
        part.skip("the driver tier's steps", f"they take about {NEEDED:.0f} s, {part.left():.0f} s are left")
    else:
        play(part, DriverScene, DRIVER_STEPS)


def play(part: Part, kind: type[Scene], steps: dict[str, str]) -> None:
    """Each step has a program of its own, which dies there."""
    size = 64 * MIB if part.settings.simulate else 512 * MIB
    roles: dict[str, Sequence[str]] = dict.fromkeys(steps, ("--gpu-memory", f"{size * 3 // 2}B"))
    roles["other"] = ("--gpu-memory", f"{part.settings.capacity - size // 2}B")
    with Stage(part.settings) as stage:
        if problem := kind.obstacle(part, stage):
            part.skip("the driver tier's steps", problem)
            return
        stage.start_broker(*kind.options)
        *programs, other = cast(stage, "torch", roles)
        other.do("load", "data", size, 4)
        for program in programs:
            program.do("load", "data", size, 4)
            kind.prepare(stage, program)
            other.do("work")
        for step, program in zip(steps, programs, strict=True):
            if part.left() < 8:
                part.skip(f"killed {steps[step]}", f"only {part.left():.0f} s are left")
                continue
            others = [*(programs[::-1] if kind is Scene else ()), other]  # what only the driver moves takes long
            beside = next(p for p in others if p is not program and p.process.poll() is None)
            scene = kind(part, stage, size, program, other, beside, steps[step])
            try:
                scene.kill_broker(step)
                scene.kill_program(step)
            except StageError as error:
                part.check(f"killed {steps[step]}: all goes on", False, str(error))
                return
            finally:
                scene.left_behind()
        referee(part, stage)


class Scene:
    """A program that is to be brought to a step, and the other one; `beside` needs little, and may run beside it."""

    options = OPTIONS

    def __init__(
        self, part: Part, stage: Stage, size: int, program: Program, other: Program, beside: Program, words: str
    ) -> None:
        self.part, self.stage, self.size = part, stage, size
        self.program, self.other, self.beside = program, other, beside
        self.words = words
        """What the program is at the step."""

    @staticmethod
    def prepare(stage: Stage, program: Program) -> None:
        """What a program needs besides its memory."""

    @staticmethod
    def obstacle(part: Part, stage: Stage) -> str:
        """Why the steps cannot be played here; '': they can."""
        return ""

    def kill_broker(self, step: str) -> None:
        """And start another."""
        go_on = self.bring(step)
        self.stage.kill_broker()
        self.left_behind()
        self.stage.start_broker(*self.options)
        right = go_on() and self.other.do("work") and self.same(self.program, self.other, self.beside)
        self.part.check(f"the broker is killed while a program is {self.words}: all goes on, and is right", right)

    def kill_program(self, step: str) -> None:
        """The memory is compared with what is free when the program is evacuated: it holds at least its context then"""
        self.other.do("work")
        free = self.stage.free()
        go_on = self.bring(step)
        self.program.kill()
        right = go_on() and self.other.do("work") and self.same(self.other, self.beside)
        self.other.do("work")
        self.part.check(f"a program is killed {self.words}: the other goes on, and is right", right)
        try:
            wait_until("its memory", lambda: self.stage.free() >= free - self.size // 4, 10)
            wait_until("its end", lambda: not self.stage.client(self.program), 10)
            problem = ""
        except StageError as error:
            problem = str(error)
        now = self.stage.free()
        self.part.check(f"a program is killed {self.words}: its memory is free", not problem,
                        problem or f"{now / MIB:.0f} MiB free, {free / MIB:.0f} with it evacuated")  # fmt: skip

    def same(self, *programs: Program) -> bool:
        """Whether their contents are right."""
        return all(program.do("check")["same"] for program in programs)

    def left_behind(self) -> None:
        """What a dead broker's helper does until it has noticed."""

    # --- the steps: each brings the program there, and returns what lets everybody go on --------------------------

    def bring(self, step: str) -> Callable[[], bool]:
        """The result of what is returned: whether what the programs were about has come out right."""
        bring: Callable[[], Callable[[], bool]] = getattr(self, step)
        go_on = bring()
        self.seen(step)
        return go_on

    def seen(self, step: str) -> None:
        """Wait until the broker sees it there."""
        self.wait_for(self.program, SEEN.get(step, step))

    def holding(self) -> Callable[[], bool]:
        mark = self.stand(self.program)
        self.other.begin("work")
        self.wait_for(self.other, "waiting")

        def go_on() -> bool:
            mark.lift()
            return self.end(self.program) and self.end(self.other)

        return go_on

    def waiting(self) -> Callable[[], bool]:
        mark = self.stand(self.other)
        self.wait_for(self.program, "evacuated")
        self.program.begin("work")

        def go_on() -> bool:
            mark.lift()
            return self.end(self.other) and self.end(self.program)

        return go_on

    def resident(self) -> Callable[[], bool]:
        self.program.do("work")
        mark = self.stand(self.beside)

        def go_on() -> bool:
            mark.lift()
            return self.end(self.beside)

        return go_on

    def evacuating(self) -> Callable[[], bool]:
        self.program.do("work")
        mark = Mark(self.stage)
        self.program.do("halt", str(mark))
        self.other.begin("work")
        mark.reached()

        def go_on() -> bool:
            mark.lift()
            return self.end(self.other)

        return go_on

    def restoring(self) -> Callable[[], bool]:
        self.other.do("work")
        self.wait_for(self.program, "evacuated")
        mark = Mark(self.stage)
        self.program.do("halt", str(mark))
        self.program.begin("work")
        mark.reached()

        def go_on() -> bool:
            mark.lift()
            return self.end(self.program)

        return go_on

    def stand(self, program: Program) -> Mark:
        """Have it stand in a region."""
        mark = Mark(self.stage)
        program.begin("work", 0.0, str(mark))
        mark.reached()
        return mark

    def end(self, program: Program) -> bool:
        """What it was about: whether it came out right, or it is dead."""
        return program.process.poll() is not None or bool(program.result())

    def wait_for(self, program: Program, state: str) -> None:
        """Until the broker sees it in this state."""
        wait_until(f"{program.name} to be {state}", lambda: self.stage.state(program) == state)


class DriverScene(Scene):
    """The same for programs whose memory only the driver can move."""

    options = DRIVER_OPTIONS
    helper = 0
    """The process that has been stopped."""

    @staticmethod
    def prepare(stage: Stage, program: Program) -> None:
        """A captured graph, or what passes for one."""
        if stage.spec is None:
            program.do("capture", "")
        else:
            program.do("pretend")

    @staticmethod
    def obstacle(part: Part, stage: Stage) -> str:
        """What the probe has found; a simulated driver is not probed."""
        if part.settings.simulate:
            return ""
        with Helper(None, stage.environment) as helper:
            result = helper.ask("probe", deadline=max(1.0, part.left()))
        assert isinstance(result, Probe)
        return "" if result.works else f"the driver tier does not work here: {result.reason}"

    def same(self, *programs: Program) -> bool:
        """Their addresses, too."""
        return all(found["same"] and found["addresses"] for found in (program.do("check") for program in programs))

    def suspending(self) -> Callable[[], bool]:
        self.program.do("work")
        self.stop()
        self.other.begin("work")

        def go_on() -> bool:
            self.left_behind()
            return self.end(self.other)

        return go_on

    def suspended(self) -> Callable[[], bool]:
        self.other.do("work")
        return lambda: True

    def resuming(self) -> Callable[[], bool]:
        self.other.do("work")
        wait_until("the program to be suspended", lambda: self.stage.client(self.program).get("suspended"))
        self.stop()
        self.program.begin("work")

        def go_on() -> bool:
            self.left_behind()
            return self.end(self.program)

        return go_on

    def seen(self, step: str) -> None:
        """By its state, but for suspended, which is another thing."""
        if step == "suspended":
            wait_until("the program to be suspended", lambda: self.stage.client(self.program).get("suspended"))
        else:
            super().seen(step)

    def stop(self) -> None:
        """The helper, which the broker has started by now."""
        self.helper = wait_until("the helper", self.stage.helper)
        (self.stage.directory / STOPPED).write_text(str(self.helper))
        os.kill(self.helper, signal.SIGSTOP)

    def left_behind(self) -> None:
        """It does what it has been asked for, if anybody still is."""
        if self.helper:
            go_on(self.stage.directory)
            self.helper = 0


SEEN = {"holding": "running", "suspending": "evacuating", "resuming": "restoring"}
"""What the broker calls a step, where that is something else."""
