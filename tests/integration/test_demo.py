"""The main promise, end to end: programs that do not fit together fail without acb, and finish with it (simulated)."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from acb.cli.acb.demo import PROGRAMS, scenes
from acb.cli.acb.demo.progress import Progress
from acb.config import SimulatedSpec
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
        summary = scenes.play(stage, PROGRAMS["mix"], progress)
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


def test_an_out_directory_that_cannot_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "acb.cli.acb", "demo", "--out", str(tmp_path / "file" / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONWARNINGS": ""})
    assert done.returncode == 73
    assert done.stderr.count("\n") == 1
