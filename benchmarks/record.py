"""Record a phase trace: run a workload alone on a simulated GPU and keep how long each of its phases took.

    python -m benchmarks.record alphafold2      # writes benchmarks/traces/alphafold2.json

The workload runs under ``acb-launch --broker off --simulate-gpus …``: nobody else wants the GPU. Its own summary.json
says which steps are GPU steps and which CPU steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report, traces

PROGRAMS = {"alphafold2": "fold.py", "video": "detect.py", "training": "train.py"}
SHORTEST, LONGEST = 100, 140
"""Residues of the proteins that are folded, drawn from the 2,122 real ones that pyhmmer carries: of similar length, for
the published figure is of programs that all fold one length (400).

It matters: the more phases differ, the more often all programs are on the CPU at once. From 50 to 160 residues the GPU
phases' coefficient of variation was 0.36 instead of 0.22, and four programs on one GPU reached efficiencies of 0.945 to
0.970 instead of 0.970 to 0.980 where memory fits, of which first come, first served itself reaches 0.977 instead of
0.983 (mean of 12 seeds) at no cost at all."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the workload, write the trace."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("mix", choices=sorted(PROGRAMS), help="what to record")
    parser.add_argument(
        "--targets", type=report.positive, default=32, metavar="N",
        help="proteins, batches of frames or steps (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--simulate-gpus", default="1x512MiB", metavar="NxSIZE", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: the mix's file in benchmarks/traces)")
    options = parser.parse_args(arguments)
    out = options.out or report.ROOT / "benchmarks" / "traces" / f"{options.mix}.json"
    with tempfile.TemporaryDirectory(prefix="acb-record-") as directory:
        trace = record(options.mix, options.targets, options.simulate_gpus, Path(directory))
    head = json.dumps({key: value for key, value in trace.items() if key != "targets"}, indent=1)
    targets = ",\n".join(json.dumps(target) for target in trace["targets"])  # one line a target
    out.write_text(f'{head[:-2]},\n "targets": [\n{targets}\n]\n}}\n')
    print(f"{len(trace['targets'])} targets, {trace['gpu_s']} s of GPU and {trace['cpu_s']} s of CPU phases in {out}")
    return 0


def record(mix: str, count: int, gpus: str, directory: Path) -> dict[str, Any]:
    """Run the workload over `count` targets; the trace with how it was recorded."""
    extra: list[str] = []
    note = ""
    if mix == "alphafold2":
        fasta = directory / "targets.fasta"
        names = _proteins(fasta, count)
        extra = [str(fasta), "--layers", "4"]
        note = f"targets.fasta: {len(names)} of pyhmmer's proteins of {SHORTEST} to {LONGEST} residues, drawn at random"
    elif mix == "video":
        extra = ["--batch", "6", "--frames", str(6 * count)]
    else:
        extra = ["--steps", str(count), "--batch", "64"]
    shown = ["acb-launch", "--broker", "off", "--simulate-gpus", gpus, "--"]
    shown += ["python", f"benchmarks/workloads/{PROGRAMS[mix]}", "--device", "cuda"]
    program = [sys.executable, str(report.ROOT / "benchmarks" / "workloads" / PROGRAMS[mix]), "--device", "cuda"]
    command = [sys.executable, "-m", "acb.launcher", *shown[1:6], *program, *extra, "--out", str(directory / "out")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACB_")}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENMM_CPU_THREADS"), "1")
    environment["PYTHONPATH"] = str(report.ROOT)
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"{PROGRAMS[mix]} failed with status {done.returncode}; see above")
    summary = json.loads((directory / "out" / "summary.json").read_text())
    targets = traces.convert(summary)
    machine = report.machine()
    return {
        "program": PROGRAMS[mix],
        "command": " ".join([*shown, *(os.path.basename(word) for word in extra)]),
        "note": note,
        "recorded": time.strftime("%Y-%m-%d"),
        "machine": f"simulated GPU on {machine['cores']} cores of {machine['cpu']}, Python {machine['python']}",
        "units": "seconds",
        "weight_bytes": summary.get("weight_bytes"),
        "gpu_s": round(sum(traces.total(target, "gpu") for target in targets), 3),
        "cpu_s": round(sum(traces.total(target, "cpu") for target in targets), 3),
        "left_out_s": round(sum(step["seconds"] for step in summary["steps"] if "item" not in step), 3),
        "targets": targets,
    }


def _proteins(file: Path, count: int) -> list[str]:
    """Write `count` of the bundled proteins to a FASTA file; their names."""
    from benchmarks.workloads.fasta import bundled_proteins, read_fasta

    found = [protein for path in bundled_proteins() for protein in read_fasta(path)]
    fitting = [protein for protein in found if SHORTEST <= len(protein) <= LONGEST]
    chosen = random.Random(0).sample(fitting, min(count, len(fitting)))
    file.write_text("".join(f">{protein.name}\n{protein.residues}\n" for protein in chosen))
    return [protein.name for protein in chosen]


if __name__ == "__main__":
    sys.exit(main())
