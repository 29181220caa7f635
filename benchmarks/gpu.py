"""Does acb keep its promises on a real GPU? What moving memory, handing over and the hooks cost; programs at once.

    python -m benchmarks.gpu [--out DIR] [--only PART,…] [--quick] [--simulate]

Every part (benchmarks.gpu_parts) runs in a process of its own, with a time limit, so that the failure of one stops no
other; all of them together take eight minutes at most. With --only, the parts named have the time of the others, too.
What is missing, be it a package, a GPU or a feature of the driver, is skipped by name. The table comes last;
DIR/gpu-DATE.json has every figure, and every skip with its reason.

--simulate plays the same on a simulated GPU: a test of this benchmark, whose figures say nothing of any GPU.

Ctrl-C, or a batch system's SIGTERM, ends the part that runs and all that it has started; what has been found till then
is in the table and in the file.

Status 1 when something was found to be wrong. A missed target is not that, nor too little time, nor a GPU that somebody
else uses; a program that crashes without acb is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from acb.cli.signals import Signals
from benchmarks import report
from benchmarks.gpu_parts import PARTS, card, playing
from benchmarks.gpu_parts.card import Card

TIME = 480.0
"""Seconds for everything."""

SIMULATED = 768 << 20
"""Bytes of the simulated GPU."""

PATIENCE = 3.0
"""Times a part's limit that it may take on a simulated GPU, where the CPU computes."""

PACKAGES = (
    "acb-gpu", "torch", "jax", "jaxlib", "cupy-cuda13x", "cupy-cuda12x", "transformers", "pyhmmer", "openmm",
    "opencv-python-headless", "scikit-video", "numpy", "nvidia-ml-py",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print the table."""
    options = _parser().parse_args(arguments)
    begun = time.time()
    here = card.simulated(SIMULATED) if options.simulate else card.find()
    options.out.mkdir(parents=True, exist_ok=True)
    now = datetime.now(timezone.utc)
    file = options.out / f"gpu-{now:%Y%m%d-%H%M%S}.json"
    figures = {
        "date": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "simulated": options.simulate,
        "quick": options.quick,
        "gpu": here.facts,
        "versions": versions(),
    }
    results: list[dict[str, Any]] = []
    with Signals(in_the_end=False) as stop:
        for number, name in enumerate(options.only, 1):
            result = _play(name, options.only[number:], here, options, begun + options.limit - time.time(), stop)
            results.append(result)
            _say(f"{name}: {result['status']} {result['reason']}".rstrip())
            figures |= {"seconds": round(time.time() - begun, 1), "parts": {r["name"]: r for r in results}}
            report.write(figures, file)  # of which nothing is lost, whatever happens to the next part
    words = "a simulated GPU" if options.simulate else here.facts.get("name", "no GPU")
    report.publish(f"acb on {words}", [row for r in results for row in _rows(r, here)], figures, file)
    print(f"figures: {file}")
    if stop.number:
        return 128 + stop.number
    bad = any(r["status"] == "failed" or any(row["kind"] == "failed" for row in r["rows"]) for r in results)
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("gpu-results"),
                        help="where the JSON file goes (default: %(default)s)")  # fmt: skip
    parser.add_argument("--only", metavar="PART,…", type=_parts, default=list(PARTS),
                        help=f"some parts: {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--simulate", action="store_true", help="on a simulated GPU, to test the benchmark itself")
    parser.add_argument("--limit", metavar="SECONDS", type=float, default=TIME,
                        help="for all parts together (default: %(default)g)")  # fmt: skip
    return parser


def _parts(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return names


def versions() -> dict[str, str]:
    """Of the packages that matter, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _play(
    name: str, later: Sequence[str], here: Card, options: argparse.Namespace, left: float, stop: Signals
) -> dict[str, Any]:
    """One part: what it has told, or why it cannot be played (see playing).

    Of the time left it may have its own limit, and all that the `later` parts may not need.
    """
    entry = PARTS[name]
    reason = stop.reason or here.obstacle or entry.obstacle(simulate=options.simulate)
    if not reason and left < entry.least:
        reason = f"only {max(0.0, left):.0f} s of {options.limit:.0f} s are left"
    reason = reason or card.others(here)
    if reason:
        return playing.empty(name, "skipped", reason)
    slower = PATIENCE if options.simulate else 1.0
    playable = [PARTS[part] for part in later if not PARTS[part].obstacle(simulate=options.simulate)]
    spare = left - slower * sum(part.limit for part in playable)
    limit = min(max(slower * entry.limit, spare), left)
    settings = {"simulate": options.simulate, "quick": options.quick, "capacity": here.capacity,
                "gpu": here.facts.get("uuid", "")}  # fmt: skip
    return playing.play(name, entry, settings, limit, options.out / f"{name}.log", stop)


def _rows(result: dict[str, Any], here: Card) -> list[report.Row]:
    """A part's lines of the table; "simulated" is said in each."""
    title = PARTS[result["name"]].title
    mark = "simulated" if here.simulated else ""
    found = []
    for row in result["rows"]:
        remark = f"skipped: {row['remark']}" if row["kind"] == "skipped" else row["remark"]
        remark = "; ".join(filter(None, (mark, remark)))
        met = None if mark and row["kind"] == "measured" else row["met"]
        figure = "" if row["kind"] == "skipped" else row["figure"]
        found.append(report.Row(f"{result['name']}: {row['question']}", figure, row["target"], met, remark))
    if result["status"] != "done":
        words = f"{result['status']}: {result['reason']}"
        met = False if result["status"] == "failed" else None
        found.append(report.Row(f"{result['name']}: {title}", "", None, met, words))
    return found


def _say(what: str) -> None:
    print(f"gpu: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
