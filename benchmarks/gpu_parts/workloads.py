"""Every workload that uses a GPU: each alone, then all four at once with acb; what they give must be the same.

Folding in PyTorch and in JAX, training, and video detection: programs that know nothing of acb. With it each is said to
need the whole GPU (``acb-launch --gpu-memory``), so that the lease never changes hands without memory being moved.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.gpu_parts import jobs
from benchmarks.gpu_parts.agreement import LOSS, SCORE, SPREAD, Files, detections, structures, training
from benchmarks.gpu_parts.part import Part, Skip
from benchmarks.gpu_parts.stage import WORKLOADS, Stage

DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "XLA_FLAGS": "--xla_gpu_deterministic_ops=true",
}
"""What a user sets who wants the same sums every time; JAX would else choose its kernels by timing them, every time."""

FOLDING = ("--search-rounds", "1", "--search-filters", "default", "--relax-steps", "200", "--relax-rounds", "1")


class Workload(NamedTuple):
    """A program of benchmarks/workloads, its options on a real GPU and on a simulated one, and how its files compare.

    `why`: what its files may differ by, and why, when not equal bit for bit.
    """

    name: str
    needs: tuple[str, ...]
    real: tuple[str, ...]
    simulated: tuple[str, ...]
    agree: Callable[[Files, Files], float | None]
    why: str


WORKLOADS_HERE = (
    Workload(
        "fold", ("torch", "transformers", "pyhmmer", "openmm"),
        (*FOLDING, "--layers", "16", "--blocks", "4", "--pair-heads", "8"),
        (*FOLDING, "--layers", "1", "--width", "128"),
        structures, f"within {SPREAD} Å: cuBLAS sums in another order when its workspace differs",
    ),
    Workload(
        "fold_jax", ("jax", "pyhmmer", "openmm"),
        (*FOLDING, "--layers", "8", "--blocks", "2", "--msa-depth", "64"),
        (*FOLDING, "--layers", "1", "--width", "64", "--blocks", "1"),
        structures, f"within {SPREAD} Å: as above, and XLA compiles anew",
    ),
    Workload(
        "train", ("torch", "pyhmmer"),
        ("--steps", "60", "--width", "512", "--layers", "8", "--length", "128", "--batch", "32"),
        ("--steps", "20", "--width", "64", "--layers", "1", "--length", "32", "--batch", "4"),
        training, f"losses within {LOSS:.0%}: attention's gradients are summed by atomic additions, in any order",
    ),
    Workload(
        "detect", ("torch", "transformers", "cv2", "skvideo"),
        ("--frames", "60", "--input-width", "640", "--width", "384", "--layers", "8"),
        ("--frames", "20", "--input-width", "160", "--width", "64", "--layers", "1"),
        detections, f"scores within {SCORE}: cuBLAS sums in another order when its workspace differs",
    ),
)  # fmt: skip


def run(part: Part) -> None:
    """One after the other without acb, then all at once with it."""
    present = []
    for workload in WORKLOADS_HERE:
        missing = [name for name in workload.needs if importlib.util.find_spec(name) is None]
        if missing:
            part.skip(workload.name, f"not installed: {', '.join(missing)}")
        else:
            present.append(workload)
    if not present:
        raise Skip("no workload can run here")
    alone = _alone(part, present)
    together = [workload for workload in present if workload.name in alone]
    if len(together) < 2:
        raise Skip("fewer than two workloads run alone")
    expected = 1.3 * sum(part.figures[workload.name]["alone_s"] for workload in together)
    if part.left() < expected:
        part.skip("all at once with acb", f"they take about {expected:.0f} s, {part.left():.0f} s are left")
        return
    _at_once(part, together, alone)


def _alone(part: Part, workloads: list[Workload]) -> dict[str, Files]:
    """The files of each that runs; half of the time is kept for all of them at once."""
    keep = 0.4 * part.left()
    found: dict[str, Files] = {}
    with Stage(part.settings) as stage:
        stage.environment |= DETERMINISTIC
        for workload in workloads:
            job = _begin(part, stage, workload, acb=False)
            if problem := jobs.alone(part, workload.name, job.program, max(0.0, part.left() - keep)):
                part.skip(workload.name, problem)
                continue
            found[workload.name] = _files(job)
            summary = job.summary()
            part.figures[workload.name] = {"alone_s": job.program.seconds, "gpu_s": summary["gpu_s"]}
            part.tell(f"{workload.name} alone", f"{job.program.seconds:.1f} s", None, None,
                      f"{summary['gpu_s']:.1f} s GPU steps, {summary['startup_s']:.1f} s start-up")  # fmt: skip
    return found


def _at_once(part: Part, workloads: list[Workload], alone: dict[str, Files]) -> None:
    one_by_one = sum(part.figures[workload.name]["alone_s"] for workload in workloads)
    with Stage(part.settings) as stage:
        stage.environment |= DETERMINISTIC
        stage.start_broker("--driver-tier", "off")  # or it would have to clear away contexts, too; see part driver
        begun, given = time.monotonic(), part.left()
        started = [_begin(part, stage, workload, acb=True) for workload in workloads]
        outcomes = jobs.wait([job.program for job in started], given)
        reason = jobs.lacking(outcomes, given, one_by_one)
        taken = max(job.program.ended for job in started) - begun
        totals = (stage.status() or {}).get("totals", {})
        part.figures |= {"at_once_s": taken, "totals": totals}
        for workload, job, outcome in zip(workloads, started, outcomes, strict=True):
            question = f"{workload.name}, at once with others, as alone"
            if outcome != "finished":
                if reason:
                    part.skip(question, reason)
                else:
                    part.check(question, False, f"{outcome}: {job.program.problem()}")
                continue
            agreement = workload.agree(alone[workload.name], _files(job))
            part.figures[workload.name] |= {"at_once_s": job.program.seconds, "bitwise_equal": agreement == 0.0}
            how = "bit for bit" if agreement == 0.0 else f"not bit for bit; allowed: {workload.why}"
            part.check(question, agreement is not None, how)
    if outcomes.count("finished") < len(outcomes):
        return
    part.tell(f"{len(workloads)} different ones at once with acb", f"{taken:.1f} s", None, None,
              f"{one_by_one:.1f} s one after the other")  # fmt: skip
    part.check("their memory has made way for each other's", totals.get("evacuations", 0) >= len(workloads) - 1,
               f"{totals.get('evacuations')} evacuations, {totals.get('evacuated_bytes', 0) / 1e9:.3g} GB")  # fmt: skip


def _begin(part: Part, stage: Stage, workload: Workload, *, acb: bool) -> jobs.Job:
    out = stage.directory / f"out-{workload.name}"
    options = workload.simulated if part.settings.simulate else workload.real
    arguments = ["--out", str(out), "--device", "cuda", *options]
    whole = ["--gpu-memory", str(part.settings.capacity)]
    program = stage.program(workload.name, WORKLOADS / f"{workload.name}.py", arguments, whole if acb else (), acb=acb)
    return jobs.Job(program, out)


def _files(job: jobs.Job) -> Files:
    """Its results, and the losses that are only in its summary."""
    losses = job.summary().get("losses")
    return job.results() | ({"losses.json": json.dumps(losses).encode()} if losses else {})
