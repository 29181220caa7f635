"""kill -9 at every step of the lease cycle: of a program, and of the broker.

At each step, first the broker is killed: both programs go on with what they have, a new broker learns of it, all is
right. Then the program is brought to the same step again and is killed itself: its memory is free by the GPU's own
count, the other program has its turn, and all is right.

The other program says that it needs nearly the whole GPU, so that nobody stays resident beside it.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.gpu_parts.casting import Mark, cast, referee
from benchmarks.gpu_parts.part import MIB, Part
from benchmarks.gpu_parts.stage import Program, Stage, StageError, wait_until

STEPS = {
    "holding": "in a region",
    "waiting": "waiting, its memory evacuated",
    "resident": "resident, without the lease",
    "evacuating": "in the midst of its evacuation",
    "restoring": "in the midst of its restoring",
}

OPTIONS = ("--quantum", "0", "--driver-tier", "off")


def run(part: Part) -> None:
    """Each step has a program of its own, which dies there."""
    size = 64 * MIB if part.settings.simulate else 512 * MIB
    roles = dict.fromkeys(STEPS, ("--gpu-memory", f"{size * 3 // 2}B"))
    roles["other"] = ("--gpu-memory", f"{part.settings.capacity - size // 2}B")
    with Stage(part.settings) as stage:
        stage.start_broker(*OPTIONS)
        *programs, other = cast(stage, "torch", roles)
        other.do("load", "data", size, 4)
        for program in programs:
            program.do("load", "data", size, 4)
            other.do("work")
        for step, program in zip(STEPS, programs, strict=True):
            if part.left() < 8:
                part.skip(f"killed {STEPS[step]}", f"only {part.left():.0f} s are left")
                continue
            beside = next(p for p in [*programs[::-1], other] if p is not program and p.process.poll() is None)
            scene = Scene(part, stage, size, program, other, beside)
            try:
                scene.kill_broker(step)
                scene.kill_program(step)
            except StageError as error:
                part.check(f"killed {STEPS[step]}: all goes on", False, str(error))
                return
        referee(part, stage)


class Scene:
    """A program that is to be brought to a step, and the other one; `beside` needs little, and may run beside it."""

    def __init__(self, part: Part, stage: Stage, size: int, program: Program, other: Program, beside: Program) -> None:
        self.part, self.stage, self.size = part, stage, size
        self.program, self.other, self.beside = program, other, beside

    def kill_broker(self, step: str) -> None:
        """And start another."""
        go_on = self.bring(step)
        self.stage.kill_broker()
        self.stage.start_broker(*OPTIONS)
        right = go_on() and self.other.do("work") and self.same(self.program, self.other, self.beside)
        self.part.check(f"the broker is killed while a program is {STEPS[step]}: all goes on, and is right", right)

    def kill_program(self, step: str) -> None:
        """The memory is compared with what is free when the program is evacuated: it holds at least its context then"""
        self.other.do("work")
        free = self.stage.free()
        go_on = self.bring(step)
        self.program.kill()
        right = go_on() and self.other.do("work") and self.same(self.other, self.beside)
        self.other.do("work")
        self.part.check(f"a program is killed {STEPS[step]}: the other goes on, and is right", right)
        try:
            wait_until("its memory", lambda: self.stage.free() >= free - self.size // 4, 10)
            wait_until("its end", lambda: not self.stage.client(self.program), 10)
            problem = ""
        except StageError as error:
            problem = str(error)
        now = self.stage.free()
        self.part.check(f"a program is killed {STEPS[step]}: its memory is free", not problem,
                        problem or f"{now / MIB:.0f} MiB free, {free / MIB:.0f} with it evacuated")  # fmt: skip

    def same(self, *programs: Program) -> bool:
        """Whether their contents are right."""
        return all(program.do("check")["same"] for program in programs)

    # --- the steps: each brings the program there, and returns what lets everybody go on --------------------------

    def bring(self, step: str) -> Callable[[], bool]:
        """The result of what is returned: whether what the programs were about has come out right."""
        bring: Callable[[], Callable[[], bool]] = getattr(self, step)
        go_on = bring()
        wait_until(f"the program to be {step}", lambda: self.stage.state(self.program) == SEEN.get(step, step))
        return go_on

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


SEEN = {"holding": "running"}
"""What the broker calls a step, where that is something else."""
