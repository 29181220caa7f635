"""Programs of two GPUs: they get both at once, give both up at once, and find everything where it was."""

from __future__ import annotations

import pytest
import users
from broker_harness import Site
from gangs import torchrun, two_gangs_and_a_program_of_one_gpu_share_a_pool, without_places
from nvidia_site import NvidiaSite, needs_cuda
from taker import Taker

pytestmark = pytest.mark.timeout(300)


@users.both
def test_a_program_of_two_gpus_gives_up_both_for_one(site: Site, framework: str) -> None:
    site.start("2x64MiB", "--quantum", "0", "--driver-tier", "off")
    held = 20 * site.unit
    user, taker = users.start(site, framework, "--gpus", "2"), Taker(site)
    user.do("load", held)
    assert site.client(user)["gpus"] == [0, 1]
    assert min(site.used(n) for n in range(2)) >= held
    for _ in range(2):
        grant = taker.take(site.capacity())
        assert site.client(user)["evacuated"] >= held
        assert site.used(grant.gpu) <= site.slack
        taker.give_back()
        assert user.do("check") == []
        assert min(site.used(n) for n in range(2)) >= held
    users.end(site, user)


@pytest.mark.gpu
@pytest.mark.parametrize("site", ["nvidia"], indirect=True)
def test_two_gangs_of_torchruns_and_a_program_of_one_gpu_share_a_pool(site: NvidiaSite) -> None:
    """The same on simulated GPUs: test_torchrun."""
    needs_cuda("torch")
    site.needs(2)
    two_gangs_and_a_program_of_one_gpu_share_a_pool(site, without_places(torchrun(site, "cuda")))
