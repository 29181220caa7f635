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


def torchrun(site: Site, kind: str, *launcher: str) -> list[dict[str, Any]]:
    """What both workers have seen."""
    command = [*launcher, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(PROGRAM), kind, str(site.directory)],
        env=site.environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "acb:" not in done.stderr
    return [json.loads((site.directory / f"{kind}{rank}.json").read_text()) for rank in range(2)]


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
