"""What the framework tier cannot move is refused by name, and moved again as soon as that can be. (The next tier takes
it where it works: see test_gpu_suspending.)"""

from __future__ import annotations

import pytest
import users
from broker_harness import Site, wait_until
from taker import Taker

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("site", "keep", "let_go", "named"),
    [
        ("simulated", "hand_out", "take_back", "DLPack"),
        pytest.param("nvidia", "hand_out", "take_back", "DLPack", marks=pytest.mark.gpu),
        pytest.param("nvidia", "capture", "reset", "a captured CUDA graph", marks=pytest.mark.gpu),
    ],
    indirect=["site"],
)
def test_memory_whose_address_is_known_stays_and_says_why(site: Site, keep: str, let_go: str, named: str) -> None:
    site.start("1x64MiB", "--driver-tier", "off", "--quantum", "0")
    held = 20 * site.unit
    user, taker = users.start(site, "torch"), Taker(site)
    user.do("make", "block", held)
    user.do(keep, "block")
    grant = taker.take()  # most of a GPU is better than waiting for all of it
    assert named in site.client(user)["unmovable"]
    assert site.client(user)["evacuated"] == 0
    assert site.used() >= held
    assert grant.headroom <= site.capacity() - held
    taker.give_back()
    if keep == "capture":
        assert user.do("replay", "block")
        user.do(let_go)
    else:
        assert user.do("right", "block")
        user.do(let_go, "block")
        user.do("make", "block", held)
    taker.take()
    client = wait_until("its memory to leave", lambda: (seen := site.client(user))["evacuated"] and seen)
    assert client["evacuated"] >= held
    assert not client["unmovable"]
    assert site.used() <= site.slack
    taker.give_back()
    if keep != "capture":
        assert user.do("right", "block")
    users.end(site, user)
