"""A suspended program that is blocked in the driver, where nothing of it can ask for its lease (simulated GPUs)."""

from __future__ import annotations

import os

import pytest
from broker_harness import Site, wait_until
from suspending import immovable, suspended


@pytest.mark.parametrize(("call", "step"), [("read_in_c", "in C"), ("read_outside", "outside")])
def test_a_suspended_program_that_is_blocked_and_cannot_ask_gets_its_lease(site: Site, call: str, step: str) -> None:
    """With the interpreter's lock, so that nothing of it runs, and without it, in a call such as page-locking."""
    site.start("1x64MiB", "--driver-tier", "on")
    held, other = immovable(site), site.program()
    other.do("enter")
    other.do("leave")
    wait_until("it to be suspended", lambda: suspended(site, held))
    fifo = site.log / "driver"
    os.mkfifo(fifo)
    descriptor = os.open(fifo, os.O_RDWR)
    try:
        held.begin(call, str(fifo))
        held.holds_at(step)
        wait_until("its memory to be brought back", lambda: not suspended(site, held))
        assert ("blocked in the driver" in site.broker_log()) == (call == "read_in_c")
        os.write(descriptor, b"x")  # now the driver lets it go
    finally:
        os.close(descriptor)
    assert held.end(call) == 1
    held.do("enter")
    held.do("operate")
    held.do("leave")
    assert site.violations() == []
    for program in (held, other):
        assert program.finish() == 0, program.errors
