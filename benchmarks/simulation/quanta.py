"""Throughput over the quantum: two jobs of which only one fits the GPU, as in nvshare's own table.

nvshare (paging by managed memory, P100, two jobs of 15 GB that are half CPU, half GPU) took 2766 s one after the other,
2043 s with a quantum of 1000 s, 2170 s with 30 s and 3496 s with 5 s: a quantum must dwarf the swap. Two pairs here:
such jobs, of phases of half a minute to a minute and a half; and two that never pause, which can only lose.
"""

from __future__ import annotations

import random
from typing import Any

from acb.broker.policies import POLICIES
from benchmarks.simulation.machine import Machine
from benchmarks.simulation.mixes import CPU, GPU, GiB, Job, Phase
from benchmarks.simulation.node import Node

MEMORY, CAPACITY = 15 * GiB, 16 * GiB
QUANTA = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 1e6)
"""Seconds; with the last a lease is as long as its holder's phase."""

SEEDS = 3
TOLERANCE = 0.03


def half(rng: random.Random, length: float) -> Job:
    """12 phases of each kind, 23 minutes in all, as long as one of nvshare's jobs; the pauses are marked."""
    phases = []
    for _ in range(12):
        pause, work = rng.uniform(28, 87) * length, rng.uniform(28, 87) * length
        phases += [Phase(CPU, pause, marked=True), Phase(GPU, work)]
    return Job("half", tuple(phases), MEMORY, MEMORY)


def never(rng: random.Random, length: float) -> Job:
    """Regions without a pause between them, for 11 to 13 minutes."""
    return Job("never", (Phase(GPU, rng.uniform(660, 780) * length),), MEMORY, MEMORY)


PAIRS = {"half": half, "never": never}


def seconds(
    pair: str, policy: str, quantum: float | None, bandwidth: float, check: bool = False, length: float = 1.0
) -> float:
    """Virtual seconds until both are done, mean of some seeds. `quantum` None: the policy's own."""
    total = 0.0
    for seed in range(SEEDS):
        rng = random.Random(f"{pair} {seed}")
        both = [PAIRS[pair](rng, length) for _ in range(2)]
        node = Node(Machine(1, CAPACITY, bandwidth), POLICIES[policy](quantum), both, check)
        total += node.run().makespan
    return total / SEEDS


def serial(pair: str, length: float = 1.0) -> float:
    """Seconds of the two one after the other, without acb."""
    total = 0.0
    for seed in range(SEEDS):
        rng = random.Random(f"{pair} {seed}")
        total += sum(PAIRS[pair](rng, length).alone for _ in range(2))
    return total / SEEDS


def measure(what: tuple[str, str], bandwidth: float, check: bool = False, length: float = 1.0) -> dict[str, Any]:
    """Seconds by quantum and of the automatic one, and how far that is behind the best fixed one (negative: ahead).

    `what`: the pair and the policy. `length`: of the jobs; 1 is as described.
    """
    pair, policy = what
    fixed = {quantum: seconds(pair, policy, quantum, bandwidth, check, length) for quantum in QUANTA}
    automatic = seconds(pair, policy, None, bandwidth, check, length)
    best = min(fixed, key=lambda quantum: fixed[quantum])
    return {
        "pair": pair,
        "policy": policy,
        "serial_s": serial(pair, length),
        "fixed_s": {_name(quantum): took for quantum, took in fixed.items()},
        "best_quantum": _name(best),
        "automatic_s": automatic,
        "behind_best": automatic / fixed[best] - 1,
    }


def _name(quantum: float) -> str:
    return "whole phase" if quantum == QUANTA[-1] else f"{quantum:g} s"
