"""What the programs share: a command line with one-line errors, a stopwatch, and summary.json."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

BAD_INPUT = 2
"""Exit status when the arguments or an input file are at fault, as argparse uses it."""


class InputError(Exception):
    """The user's input cannot be used; the message is one line that says what and how to mend it."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default only where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, whose help shows the defaults and the module's docstring."""

    def __init__(self, program: str, docstring: str | None) -> None:
        super().__init__(prog=program, description=docstring, formatter_class=_HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print the message on one line of stderr and exit with status 2."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def count(minimum: int = 1, maximum: int | None = None) -> Callable[[str], int]:
    """Return an argparse type: a whole number from `minimum` to `maximum`, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum or (maximum is not None and value > maximum):
            upper = "" if maximum is None else f" and at most {maximum}"
            raise argparse.ArgumentTypeError(f"{value} is out of range: at least {minimum}{upper}")
        return value

    return parse


def positive(text: str) -> float:
    """Be an argparse type: a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is out of range: above 0")
    return value


def output_directory(path: Path) -> Path:
    """Create the output directory where needed and return it; raise InputError where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the output directory {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise InputError(f"cannot write into the output directory {path}")
    return path


def run(main: Callable[[], None], parser: argparse.ArgumentParser) -> int:
    """Call `main` and return the exit status; an InputError becomes one line on stderr and status 2."""
    try:
        main()
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return 0


class Stopwatch:
    """Times the steps of a run, told apart into GPU steps and CPU steps.

    Steps must not be nested; the seconds outside every step are found under `other_s` of the summary.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._startup = _seconds_since_process_start()
        self.steps: list[dict[str, Any]] = []

    @contextmanager
    def step(self, name: str, kind: str, item: str = "") -> Iterator[None]:
        """Time the block as one step: `kind` is "gpu" or "cpu", `item` what it works on."""
        start, processor = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            seconds, processor = time.perf_counter() - start, time.process_time() - processor
            entry = {"name": name, "kind": kind, "start_s": start - self._began}
            entry |= {"seconds": seconds, "processor_s": processor}
            self.steps.append(entry | ({"item": item} if item else {}))

    def total(self, kind: str) -> float:
        """Return the seconds spent in steps of one kind so far."""
        return sum((step["seconds"] for step in self.steps if step["kind"] == kind), 0.0)

    def summary(self) -> dict[str, Any]:
        """Return the seconds of the run and of every step, counted from main's begin; startup is what came before.

        `processor_s` is processor time: of the whole process, start-up included, or of the step. It differs from
        the wall-clock seconds where the program waited.
        """
        wall = time.perf_counter() - self._began
        gpu, cpu = self.total("gpu"), self.total("cpu")
        return {
            "startup_s": _rounded(self._startup),
            "wall_s": _rounded(wall),
            "processor_s": _rounded(time.process_time()),
            "gpu_s": _rounded(gpu),
            "cpu_s": _rounded(cpu),
            "other_s": _rounded(wall - gpu - cpu),
            "steps": [{k: _rounded(v) if isinstance(v, float) else v for k, v in s.items()} for s in self.steps],
        }


def write_summary(directory: Path, program: str, watch: Stopwatch, **facts: Any) -> Path:
    """Write DIRECTORY/summary.json (whole or not at all) and return its path."""
    path = directory / "summary.json"
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps({"program": program, **facts, **watch.summary()}, indent=1) + "\n")
    draft.replace(path)
    return path


def _rounded(seconds: float) -> float:
    return round(seconds, 4)


def _seconds_since_process_start() -> float:
    """Return the process's age: what the interpreter and the imports took before main began."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])  # field 22 of proc(5): the start time, in clock ticks since boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
