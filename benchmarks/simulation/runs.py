"""A mix of jobs on many nodes with a broker each; placing jobs on nodes, here round robin, is a batch system's work."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from acb.broker.policies import POLICIES
from benchmarks import report
from benchmarks.simulation.machine import Machine, Outcome
from benchmarks.simulation.mixes import GiB, jobs
from benchmarks.simulation.node import Node

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

GPUS_A_NODE = 8

ORDER = ("fifo", "fair", "priority", "backfill", "affinity")


def policies() -> list[str]:
    """The policies that there are, each by one name."""
    return [name for name in ORDER if name in POLICIES]


class Run(NamedTuple):
    """What is to be run. `cores` are a node's (None: one for each of its jobs), `memory` bytes of one GPU, `bandwidth`
    bytes a second, `length` the jobs', in parts of what benchmarks.simulation.mixes describes."""

    mix: str
    policy: str
    clients: int = 80
    gpus: int = 8
    length: float = 0.5
    seed: int = 1
    cores: int | None = None
    memory: int = 32 * GiB
    bandwidth: float = 24.0 * GiB
    quantum: float | None = None
    check: bool = False


def spread(call: Callable[[_Item], _Result], items: Sequence[_Item], processes: int, what: str = "") -> list[_Result]:
    """`call` of each item, by so many processes: none of them has to do with another. A terminal shows how far `what`
    is."""
    if processes == 1:
        return list(report.track(map(call, items), what, len(items)))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("forkserver")) as pool:
        return list(report.track(pool.map(call, items), what, len(items)))


def run(what: Run) -> Outcome:
    """Run it here."""
    return run_all([what], processes=1)[0]


def run_all(plan: Sequence[Run], processes: int) -> list[Outcome]:
    """Run all of it, node by node."""
    parts = [(index, what, number) for index, what in enumerate(plan) for number in range(-(-what.gpus // GPUS_A_NODE))]
    outcomes = [Outcome() for _ in plan]
    for (index, _, _), part in zip(parts, spread(_run_part, parts, processes, "runs"), strict=True):
        outcomes[index].add(part)
    return outcomes


def _run_part(part: tuple[int, Run, int]) -> Outcome:
    """One node of a run."""
    _, what, number = part
    begin = time.perf_counter()
    nodes = -(-what.gpus // GPUS_A_NODE)
    gpus = what.gpus // nodes + (number < what.gpus % nodes)
    machine = Machine(gpus, what.memory, what.bandwidth, what.cores)
    mine = jobs(what.mix, range(number, what.clients, nodes), what.seed, what.length)
    outcome = Node(machine, POLICIES[what.policy](what.quantum), mine, what.check).run()
    outcome.real_seconds = time.perf_counter() - begin
    return outcome


def describe(what: Run, outcome: Outcome) -> dict[str, Any]:
    """The figures of a run: virtual seconds, bytes, and fractions of all GPUs' time until the makespan."""
    gpu_time = outcome.makespan * outcome.gpus
    waits = {kind: report.percentiles(found) for kind, found in sorted(outcome.waits.items())}
    everybody = report.percentiles(list(chain.from_iterable(outcome.waits.values())))
    return {
        **what._asdict(),
        "makespan_s": outcome.makespan,
        "bound_s": outcome.bound,
        "fullest_gpu_s": outcome.fullest,
        "efficiency_as_placed": max(outcome.bound, outcome.fullest) / outcome.makespan,
        "efficiency": outcome.efficiency,
        "wait_mean_s": everybody["mean"],
        "wait_p99_s": everybody["p99"],
        "wait_max_s": everybody["max"],
        "wait_s_by_kind": waits,
        "copies": outcome.copies,
        "copied_bytes": outcome.copied,
        "leases": outcome.leases,
        "messages": outcome.messages,
        "failed": outcome.failed,
        "real_s": outcome.real_seconds,
        "gpu_busy": outcome.gpu_seconds / gpu_time,
        **{f"gpu_{reason}": seconds / gpu_time for reason, seconds in outcome.lost.items()},
    }
