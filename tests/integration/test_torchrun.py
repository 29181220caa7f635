"""Programs of several processes, started by torchrun, compute on simulated GPUs what they compute on the CPU."""

from __future__ import annotations

import sys
from typing import Any

import broker_harness
import pytest
from broker_harness import Site
from gangs import torchrun, two_gangs_and_a_program_of_one_gpu_share_a_pool, without_places

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    """What the workers compute on the CPU."""
    with broker_harness.site() as place:
        return torchrun(place, "cpu")


@pytest.mark.timeout(400)
def test_distributed_training_is_that_of_the_cpu_to_the_last_bit(site: Site, expected: list[dict[str, Any]]) -> None:
    launcher = [sys.executable, "-m", "acb.launcher", "--broker", "off", "--simulate-gpus", "2x256MiB"]
    found = without_places(torchrun(site, "cuda", *launcher))
    assert expected[0]["losses"] != expected[1]["losses"]
    assert found == expected


@pytest.mark.timeout(400)
def test_two_gangs_and_a_program_of_one_gpu_share_a_pool(site: Site, expected: list[dict[str, Any]]) -> None:
    two_gangs_and_a_program_of_one_gpu_share_a_pool(site, expected)
