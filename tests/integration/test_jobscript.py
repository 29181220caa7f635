"""A batch job's script as people write it for PJM and Slurm, run by sh: broker, programs in the background, its end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from broker_harness import REPOSITORY, Site

PROGRAM = """
import sys, acb
from acb.client import runtime
from acb.devices.simulated import Card, CardOutOfMemory

name, size = sys.argv[1], int(sys.argv[2]) << 20


class Memory:
    name = "job"
    held = away = 0

    def synchronize(self): pass
    def resident(self): return self.held
    def peak(self): return self.held
    def reset_peak(self): pass

    def evacuation(self, piece=0):
        yield 0
        moved, self.held = self.held, 0
        card.free(moved)
        card.held()  # the others may see it now
        self.away += moved
        yield moved

    def restore(self, limit=None):
        if limit is not None and self.away > limit:
            return 0
        try:
            card.allocate(self.away)
        except CardOutOfMemory as error:
            raise MemoryError(str(error))
        moved, self.away = self.away, 0
        self.held += moved
        return moved


card = Card.open(runtime.client().simulated)
memory = Memory()
runtime.client().add_evacuator(memory)
with acb.gpu():
    card.allocate(size)
    memory.held = size
for _ in range(10):
    sum(range(100_000))
    with acb.gpu():
        with card.operation("step"):
            assert memory.held == size
sys.stdout.write(f"{name} done, violations: {len(card.violations())}\\n")  # at once: two may share the file
"""

SCRIPT = """#!/bin/sh
#SBATCH --gres=gpu:1
#PJM -L gpu=1
cd "$WORK"
gpu_assigner start --gpu-list 0 --simulate-gpus 1x1GiB
for i in 1 2 3 4; do
    acb-launch python program.py "program$i" 700 > "out.$i" &
done
wait
cat out.*
pgrep -c -x gpu_assigner
gpu_assigner stop
pgrep -c -x gpu_assigner
ls "$ACB_RUNTIME_DIR"
"""


@pytest.fixture
def namespace() -> list[str]:
    """Runs a command where `pkill gpu_assigner` finds no other broker than its own."""
    command = ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or shutil.which("pkill") is None:
        pytest.skip("needs unshare (util-linux) and pkill (procps)")
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode:
        command[1:1] = ["--user", "--map-root-user"]
        if subprocess.run([*command, "true"], capture_output=True).returncode:
            pytest.skip(f"no process namespace can be made here: {tried.stderr.strip()}")
    return command


def run_script(
    site: Site, namespace: list[str], work: Path, script: str, **job: str
) -> subprocess.CompletedProcess[str]:
    """Run a job script with sh, in a process namespace of its own and with acb's commands on PATH."""
    commands = work / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in {
        "gpu_assigner": f'#!/bin/sh\nexec "{sys.executable}" -m acb.cli.gpu_assigner "$@"\n',
        "acb-launch": f'#!/bin/sh\nexec "{sys.executable}" -m acb.launcher "$@"\n',
        "python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n',
    }.items():
        if not (commands / name).exists():
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
    (work / "program.py").write_text(PROGRAM)
    return subprocess.run(
        [*namespace, "sh", "-c", script],
        env=site.environment(PATH=f"{commands}:{os.environ['PATH']}", WORK=str(work), **job),
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.mark.parametrize("job", [{"PJM_JOBID": "4711"}, {"SLURM_JOB_ID": "4712"}, {}], ids=["PJM", "Slurm", "no job"])
def test_a_job_script_works_as_it_stands(site: Site, namespace: list[str], tmp_path: Path, job: dict[str, str]) -> None:
    done = run_script(site, namespace, tmp_path, SCRIPT, **job)
    programs = "".join(f"program{i} done, violations: 0\n" for i in (1, 2, 3, 4))
    assert done.stdout == programs + "1\n0\n", done.stderr
    assert done.returncode == 0
    assert [line.split(" (")[0] for line in done.stderr.splitlines()] == [
        "gpu_assigner: started",
        "gpu_assigner: stopped",
    ]
    assert os.listdir(site.directory) == []


def test_two_jobs_on_a_node_have_two_brokers(site: Site, namespace: list[str], tmp_path: Path) -> None:
    script = """
        SLURM_JOB_ID=1 gpu_assigner start --gpu-list 0 --simulate-gpus 1x1GiB
        SLURM_JOB_ID=2 gpu_assigner start --gpu-list 0 --simulate-gpus 1x1GiB
        cd "$WORK"
        SLURM_JOB_ID=1 acb-launch python program.py one 700 &
        SLURM_JOB_ID=2 acb-launch python program.py two 700 &
        wait
        pgrep -c -x gpu_assigner
        SLURM_JOB_ID=1 gpu_assigner stop
        pgrep -c -x gpu_assigner
        SLURM_JOB_ID=2 gpu_assigner status > /dev/null && echo two lives
        SLURM_JOB_ID=2 gpu_assigner stop
        ls "$ACB_RUNTIME_DIR"
    """
    done = run_script(site, namespace, tmp_path, script)
    lines = done.stdout.splitlines()
    assert sorted(lines[:2]) == ["one done, violations: 0", "two done, violations: 0"], done.stderr
    assert lines[2:] == ["2", "1", "two lives"], done.stderr


def test_programs_that_still_run_when_the_broker_is_killed_finish(
    site: Site, namespace: list[str], tmp_path: Path
) -> None:
    """A script that forgets to wait: who holds the GPU runs on."""
    script = """
        cd "$WORK"
        gpu_assigner start --simulate-gpus 1x1GiB
        mkfifo begun go
        acb-launch python -c '
import acb
from acb.client import runtime
with acb.gpu():
    open("begun", "w").close()
    open("go").read()
with acb.gpu():
    print("went on")
' &
        cat begun
        pkill gpu_assigner
        while pgrep -x gpu_assigner > /dev/null; do :; done
        : > go
        wait
        echo "$?"
    """
    done = run_script(site, namespace, tmp_path, script)
    assert done.stdout == "went on\n0\n", done.stderr
    assert REPOSITORY.exists()
