"""Programs with PyTorch's memory, and their brokers, are killed in the midst: nothing is lost but what is theirs.

The same scenes, without PyTorch, on simulated GPUs: test_lease_death.
"""

from __future__ import annotations

from typing import Any

import pytest
from broker_harness import Site
from lease_death import kill_a_client, kill_the_broker

pytestmark = pytest.mark.timeout(300)


def on_nvidia(*steps: str) -> list[Any]:
    return [pytest.param("nvidia", step, marks=pytest.mark.gpu) for step in steps]


@pytest.mark.parametrize(
    ("site", "step"),
    on_nvidia("inside", "waiting", "resident", "evacuating", "restoring", "waiting evacuated"),
    indirect=["site"],
)
def test_a_program_is_killed(site: Site, step: str) -> None:
    kill_a_client(site, step)


@pytest.mark.parametrize(
    ("site", "step"),
    [("simulated", "evacuating"), *on_nvidia("inside", "resident", "evacuating", "restoring", "waiting evacuated")],
    indirect=["site"],
)
def test_the_broker_is_killed(site: Site, step: str) -> None:
    kill_the_broker(site, step)
