"""Real PyTorch and JAX programs that only the driver can move are taken from one simulated GPU to another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from broker_harness import MIB, Site, wait_until

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
                report = site.report() or {"clients": []}
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
