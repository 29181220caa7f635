"""acb-launch with the true broker: it starts one, later launches find it, and it ends when told to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launcher_layout import Installation, run

SHOW = "import os; print(*sorted(f'{k}={v}' for k, v in os.environ.items() if k.startswith('ACB_')), sep='\\n')"


@pytest.fixture
def acb(tmp_path: Path) -> Iterator[Installation]:
    installation = Installation(tmp_path / "installation", true=True)
    yield installation
    gpu_assigner(installation, "stop")
    installation.remove()


def gpu_assigner(acb: Installation, *arguments: str) -> int:
    return run(acb.python, "-m", "acb.cli.gpu_assigner", *arguments, env=acb.environment(), cwd=acb.home).status


def test_a_broker_from_start_to_end(acb: Installation) -> None:
    missing = acb.launch("true", options=["--broker", "require"])
    assert (missing.status, missing.stderr.count("\n")) == (69, 1)
    first = acb.launch(sys.executable, "-c", SHOW, options=["--simulate-gpus", "1x1GiB"])
    assert first.status == 0
    assert first.stderr.count("\n") == 1  # that a broker has been started
    for options in ([], ["--broker", "auto"], ["--simulate-gpus=1x1024MiB"]):
        assert acb.launch(sys.executable, "-c", SHOW, options=options) == (0, first.stdout, "")
    assert f"ACB_SIMULATED={acb.runtime}/simulated-1x1GiB" in first.stdout
    assert gpu_assigner(acb, "stop") == 0
    assert acb.launch("true", options=["--broker", "require"]) == missing


def test_simulated_gpus_without_a_broker(acb: Installation) -> None:
    for _ in range(2):
        result = acb.launch("/usr/bin/printenv", "ACB_SIMULATED", options=["--broker=off", "--simulate-gpus=2x1GiB"])
        assert result == (0, f"{acb.runtime}/simulated-2x1GiB\n", "")
        assert list(acb.runtime.iterdir()) == []
    show = "import acb, os; acb.begin(); print(*sorted(os.listdir(os.environ['ACB_SIMULATED'])))"
    options = ["--broker=off", "--simulate-gpus=2x1GiB"]
    for command in ([sys.executable, "-c", show], ["sh", "-c", '"$0" -c "$1" && "$0" -c "$1"', sys.executable, show]):
        result = acb.launch(*command, options=options)
        assert result == (0, "gpu0.card gpu1.card users\n" * (2 if "sh" in command else 1), "")
        assert list(acb.runtime.iterdir()) == []


def test_more_than_the_gpus_can_ever_give_is_refused_before_anything_is_started(acb: Installation) -> None:
    for broker in ("off", "auto"):
        for too_much in ("--gpus=3", "--gpu-memory=2GiB"):
            result = acb.launch("true", options=[f"--broker={broker}", "--simulate-gpus=2x1GiB", too_much])
            assert (result.status, result.stderr.count("\n")) == (65, 1)
            assert too_much.partition("=")[0] in result.stderr
    assert not (acb.runtime / "broker.sock").exists()


@pytest.mark.parametrize("whose", ["off", "auto", "running"])
def test_more_gpus_of_a_size_than_there_are_are_refused_before_the_program_starts(
    acb: Installation, whose: str
) -> None:
    pool = "--simulate-gpus=1x2GiB+2x1GiB"
    options = [f"--broker={whose}", pool]
    if whose == "running":
        assert gpu_assigner(acb, "start", pool) == 0
        options = []
    for gpus, memory, refused in ((2, "1.5GiB", True), (2, "1GiB", False), (1, "1.5GiB", False), (3, "1GiB", False)):
        result = acb.launch("echo", "here", options=[*options, f"--gpus={gpus}", f"--gpu-memory={memory}"])
        assert (result.status, result.stdout) == ((65, "") if refused else (0, "here\n"))
        if refused:
            assert result.stderr.count("\n") == 1
            assert f"--gpus 2 --gpu-memory {memory}" in result.stderr
            assert "has not so many so large; ask for less, or start a broker with larger ones" in result.stderr
    assert (acb.runtime / "broker.sock").exists() == (whose != "off")
