"""Two programs that each want most of a real GPU's memory take turns, and have the results they have alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parents[1] / "integration" / "programs"
LAUNCH = str(Path(sys.executable).with_name("acb-launch"))
ASSIGNER = [sys.executable, "-m", "acb.cli.gpu_assigner"]


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("program", "framework"), [("mixed_torch.py", "torch"), ("mixed_jax.py", "jax")])
def test_two_programs_at_once_give_the_results_of_one_alone(tmp_path: Path, program: str, framework: str) -> None:
    pytest.importorskip(framework)
    environment = {**os.environ, "ACB_RUNTIME_DIR": str(tmp_path / "rt"), "ACB_BROKER": "require"}
    command = [sys.executable, str(PROGRAMS / program), "10"]
    alone = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert alone.returncode == 0, alone.stderr
    subprocess.run([*ASSIGNER, "start", "--gpu-list", "0", "--quantum", "0"], env=environment, check=True, timeout=60)
    try:
        at_once = [
            subprocess.Popen([LAUNCH, *command], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in at_once]
    finally:
        subprocess.run([*ASSIGNER, "stop"], env=environment, check=True, timeout=60)
    assert [process.returncode for process in at_once] == [0, 0]
    assert outputs == [alone.stdout, alone.stdout]
