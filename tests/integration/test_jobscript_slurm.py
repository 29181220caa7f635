"""The job script under a real Slurm: a controller and two nodes on this machine, each with one (pretended) GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_jobscript import PROGRAM, SCRIPT, namespace

__all__ = ["namespace"]  # a fixture

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")

CLUSTER = """
set -e
host=$(hostname -s)
munge=$WORK/munge
mkdir "$munge" "$WORK/state" "$WORK/spool.n1" "$WORK/spool.n2"
chmod 755 "$WORK" "$munge"
head -c 64 /dev/urandom > "$munge/key"
chmod 600 "$munge/key"
chown -R munge:munge "$munge"
setpriv --reuid munge --regid munge --clear-groups munged --foreground --key-file="$munge/key" \
    --socket="$munge/socket" --pid-file="$munge/pid" --log-file="$munge/log" --seed-file="$munge/seed" \
    2> /dev/null &
cat > "$WORK/slurm.conf" << END
ClusterName=acb
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket=$munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$WORK/state
SlurmdSpoolDir=$WORK/spool.%n
SlurmctldPidFile=$WORK/ctld.pid
SlurmdPidFile=$WORK/slurmd.%n.pid
SlurmctldLogFile=$WORK/ctld.log
SlurmdLogFile=$WORK/slurmd.%n.log
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=2 Gres=gpu:1 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=2 Gres=gpu:1 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
END
echo 'NodeName=n[1-2] Name=gpu File=/dev/null' > "$WORK/gres.conf"
export SLURM_CONF="$WORK/slurm.conf"
until [ -S "$munge/socket" ]; do sleep 0.05; done
slurmctld -D 2> /dev/null &
slurmd -D -N n1 2> /dev/null &
slurmd -D -N n2 2> /dev/null &
until sinfo --noheader --format=%T 2> /dev/null | grep -q '^idle'; do sleep 0.05; done
"""

SUBMIT = """
submit() {  # NODE LOG SCRIPT ARGUMENTS; not with --wait, which looks every ten seconds only
    node=$1 log=$2
    shift 2
    sbatch --quiet --nodelist="$node" --gres=gpu:1 --output="$WORK/$log" "$@"
}
await() { until [ -e "$WORK/done.$1" ]; do sleep 0.05; done; }
"""


@pytest.fixture
def work() -> Iterator[Path]:
    """A directory that munge accepts: one whose parents nobody else can write."""
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing or os.getuid():
        pytest.skip(f"needs root and Slurm (slurm-wlm, munge); missing: {', '.join(missing) or 'root'}")
    directory = Path(tempfile.mkdtemp(prefix="acb-slurm-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def run(namespace: list[str], work: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script beside a cluster of its own."""
    commands = work / "bin"
    commands.mkdir()
    for name, module in {"gpu_assigner": "acb.cli.gpu_assigner", "acb-launch": "acb.launcher", "python": ""}.items():
        option = f"-m {module}" if module else ""
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {option} "$@"\n')
        (commands / name).chmod(0o755)
    (work / "program.py").write_text(PROGRAM)
    (work / "job.sh").write_text(SCRIPT + ': > "$WORK/done.one"\n')
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("ACB_", "SLURM_", "PJM_", "XDG_RUNTIME"))}
    environ |= {
        "PATH": f"{commands}:{os.environ['PATH']}:/usr/sbin",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "WORK": str(work),
        "ACB_RUNTIME_DIR": str(work / "rt"),
    }
    return subprocess.run(
        [*namespace, "sh", "-c", CLUSTER + script], env=environ, capture_output=True, text=True, timeout=100
    )


def test_a_job_script_under_slurm(namespace: list[str], work: Path) -> None:
    done = run(namespace, work, SUBMIT + 'submit n1 log "$WORK/job.sh"\nawait one\n')
    log = (work / "log").read_text()
    assert done.returncode == 0, (done.stderr, log)
    started, *rest = log.splitlines()
    assert "gpu_assigner: started" in started
    assert rest == [*(f"program{i} done, violations: 0" for i in (1, 2, 3, 4)), "1"]
    assert os.listdir(work / "rt") == []


def test_each_job_of_a_node_has_a_broker_of_its_own(namespace: list[str], work: Path) -> None:
    """Two jobs at once, on one machine as if it were two nodes."""
    script = """
        cat > "$WORK/two.sh" << 'END'
#!/bin/sh
cd "$WORK"
gpu_assigner start --gpu-list 0 --simulate-gpus 1x1GiB 2> /dev/null
acb-launch python program.py "$1" 700
: > "$WORK/ready.$1"
until [ -e "$WORK/ready.one" ] && [ -e "$WORK/ready.two" ]; do sleep 0.05; done
gpu_assigner status --json | grep -o 'broker-[0-9]*.sock'
gpu_assigner stop 2> /dev/null
: > "$WORK/done.$1"
END
        submit n1 log.1 "$WORK/two.sh" one
        submit n2 log.2 "$WORK/two.sh" two
        await one
        await two
    """
    done = run(namespace, work, SUBMIT + script)
    logs = [(work / f"log.{n}").read_text().splitlines() for n in (1, 2)]
    assert done.returncode == 0, (done.stderr, logs)
    assert [log[0] for log in logs] == ["one done, violations: 0", "two done, violations: 0"]
    assert {log[1] for log in logs} == {"broker-1.sock", "broker-2.sock"}
    assert os.listdir(work / "rt") == []
