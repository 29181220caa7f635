"""A program whose memory its framework must not move, since a captured CUDA graph knows the addresses, beside another.

With the driver tier it is suspended whole, and its graph does afterwards what it did. Without it the program holds its
memory: it goes on, and the other one, which wants more than is left, has its turn when it has ended.

CUDA graphs are not simulated. There acb is only made to believe that one has been captured.
"""

from __future__ import annotations

import time

from benchmarks.gpu_parts.casting import Mark, cast, referee
from benchmarks.gpu_parts.part import GB, MIB, Part, Skip
from benchmarks.gpu_parts.stage import Program, Stage, StageError, wait_until

HARM = 1.0
"""Seconds that a capture lasts while another program waits: enough for a lease to be given back in the midst of it."""

NO_DRIVER = "the driver cannot move memory here: "
"""What the broker logs when its probe has failed."""


def run(part: Part) -> None:
    """The hold tier, then the driver tier."""
    if part.settings.simulate:
        part.skip("a captured CUDA graph", "CUDA graphs are not simulated; acb is made to believe in one")
    hold(part)
    if part.left() < 15:
        part.skip("with the driver tier", f"only {part.left():.0f} s are left")
    else:
        suspend(part)


def sized(part: Part) -> int:
    """Bytes of the program: more than contexts take, so that it is seen whether they are there."""
    return 64 * MIB if part.settings.simulate else 2 * GB


def capture(part: Part, stage: Stage, program: Program, other: Program) -> None:
    """Load it, and have it capture a graph, while the other one comes to wait; that has work to do then."""
    program.do("load", "data", sized(part), 4)
    if part.settings.simulate:
        program.do("pretend")
        other.begin("work")
        return
    mark = Mark(stage)
    program.begin("capture", str(mark))
    mark.reached()
    other.begin("work")
    wait_until("the other program to wait", lambda: stage.state(other) == "waiting")
    time.sleep(HARM)
    mark.lift()
    problem = ""
    try:
        program.result()
    except StageError as error:
        problem = str(error)
    if not part.check("a capture goes well while another program waits", not problem, problem):
        raise Skip("there is no captured graph to go on with")


def right(program: Program) -> bool:
    """Whether it does what it did, with what it had, where it was."""
    replayed = program.do("replay")
    found = program.do("check")
    return bool(replayed and found["same"] and found["addresses"])


def hold(part: Part) -> None:
    """Without the driver tier. The program has more than half of the GPU: beside less, others make do with the rest."""
    nbytes = int(part.settings.capacity * 0.55)
    with Stage(part.settings) as stage:
        stage.start_broker("--driver-tier", "off")
        program, other = cast(stage, "torch", {"immovable": (), "other": ("--gpu-memory", f"{nbytes}B")})
        program.do("reserve", nbytes - sized(part))
        capture(part, stage, program, other)
        reason = wait_until("the refusal", lambda: stage.client(program).get("unmovable"))
        part.check("evacuation is refused by name", "CUDA graph" in reason, reason)
        part.check("no driver tier: the program goes on while the other waits", right(program))
        part.check("no driver tier: the other waits", stage.state(other) == "waiting")
        program.end()
        part.check("no driver tier: the other has its turn in the end", other.result())
        referee(part, stage)


def suspend(part: Part) -> None:
    """With the driver tier, there and back as often as the time allows."""
    with Stage(part.settings) as stage:
        stage.start_broker("--driver-tier", "on")
        empty = stage.free()
        program, other = cast(stage, "torch", {"immovable": (), "other": ()})
        capture(part, stage, program, other)
        for number in range(1 if part.settings.quick else 3):
            if number:
                other.begin("work")
            problem = wait_until("the program to be suspended", lambda: suspended(stage, program))
            if problem.startswith(NO_DRIVER) and not number:
                part.skip("suspended by the driver", problem.removeprefix(NO_DRIVER))
                return
            if not part.check("the driver suspends the program", problem == "none", problem * (problem != "none")):
                return
            answer = other.result()
            free = stage.free()
            part.check("suspended: the other has its turn", answer)
            part.check("suspended: its memory is free", empty - free < sized(part),
                       f"{(empty - free) / MIB:.0f} MiB in use, it has {sized(part) / MIB:.0f}")  # fmt: skip
            part.check("suspended: it comes back, and does what it did, with what it had, where it was",
                       right(program))  # fmt: skip
        referee(part, stage)


def suspended(stage: Stage, program: Program) -> str:
    """What the broker has logged about why it cannot be, "none" when it is; '' while neither is so."""
    if stage.client(program).get("suspended"):
        return "none"
    lines = logged(stage)
    if any("cannot be suspended" in line for line in lines):
        time.sleep(0.2)  # that it never can is the broker's next line
        lines = logged(stage)[::-1]
    return next((line for line in lines if NO_DRIVER in line or "cannot be suspended" in line), "")


def logged(stage: Stage) -> list[str]:
    """The lines of the broker's log."""
    log = (stage.directory / "broker.txt").read_text(errors="replace").splitlines()
    return [line.removeprefix("gpu_assigner: ") for line in log]
