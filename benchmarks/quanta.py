"""Throughput over the quantum: two programs that do not fit together and never pause, for real.

Each computes for some seconds without a CPU phase, and needs more than half of the GPU. Under a fixed quantum they
change places whenever it is over, and each change is a swap; the broker's own quantum is ten times what the swaps cost.
A short quantum loses throughput, a long one lets the other program wait. nvshare measured the same kind of thing (two
programs of 15 GB, half of their time on the CPU): quantum 1000 s: 2043 s in all; 30 s: 2170 s; 5 s: 3496 s.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks import report, scenes, traces
from benchmarks.scenes import Setting

SWAP = 0.1
"""Seconds to move one program's memory out and in."""

QUANTA = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, None)
"""Seconds; None: the broker's own."""

WORK = 8.0
"""Seconds of GPU work a program."""


def measure(quick: bool) -> list[dict[str, Any]]:
    """A row a quantum."""
    job = [traces.Phase("gpu", 0.5 if quick else WORK)]
    nbytes = int(SWAP / 2 * scenes.BANDWIDTH)
    best = traces.bound([job, job], 1, cores=2)
    rows = []
    for quantum in (0.1, None) if quick else QUANTA:
        setting = Setting(2, 1, "fifo", True, quantum)
        outcome = scenes.play(setting, [job, job], nbytes)
        print(f"throughput: {setting.words}: {outcome.makespan_s:.2f} s", file=sys.stderr, flush=True)
        rows.append(
            {
                **setting._asdict(),
                "policy": "fifo" if quantum is None else f"fifo, quantum {quantum:g} s",
                "setting": setting.words,
                "speedup": best.seconds / outcome.makespan_s,  # one after the other takes as long as the bound
                "bound": 1.0,
                "efficiency": best.seconds / outcome.makespan_s,
                "bound_cause": best.cause,
                "swap_s": SWAP,
                "memory_bytes": nbytes,
                "simulated": True,
                **{key: value for key, value in outcome._asdict().items() if key != "ended_s"},
            }
        )
    return rows


def publish(rows: list[dict[str, Any]]) -> None:
    """The table."""
    lines = []
    for row in rows:
        own = row["quantum"] is None
        words = "the broker's own quantum" if own else f"a quantum of {row['quantum']:g} s"
        remark = f"{row['evacuations']} swaps, the longest wait {row['longest_wait_s']:.1f} s"
        target, met = ("at least 0.90", row["efficiency"] >= 0.9) if own else (None, None)
        lines.append(report.Row(words, f"{row['efficiency']:.3f}", target, met, remark))
    title = (
        f"Throughput (1: nothing lost) of two programs that do not fit one simulated GPU together and never pause; "
        f"a swap out and in: {SWAP:g} s"
    )
    report.publish(title, lines, {}, None)
