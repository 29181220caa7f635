"""The driver tier on a real GPU, with programs whose captured graphs PyTorch's evacuator cannot move.

The same scenes, without PyTorch, on simulated GPUs: test_suspending.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from broker_harness import Site
from suspending import SCENES

from acb.broker.checkpointing import Helper
from acb.devices.checkpoint_probe import Probe

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def obstacle() -> str:
    """Why the driver tier does not work on the real GPUs; '' where it does."""
    with Helper() as helper:
        result = helper.ask("probe", deadline=180)
    assert isinstance(result, Probe)
    return "" if result.works else f"the driver tier does not work here: {result.reason}"


@pytest.mark.gpu
@pytest.mark.parametrize("site", ["nvidia"], indirect=True)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_that(site: Site, scene: Callable[[Site], None], obstacle: str) -> None:
    if obstacle:
        pytest.skip(obstacle)
    scene(site)
