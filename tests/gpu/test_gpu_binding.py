"""A program costs no GPU anything before its first use of one, and then sees the one that it was granted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import users
from broker_harness import Site
from nvidia_site import VARIABLE, NvidiaSite
from taker import Taker

pytestmark = pytest.mark.timeout(300)

nvidia = pytest.mark.parametrize("site", [pytest.param("nvidia", marks=pytest.mark.gpu)], indirect=True)


@users.both
def test_a_program_costs_no_gpu_anything_before_its_first_use_and_sees_what_it_was_granted(
    site: Site, framework: str
) -> None:
    site.start("1x64MiB" if isinstance(site, NvidiaSite) and len(site.gpus) == 1 else "2x64MiB")
    report = site.report()
    assert report is not None
    ordinals = [gpu["ordinal"] for gpu in report["gpus"]]
    before = [site.processes(n) for n in ordinals]
    user = users.start(site, framework)
    answers = user.do("ask")
    if framework == "torch":
        assert answers == {"available": True, "count": 1}
    assert user.do("facts")["initialised"] is False
    assert [site.processes(n) for n in ordinals] == before
    assert [site.used(n) for n in ordinals] == [0] * len(ordinals)
    assert site.client(user) == {}
    if len(ordinals) > 1:
        Taker(site).take()  # the first GPU is somebody else's
    user.do("make", "block", site.unit)
    assert user.do("facts")["initialised"] is True
    granted = site.client(user)["gpu"]
    assert granted == ordinals[-1]
    assert [site.used(n) >= site.unit for n in ordinals] == [n == granted for n in ordinals]
    assert [site.used(n) == 0 for n in ordinals] == [n != granted for n in ordinals]
    if framework == "torch":
        assert user.do("ask") == {"available": True, "count": 1}
    else:
        assert user.do("devices") == {"platform": "gpu", "count": 1}
    if site.place == "nvidia":
        assert user.do("facts")["visible"] == report["gpus"][granted]["visible"]
        if framework == "torch":
            uuid = user.do("describe")["uuid"].removeprefix("GPU-")
            assert f"GPU-{uuid}" == report["gpus"][granted]["visible"]
    users.end(site, user)


@nvidia
def test_what_only_the_gpu_can_say_is_asked_behind_the_gate(site: NvidiaSite) -> None:
    site.start()
    taker = Taker(site)
    taker.take()
    before = site.processes()
    user = users.start(site, "torch")
    user.begin("describe")
    site.wait_for(user, "waiting")
    assert site.processes() == before
    assert site.used() == 0
    taker.give_back()
    assert user.end("describe")["bytes"] > 0
    assert site.used() > 0
    users.end(site, user)


@nvidia
@users.both
@pytest.mark.parametrize(
    "name", [lambda site, n: str(site.index(n)), lambda site, n: site.gpus[n].uuid], ids=["ordinal", "uuid"]
)
def test_the_users_own_choice_is_heeded(
    site: NvidiaSite, framework: str, name: Callable[[NvidiaSite, int], str]
) -> None:
    last = len(site.gpus) - 1
    site.start(f"{len(site.gpus)}x")
    user = users.start(site, framework, **{VARIABLE: name(site, last)})
    user.do("touch")
    assert site.client(user)["gpu"] == last
    assert user.do("facts")["visible"] in (site.gpus[last].uuid, name(site, last))
    users.end(site, user)


@nvidia
@users.both
def test_with_every_gpu_hidden_a_program_runs_on_the_cpu(site: NvidiaSite, framework: str) -> None:
    site.start()
    user = users.start(site, framework, **{VARIABLE: ""})
    if framework == "torch":
        assert user.do("ask") == {"available": False, "count": 0}
    else:
        assert user.do("devices")["platform"] == "cpu"
    assert site.client(user) == {}
    assert site.used() == 0
    assert user.finish() == 0, user.errors
