"""Programs that only the driver can move are taken from one simulated GPU to another, PyTorch and JAX ones too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from broker_harness import MIB, Program, Site, wait_until
from suspending import immovable, suspended

PINNED = Path(__file__).parent / "programs" / "pinned.py"
LAUNCH = str(Path(sys.executable).with_name("acb-launch"))
COUNT = 10 << 20


@pytest.mark.timeout(200)
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_program_goes_on_on_another_gpu_and_computes_the_same(site: Site, framework: str) -> None:
    pytest.importorskip(framework)
    site.start("2x128MiB", "--driver-tier", "on")
    with subprocess.Popen(
        [LAUNCH, sys.executable, str(PINNED), framework],
        env=site.environment(ACB_BROKER="require", OMP_NUM_THREADS="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            assert program.stdin is not None
            assert program.stdout is not None
            assert program.stdout.readline() == "0.0\n"

            def seen() -> dict[str, object]:
                report = wait_until("the broker to answer", site.report)
                [client] = [c for c in report["clients"] if c["name"] == "pinned.py"]
                return client  # type: ignore[no-any-return]

            other, holder = site.program(), site.program()
            other.do("enter")
            holder.do("enter")  # needs all of the first GPU
            wait_until("it to be suspended", lambda: seen()["suspended"])
            assert [seen()["gpu"], *(site.client(one)["gpu"] for one in (other, holder))] == [0, 1, 0]
            assert other.finish() == 0
            for times in (1, 2):
                program.stdin.write("\n")
                program.stdin.flush()
                assert program.stdout.readline() == f"{float(COUNT * times)}\n"
            assert (seen()["gpu"], seen()["suspended"]) == (1, False)
            with site.card(0) as old, site.card(1) as new:
                assert new.held(program.pid) >= 40 * MIB
                assert old.held(program.pid) == 0
            assert site.violations() == []
            assert program.communicate("", timeout=60)[0] == ""
            assert program.returncode == 0
        finally:
            program.kill()
    assert holder.finish() == 0


def suspended_on_a_gpu_that_is_taken(site: Site) -> tuple[Program, Program]:
    """A program that the driver has moved off the first GPU, and the one that holds that; the second one is free."""
    held, first = immovable(site), site.program()
    first.do("enter")  # on the other GPU
    holder = site.program()
    holder.do("enter")
    assert [program.do("facts")["gpu"] for program in (held, first, holder)] == [0, 1, 0]
    assert suspended(site, held)
    assert first.finish() == 0
    return held, holder


def test_a_suspended_program_whose_gpu_is_taken_goes_on_on_another(site: Site) -> None:
    site.start("2x64MiB", "--driver-tier", "on")
    held, holder = suspended_on_a_gpu_that_is_taken(site)
    held.do("enter")
    assert held.do("facts")["gpu"] == 1
    held.do("operate")
    held.do("add", "more", 20 * MIB)
    held.do("operate")
    with site.card(0) as old, site.card(1) as new:
        assert (old.held(held.pid), new.held(held.pid)) == (0, 60 * MIB)
    seen = site.client(held)
    assert (seen["gpu"], seen["state"]) == (1, "running")
    assert site.client(holder)["revoked"] is False
    held.do("leave")
    assert site.violations() == []
    for program in (held, holder):
        assert program.finish() == 0, program.errors
    with site.card(0) as old, site.card(1) as new:
        assert (old.used(), new.used()) == (0, 0)


@pytest.mark.parametrize("helper_too", [False, True])
def test_when_the_broker_dies_on_the_way_the_next_one_goes_on_with_the_same_gpu(site: Site, helper_too: bool) -> None:
    gpus = "2x64MiB,bandwidth=20MiB"  # two seconds each way
    broker = site.start(gpus, "--driver-tier", "on")
    held, holder = suspended_on_a_gpu_that_is_taken(site)
    held.begin("enter")
    with site.card(1) as new:
        wait_until("its memory to come back on the other GPU", lambda: new.held(held.pid))
    helpers = site.children(broker)
    site.kill_broker(signal.SIGKILL)
    for helper in helpers if helper_too else []:
        os.kill(helper, signal.SIGKILL)  # and nobody unlocks it
    site.start(gpus, "--driver-tier", "on")
    held.end("enter")
    assert held.do("facts")["gpu"] == 1
    held.do("operate")
    assert site.client(holder)["gpu"] == 0
    held.do("leave")
    assert site.violations() == []
    for program in (held, holder):
        assert program.finish() == 0, program.errors
