"""The longest wait of one client that every policy has a reason to disfavour, against a stream of favoured ones.

The favoured have priority, weight, short leases and little memory; whenever one ends a new process comes, which has
used no GPU yet, so that there are always four. The disfavoured one has none of that, fills the GPU, and computes for
half a minute at a time.
"""

from __future__ import annotations

from typing import Any

from acb.broker.policies import POLICIES
from benchmarks.simulation.clients import Client
from benchmarks.simulation.machine import Machine
from benchmarks.simulation.mixes import CPU, GPU, GiB, Job, Phase
from benchmarks.simulation.node import Node

CAPACITY = 16 * GiB
STREAM = 4
HORIZON = 7200.0
"""Virtual seconds."""

LIMIT = HORIZON / 8
"""Seconds: a longer wait may be one without end."""

FAVOURED = Job(
    "favoured", (Phase(GPU, 2.0), Phase(CPU, 0.5, marked=True)) * 3, GiB, GiB, hint=GiB, priority=10, weight=4.0
)
DISFAVOURED = Job(
    "disfavoured", (Phase(GPU, 30.0), Phase(CPU, 1.0, marked=True)) * 1000, 15 * GiB, 15 * GiB, hint=15 * GiB
)


def measure(policy: str, bandwidth: float, horizon: float = HORIZON, check: bool = False) -> dict[str, Any]:
    """How long the disfavoured one waited at most, its wait at the horizon included, and its share of the GPU."""
    node = Node(Machine(1, CAPACITY, bandwidth), POLICIES[policy](None), [FAVOURED] * STREAM, check)
    victim = node.start(DISFAVOURED._replace(arrival=1.0))
    computed = 0.0

    def successor(client: Client) -> None:
        nonlocal computed
        computed += client.job.gpu_seconds
        node.start(FAVOURED._replace(arrival=node.now))

    node.hook = successor
    node.pause_at = horizon
    outcome = node.run()
    waits = list(outcome.waits.get("disfavoured", ()))
    unfinished = horizon - victim.waits_since if victim.requested else 0.0
    return {
        "policy": policy,
        "longest_s": max([*waits, unfinished]),
        "still_waits": unfinished > 0 and unfinished >= max(waits, default=0.0),
        "leases": len(waits),
        "share": victim.computed / horizon,
        "favoured_share": computed / horizon,
    }
