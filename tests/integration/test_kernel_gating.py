"""Kernels that a program starts itself wait for the lease: a real broker, another program, a simulated GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import broker_harness
import pytest
import standin_extension
import standin_triton

PROGRAM = Path(__file__).parent / "programs" / "stray_kernel.py"
LAUNCH = [str(Path(sys.executable).with_name("acb-launch"))]


@pytest.mark.parametrize("way", ["triton", "torch", "extension"])
def test_a_stray_kernel_waits_until_the_lease_is_granted(site: broker_harness.Site, tmp_path: Path, way: str) -> None:
    if way != "triton":
        pytest.importorskip("torch")
    standin_triton.write(tmp_path)
    if way == "extension":
        standin_extension.build(tmp_path, "standin_torch", "libtorch_python.so")
    site.start("1x64MiB", "--quantum", "0")
    program: Any = subprocess.Popen(
        [*LAUNCH, sys.executable, str(PROGRAM), way],
        env=site.environment(PYTHONPATH=str(tmp_path), ACB_BROKER="require"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        try:
            assert program.stdout.readline() == "ready\n"
            other = site.program()
            other.do("enter")
            program.stdin.write("go\n")
            program.stdin.flush()
            site.wait_for(program, "waiting")
            other.do("leave")
            said, _ = program.communicate(timeout=broker_harness.PATIENCE)
        finally:
            program.kill()
    assert said == "done\n"
    assert program.returncode == 0
    assert site.violations() == []
