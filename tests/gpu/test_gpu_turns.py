"""The framework tier: two programs that each hold more than half of a GPU take turns on it, and lose nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import users
from broker_harness import Program, Site, wait_until

pytestmark = pytest.mark.timeout(300)

FULL = os.environ.get("ACB_GPU_TESTS_FULL") == "1"
"""Really more than half of a real GPU, and as much host memory for each. Without it they hold 4 GB each, and say that
they need so much that one's memory has to leave for the other's."""


def sizes(site: Site) -> tuple[int, int]:
    """Bytes that each holds, and that it says it needs: both are not there at once."""
    capacity = site.capacity()
    held = capacity * 55 // 100 if FULL or site.place == "simulated" else 40 * site.unit
    return held, capacity - held // 2


def left_behind(site: Site, program: Program, held: int) -> None:
    """Wait until the broker knows what an evacuated program still has on the GPU, by the device's own count."""

    def by_device() -> int:  # its count lags behind
        return site.processes().get(program.pid, 0)  # a process that NVML lists under another id is not known

    wait_until("the device to count it as gone", lambda: by_device() < held // 3)
    try:
        wait_until("what is left to be known", lambda: site.client(program)["resident"] >= by_device())
    except AssertionError:
        pytest.fail(f"{site.client(program)} has {by_device()}, says the device; the broker: {site.broker_log()}")


@users.both
def test_two_programs_of_which_only_one_fits_take_turns(site: Site, framework: str) -> None:
    site.start("1x64MiB", "--quantum", "0", "--driver-tier", "off")
    held, needed = sizes(site)
    programs = [users.start(site, framework, "--gpu-memory", str(needed)) for _ in range(2)]
    for program in programs:
        program.do("load", held)
    for _ in range(3):
        for program, other in (programs, programs[::-1]):
            assert program.do("check") == []
            assert site.wait_for(other, "evacuated")["evacuated"] >= held
            assert held <= site.used() < 2 * held  # with what the running one computes with, but not both
            left_behind(site, other, held)
    users.end(site, *programs)


def overlaps(trace: list[dict[str, Any]]) -> bool:
    """Whether one has begun to restore while the other was evacuating."""
    evacuating: dict[int, float] = {}
    spans = []
    for line in trace:
        if line["state"] == "evacuating":
            evacuating[line["pid"]] = line["t"]
        elif line["pid"] in evacuating:
            spans.append((evacuating.pop(line["pid"]), line["t"]))
    return any(begin < line["t"] < end for line in trace if line["state"] == "restoring" for begin, end in spans)


@users.both
def test_memory_comes_in_while_the_other_ones_is_still_leaving(site: Site, framework: str, tmp_path: Path) -> None:
    site.start("1x256MiB,bandwidth=800MiB", "--quantum", "0", "--driver-tier", "off")
    held, needed = sizes(site)
    file = tmp_path / "trace"
    programs = [users.start(site, framework, "--gpu-memory", str(needed), ACB_TRACE=str(file)) for _ in range(2)]
    for program in programs:
        program.do("load", held)
    for _ in range(10):  # a slow machine may miss it once
        for program in programs:
            assert program.do("check") == []
        if overlaps([json.loads(line) for line in file.read_text().splitlines()]):
            break
    else:
        pytest.fail(file.read_text())
    users.end(site, *programs)
