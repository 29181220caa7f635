"""The driver tier end to end, on simulated GPUs: a real broker, its helper, and programs that nothing else can move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from broker_harness import Site, wait_until
from suspending import SCENES, immovable


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_that(site: Site, scene: Callable[[Site], None]) -> None:
    scene(site)


def test_without_it_such_a_program_keeps_others_out_of_what_it_holds(site: Site) -> None:
    site.start("1x64MiB", "--driver-tier", "off")
    held, other = immovable(site), site.program()
    other.begin("enter")
    wait_until("the refusal", lambda: site.client(held).get("unmovable"))
    assert site.client(other)["state"] == "waiting"
    held.kill()
    other.end("enter")
    other.do("leave")
    assert other.finish() == 0
