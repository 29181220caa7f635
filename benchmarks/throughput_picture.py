"""The picture of benchmarks.throughput: speed-up over jobs, one bar a policy, the bound above them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#F0E442")
"""Okabe and Ito's, which people with any colour vision tell apart."""

NO_BROKER = "#999999"


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the rows of a run to a file of any kind that matplotlib writes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = [row for row in rows if row["quantum"] is None and row["marked"]]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, swapping in zip(axes, (False, True), strict=True):
        _panel(axis, [row for row in plain if row["swapping"] is swapping])
        axis.set_title("all programs' memory fits together" if not swapping else "every hand-over swaps", fontsize=10)
    axes[0].set_ylabel("throughput, one after the other = 1")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False, fontsize=9)
    first = plain[0]
    figure.suptitle(
        f"Simulated GPU: {first['mix']} jobs, {first['gpu_share']:.1%} of each job's time on the GPU", fontsize=11
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _panel(axis: Any, rows: list[dict[str, Any]]) -> None:
    groups = list(dict.fromkeys((row["jobs"], row["gpus"]) for row in rows))
    policies = [name for name in dict.fromkeys(row["policy"] for row in rows) if name != "sequential"]
    width = 0.8 / len(policies)
    for index, policy in enumerate(policies):
        colour = NO_BROKER if policy == "none" else COLOURS[(index - 1) % len(COLOURS)]
        label = "at once, no broker" if policy == "none" else f"acb, {policy}"
        places, heights = [], []
        for place, group in enumerate(groups):
            (row,) = (r for r in rows if (r["jobs"], r["gpus"]) == group and r["policy"] == policy)
            x = place - 0.4 + (index + 0.5) * width
            if row["speedup"] is None:
                failed = f"{row['out_of_memory']} of {row['jobs']} out of memory"
                axis.text(
                    x,
                    0.08,
                    failed,
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=7,
                    color="#444444",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                    zorder=3,
                )
            places.append(x)
            heights.append(row["speedup"] or 0.0)
        axis.bar(places, heights, width * 0.92, color=colour, label=label)
    for place, group in enumerate(groups):
        bound = next(row["bound"] for row in rows if (row["jobs"], row["gpus"]) == group)
        words = None if place else "bound: no scheduler does better"
        axis.plot([place - 0.42, place + 0.42], [bound, bound], color="black", linewidth=1.5, label=words)
        axis.text(place, bound + 0.05, f"{bound:.2f}", ha="center", va="bottom", fontsize=8)
    axis.axhline(1.0, color="#666666", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(groups)))
    axis.set_xticklabels([f"{jobs} job{'s' * (jobs > 1)}\n{gpus} GPU{'s' * (gpus > 1)}" for jobs, gpus in groups])
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.1)
