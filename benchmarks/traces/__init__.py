"""Phase traces: what a program does on the CPU and on the GPU, recorded from a real run, and jobs made of them.

A trace is a list of *targets* (a protein, a batch of frames, a training step), each a list of phases. The files beside
this module were written by ``python -m benchmarks.record`` and say how. A GPU phase was recorded on a simulated GPU,
that is on a CPU: how GPU phases differ from each other, and CPU phases too, is measured; the ratio of one kind to the
other is not a GPU's, nor is the length of either that of a large input. jobs() therefore scales three things and
nothing else: all GPU phases by one factor and all CPU phases by another, so that a job takes a given time alone and a
given share of it on the GPU; the order of the targets, which each job shuffles for itself; and their number.
"""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

GPU_SHARE = {"alphafold2": 0.345, "video": 0.4, "training": 0.7}
"""Of a job's time alone, on the GPU.

alphafold2: four jobs on one GPU can reach at most 1 / 0.345 = 2.9 times the throughput, which is what Fujitsu publishes
of its broker with four AlphaFold2 programs on one V100. The others are assumed.
"""


class Phase(NamedTuple):
    """`kind` is "gpu" or "cpu"."""

    kind: str
    seconds: float


Job = list[Phase]


class Bound(NamedTuple):
    """The least makespan that any scheduler could reach, in seconds, and what sets it."""

    seconds: float
    cause: str


def mixes() -> list[str]:
    """The traces there are, by name."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


def load(name: str) -> list[Job]:
    """The targets of a trace, in recorded seconds."""
    file = Path(__file__).with_name(f"{name}.json")
    return [[Phase(kind, seconds) for kind, seconds in target] for target in json.loads(file.read_text())["targets"]]


def convert(summary: dict[str, Any]) -> list[Job]:
    """The targets of a workload's summary.json: its steps that work on an item, one target an item.

    What is done once a program (building the model, loading databases) belongs to no item and is left out: in life it
    is a small part of a job.
    """
    targets: dict[str, Job] = {}
    for step in summary["steps"]:
        if "item" in step:
            phases = targets.setdefault(step["item"], [])
            seconds = round(step["seconds"], 4)
            if phases and phases[-1].kind == step["kind"]:
                seconds = round(seconds + phases.pop().seconds, 4)
            phases.append(Phase(step["kind"], seconds))
    return [target for target in targets.values() if any(phase.kind == "gpu" for phase in target)]


def jobs(targets: Sequence[Job], count: int, seconds: float, share: float, length: int, seed: int) -> list[Job]:
    """`count` jobs of `length` targets, each taking `seconds` alone, of which `share` (0 to 1) on the GPU.

    All have the same targets (repeated when there are fewer), each in an order of its own, drawn by `seed`.
    Neighbouring phases of one kind are one phase.
    """
    if not targets:
        raise ValueError("a trace without targets")
    chosen = [targets[index % len(targets)] for index in range(length)]
    recorded = {kind: sum(p.seconds for target in chosen for p in target if p.kind == kind) for kind in ("gpu", "cpu")}
    wanted = {"gpu": seconds * share, "cpu": seconds * (1 - share)}
    scale = {kind: wanted[kind] / recorded[kind] if recorded[kind] else 0.0 for kind in recorded}
    made = []
    for number in range(count):
        order = list(chosen)
        random.Random(f"{seed} {number}").shuffle(order)
        made.append(_joined(Phase(p.kind, p.seconds * scale[p.kind]) for target in order for p in target))
    return made


def _joined(phases: Any) -> Job:
    job: Job = []
    for phase in phases:
        if job and job[-1].kind == phase.kind:
            job[-1] = Phase(phase.kind, job[-1].seconds + phase.seconds)
        else:
            job.append(phase)
    return job


def total(job: Job, kind: str | None = None) -> float:
    """Seconds of a job, or of its phases of one kind."""
    return sum(phase.seconds for phase in job if kind in (None, phase.kind))


def bound(made: Sequence[Job], gpus: int, cores: int) -> Bound:
    """The larger of all GPU time over the GPUs, all CPU time over the cores, and the longest job."""
    return max(
        Bound(sum(total(job, "gpu") for job in made) / gpus, "GPU time"),
        Bound(sum(total(job, "cpu") for job in made) / cores, "CPU time"),
        Bound(max(total(job) for job in made), "longest job"),
    )


def sequential(alone: Sequence[float], gpus: int) -> float:
    """The makespan when a job has a GPU from its start to its end and the next begins when one is free, in seconds."""
    free = [0.0] * gpus
    for seconds in alone:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def first_come(made: Sequence[Job], gpus: int, swap: float = 0.0) -> float:
    """The makespan, in seconds, of first come first served when deciding takes no time: what the order itself costs.

    Job n is bound to GPU n modulo `gpus`. With `swap`, every hand-over to another job takes so many seconds.
    """
    free_at, last = [0.0] * gpus, [-1] * gpus
    steps = [iter(job) for job in made]
    arrivals = [(0.0, number) for number in range(len(made))]  # (when it asks for the GPU, or ends, job)
    pending: dict[int, float] = {}
    end = 0.0
    heapq.heapify(arrivals)
    while arrivals:
        now, number = heapq.heappop(arrivals)
        if number in pending:
            gpu = number % gpus
            begin = max(now, free_at[gpu]) + (swap if last[gpu] not in (-1, number) else 0.0)
            now = free_at[gpu] = begin + pending.pop(number)
            last[gpu] = number
        for phase in steps[number]:
            if phase.kind == "gpu":
                pending[number] = phase.seconds
                heapq.heappush(arrivals, (now, number))
                break
            now += phase.seconds
        else:
            end = max(end, now)
    return end
