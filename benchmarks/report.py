"""What the benchmarks share: statistics, the machine in words, the closing table, the JSON file, a broker."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

_Item = TypeVar("_Item")

ROOT = Path(__file__).resolve().parents[1]
"""The checkout: subprocesses of the benchmarks run with it first on their PYTHONPATH."""


WIDTH = 120
"""Characters that a table before the closing one should fit into; it takes what it needs, whatever the terminal has."""


class Row(NamedTuple):
    """A line of the closing table: `target` is what was promised, in words; None: nothing was.

    `met` is None where there is no target, or nothing was measured.
    """

    question: str
    figure: str
    target: str | None = None
    met: bool | None = None
    remark: str = ""


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """Minimum, 10th, 50th, 90th and 99th percentile, maximum and mean of samples, in the samples' unit."""
    if len(samples) < 2:
        only = float(samples[0])
        return dict.fromkeys(("min", "p10", "p50", "p90", "p99", "max", "mean"), only)
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    return {
        "min": min(samples),
        "p10": cuts[9],
        "p50": cuts[49],
        "p90": cuts[89],
        "p99": cuts[98],
        "max": max(samples),
        "mean": statistics.fmean(samples),
    }


def machine() -> dict[str, Any]:
    """The machine that the figures are from."""
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark."""
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures, as one JSON object, to FILE")


def positive(text: str) -> int:
    """For argparse: a number of rounds."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def write(figures: dict[str, Any], file: Path) -> None:
    """The JSON file, whole or not at all, with the machine in it."""
    draft = file.with_name(f".{file.name}.part")
    draft.write_text(json.dumps({**figures, "machine": machine()}, indent=2) + "\n")
    draft.replace(file)


def publish(title: str, rows: Sequence[Row], figures: dict[str, Any], file: Path | None) -> None:
    """Write the JSON file, if one is wished, and print the table, last."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # for no remark is to be taken for markup: "[/tmp/x]" would be an error

    if file is not None:
        write(figures, file)
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("question", overflow="fold")
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("target", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in rows:
        verdict = ("", "") if row.met is None else ("met ", "green") if row.met else ("missed ", "red")
        remark = Text.assemble(verdict, row.remark)
        table.add_row(Text(row.question), Text(row.figure), Text(row.target or ""), remark)
    Console(highlight=False).print(table)
    print_machine()


def print_machine() -> None:
    """Print on what machine the figures are from."""
    from rich.console import Console

    here = machine()
    Console(highlight=False, markup=False).print(
        f"on {here['cores']} cores of {here['cpu']} (load {here['load']:.1f}), Linux {here['kernel']}, "
        f"Python {here['python']}",
        soft_wrap=True,
    )


def show(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table that stands before the closing one."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*map(Text, line))
    needed = Console(width=10 * WIDTH).measure(table).maximum
    Console(highlight=False, width=max(WIDTH, needed, shutil.get_terminal_size().columns)).print(table)


def track(found: Iterable[_Item], what: str, total: int) -> Iterator[_Item]:
    """Pass on each of `total` items as it is found; on a terminal, a bar on stderr shows how many there are."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    disable = not console.is_terminal
    # Refreshed but once a second, so that it costs nothing that is measured.
    yield from track(found, what, total, console=console, transient=True, refresh_per_second=1, disable=disable)


@contextlib.contextmanager
def broker(gpus: str = "1x1GiB", *options: str) -> Iterator[dict[str, str]]:
    """Run a broker of simulated GPUs, with more options of ``gpu_assigner start``, in a runtime directory of its own.

    Gives the environment in which programs find it, as acb-launch would set it. Nothing is left behind.
    """
    directory = tempfile.mkdtemp(prefix="acb-bench-")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACB_", "SLURM_", "PJM_"))}
    environment["ACB_STATE_DIR"] = directory
    environment |= {"ACB_RUNTIME_DIR": directory, "ACB_BROKER": "require", "PYTHONPATH": _search_path()}
    command = [sys.executable, "-m", "acb.cli.gpu_assigner"]
    try:
        start = [*command, "start", "--simulate-gpus", gpus, *options]
        subprocess.run(start, env=environment, check=True, capture_output=True)
        try:
            lines = Path(directory, "broker.env").read_text().splitlines()
            yield environment | dict(line.split("=", 1) for line in lines)
        finally:
            subprocess.run([*command, "stop"], env=environment, check=False, capture_output=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"no broker could be started: {error.stderr.decode(errors='replace').strip()}") from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _search_path() -> str:
    before = os.environ.get("PYTHONPATH")
    return str(ROOT) + (os.pathsep + before if before else "")
