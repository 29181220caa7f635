"""How much more do programs get done when they share GPUs phase by phase? Against one after the other, and the bound.

Real processes under a real broker replay the phases of recorded programs (benchmarks.traces) on simulated GPUs: CPU
phases wait, GPU phases occupy the GPU. In one run:

- one after the other, where a program has a GPU from its start to its end (each program's time alone is measured, on a
  GPU of its own; the sum is the makespan);
- all at once without a broker: who does not fit runs out of memory, and the GPU is time-sliced among the others;
- all at once under the broker, with each of its policies;

once where all programs' memory fits together, and once where every hand-over must swap (benchmarks.scenes says how much
memory and why). The makespan is the time from the common start to the last program's end of work, as the programs say.

The bound is what no scheduler can beat: the largest of all GPU time over the GPUs, all CPU time over the cores, and the
longest program. A CPU phase that waits uses no core, so the bound takes as many cores as there are jobs; on a machine
with fewer, CPU phases would be a bound of their own. Swapping is not in the bound. The ideal is tighter: what first
come, first served would take, for these very phases, if nothing but the phases took any time.

speed-up = one after the other / makespan; efficiency = bound / makespan.

Time is compressed: in life an AlphaFold2 GPU phase takes a minute, here 0.1 s, so that what a hand-over costs, swaps
aside, weighs some hundred times what it would. Scenes run side by side, which they stand, for they hardly use the CPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from acb.broker.policies import POLICIES
from benchmarks import report, scenes, throughput_table, traces
from benchmarks.scenes import Outcome, Setting

SIZES = (1, 2, 4, 8, 16)
MANY = 8
"""So many programs share one GPU at most; more share four."""

QUANTUM_IN_LIFE = 0.5
"""Of a mean GPU phase.

The broker's own quantum is ten times two programs' swaps, which with SWAP_SHARE is half a phase, but never less than a
second: more than a phase, when time is compressed. One scene has it as it would be in life.
"""


class Plan(NamedTuple):
    """What is run: a job takes `seconds` alone, `share` of it on the GPU, in `targets` targets."""

    mix: str
    seconds: float
    share: float
    targets: int
    seed: int

    def jobs(self, count: int) -> list[traces.Job]:
        """So many of them, each with an order of its own."""
        return traces.jobs(traces.load(self.mix), count, self.seconds, self.share, self.targets, self.seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print the tables; status 1 when a program under the broker did not finish, or used another's GPU."""
    options = _parser().parse_args(arguments)
    plan = Plan(
        options.mix,
        options.seconds or (1.5 if options.quick else 24.0),
        traces.GPU_SHARE[options.mix],
        6 if options.quick else 64,
        options.seed,
    )
    if options.quantum_table:
        from benchmarks import quanta

        rows = quanta.measure(options.quick)
        quanta.publish(rows)
    else:
        policies = options.policies or (["fifo"] if options.quick else names())
        rows = measure(plan, options.jobs or ([1, 2] if options.quick else list(SIZES)), policies, options)
        throughput_table.publish(rows)
        if options.picture is not None:
            from benchmarks import throughput_picture

            throughput_picture.draw(rows, options.picture)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    bad = [row for row in rows if row["policy"] != "none" and (row["finished"] < row["jobs"] or row["violations"])]
    for row in bad:
        print(f"throughput: {row['setting']}: {row['failures'] or row['out_of_memory']}", file=sys.stderr)
    return 1 if bad else 0


def names() -> list[str]:
    """The broker's policies, each by the first of its names, its own choice first."""
    return sorted({kind.names[0] for kind in POLICIES.values()}, key=lambda name: (name != "fifo", name))


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=about)
    parser.add_argument("--json", metavar="FILE", type=_file, help="write the rows, as a JSON list, to FILE")
    parser.add_argument("--picture", metavar="FILE", type=_file, help="draw the speed-ups to FILE")
    parser.add_argument("--mix", choices=sorted(traces.GPU_SHARE), default="alphafold2", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=_sizes, metavar="LIST", help="such as 1,4,16: above 8 on four GPUs (all)")
    parser.add_argument("--policies", type=_policies, metavar="LIST", help="such as fifo,fair (all)")
    parser.add_argument("--seconds", type=_seconds, metavar="S", help="a job's time alone (24)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of each job's targets (%(default)s)")
    parser.add_argument(
        "--side-by-side", type=report.positive, default=5, metavar="N", help="scenes at the same time (%(default)s)"
    )
    parser.add_argument("--trace", type=Path, metavar="DIR", help="a trace of each scene under the broker in DIR")
    parser.add_argument("--quantum-table", action="store_true", help="throughput over the quantum, and nothing else")
    parser.add_argument("--quick", action="store_true", help="few jobs, short: only to see that it works")
    return parser


def _file(text: str) -> Path:
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.absolute().parent}")
    return path


def _sizes(text: str) -> list[int]:
    if not all(word.isdigit() and 1 <= int(word) <= 64 for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of jobs, 1 to 64, such as 1,2,4")
    return sorted({int(word) for word in text.split(",")})


def _policies(text: str) -> list[str]:
    unknown = [word for word in text.split(",") if word not in POLICIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no policy {unknown[0]!r}; there are: {', '.join(POLICIES)}")
    return list(dict.fromkeys(text.split(",")))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time from 0.1 to 3600 seconds")
    return seconds


# --- measuring --------------------------------------------------------------------------------------------------------


def settings(sizes: Sequence[int], policies: Sequence[str], phase: float) -> list[Setting]:
    """What is to be run, the longest first. `phase`: a mean GPU phase, in seconds."""
    found = []
    for jobs in sizes:
        gpus = 1 if jobs <= MANY else 4
        for swapping in (False, True):
            found += [Setting(jobs, gpus, policy, swapping) for policy in ["none", *policies]]
    if 4 in sizes and policies:
        found.append(Setting(4, 1, policies[0], True, quantum=QUANTUM_IN_LIFE * phase))
        found.append(Setting(4, 1, policies[0], False, marked=False))
    return sorted(found, key=lambda setting: -setting.jobs / setting.gpus)


def measure(
    plan: Plan, sizes: Sequence[int], policies: Sequence[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All scenes; a row each, and one for each size one after the other."""
    made = plan.jobs(max(sizes))
    gpu_phases = [phase.seconds for phase in made[0] if phase.kind == "gpu"]
    phase = sum(gpu_phases) / len(gpu_phases)
    nbytes = scenes.memory(made)
    _say(f"{len(made)} jobs alone, each on a GPU of its own")
    alone = scenes.play(Setting(len(made), len(made), "none", False), made, nbytes)
    plans = settings(sizes, policies, phase)
    results: dict[Setting, Outcome] = {}

    def run(setting: Setting) -> Outcome:
        trace = None if options.trace is None else options.trace.resolve() / f"{setting.words}.jsonl"
        return scenes.play(setting, made[: setting.jobs], nbytes, trace)

    if options.trace is not None:
        options.trace.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(options.side_by_side) as pool:
        running = {pool.submit(run, setting): setting for setting in plans}
        try:
            for done in concurrent.futures.as_completed(running):
                setting = running[done]
                outcome = results[setting] = done.result()
                _say(f"{setting.words}: {outcome.finished} finished in {outcome.makespan_s:.2f} s")
        finally:
            pool.shutdown(cancel_futures=True)
    rows = []
    for setting in sorted(plans, key=lambda s: (s.gpus, s.jobs, s.swapping)):
        ended = alone.ended_s[: setting.jobs]
        row = _row(plan, setting, made[: setting.jobs], results[setting], nbytes, ended)
        if setting.policy == "none":
            rows.append({**row, **_one_after_the_other(row)})
        rows.append(row)
    return rows


def _row(
    plan: Plan, setting: Setting, made: list[traces.Job], outcome: Outcome, nbytes: int, alone: list[float]
) -> dict[str, Any]:
    best = traces.bound(made, setting.gpus, cores=setting.jobs)
    sequential = traces.sequential(alone, setting.gpus)
    whole = outcome.finished == setting.jobs
    swap = 2 * nbytes / scenes.BANDWIDTH
    ideal = traces.first_come(made, setting.gpus)
    return {
        **setting._asdict(),
        "setting": setting.words,
        "policy": setting.policy if setting.quantum is None and setting.marked else setting.words.rpartition(": ")[2],
        "speedup": sequential / outcome.makespan_s if whole else None,
        "bound": sequential / best.seconds,
        "efficiency": best.seconds / outcome.makespan_s if whole else None,
        "makespan_s": outcome.makespan_s,
        "sequential_s": sequential,
        "bound_s": best.seconds,
        "bound_cause": best.cause,
        "bound_cores": setting.jobs,
        "ideal_s": ideal,
        "ideal_efficiency": best.seconds / ideal,
        "ideal_swapping_efficiency": best.seconds / traces.first_come(made, setting.gpus, swap),
        "finished": outcome.finished,
        "out_of_memory": outcome.out_of_memory,
        "failures": outcome.failures,
        "evacuations": outcome.evacuations,
        "evacuated_bytes": outcome.evacuated_bytes,
        "waited_s": outcome.waited_s,
        "longest_wait_s": outcome.longest_wait_s,
        "programs_processor_s": outcome.processor_s,
        "handovers": outcome.handovers,
        "lost_s": outcome.lost_s,
        "jobs_per_gpu": outcome.jobs_per_gpu,
        "violations": outcome.violations,
        "mix": plan.mix,
        "job_s": plan.seconds,
        "gpu_share": plan.share,
        "gpu_phases": sum(phase.kind == "gpu" for phase in made[0]),
        "seed": plan.seed,
        "memory_bytes": nbytes,
        "swap_s": swap,
        "swap_share": scenes.SWAP_SHARE,
        "gpu": f"simulated: {scenes.cards(setting, nbytes)}",
        "simulated": True,
    }


def _one_after_the_other(row: dict[str, Any]) -> dict[str, Any]:
    seconds = row["sequential_s"]
    nothing = ("out_of_memory", "evacuations", "evacuated_bytes", "waited_s", "longest_wait_s", "handovers", "lost_s")
    return {
        "policy": "sequential",
        "setting": row["setting"].replace(": none", ": sequential"),
        "speedup": 1.0,
        "efficiency": row["bound_s"] / seconds,
        "makespan_s": seconds,
        "finished": row["jobs"],
        "failures": [],
        "programs_processor_s": None,
        "violations": 0,
        **dict.fromkeys(nothing, 0),
    }


def _say(what: str) -> None:
    print(f"throughput: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
