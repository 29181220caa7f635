"""Programs of several processes, started by torchrun, compute on simulated GPUs what they compute on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from broker_harness import Site

pytest.importorskip("torch")

PROGRAM = Path(__file__).parent / "programs" / "data_parallel.py"


def start(site: Site, kind: str, directory: Path, *launcher: str) -> subprocess.Popen[str]:
    command = [*launcher, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, str(PROGRAM), kind, str(directory)],
        env=site.environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def seen_by_workers(process: subprocess.Popen[str], kind: str, directory: Path) -> list[dict[str, Any]]:
    """What both workers have seen, when they have ended well."""
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "acb:" not in errors
    return [json.loads((directory / f"{kind}{rank}.json").read_text()) for rank in range(2)]


def torchrun(site: Site, kind: str, *launcher: str) -> list[dict[str, Any]]:
    return seen_by_workers(start(site, kind, site.log, *launcher), kind, site.log)


@pytest.mark.timeout(400)
def test_distributed_training_is_that_of_the_cpu_to_the_last_bit(site: Site) -> None:
    expected = torchrun(site, "cpu")
    launcher = [sys.executable, "-m", "acb.launcher", "--broker", "off", "--simulate-gpus", "2x256MiB"]
    found = torchrun(site, "cuda", *launcher)
    for rank, seen in enumerate(found):
        assert seen.pop("devices") == [f"cuda:{rank}"]
        assert seen.pop("count") == 2
        assert seen.pop("allocated") == [rank == 0, rank == 1]
    assert expected[0]["losses"] != expected[1]["losses"]
    assert found == expected


@pytest.mark.timeout(400)
def test_two_gangs_and_a_program_of_one_gpu_share_a_pool(site: Site) -> None:
    expected = torchrun(site, "cpu")
    site.start("2x64MiB", "--quantum", "0.2")
    launcher = [sys.executable, "-m", "acb.launcher", "--broker", "require"]
    places = [site.log / name for name in ("one", "other")]
    for place in places:
        place.mkdir()
    gangs = [start(site, "cuda", place, *launcher) for place in places]
    alone = site.program()
    alone.do("take_turns", 30, 20 << 20)
    for gang, place in zip(gangs, places, strict=True):
        found = seen_by_workers(gang, "cuda", place)
        for rank, seen in enumerate(found):
            assert seen.pop("devices") == [f"cuda:{rank}"]
            assert seen.pop("count") == 2
            assert seen.pop("allocated") == [rank == 0, rank == 1]
        assert found == expected
    report = site.report()
    assert report is not None
    assert report["totals"]["grants"] > 4
    assert site.violations() == []
    assert alone.finish() == 0, alone.errors
