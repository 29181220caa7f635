"""Programs that obey, several at once, and marks: files at which a program stands in the midst of something."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acb.devices.simulated import Card
from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.stage import PROGRAMS, Program, Stage, StageError, wait_until

_numbers = itertools.count(1)


def cast(stage: Stage, framework: str, roles: dict[str, Sequence[str]], *, acb: bool = True) -> list[Program]:
    """Start a program for each name, with acb-launch's options, side by side, since importing takes long; all ready."""
    script = PROGRAMS / f"{framework}_subject.py"
    programs = [stage.program(name, script, options=options, acb=acb) for name, options in roles.items()]
    for program in programs:
        program.ready()
    return programs


def complaint(program: Program, *command: Any) -> str:
    """Have a program do what fails: the exception's type and message; '' when it did not fail.

    Raises StageError when the program has ended, or does not answer.
    """
    try:
        program.do(*command)
    except StageError as error:
        text = str(error).removeprefix(f"{program.name}: {command[0]}: ")
        if text == str(error):
            raise
        return text
    return ""


def referee(part: Part, stage: Stage) -> None:
    """On a simulated GPU, which sees every operation: whether all of them had the lease."""
    if stage.spec is not None:
        with Card.open(next(stage.directory.glob("simulated-*"))) as card:
            found = card.violations()
        part.check("the referee has seen no operation without the lease", not found, "; ".join(map(str, found[:3])))


class Mark:
    """A file that a program makes when it has come to a certain point, where it stands until the file is gone."""

    def __init__(self, stage: Stage) -> None:
        self.path: Path = stage.directory / f"mark-{next(_numbers)}"

    def __str__(self) -> str:
        return str(self.path)

    def reached(self) -> None:
        """Wait until the program stands there."""
        wait_until("a program to come to where it is to stand", self.path.exists)

    def lift(self) -> None:
        """Let it go on."""
        self.path.unlink(missing_ok=True)
