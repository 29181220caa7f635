"""A training run whose memory leaves the GPU again and again gives the results of an undisturbed one, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import users
from broker_harness import Site
from taker import Taker

pytestmark = pytest.mark.timeout(300)

TIMES = {"nvidia": 100, "simulated": 25}
"""Evacuations; a simulated one takes a tenth of a second, nearly all of it to find PyTorch's tensors."""


@users.both
def test_evacuations_at_every_moment_change_no_bit(site: Site, framework: str, tmp_path: Path) -> None:
    site.start("1x64MiB", "--quantum", "0", "--driver-tier", "off")
    user, taker = users.start(site, framework), Taker(site)
    user.do("train", "", 3)  # compiled, and bound
    enough = tmp_path / "enough"
    user.begin("train", str(enough))
    times = 0
    while times < TIMES[site.place]:
        taker.take(site.capacity())
        times += site.client(user)["evacuated"] > 0  # before it has made its model, there is nothing to move
        assert site.used() <= site.slack
        taker.give_back()
        site.wait_for(user, "running")
    enough.touch()
    disturbed = user.end("train")
    assert disturbed["steps"] > 3
    assert user.do("train", "", disturbed["steps"]) == disturbed
    users.end(site, user)
