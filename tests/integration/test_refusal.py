"""What a person sees of a program that asks for more than the broker's GPUs can ever give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from broker_harness import PATIENCE, Site

GANG = {"TORCHELASTIC_RUN_ID": "run", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0"}
SENTENCE = "one of 4 that run together, asks for 4 GPUs at once, but the broker has 2; start fewer, or start a broker"


@pytest.fixture
def program(site: Site) -> Path:
    site.start("2x64MiB")
    return site.log / "program.py"


def launch(site: Site, program: Path, text: str, *options: str, size: str = "4") -> subprocess.CompletedProcess[str]:
    """Run the text as one of a gang, of four, under acb-launch."""
    program.write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "acb.launcher", "--broker", "require", *options, sys.executable, str(program)],
        env=site.environment(**GANG | {"LOCAL_WORLD_SIZE": size}, OMP_NUM_THREADS="1"),
        capture_output=True, text=True, timeout=4 * PATIENCE,
    )  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--quiet"]], ids=["loud", "quiet"])
def test_a_refusal_that_nobody_catches_is_one_line_that_names_the_line(
    site: Site, program: Path, options: list[str]
) -> None:
    done = launch(site, program, "import acb\nwith acb.gpu():\n    print('never')\n", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("acb: process ")
    assert SENTENCE in done.stderr
    assert done.stderr.endswith(f"({program}, line 2)\n")


@pytest.mark.parametrize(
    ("framework", "text"),
    [("torch", "import torch\nx = torch.ones(3)\nx.cuda()\n"), ("jax", "import jax.numpy\n\njax.numpy.ones(3)\n")],
    ids=["torch", "jax"],
)
def test_the_first_gpu_call_of_a_framework_ends_in_the_same_line(
    site: Site, program: Path, framework: str, text: str
) -> None:
    pytest.importorskip(framework)
    done = launch(site, program, text)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("acb: process ")
    assert SENTENCE in done.stderr
    assert done.stderr.endswith(f"({program}, line 3)\n")


@pytest.mark.parametrize(("gpus", "ends"), [("1", True), ("2", False)])
def test_fewer_gpus_than_workers_is_a_contradiction(site: Site, program: Path, gpus: str, ends: bool) -> None:
    done = launch(site, program, "import acb\nwith acb.gpu():\n    print('in')\n", "--gpus", gpus, size="2")
    assert (done.returncode, done.stdout) == ((1, "") if ends else (0, "in\n"))
    assert done.stderr.count("\n") == ends, done.stderr
    assert ("started with --gpus 1 and is one of 2 that run together" in done.stderr) is ends


def test_in_a_thread_it_is_one_line_too_and_the_program_goes_on(site: Site, program: Path) -> None:
    text = "import acb, threading\nt = threading.Thread(target=acb.begin)\nt.start()\nt.join()\nprint('on')\n"
    done = launch(site, program, text)
    assert (done.returncode, done.stdout) == (0, "on\n")
    assert done.stderr.count("\n") == 1, done.stderr
    assert SENTENCE in done.stderr


def test_a_program_that_catches_it_sees_the_exception_and_its_own_errors_stay_as_they_are(
    site: Site, program: Path
) -> None:
    text = "import acb\ntry:\n    acb.begin()\nexcept acb.LeaseRefused as error:\n    print(error)\n1 / 0\n"
    done = launch(site, program, text)
    assert done.returncode == 1
    assert SENTENCE in done.stdout
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    text = "import acb\ntry:\n    acb.begin()\nexcept acb.LeaseRefused:\n    1 / 0\n"
    done = launch(site, program, text)
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_programs_own_excepthook_is_left_alone(site: Site, program: Path) -> None:
    text = "import acb, sys\nsys.excepthook = lambda kind, error, trace: print('mine', kind.__name__)\nacb.begin()\n"
    done = launch(site, program, text)
    assert (done.returncode, done.stdout, done.stderr) == (1, "mine LeaseRefused\n", "")


def test_without_the_launcher_the_traceback_shows_where(site: Site, program: Path) -> None:
    program.write_text("import acb\nacb.begin()\n")
    done = subprocess.run(
        [sys.executable, str(program)],
        env=site.environment(**GANG, ACB_BROKER="require", ACB_SIMULATED=str(next(site.directory.glob("simulated-*")))),
        capture_output=True, text=True, timeout=4 * PATIENCE,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "acb.begin()" in done.stderr
    assert "acb.LeaseRefused: process " in done.stderr
