"""What `acb doctor` says of frameworks, settings, hosts and brokers unlike these, and the page that it prints."""

from __future__ import annotations

import io
import json
import os
import resource
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from doctor_checks import marks, only
from rich.console import Console

from acb.cli.acb import doctor
from acb.cli.acb.doctor import broker, environment, frameworks, host, scan, show
from acb.cli.acb.doctor.check import Check
from acb.config import ConfigError
from acb.launcher.environment import BOOTSTRAP

GIB = 1 << 30


# --- frameworks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version", "cuda", "gpu_here", "mark", "words"),
    [
        ("torch", "2.13.0+cpu", None, False, "ok", "simulated"),
        ("torch", "2.13.0+cpu", None, True, "warn", "cannot use"),
        ("torch", "2.13.0", "13.0", True, "ok", "CUDA 13.0"),
        ("torch", "2.2.2", "12.1", True, "warn", "2.3 or newer"),
        ("torch", "2.3.0", "12.1", True, "ok", "CUDA 12.1"),
        ("torch", "2.14.0a0+git12", "13.0", True, "note", "newer than"),
        ("torch", "2.9.1", "rocm", True, "warn", "NVIDIA GPUs only"),
        ("jax", "0.4.29", "12", True, "warn", "0.4.30"),
        ("jax", "0.4.30", "12", True, "ok", "CUDA 12"),
        ("jax", "0.10.2", "13", True, "ok", "CUDA 13"),
        ("tensorflow", "2.20.0", "12", True, "note", "not hooked"),
        ("openmm", "8.6.1", None, True, "ok", "nothing to gate"),
    ],
)
def test_each_framework_against_what_the_hooks_know(
    name: str, version: str, cuda: str | None, gpu_here: bool, mark: str, words: str
) -> None:
    found = scan.scan() | {"frameworks": [{"name": name, "title": "It", "version": version, "cuda": cuda}]}
    check = only(frameworks.checks(found, gpu_here), "It")
    assert check.mark == mark, check
    assert words in check.text


def distribution(site: Path, name: str, version: str, its_version_py: str | None = None) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if its_version_py is not None:
        (site / name).mkdir()
        (site / name / "version.py").write_text(its_version_py)


def test_builds_are_read_from_what_installers_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert scan.scan()["frameworks"] == []
    distribution(tmp_path, "torch", "2.13.0", "__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip = None\n")
    distribution(tmp_path, "jax", "0.10.2")
    distribution(tmp_path, "jax-cuda13-plugin", "0.10.2")
    distribution(tmp_path, "cupy-cuda12x", "13.6.0")
    distribution(tmp_path, "OpenMM", "8.6.1")
    distribution(tmp_path, "OpenMM-CUDA-12", "8.6.1")
    found: Any = scan.scan()["frameworks"]
    assert {f["name"]: f["cuda"] for f in found} == {"torch": "13.0", "jax": "13", "cupy": "12", "openmm": "12"}


@pytest.mark.parametrize(
    ("version", "text", "cuda"),
    [
        ("2.13.0+cpu", "cuda: Optional[str] = None\nhip: Optional[str] = None\n", None),
        ("2.9.0", "cuda = None\nhip: Optional[str] = '6.4'\n", "rocm"),
        ("2.9.0+cu128", None, "12.8"),
        ("2.9.0+cpu", None, None),
        ("2.9.0", None, None),
    ],
)
def test_builds_of_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, text: str | None, cuda: str | None
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    distribution(tmp_path, "torch", version, text)
    found: Any = scan.scan()["frameworks"]
    assert found[0]["cuda"] == cuda


def test_another_python_is_asked(tmp_path: Path) -> None:
    assert frameworks.look(sys.executable)["frameworks"] == scan.scan()["frameworks"]
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho none\n")
    broken.chmod(0o755)
    with pytest.raises(ConfigError, match="does not say"):
        frameworks.look(str(broken))
    with pytest.raises(ConfigError, match="no Python"):
        frameworks.is_file(str(tmp_path))


# --- environment ------------------------------------------------------------------------------------------------------

PATH = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])}


@pytest.mark.parametrize(
    ("variables", "subject", "mark"),
    [
        ({}, "variables", "ok"),
        (
            {"ACB_DISABLE": "0", "TF_FORCE_UNIFIED_MEMORY": "0", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"},
            "variables",
            "ok",
        ),
        ({"ACB_DISABLE": "1"}, "ACB_DISABLE", "fail"),
        ({"PATH": "/nowhere"}, "acb-launch", "warn"),
        ({"PYTHONPATH": f"{BOOTSTRAP}:/x"}, "PYTHONPATH", "note"),
        ({"TF_FORCE_UNIFIED_MEMORY": "1"}, "JAX memory", "warn"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "4.0"}, "JAX memory", "warn"),
        ({"XLA_CLIENT_MEM_FRACTION": "much"}, "XLA_CLIENT_MEM_FRACTION", "warn"),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, "JAX memory", "warn"),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, "variables", "ok"),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "bfc"}, "JAX memory", "warn"),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, "variables", "ok"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:1,expandable_segments:True"}, "PyTorch memory", "warn"),
        ({"CUDA_MPS_PIPE_DIRECTORY": "/var/run/mps"}, "MPS", "warn"),
        ({"CUDA_MPS_PIPE_DIRECTORY": ""}, "variables", "ok"),
        ({"SLURM_JOB_ID": "17"}, "batch job", "ok"),
        ({"PJM_JOBID": "18"}, "batch job", "ok"),
    ],
)
def test_settings_that_stand_in_the_way(tmp_path: Path, variables: dict[str, str], subject: str, mark: str) -> None:
    check = only(environment.checks({**PATH, **variables}, tmp_path), subject)
    assert check.mark == mark
    assert check.mark in ("ok", "note") or check.advice


def test_one_wrong_setting_hides_no_other(tmp_path: Path) -> None:
    both = {
        **PATH,
        "TF_FORCE_UNIFIED_MEMORY": "1",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "x",
        "XLA_CLIENT_MEM_FRACTION": "4",
    }
    checks = environment.checks(both, tmp_path)
    assert only(checks, "XLA_PYTHON_CLIENT_MEM_FRACTION").advice == "unset XLA_PYTHON_CLIENT_MEM_FRACTION"
    managed = only(checks, "JAX memory")
    assert "TF_FORCE_UNIFIED_MEMORY=1 and XLA_CLIENT_MEM_FRACTION=4" in managed.text


def test_expandable_segments_are_a_warning_that_says_what_is_known(tmp_path: Path) -> None:
    for setting in ("expandable_segments:True", "expandable_segments:False"):
        found = marks(environment.checks({**PATH, "PYTORCH_ALLOC_CONF": setting}, tmp_path))
        assert found == ({"PyTorch memory": "warn"} if "True" in setting else {"variables": "ok"})
    check = only(
        environment.checks({**PATH, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}, tmp_path), "PyTorch memory"
    )
    assert "out of memory" in check.text
    assert "not been tried" in check.text
    assert "PYTORCH_ALLOC_CONF" in check.advice


def test_a_running_mps_daemon_is_seen_without_its_variable(tmp_path: Path) -> None:
    (tmp_path / "tmp/nvidia-mps").mkdir(parents=True)
    (tmp_path / "tmp/nvidia-mps/control").touch()
    check = only(environment.checks(PATH, tmp_path), "MPS")
    assert "runs" in check.text


def test_whether_acb_gets_into_programs_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.injection({**PATH, "ACB_DISABLE": "1"}).mark == "ok"
    monkeypatch.setattr("acb.launcher.environment.BOOTSTRAP", tmp_path)  # an installation that has lost it
    assert environment.injection(PATH).mark == "fail"


# --- host -------------------------------------------------------------------------------------------------------------


def test_host_memory_is_held_against_the_largest_gpu() -> None:
    assert host._memory(100 * GIB, 80 * GIB).mark == "ok"
    assert host._memory(60 * GIB, 80 * GIB).mark == "warn"
    assert host._memory(GIB, 0).mark == "ok"
    assert host._memory(None, 80 * GIB).mark == "note"


def test_page_locking_matters_where_there_is_a_gpu() -> None:
    assert host._locked(resource.RLIM_INFINITY).mark == "ok"
    assert "8MiB" in host._locked(8 << 20).text
    assert "locked memory" not in marks(host.checks(0))
    assert "locked memory" in marks(host.checks(GIB))


@pytest.mark.parametrize(
    ("scope", "capabilities", "mark"), [(None, 0, "ok"), (1, 0, "ok"), (2, 0, "note"), (3, 1 << 19, "ok")]
)
def test_who_may_act_on_whom(tmp_path: Path, scope: int | None, capabilities: int, mark: str) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text(f"Name:\tx\nCapEff:\t{capabilities:016x}\n")
    if scope is not None:
        (tmp_path / "proc/sys/kernel/yama").mkdir(parents=True)
        (tmp_path / "proc/sys/kernel/yama/ptrace_scope").write_text(f"{scope}\n")
    check = host._user(tmp_path)
    assert check.mark == mark
    assert ("SYS_PTRACE" in check.text) == bool(capabilities)


# --- the broker -------------------------------------------------------------------------------------------------------


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("ACB_SOCKET", "SLURM_JOB_ID", "PJM_JOBID"):
        monkeypatch.delenv(name, raising=False)
    directory = tmp_path / "rt"
    monkeypatch.setenv("ACB_RUNTIME_DIR", str(directory))
    return directory


def test_no_broker_yet_is_fine(runtime: Path) -> None:
    report, checks = broker.look()
    assert report is None
    assert marks(checks) == {"directory": "ok", "broker": "ok"}
    assert "none runs yet" in only(checks, "broker").text
    assert not runtime.exists()  # the doctor changes nothing


def test_a_directory_that_cannot_be_made_is_a_failure(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.touch()
    (check,) = broker.look()[1]
    assert (check.mark, "set ACB_RUNTIME_DIR" in check.advice) == ("fail", True)
    monkeypatch.setenv("ACB_RUNTIME_DIR", f"{runtime}/in/rt")
    _, checks = broker.look()
    assert only(checks, "directory").mark == "fail"
    assert "Not a directory" in only(checks, "directory").text


def test_a_directory_open_to_others_is_a_failure_with_its_remedy(runtime: Path) -> None:
    runtime.mkdir(mode=0o755)
    _, checks = broker.look()
    (check,) = checks
    assert check.mark == "fail"
    assert check.advice == f"run: chmod 700 {runtime}"


@pytest.mark.parametrize("place", ["state", "file", "file/deep/er", "gone/and/gone", "closed/in"])
def test_whether_what_is_learned_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "closed/in/programs.json").mkdir(parents=True)
    monkeypatch.setenv("ACB_STATE_DIR", str(tmp_path / place))
    before = sorted(tmp_path.rglob("*"))
    check = broker.learning()
    assert str(tmp_path / place / "programs.json") in check.text
    assert check.mark == ("ok" if place in ("state", "gone/and/gone") else "warn")
    assert bool(check.advice) == (check.mark == "warn")
    assert ("Not a directory" in check.text) == place.startswith("file")
    assert sorted(tmp_path.rglob("*")) == before


def test_sockets_of_killed_brokers_are_named(runtime: Path) -> None:
    runtime.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(runtime / "broker-17.sock"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as alive:
        alive.bind(str(runtime / "broker-18.sock"))
        alive.listen()
        _, checks = broker.look()
    check = only(checks, "leavings")
    assert "broker-17.sock" in check.text
    assert "broker-18.sock" not in check.text
    assert str(runtime / "broker-17.sock") in check.advice


def test_brokers_that_run(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = {"version": doctor.__version__, "pid": 4, "devices": "2 simulated GPUs of 1GiB", "clients": [{}]}
    monkeypatch.setattr(broker.talk, "status", lambda path: report)
    found, checks = broker.look()
    assert found is report
    assert "1 program connected" in only(checks, "broker").text
    assert broker.lends_simulated(report, 0) == []
    assert broker.lends_simulated(report, 1)[0].mark == "warn"
    report["version"] = "0.0.0"
    assert only(broker.look()[1], "broker").mark == "warn"

    def silent(path: Path) -> None:
        raise ConfigError(f"the GPU broker at {path} does not answer; end it with: kill -9 7", 75)

    monkeypatch.setattr(broker.talk, "status", silent)
    check = only(broker.look()[1], "broker")
    assert (check.mark, check.advice) == ("fail", "end it with: kill -9 7")


# --- the whole --------------------------------------------------------------------------------------------------------

FOUND = [
    Check("GPUs", "driver", "ok", "NVIDIA 580.95.05, for CUDA up to 13.0"),
    Check("GPUs", "GPU 0", "fail", "it is [divided] by MIG " * 6, "have it turned off " * 8),
    Check("Host", "memory", "warn", "little", "more"),
    Check("Host", "user", "note", "root"),
]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_page_fits_80_columns_and_any_terminal(encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    show.show(FOUND, "No.", False, Console(file=stream, width=80, markup=False, highlight=False))
    stream.flush()
    lines = raw.getvalue().decode(encoding).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("[divided]" in line for line in lines)
    assert lines[-1].strip() == ("✗ No." if encoding == "utf-8" else "x No.")
    assert sum(line.strip() in ("GPUs", "Host") for line in lines) == 2


def test_the_verdict() -> None:
    assert doctor.verdict(FOUND, 1) == "acb cannot be used here before this is mended: GPU 0."
    assert doctor.verdict([FOUND[0]], 0) == "acb can be used here, with simulated GPUs only."
    assert doctor.verdict([FOUND[0]], 1).endswith("with one GPU.")
    assert doctor.verdict([FOUND[0]], 4).endswith("with 4 GPUs.")
    assert json.loads(json.dumps([check.as_json() for check in FOUND]))[2]["mark"] == "warn"
