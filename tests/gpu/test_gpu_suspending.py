"""The driver tier on a real GPU, with programs whose captured graphs PyTorch's evacuator cannot move; and, so that the
programs are known to work, one scene on a simulated GPU. (Without PyTorch: test_suspending.)"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from broker_harness import Site
from suspending import SCENES

from acb.broker.checkpointing import Helper
from acb.devices.checkpoint_probe import Probe

pytestmark = pytest.mark.timeout(300)

PLACES = [
    ("simulated", SCENES[0]),
    *(pytest.param("nvidia", scene, marks=pytest.mark.gpu, id=f"nvidia-{scene.__name__}") for scene in SCENES),
]


@pytest.fixture(scope="module")
def obstacle() -> str:
    """Why the driver tier does not work on the real GPUs; '' where it does."""
    with Helper() as helper:
        result = helper.ask("probe", deadline=180)
    assert isinstance(result, Probe)
    return "" if result.works else f"the driver tier does not work here: {result.reason}"


@pytest.mark.parametrize(("site", "scene"), PLACES, indirect=["site"])
def test_that(site: Site, scene: Callable[[Site], None], request: pytest.FixtureRequest) -> None:
    if site.place == "nvidia" and (reason := request.getfixturevalue("obstacle")):
        pytest.skip(reason)
    scene(site)
