"""Folding jobs for a GPU of any size: how they are made so large that four of them do not fit at once."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_parts.part import GB, Part, Settings
from benchmarks.gpu_parts.stage import WORKLOADS, Program, Stage
from benchmarks.workloads.fasta import Protein, bundled_proteins, read_fasta

FILL = 1.2
"""Of the GPU's memory, what four jobs want together."""

HEADS = 8
"""Of the triangle attention, on a real GPU: 128 channels, as in ESMFold itself."""

BESIDES = 1.5 * GB
"""Bytes of a job beside that attention: weights, other activations, the CUDA context."""

ENOUGH = 1.5
"""Times what they take one after the other, after which programs at once are taken to hang."""

LONGEST = 1022
SIMULATED = ("--layers", "4", "--width", "1024", "--relax-steps", "200", "--relax-rounds", "1", "--search-rounds", "1")
"""On a simulated GPU the weights are what does not fit: about 220 MB a job."""

REAL = ("--layers", "8", "--blocks", "8", "--recycles", "3", "--pair-heads", str(HEADS), "--search-rounds", "1",
        "--relax-steps", "100", "--relax-rounds", "1")  # fmt: skip


class Size(NamedTuple):
    """What a job folds, and with which options; `why` in words."""

    fasta: Path
    options: tuple[str, ...]
    why: str


def sized(settings: Settings, directory: Path) -> Size:
    """A protein so long that the attention, which grows with the cube of its length, fills a third of the GPU.

    Long proteins are what fills a GPU in life, too. The nearest in length of pyhmmer's real proteins is taken: with it
    a job took 38 s beside an H100, 4 of them on the GPU and 16 relaxing, which was 500 steps then. It is 100 now, whose
    time has not been measured: four jobs have to be played twice in the part's time. The length is bounded by what the
    language model is made for.
    """
    if settings.simulate:
        fasta = directory / "short.fasta"
        _write(fasta, _nearest(60))
        return Size(fasta, SIMULATED, "weights of 200 MiB; a simulated GPU of 768 MiB holds three")
    wanted = max(0.5 * GB, FILL * settings.capacity / 4 - BESIDES)
    residues = min(LONGEST, round((wanted / (8 * HEADS)) ** (1 / 3)))
    heads = round(wanted / 8 / residues**3)
    options = (*REAL, "--pair-heads", str(max(HEADS, heads)))
    chosen = _nearest(residues)
    fasta = directory / "long.fasta"
    _write(fasta, chosen)
    return Size(fasta, options, f"{len(chosen)} residues, {max(HEADS, heads)} heads of triangle attention")


def _nearest(residues: int) -> Protein:
    found = [protein for path in bundled_proteins() for protein in read_fasta(path) if len(protein) <= LONGEST]
    return min(found, key=lambda protein: (abs(len(protein) - residues), protein.name))


def _write(fasta: Path, protein: Protein) -> None:
    fasta.write_text(f">{protein.name}\n{protein.residues}\n")


class Job(NamedTuple):
    """A job that has been started, and where it writes."""

    program: Program
    out: Path

    def summary(self) -> dict[str, Any]:
        """What it has written about itself; {} when it did not come so far."""
        file = self.out / "summary.json"
        return json.loads(file.read_text()) if file.exists() else {}  # type: ignore[no-any-return]

    def results(self) -> dict[str, bytes]:
        """Its files, but for times."""
        return contents(self.out)


def contents(directory: Path) -> dict[str, bytes]:
    """Of every file that holds results."""
    files = sorted(directory.glob("*")) if directory.exists() else []
    return {f.name: f.read_bytes() for f in files if f.name != "summary.json" and f.is_file()}


def begin(stage: Stage, size: Size, name: str, *, acb: bool) -> Job:
    """Start one."""
    out = stage.directory / f"out-{name}-{'acb' if acb else 'bare'}"
    shutil.rmtree(out, ignore_errors=True)
    arguments = [str(size.fasta), "--out", str(out), "--device", "cuda", *size.options]
    return Job(stage.program(name, WORKLOADS / "fold.py", arguments, acb=acb), out)


def alone(part: Part, what: str, program: Program, seconds: float) -> str:
    """Wait so long for a program without acb: why nothing can be compared with it, '' when it has finished.

    That it crashes is told as a failure: it is none of acb's, but no result either.
    """
    outcome = program.wait(seconds)
    if outcome == "failed":
        part.check(f"{what} runs without acb", False, program.problem())
    return {
        "finished": "",
        "not done in time": f"{what} is not done within the {seconds:.0f} s that it could be given",
        "out of memory": f"{what} runs out of memory without acb: {program.problem()}",
    }.get(outcome, f"{what} does not run without acb: {program.problem()}")


def lacking(outcomes: Sequence[str], seconds: float, sequential: float) -> str:
    """Why nothing is known of programs at once that were given so many seconds; `sequential`: one after the other.

    '' when all have ended, by themselves, or had time enough: then they hang, and are at fault.
    """
    cut = "not done in time" in outcomes and set(outcomes) <= {"finished", "not done in time"}
    if not cut or seconds >= ENOUGH * sequential:
        return ""
    return f"not done within the {seconds:.0f} s that were left; one after the other they take {sequential:.0f} s"


def wait(programs: Sequence[Program], seconds: float) -> list[str]:
    """What comes of each within so many seconds for all."""
    end = time.monotonic() + seconds
    return [program.wait(end - time.monotonic()) for program in programs]


class Watch:
    """The most memory, in bytes, that was taken of the GPU while it was watched."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._before = stage.free()
        self._least = self._before
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def peak(self) -> int:
        """Bytes more than before."""
        return self._before - self._least

    def _look(self) -> None:
        while not self._end.wait(0.02):
            self._least = min(self._least, self._stage.free())
