"""The main promise, end to end: programs that do not fit together fail without acb, and finish with it (simulated)."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from broker_harness import Peer, wait_until

from acb.cli.acb.demo import NEEDS, PROGRAMS, scenes
from acb.cli.acb.demo.progress import Progress
from acb.cli.signals import Signals
from acb.config import SimulatedSpec
from acb.protocol import VERSION, Hello, Welcome
from acb.workloads import fasta

QUICK = ("--search-rounds", "1", "--relax-steps", "10", "--relax-rounds", "1")

RESIDUES = 32
"""Of the protein that is folded."""


@pytest.mark.timeout(400)
def test_a_mix_of_pytorch_and_jax_runs_out_of_memory_without_acb_and_finishes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for needed in ("torch", "jax", "transformers", "pyhmmer", "openmm"):
        pytest.importorskip(needed)
    first = fasta.read_fasta(Path(fasta.__file__).with_name("proteins.fasta"))[0]
    (tmp_path / "one.fasta").write_text(f">{first.name}\n{first.residues[:RESIDUES]}\n")
    quick = (*QUICK, str(tmp_path / "one.fasta"))
    monkeypatch.setattr(scenes, "OPTIONS", {name: (*given, *quick) for name, given in scenes.OPTIONS.items()})
    with scenes.Stage(tmp_path, SimulatedSpec((512 << 20,))) as stage, Progress(io.StringIO()) as progress:
        summary = scenes.play(stage, PROGRAMS["mix"], progress, warm_up=False)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("with_acb/*/log.txt"))
    assert summary["without_acb"]["out_of_memory"] >= 2, summary
    assert summary["with_acb"]["finished"] == 4, logs
    assert summary["with_acb"]["outputs_identical"], summary
    assert summary["with_acb"]["evacuations"] > 0
    promised = {"finished", "out_of_memory", "outputs_identical", "wall_s", "sequential_wall_s", "speedup"}
    assert promised <= summary["with_acb"].keys()


def test_what_the_demo_needs_is_said_in_one_line(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules['pyhmmer'] = None; from acb.cli.acb import main; sys.exit(main(['demo']))"
    done = subprocess.run([sys.executable, "-c", blocked], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 69
    assert done.stderr.count("\n") == 1
    assert "pip install 'acb-gpu[demo]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def processes_of(directory: Path) -> list[str]:
    """The commands of all processes that run with this directory in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(directory) in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            pass  # it has ended, or is not ours
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_and_nothing_is_left(tmp_path: Path, number: signal.Signals) -> None:
    for needed in NEEDS:
        pytest.importorskip(needed)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "acb.cli.acb", "demo", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "TMPDIR": str(temporary), "ACB_TEST": str(temporary)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as demo:
        wait_until("a program to run", lambda: any("fold.py" in found for found in processes_of(temporary)))
        demo.send_signal(number)
        _, said = demo.communicate(timeout=60)
    # Python's own way with Ctrl-C in a command is a status.
    assert demo.returncode == (130 if number == signal.SIGINT else -number), said
    assert b"Traceback" not in said
    assert processes_of(temporary) == []
    assert list(temporary.iterdir()) == []


def test_a_signal_at_any_moment_ends_the_broker_too(tmp_path: Path) -> None:
    play = """
import os, pathlib, signal, sys
from acb.cli import signals
from acb.cli.acb.demo import scenes
from acb.config import SimulatedSpec
with signals.Signals() as held, scenes.Stage(pathlib.Path.cwd(), SimulatedSpec((1 << 20,)), held.check) as stage:
    os.kill(os.getpid(), signal.SIGTERM)
    stage.start_broker()
    os.kill(os.getpid(), signal.SIGHUP)
    print(stage.status()["devices"], flush=True)
    stage.check()
    print("not reached")
"""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", play],
        env={**os.environ, "TMPDIR": str(temporary), "ACB_TEST": str(temporary)},
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "1 simulated GPU of 1MiB\n", "")
    assert processes_of(temporary) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "PJM_JOBID"])
def test_a_demo_in_a_batch_job_finds_its_own_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "77")
    with scenes.Stage(tmp_path, SimulatedSpec((1 << 20,))) as stage:
        stage.start_broker()
        (socket,) = Path(stage.environment["ACB_RUNTIME_DIR"]).glob("*.sock")
        with Peer(socket) as peer:
            peer.send(Hello(VERSION, os.getpid(), "peer"))
            assert isinstance(peer.receive(), Welcome)
            assert [client["pid"] for client in scenes._ask(stage)] == [os.getpid()]


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as held:
            signal.raise_signal(signal.SIGHUP)
            held.check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_out_directory_that_cannot_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "acb.cli.acb", "demo", "--out", str(tmp_path / "file" / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONWARNINGS": ""})
    assert done.returncode == 73
    assert done.stderr.count("\n") == 1
