"""Programs of several processes, started by torchrun: what they compute with and without acb, and on a shared pool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from broker_harness import PROGRAMS, Site

LAUNCH = [sys.executable, "-m", "acb.launcher", "--broker", "require"]


def start(site: Site, kind: str, directory: Path, *launcher: str) -> subprocess.Popen[str]:
    """Two workers on the "cpu" or on "cuda", which write into the directory; as they are, or under a launcher."""
    command = [*launcher, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    hidden: dict[str, str | None] = {} if site.place == "nvidia" else {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, str(PROGRAMS / "data_parallel.py"), kind, str(directory)],
        env=site.environment(OMP_NUM_THREADS="1", **hidden), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def seen_by_workers(process: subprocess.Popen[str], kind: str, directory: Path) -> list[dict[str, Any]]:
    """What both workers have seen, when they have ended well."""
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "acb:" not in errors
    return [json.loads((directory / f"{kind}{rank}.json").read_text()) for rank in range(2)]


def torchrun(site: Site, kind: str, *launcher: str) -> list[dict[str, Any]]:
    """start(), and what they have seen."""
    return seen_by_workers(start(site, kind, site.log, *launcher), kind, site.log)


def without_places(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What workers on GPUs have computed, when each was on its own GPU and saw both."""
    for rank, seen in enumerate(found):
        assert seen.pop("devices") == [f"cuda:{rank}"]
        assert seen.pop("count") == 2
        assert seen.pop("allocated") == [rank == 0, rank == 1]
    return found


def two_gangs_and_a_program_of_one_gpu_share_a_pool(site: Site, expected: list[dict[str, Any]]) -> None:
    """Each gang computes what was expected."""
    site.start("2x64MiB", "--quantum", "0.2")
    places = [site.log / name for name in ("one", "other")]
    for place in places:
        place.mkdir()
    gangs = [start(site, "cuda", place, *LAUNCH) for place in places]
    alone = site.program()
    alone.do("take_turns", 30, 20 * site.unit)
    for gang, place in zip(gangs, places, strict=True):
        assert without_places(seen_by_workers(gang, "cuda", place)) == expected
    report = site.report()
    assert report is not None
    assert report["totals"]["grants"] > 4
    assert site.violations() == []
    assert alone.finish() == 0, alone.errors
