"""Strict gating: a program whose lease is revoked at random moments never touches the device without it (simulated)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import standin_extension
import standin_triton

from acb.devices.simulated import Card

PROGRAMS = Path(__file__).parent / "programs"
LAUNCH = [str(Path(sys.executable).with_name("acb-launch"))]
ASSIGNER = [sys.executable, "-m", "acb.cli.gpu_assigner"]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A broker of its own that preempts at once, with a simulated GPU."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("ACB_", "JAX_"))}
    variables |= {"ACB_RUNTIME_DIR": str(tmp_path / "rt"), "OMP_NUM_THREADS": "1", "ACB_BROKER": "require"}
    start = [*ASSIGNER, "start", "--simulate-gpus", "1x64MiB", "--quantum", "0"]
    subprocess.run(start, env=variables, check=True, timeout=60)
    yield variables
    subprocess.run([*ASSIGNER, "stop"], env=variables, check=True, timeout=60)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("program", "framework", "rounds"),
    [("mixed_torch.py", "torch", 6), ("mixed_jax.py", "jax", 6), ("mixed_kernels.py", "torch", 600)],
)
def test_nothing_touches_the_device_while_another_client_holds_it(
    environment: dict[str, str], tmp_path: Path, program: str, framework: str, rounds: int
) -> None:
    pytest.importorskip(framework)
    if program == "mixed_kernels.py":
        environment["PYTHONPATH"] = str(standin_triton.write(tmp_path))
        standin_extension.build(tmp_path, "standin_torch", "libtorch_python.so")
    command = [*LAUNCH, sys.executable, str(PROGRAMS / program), str(rounds)]
    alone = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert alone.returncode == 0, alone.stderr
    competitor = subprocess.Popen(
        [*LAUNCH, sys.executable, str(PROGRAMS / "competitor.py"), "11"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with competitor:
        assert competitor.stdout is not None
        assert competitor.stdout.readline() == "ready\n"
        disturbed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        times, _ = competitor.communicate("", timeout=60)
    assert disturbed.returncode == 0, disturbed.stderr
    assert disturbed.stdout == alone.stdout
    [directory] = Path(environment["ACB_RUNTIME_DIR"]).glob("simulated-*")
    with Card.open(directory) as card:
        assert card.violations() == []
    assert competitor.returncode == 0
    assert int(times) > 20, "the competitor hardly ever had the GPU: nothing was tried"


@pytest.mark.timeout(200)
def test_a_phase_that_waits_for_threads_of_its_own_is_not_stopped_for_ever(environment: dict[str, str]) -> None:
    command = [*LAUNCH, sys.executable, str(PROGRAMS / "inner_threads.py")]
    programs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        outputs = [program.communicate(timeout=90)[0] for program in programs]
    finally:
        for program in programs:
            program.kill()
    assert outputs == ["160\n", "160\n"]
