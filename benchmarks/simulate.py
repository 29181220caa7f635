"""The very broker core and policies that lend real GPUs, driven in virtual time, with up to ten thousand clients.

Four questions, a table each:

- runs: how near do mixes of jobs come to what is possible at all, under each policy, and how long do they wait? The
  bound is the largest of: all GPU work over all GPUs, all CPU work over all cores, the longest single job.
- cost: what does a decision of the core cost, in real time, as its clients grow?
- quantum: how does throughput depend on the quantum, and is the automatic one good?
- starvation: how long does the most disfavoured client wait, at most?

All four take some minutes; on a terminal a bar shows how far they are.

All times but those of the cost table are virtual. In benchmarks/simulation, clients.py says how the clients behave,
node.py what is idealised, and mixes.py what the jobs do.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from acb import config
from benchmarks import report
from benchmarks.simulation import cost, quanta, runs, starvation
from benchmarks.simulation.mixes import GPU_SHARE, MIXES, GiB, jobs
from benchmarks.simulation.runs import Run

RUN = ("mix", "policy", "clients/GPUs")

TABLES = ("runs", "cost", "quantum", "starvation")
CYCLES_TARGET = 20_000
"""Lease cycles a second."""

SIZES = (100, 1000, 10_000)
BIG_LENGTH = 0.2
"""Of the jobs in the default big run, so that it is done in about a minute."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print the tables."""
    parser = _parser()
    options = parser.parse_args(arguments)
    rows: list[report.Row] = []
    figures: dict[str, Any] = {"virtual_time": True, "seed": options.seed}
    begin = time.perf_counter()
    for name, tabulate in (("runs", _runs), ("cost", _cost), ("quantum", _quantum), ("starvation", _starvation)):
        if name in options.tables:
            found, closing = tabulate(options)
            figures |= found
            rows += closing
    figures["wall_s"] = time.perf_counter() - begin
    report.publish("The broker's core in virtual time", rows, figures, options.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=(__doc__ or "").split("\n\n")[0])
    report.add_arguments(parser)
    found = runs.policies()
    parser.add_argument("--tables", type=_several(TABLES), default=TABLES, metavar="T,..", help=", ".join(TABLES))
    parser.add_argument("--mix", type=_several(tuple(MIXES)), metavar="M,..", help=", ".join(MIXES))
    parser.add_argument("--policy", type=_several(tuple(found)), metavar="P,..", help=", ".join(found))
    parser.add_argument("--clients", type=report.positive, metavar="N", help="jobs of a run, in all")
    parser.add_argument("--gpus", type=report.positive, metavar="N", help="of a run, in nodes of 8 with a broker each")
    parser.add_argument("--length", type=_number, metavar="X", help="of the jobs: 1 is as described, 2 twice as long")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--cores", type=report.positive, metavar="N", help="of a node (default: one for each job)")
    parser.add_argument("--gpu-memory", type=_size, default=32 * GiB, metavar="SIZE", help="default: 32GiB")
    parser.add_argument(
        "--bandwidth", type=_size, default=24 * GiB, metavar="SIZE", help="a second, GPU to host (default: 24GiB)"
    )
    parser.add_argument("--quantum", type=_number, metavar="SECONDS", help="of runs (default: the policy's own)")
    parser.add_argument("--sizes", type=_sizes, default=SIZES, metavar="N,..", help="clients in the cost table")
    parser.add_argument("--check", action="store_true", help="check the core's invariants after every event (slow)")
    parser.add_argument(
        "--processes", type=report.positive, default=len(os.sched_getaffinity(0)), metavar="N", help="that share a run"
    )
    return parser


# --- the tables -------------------------------------------------------------------------------------------------------


def _runs(options: argparse.Namespace) -> tuple[dict[str, Any], list[report.Row]]:
    """Mixes by policies, and one big run; or what the options say."""
    every = runs.policies()
    chosen = options.clients or options.gpus or options.mix or options.policy
    common: dict[str, Any] = {
        "seed": options.seed, "cores": options.cores, "memory": options.gpu_memory, "bandwidth": options.bandwidth,
        "quantum": options.quantum, "check": options.check,
    }  # fmt: skip
    gpus = options.gpus or 8
    clients = options.clients or 10 * gpus
    length = options.length or (BIG_LENGTH if clients >= 5000 else 0.5)
    plan = [
        Run(mix, policy, clients, gpus, length, **common)
        for mix in options.mix or MIXES
        for policy in options.policy or every
    ]
    if not chosen:
        big = "fair" if "fair" in every else every[0]
        plan.append(Run("mixed", big, 10_000, 1000, options.length or BIG_LENGTH, **common))
    outcomes = runs.run_all(plan, options.processes)
    found = [runs.describe(what, outcome) for what, outcome in zip(plan, outcomes, strict=True)]
    _show_runs(found)
    rows = []
    for mix in dict.fromkeys(f["mix"] for f in found):
        of_mix = [f for f in found if f["mix"] == mix and f["clients"] == clients]
        worst, best = min(of_mix, key=_efficiency), max(of_mix, key=_efficiency)
        least = f"; the least {worst['efficiency']:.2f}, {worst['policy']}" if worst is not best else ""
        rows.append(
            report.Row(
                f"{mix}: bound over makespan, virtual time", f"{best['efficiency']:.2f}", remark=best["policy"] + least
            )
        )
    if not chosen:
        largest = found[-1]
        placed = f"{largest['efficiency_as_placed']:.2f} of what the fullest GPU allows"
        effort = f"{largest['messages']} messages in {largest['real_s']:.0f} s of a core's time"
        rows.append(
            report.Row(
                f"{largest['clients']} clients on {largest['gpus']} GPUs: bound over makespan, virtual time",
                f"{largest['efficiency']:.2f}",
                remark=f"{largest['policy']}; {placed}; {effort}",
            )
        )
    folds = {policy: _four_folds(policy, options) for policy in options.policy or every}
    best_fold, worst_fold = max(folds, key=lambda p: folds[p]), min(folds, key=lambda p: folds[p])
    least = f"; the least {folds[worst_fold]:.2f}, {worst_fold}" if worst_fold != best_fold else ""
    rows.append(
        report.Row(
            "four alphafold2 jobs on one GPU over one after the other, virtual time",
            f"{folds[best_fold]:.2f} times",
            remark=f"{best_fold}{least}; at most {1 / GPU_SHARE:.1f} are possible",
        )
    )
    return {"runs": found, "four_folds": folds}, rows


def _show_runs(found: list[dict[str, Any]]) -> None:
    """How long they took, and where the GPUs' time went, in two tables: in one they would be too wide."""
    report.show(
        "Runs (virtual time; fullest GPU: the most work that one was given; wait: until the GPU works for the client)",
        (*RUN, "makespan", "fullest GPU", "bound", "efficiency", "wait mean", "99 %"),
        [
            (
                *_run(f), f"{f['makespan_s']:.0f} s", f"{f['fullest_gpu_s']:.0f} s", f"{f['bound_s']:.0f} s",
                f"{f['efficiency']:.2f}", f"{f['wait_mean_s']:.1f} s", f"{f['wait_p99_s']:.1f} s",
            )
            for f in found
        ],
    )  # fmt: skip
    report.show(
        "What the GPUs did (copying, lingering, idle: while somebody waits for that GPU)",
        (*RUN, "copies", "TiB", "GPU busy", "copying", "lingering", "idle"),
        [
            (
                *_run(f), f"{f['copies']}", f"{f['copied_bytes'] / (1 << 40):.2f}",
                *(f"{100 * f[key]:.1f} %" for key in ("gpu_busy", "gpu_copying", "gpu_lingering", "gpu_empty")),
            )
            for f in found
        ],
    )  # fmt: skip


def _run(figures: dict[str, Any]) -> tuple[str, str, str]:
    return figures["mix"], figures["policy"], f"{figures['clients']}/{figures['gpus']}"


def _four_folds(policy: str, options: argparse.Namespace) -> float:
    """The throughput of four long jobs that share a V100 of 16 GiB, over that of one after the other."""
    what = Run("alphafold2", policy, 4, 1, 4.0, options.seed, memory=16 * GiB, bandwidth=options.bandwidth)
    alone = sum([job.alone for job in jobs(what.mix, range(4), what.seed, what.length)])
    return alone / runs.run(what).makespan


def _cost(options: argparse.Namespace) -> tuple[dict[str, Any], list[report.Row]]:
    """A decision's price by the number of clients."""
    points = cost.table(options.policy or runs.policies(), options.sizes)
    summary = cost.summary(points)
    report.show(
        "Cost of a decision (real time)",
        ("setting", "policy", "clients", "a decision", "a lease cycle", "cycles a second"),
        [
            (p["setting"], p["policy"], f"{p['clients']}", f"{p['decision_us']:.1f} µs", f"{p['cycle_us']:.1f} µs",
             f"{1e6 / p['cycle_us']:.0f}")
            if p["cycle_us"]
            else (p["setting"], p["policy"], f"{p['clients']}", f"over {cost.PATIENCE:.0f} s", "", "")
            for p in points
        ],
    )  # fmt: skip
    fewest, most = min(options.sizes), max(options.sizes)
    limit = math.log(most) / math.log(fewest) if fewest > 1 else math.inf
    rate, growth = summary["decisions_per_s"], summary["cost_growth"]
    rows = [
        report.Row(
            f"lease cycles a second through the core, {most} clients, slowest policy",
            "not reached" if rate is None else f"{rate:.0f}",
            f"at least {CYCLES_TARGET}",
            rate is not None and rate >= CYCLES_TARGET,
        ),
        report.Row(
            f"a decision's cost with {most} clients over that with {fewest}, worst case",
            "not reached" if growth is None else f"{growth:.2f}",
            f"at most {limit:.2f}",
            growth is not None and growth <= limit,
        ),
    ]
    return {**summary, "cost": points}, rows


def _quantum(options: argparse.Namespace) -> tuple[dict[str, Any], list[report.Row]]:
    """Throughput by the quantum."""
    plan = [(pair, policy) for pair in quanta.PAIRS for policy in options.policy or runs.policies()]
    measure = partial(quanta.measure, bandwidth=options.bandwidth, check=options.check, length=options.length or 1.0)
    found = runs.spread(measure, plan, options.processes, "quantum")
    names = list(found[0]["fixed_s"])
    report.show(
        "Two jobs that do not fit together: seconds by quantum (virtual time; serial: one after the other; phase: a "
        "whole one)",
        ("pair", "policy", "serial", *(name.removeprefix("whole ") for name in names), "automatic"),
        [
            (f["pair"], f["policy"], f"{f['serial_s']:.0f}", *(f"{took:.0f}" for took in f["fixed_s"].values()),
             f"{f['automatic_s']:.0f}")
            for f in found
        ],
    )  # fmt: skip
    rows = []
    for pair in quanta.PAIRS:
        worst = max((f for f in found if f["pair"] == pair), key=lambda f: float(f["behind_best"]))
        rows.append(
            report.Row(
                f"{pair} pausing: automatic quantum behind the best fixed one, virtual time",
                f"{100 * worst['behind_best']:.1f} %",
                f"at most {100 * quanta.TOLERANCE:.0f} %",
                worst["behind_best"] <= quanta.TOLERANCE,
                f"best: {worst['best_quantum']} ({worst['policy']})",
            )
        )
    return {"quantum": found}, rows


def _starvation(options: argparse.Namespace) -> tuple[dict[str, Any], list[report.Row]]:
    """The longest wait in an adversarial stream."""
    measure = partial(starvation.measure, bandwidth=options.bandwidth, check=options.check)
    found = runs.spread(measure, options.policy or runs.policies(), options.processes, "starvation")
    report.show(
        f"One disfavoured client against a stream, {starvation.HORIZON:.0f} s (virtual time)",
        ("policy", "longest wait", "leases", "share of the GPU", "the stream's"),
        [
            (f["policy"], f"{f['longest_s']:.0f} s{' and waits still' if f['still_waits'] else ''}", f"{f['leases']}",
             f"{100 * f['share']:.0f} %", f"{100 * f['favoured_share']:.0f} %")
            for f in found
        ],
    )  # fmt: skip
    worst = max(found, key=lambda f: float(f["longest_s"]))
    row = report.Row(
        "longest wait of a disfavoured client, virtual time",
        f"{worst['longest_s']:.0f} s",
        f"at most {starvation.LIMIT:.0f} s",
        worst["longest_s"] <= starvation.LIMIT,
        worst["policy"],
    )
    return {"starvation": found}, [row]


def _efficiency(figures: dict[str, Any]) -> float:
    return float(figures["efficiency"])


# --- values of options ------------------------------------------------------------------------------------------------


def _several(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """For argparse: some of these names, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def _sizes(text: str) -> tuple[int, ...]:
    """For argparse: two different numbers or more."""
    try:
        sizes = tuple(sorted({report.positive(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers") from None
    if len(sizes) < 2:
        raise argparse.ArgumentTypeError("at least two numbers are needed to tell how cost grows")
    return sizes


def _number(text: str) -> float:
    """For argparse: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError("must be above 0 and finite")
    return number


def _size(text: str) -> int:
    """For argparse: bytes."""
    try:
        return config.parse_size(text)
    except config.ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
