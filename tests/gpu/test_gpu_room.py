"""A program that comes short of memory in the midst of its work gets others' room, and repeats the call."""

from __future__ import annotations

import pytest
import users
from broker_harness import Site

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("framework", "how", "error"),
    [
        ("torch", "put", "OutOfMemoryError"),
        ("torch", "forward", "OutOfMemoryError"),
        ("jax", "put", "RESOURCE_EXHAUSTED"),
    ],
)
def test_out_of_memory_others_make_room_and_the_call_is_repeated(
    site: Site, framework: str, how: str, error: str
) -> None:
    site.start("1x96MiB", "--driver-tier", "off", "--quantum", "0")
    filler = users.start(site, "torch")
    filler.do("fill", 64 * site.unit)  # whatever the GPU's size
    resident = users.start(site, {"torch": "jax", "jax": "torch"}[framework], "--gpu-memory", str(45 * site.unit))
    resident.do("load", 36 * site.unit)
    short = users.start(site, framework, "--gpu-memory", str(site.unit))
    short.do("touch")
    assert site.wait_for(resident, "resident")["evacuated"] == 0
    errors = short.do(how, "put", 30 * site.unit)
    assert site.wait_for(resident, "evacuated")["evacuated"] >= 36 * site.unit
    if framework == "torch":
        assert errors > 0, "PyTorch was never out of memory: nothing was tried"
    kind, message = short.fails("make", "too much", 2 * site.capacity())
    assert error in f"{kind}: {message}"
    assert short.do("right", "put")
    assert resident.do("check") == []
    assert short.do("right", "put")
    assert site.client(filler)["evacuated"] == 0
    users.end(site, short, resident, filler)
