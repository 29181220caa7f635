"""One scene of benchmarks.throughput: so many programs at once, with a broker or without, and what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from acb.config import SimulatedSpec
from acb.devices.simulated import Card, create_cards
from benchmarks import report
from benchmarks.traces import Job

BANDWIDTH = 12 << 30
"""Bytes a second between host and GPU: a PCIe 3 bus of 16 lanes, measured."""

SWAP_SHARE = 0.025
"""Of a mean GPU phase, for moving a program's memory out and in.

In life: 10 GiB at 12 GiB/s is 1.7 s out and in, 2.1 % of an AlphaFold2 phase of 80 s. Time is compressed here, a phase
of 80 s to one of 0.1 s or so; the memory is scaled down by as much as the time, and the bandwidth stays as in life.
"""


class Setting(NamedTuple):
    """What is run: `policy` is a scheduler's name or "none"; `quantum` in seconds, None: the broker's own choice."""

    jobs: int
    gpus: int
    policy: str
    swapping: bool
    quantum: float | None = None
    marked: bool = True

    @property
    def words(self) -> str:
        """For people."""
        place = f"{self.jobs} job{'s' * (self.jobs > 1)} on {self.gpus} GPU{'s' * (self.gpus > 1)}"
        extra = "" if self.quantum is None else f", quantum {self.quantum:.3g} s"
        extra += "" if self.marked else ", CPU phases not marked"
        return f"{place}, {'swapping' if self.swapping else 'memory fits'}: {self.policy}{extra}"


class Outcome(NamedTuple):
    """What came of it, in seconds and bytes. `ended_s`: when each program ended, counted from the common start.

    `lost_s`: how long GPUs stood idle although a program waited for them, over `handovers` times.
    """

    makespan_s: float
    ended_s: list[float]
    finished: int
    out_of_memory: int
    failures: list[str]
    waited_s: float
    longest_wait_s: float
    handovers: int
    lost_s: float
    jobs_per_gpu: list[int]
    evacuations: int
    evacuated_bytes: int
    violations: int
    processor_s: float


def memory(made: Sequence[Job]) -> int:
    """Bytes that each program has on the GPU, so that moving them takes SWAP_SHARE of a mean GPU phase."""
    phases = [phase.seconds for job in made for phase in job if phase.kind == "gpu"]
    return int(SWAP_SHARE * sum(phases) / len(phases) / 2 * BANDWIDTH)


def cards(setting: Setting, nbytes: int) -> SimulatedSpec:
    """The GPUs: room for all programs that share one, with what the broker adds to a peak; or for one and a half."""
    fitting = -(-setting.jobs // setting.gpus)
    capacity = int(1.5 * nbytes) if setting.swapping else int(1.25 * nbytes * max(2, fitting))
    return SimulatedSpec((capacity,) * setting.gpus, BANDWIDTH)


def play(setting: Setting, made: Sequence[Job], nbytes: int, trace: Path | None = None) -> Outcome:
    """Run the programs of one scene. Raises SystemExit when the broker does not start or a program fails."""
    spec = cards(setting, nbytes)
    wish = {"jobs": made, "memory": nbytes, "gpus": setting.gpus, "marked": setting.marked}
    with _gpus(setting, spec, trace) as (directory, environment, brokered):
        wish |= {"broker": brokered, "cards": str(directory)}
        told = _run(wish, environment)
        totals = _totals(environment) if brokered else {}
        violations = 0
        for ordinal in range(setting.gpus):
            with Card.open(directory, ordinal) as card:
                violations += len(card.violations())
    programs = told["programs"]
    outcomes = [program["outcome"] for program in programs]
    ended = [program["end_t"] - told["go_t"] for program in programs]
    uses = [(program.get("gpu", -1), use) for program in programs for use in program.get("uses", ())]
    lost = [idle_while_wanted([use for gpu, use in uses if gpu == ordinal]) for ordinal in range(setting.gpus)]
    waits = [got - asked for _, (asked, got, _) in uses]
    return Outcome(
        makespan_s=max(ended),
        ended_s=ended,
        finished=outcomes.count("finished"),
        out_of_memory=outcomes.count("out of memory"),
        failures=[outcome for outcome in outcomes if outcome not in ("finished", "out of memory")],
        waited_s=sum(waits),
        longest_wait_s=max(waits, default=0.0),
        handovers=sum(len(gaps) for gaps in lost),
        lost_s=sum(sum(gaps) for gaps in lost),
        jobs_per_gpu=[sum(program.get("gpu") == ordinal for program in programs) for ordinal in range(setting.gpus)],
        evacuations=totals.get("evacuations", 0),
        evacuated_bytes=totals.get("evacuated_bytes", 0),
        violations=violations,
        processor_s=sum(program.get("processor_s", 0.0) for program in programs),
    )


def idle_while_wanted(uses: Sequence[Sequence[float]]) -> list[float]:
    """The times, in seconds, that a GPU stood idle although somebody waited, from its uses: (asked, got, left) each."""
    found = []
    free_since: float | None = None
    for asked, got, left in sorted(uses, key=lambda use: use[1]):
        if free_since is not None and got > max(asked, free_since):
            found.append(got - max(asked, free_since))
        free_since = left if free_since is None else max(free_since, left)
    return found


@contextlib.contextmanager
def _gpus(setting: Setting, spec: SimulatedSpec, trace: Path | None) -> Iterator[tuple[Path, dict[str, str], bool]]:
    """The simulated GPUs, with a broker or without: their directory, the programs' environment, and which it is."""
    if setting.policy == "none":
        with tempfile.TemporaryDirectory(prefix="acb-bench-") as directory:
            create_cards(Path(directory), spec)
            environment = {k: v for k, v in os.environ.items() if not k.startswith("ACB_")}
            yield Path(directory), environment | {"PYTHONPATH": str(report.ROOT), "ACB_BROKER": "off"}, False
        return
    options = ["--scheduler", setting.policy]
    options += [] if setting.quantum is None else ["--quantum", str(setting.quantum)]
    with report.broker(str(spec), *options) as environment:
        if trace is not None:
            environment["ACB_TRACE"] = str(trace)
        yield Path(environment["ACB_SIMULATED"]), environment, True


def _run(wish: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Start the programs, say go when all are ready, and wait for what they tell."""
    command = [sys.executable, "-m", "benchmarks.replay"]
    with subprocess.Popen(
        command, env=environment, cwd=report.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdin
            assert process.stdout
            process.stdin.write(json.dumps(wish) + "\n")
            process.stdin.flush()
            if process.stdout.readline() != "ready\n":
                raise SystemExit("the programs of the benchmark did not start; see above")
            told = process.communicate("go\n")[0]
        finally:
            process.kill()
    if process.returncode or not told:
        raise SystemExit("the programs of the benchmark failed; see above")
    found: dict[str, Any] = json.loads(told)
    return found


def _totals(environment: dict[str, str]) -> dict[str, Any]:
    """What the broker has counted."""
    command = [sys.executable, "-m", "acb.cli.gpu_assigner", "status", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the broker has ended before the programs: {done.stderr.strip()}")
    totals: dict[str, Any] = json.loads(done.stdout)["totals"]
    return totals
