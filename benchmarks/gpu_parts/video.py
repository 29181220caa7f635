"""Two video streams on one GPU: frames a second of each alone, of both at once without acb, and of both with it.

Each stream is benchmarks/workloads/detect.py: decoding and drawing on the CPU, detection on the GPU. Its first batch
is not counted, and of two streams only the time in which both were at work.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from benchmarks.gpu_parts import jobs
from benchmarks.gpu_parts.agreement import SCORE, detections
from benchmarks.gpu_parts.part import Part, Skip
from benchmarks.gpu_parts.stage import WORKLOADS, Program, Stage

BATCH = 10
REAL = ("--frames", "200", "--input-width", "640", "--width", "768", "--layers", "12")
"""YOLOS-base, but for its random weights."""

QUICK = ("--frames", "100", "--input-width", "640", "--width", "384", "--layers", "12")
SIMULATED = ("--frames", "40", "--input-width", "160", "--width", "64", "--layers", "1")

PAIR = 1.6
"""How many times what one takes alone two at once take, on a machine of few cores: importing is most of it."""

Times = list[tuple[float, float]]
"""When each batch was begun and when it was done, in seconds of time.monotonic()."""


def run(part: Part) -> None:
    """Alone, both without acb, both with it."""
    options = SIMULATED if part.settings.simulate else QUICK if part.settings.quick else REAL
    cores = len(os.sched_getaffinity(0))
    with Stage(part.settings) as stage:
        job = _begin(stage, options, "alone", acb=False)
        if problem := jobs.alone(part, "a stream", job.program, part.left()):
            raise Skip(problem)
        alone = _came(job, "finished")
        rate = _rates([alone.batches])[0]
        part.figures |= {"alone_fps": rate, "options": list(options), "cores": cores}
        seconds = job.program.seconds
        expected = PAIR * seconds
        part.tell("one stream alone", f"{rate:.1f} frames/s", None, None, f"{alone.share:.0%} of it on the GPU")
    bare: list[Stream] = []
    if part.left() < 2 * expected:
        part.skip("two at once without acb", f"all take about {2 * expected:.0f} s, {part.left():.0f} s are left")
    else:
        with Stage(part.settings) as stage:
            bare = _play(stage, options, part.left() / 2, acb=False)  # the other half is acb's
        _tell(part, "two at once without acb", bare, rate, f"{cores} cores")
    if part.left() < expected:
        raise Skip(f"two at once with acb take about {expected:.0f} s, {part.left():.0f} s are left")
    with Stage(part.settings) as stage:
        stage.start_broker()
        given = part.left()
        brokered = _play(stage, options, given, acb=True)
        totals = (stage.status() or {}).get("totals", {})
    part.figures["totals"] = totals
    if reason := jobs.lacking([stream.outcome for stream in brokered], given, 2 * seconds):
        raise Skip(f"two at once with acb: {reason}")
    _tell(part, "two at once with acb", brokered, rate, f"{totals.get('evacuations')} evacuations")
    problems = "; ".join(stream.problem for stream in brokered if stream.outcome != "finished")
    part.check("both streams with acb come to their end", not problems, problems[:400])
    streams = [stream for stream in [*bare, *brokered] if stream.outcome == "finished"]
    agreements = [detections(alone.files, stream.files) for stream in streams]
    part.figures["bitwise_equal"] = [agreement == 0.0 for agreement in agreements]
    exact = agreements.count(0.0)
    others = f", the others within {SCORE}" if exact < len(streams) else ""
    same = bool(streams) and None not in agreements
    part.check("detections are those of the stream alone", same, f"{exact} of {len(streams)} bit for bit{others}")


class Stream(NamedTuple):
    """What came of a stream; `share`: of its time, the GPU's."""

    outcome: str
    problem: str
    batches: Times
    share: float
    files: dict[str, bytes]


def _begin(stage: Stage, options: tuple[str, ...], name: str, *, acb: bool) -> jobs.Job:
    out = stage.directory / f"out-{name}"
    arguments = ["--out", str(out), "--device", "cuda", "--batch", str(BATCH), *options]
    return jobs.Job(stage.program(name, WORKLOADS / "detect.py", arguments, acb=acb), out)


def _play(stage: Stage, options: tuple[str, ...], given: float, *, acb: bool) -> list[Stream]:
    """Start two streams at once; what came of them within the seconds given."""
    started = [_begin(stage, options, name, acb=acb) for name in ("one", "two")]
    outcomes = jobs.wait([job.program for job in started], given)
    return [_came(job, outcome) for job, outcome in zip(started, outcomes, strict=True)]


def _came(job: jobs.Job, outcome: str) -> Stream:
    if outcome != "finished":
        return Stream(outcome, f"{job.program.name}: {outcome}: {job.program.problem()}", [], 0.0, {})
    summary = job.summary()
    batches = _batches(job.program, summary)
    steps = [step for step in summary["steps"] if step.get("item") not in (None, "0")]
    on_gpu = sum(step["seconds"] for step in steps if step["kind"] == "gpu")
    return Stream(outcome, "", batches, on_gpu / sum(step["seconds"] for step in steps), job.results())


def _batches(program: Program, summary: dict[str, Any]) -> Times:
    """All but the first; the last ``decode`` finds no frame."""
    origin = program.started + summary["startup_s"]
    begun: dict[str, float] = {}
    found = []
    for step in summary["steps"]:
        if step["name"] == "decode":
            begun[step["item"]] = origin + step["start_s"]
        elif step["name"] == "draw" and step["item"] != "0":
            found.append((begun[step["item"]], origin + step["start_s"] + step["seconds"]))
    return found


def _rates(streams: list[Times]) -> list[float]:
    """Frames a second of each while all were at work; a batch that was only partly so counts by that part."""
    begin = max(batches[0][0] for batches in streams)
    end = min(batches[-1][1] for batches in streams)
    if end <= begin:
        return [0.0] * len(streams)
    found = []
    for batches in streams:
        frames = sum(BATCH * max(0.0, min(b, end) - max(a, begin)) / (b - a) for a, b in batches)
        found.append(frames / (end - begin))
    return found


def _tell(part: Part, question: str, streams: list[Stream], alone: float, remark: str) -> None:
    finished = [stream for stream in streams if stream.outcome == "finished"]
    if len(finished) < len(streams):
        problems = "; ".join(stream.problem for stream in streams if stream.problem)
        part.tell(question, f"{len(finished)} of {len(streams)}", None, None, f"finish: {problems[:300]}")
        return
    rates = _rates([stream.batches for stream in streams])
    part.figures[question] = rates
    if not all(rates):
        part.tell(question, "not at once", None, None, "one had ended before the other began")
        return
    together = f"{sum(rates):.1f} together, {sum(rates) / alone:.2f} times one alone"
    part.tell(
        question, " and ".join(f"{rate:.1f}" for rate in rates) + " frames/s", None, None, f"{together}; {remark}"
    )
