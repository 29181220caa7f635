"""The tables of benchmarks.throughput: speed-ups of every setting, and what was promised."""

from __future__ import annotations

from typing import Any

from benchmarks import report, scenes

PROMISED = {False: 0.97, True: 0.90}
"""Efficiency of 4 jobs on 1 GPU and of 16 on 4, without swapping and with."""


def publish(rows: list[dict[str, Any]]) -> None:
    """Print the table, and at last the promises, if any of the settings that they are about was run."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    any_row = rows[0]
    head = (
        f"{any_row['mix']} on simulated GPUs: speed-up over one after the other (efficiency). A job: "
        f"{any_row['job_s']:.3g} s alone, {any_row['gpu_share']:.1%} on the GPU; a swap out and in: "
        f"{scenes.SWAP_SHARE:.1%} of a GPU phase"
    )
    table = Table(title=head, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    plain = [row for row in rows if row["quantum"] is None and row["marked"]]
    columns = list(dict.fromkeys(row["policy"] for row in plain if row["policy"] != "sequential"))
    for name in ("jobs", "GPUs", "memory", "bound", "ideal", *(c.replace("none", "no broker") for c in columns)):
        table.add_column(name, justify="right", no_wrap=True)
    for first in (row for row in plain if row["policy"] == "sequential"):
        same = {r["policy"]: r for r in plain if all(r[k] == first[k] for k in ("jobs", "gpus", "swapping"))}
        ideal = first["ideal_swapping_efficiency" if first["swapping"] else "ideal_efficiency"]
        table.add_row(
            str(first["jobs"]), str(first["gpus"]), "swaps" if first["swapping"] else "fits",
            f"{first['bound']:.2f}", f"{first['bound'] * ideal:.2f} ({ideal:.3f})",
            *(_cell(same[column]) for column in columns),
        )  # fmt: skip
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "bound: GPU time over GPUs, CPU time over cores (as many as jobs: CPU phases only wait here) or the longest "
        "job; ideal: first come, first served, for these phases, if deciding took no time; OOM: out of memory",
        soft_wrap=True,
    )
    promises, remarks = _promises(plain), _remarks(rows)
    if promises or remarks:
        report.publish("What was promised" if promises else "Other settings", [*promises, *remarks], {}, None)
    else:
        report.print_machine()


def _cell(row: dict[str, Any]) -> str:
    if row["speedup"] is None:
        return f"{row['out_of_memory']} of {row['jobs']} OOM"
    return f"{row['speedup']:.2f} ({row['efficiency']:.3f})"


def _promises(rows: list[dict[str, Any]]) -> list[report.Row]:
    found = []
    for jobs, gpus in ((4, 1), (16, 4)):
        for swapping, target in PROMISED.items():
            these = [r for r in rows if (r["jobs"], r["gpus"], r["swapping"]) == (jobs, gpus, swapping)]
            under = {r["policy"]: r["efficiency"] for r in these if r["policy"] not in ("sequential", "none")}
            if not under or these[0]["mix"] != "alphafold2":
                continue
            first = next(iter(under))
            others = ", ".join(f"{name} {efficiency:.3f}" for name, efficiency in under.items() if efficiency)
            words = f"{jobs} jobs on {gpus} GPU{'s' * (gpus > 1)}, {'swapping' if swapping else 'memory fits'}: {first}"
            reached = under[first] or 0.0
            found.append(report.Row(words, f"{reached:.3f}", f"at least {target:.2f}", reached >= target, others))
    return found


def _remarks(rows: list[dict[str, Any]]) -> list[report.Row]:
    return [
        report.Row(row["setting"], f"{row['efficiency'] or 0:.3f}", remark=f"{row['evacuations']} evacuations")
        for row in rows
        if row["quantum"] is not None or not row["marked"]
    ]
