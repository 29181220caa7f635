"""The published experiment: N folding jobs one after the other, at once without acb, and at once with it.

Each job searches on the CPU, predicts on the GPU and relaxes on the CPU. One after the other takes N times what one
takes alone, measured after a first run that fills the caches. The bound is what no broker can beat: the largest of all
GPU time, all CPU time over the cores, and the longest job. speed-up = one after the other / with acb; efficiency =
bound / with acb. Four jobs do not fit into the GPU together (see jobs), which is the peer's case, too.
"""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.gpu_parts import jobs
from benchmarks.gpu_parts.agreement import SPREAD, structures
from benchmarks.gpu_parts.part import GB, Part, Skip
from benchmarks.gpu_parts.stage import Stage

SPEEDUP, EFFICIENCY = 2.9, 0.95
"""Promised for four jobs."""


def run(part: Part) -> None:
    """Alone first, then four at once, which matters most, then the others as far as the time goes."""
    with Stage(part.settings) as stage:
        size = jobs.sized(part.settings, part.file.parent)
        alone = _alone(part, stage, size)
    counts = (4,) if part.settings.simulate and part.settings.quick else (4, 2, 8, 1)
    for count in counts:
        expected = alone["seconds"] * 2.2 * max(1.0, count / 4)
        if part.left() < expected:
            part.skip(f"{count} jobs", f"they take about {expected:.0f} s, {part.left():.0f} s are left")
            continue
        _at_once(part, size, alone, count)


def _alone(part: Part, stage: Stage, size: jobs.Size) -> dict[str, Any]:
    """Seconds, GPU seconds and CPU seconds of one job, its memory and its files."""
    with jobs.Watch(stage) as watch:
        first = jobs.begin(stage, size, "first", acb=False)
        problem = jobs.alone(part, "a job", first.program, part.left())
    if problem:
        raise Skip(problem)
    job = jobs.begin(stage, size, "alone", acb=False)
    if problem := jobs.alone(part, "the same job a second time", job.program, part.left()):
        raise Skip(problem)
    told = job.summary()
    on_gpu = sum(step["processor_s"] for step in told["steps"] if step["kind"] == "gpu")
    found = {
        "seconds": job.program.seconds, "gpu_s": told["gpu_s"], "cpu_s": told["processor_s"] - on_gpu,
        "peak": watch.peak, "weights": told["weight_bytes"], "residues": [p["residues"] for p in told["proteins"]],
        "first_seconds": first.program.seconds, "startup_s": told["startup_s"],
        "steps_s": {step["name"]: round(step["seconds"], 3) for step in told["steps"]},
        "size": size.why, "options": list(size.options),
    }  # fmt: skip
    part.figures["alone"] = dict(found)
    wanted = 4 * watch.peak
    fits = wanted <= part.settings.capacity
    part.tell(
        "one job alone", f"{found['seconds']:.1f} s", None, None,
        f"{found['gpu_s']:.1f} s GPU, {found['cpu_s']:.1f} s CPU; {size.why}; peak {watch.peak / GB:.3g} GB: four want "
        f"{wanted / GB:.3g} of {part.settings.capacity / GB:.3g} GB" + ("; they fit" if fits else ""),
    )  # fmt: skip
    part.check("the job gives the same twice", structures(first.results(), job.results()) is not None)
    return {**found, "results": job.results()}


def _at_once(part: Part, size: jobs.Size, alone: dict[str, Any], count: int) -> None:
    cores = len(os.sched_getaffinity(0))
    with Stage(part.settings) as stage:
        bare = _play(stage, size, count, part.left() / 2, acb=False)  # the other half is acb's
    with Stage(part.settings) as stage:
        stage.start_broker()
        given = part.left()
        brokered = _play(stage, size, count, given, acb=True)
        totals = (stage.status() or {}).get("totals", {})
        agreements = [
            structures(alone["results"], job.results()) for job in brokered["jobs"]
        ]  # before the stage is cleared
    bounds = {
        "GPU time": count * alone["gpu_s"], "CPU time over cores": count * alone["cpu_s"] / cores,
        "longest job": alone["seconds"],
    }  # fmt: skip
    cause, bound = max(bounds.items(), key=lambda item: item[1])
    sequential, taken = count * alone["seconds"], brokered["seconds"]
    speedup, efficiency, possible = sequential / taken, bound / taken, sequential / bound
    part.figures[f"{count} jobs"] = {
        "sequential_s": sequential, "without_acb_s": bare["seconds"], "without_acb": bare["outcomes"],
        "with_acb_s": taken, "with_acb": brokered["outcomes"], "bounds_s": bounds, "bound": cause, "cores": cores,
        "speedup": speedup, "efficiency": efficiency, "bitwise_equal": [a == 0.0 for a in agreements],
        "evacuations": totals.get("evacuations"), "evacuated_bytes": totals.get("evacuated_bytes"),
    }  # fmt: skip
    done, lost, cut = (bare["outcomes"].count(o) for o in ("finished", "out of memory", "not done in time"))
    late = f", {cut} not done in time" if cut else ""
    part.tell(f"{count} at once without acb", f"{done} of {count}", None, None,
              f"finish, {lost} out of memory{late}; {bare['seconds']:.1f} s")  # fmt: skip
    if reason := jobs.lacking(brokered["outcomes"], given, sequential):
        part.skip(f"{count} at once with acb", reason)
        return
    finished = brokered["outcomes"].count("finished")
    part.check(f"{count} at once with acb all finish", finished == count, "; ".join(brokered["problems"])[:400])
    exact = agreements.count(0.0)
    part.check(f"{count} at once with acb give what one gives alone", None not in agreements,
               f"{exact} of {count} bit for bit, the others within {SPREAD} Å")  # fmt: skip
    if finished < count:
        return
    allowed = count == 4 and possible >= SPEEDUP
    part.tell(
        f"{count} jobs, speed-up over one after the other", f"{speedup:.2f}",
        f"at least {SPEEDUP}" if allowed else None, speedup >= SPEEDUP if allowed else None,
        f"{sequential:.1f} s against {taken:.1f} s; the bound allows {possible:.2f} ({cause}, {cores} cores)",
    )  # fmt: skip
    part.tell(f"{count} jobs, bound over time taken", f"{efficiency:.3f}",
              f"at least {EFFICIENCY}" if count == 4 else None, efficiency >= EFFICIENCY if count == 4 else None,
              f"{totals.get('evacuations', 0)} evacuations")  # fmt: skip


def _play(stage: Stage, size: jobs.Size, count: int, given: float, *, acb: bool) -> dict[str, Any]:
    """From the common start to the last end, in seconds; what runs after those given is killed."""
    begun = time.monotonic()
    started = [jobs.begin(stage, size, str(number), acb=acb) for number in range(count)]
    outcomes = jobs.wait([job.program for job in started], given)
    problems = [f"{o}: {job.program.problem()}" for job, o in zip(started, outcomes, strict=True) if o != "finished"]
    seconds = max(job.program.ended for job in started) - begun
    return {"jobs": started, "outcomes": outcomes, "problems": problems, "seconds": seconds}
