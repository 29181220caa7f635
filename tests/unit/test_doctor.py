"""What `acb doctor` says of machines unlike this one: each check against what it looks at, and the page it prints."""

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
from rich.console import Console

from acb.cli.acb import doctor
from acb.cli.acb.doctor import broker, environment, frameworks, gpus, host, scan, show
from acb.cli.acb.doctor.check import Check
from acb.cli.acb.doctor.gpus import Machine
from acb.config import ConfigError
from acb.devices.checkpoint_probe import Probe
from acb.devices.nvml import Device, Settings, visible
from acb.launcher.environment import BOOTSTRAP

GIB = 1 << 30
H100 = Device(0, "GPU-aaaa", "NVIDIA H100", 80 * GIB)
T4 = Device(1, "GPU-bbbb", "Tesla T4", 16 * GIB)


def machine(*devices: Device, setting: str | None = None, driver: str = "580.95.05", **settings: Any) -> Machine:
    seen = visible(devices, setting)
    return Machine(
        driver,
        "13.0",
        list(devices),
        seen,
        {device.uuid: Settings(**settings) for device in seen},
        {device.uuid: device.capacity for device in seen},
    )


def marks(checks: list[Check]) -> dict[str, str]:
    return {check.subject: check.mark for check in checks}


def only(checks: list[Check], subject: str) -> Check:
    (check,) = [check for check in checks if check.subject == subject]
    return check


# --- GPUs -------------------------------------------------------------------------------------------------------------


def test_a_good_gpu_needs_no_advice() -> None:
    checks = gpus.checks(machine(H100, persistence=True, mig=False, compute_mode=0), {})
    assert [(check.subject, check.mark, check.advice) for check in checks] == [
        ("driver", "ok", ""),
        ("GPU 0", "ok", ""),
    ]
    assert "580.95.05" in checks[0].text
    assert "13.0" in checks[0].text
    assert checks[1].text == "NVIDIA H100, 80GiB"


@pytest.mark.parametrize(
    ("settings", "words", "remedy"),
    [
        ({"mig": True}, "MIG", "-mig 0"),
        ({"compute_mode": 2}, "Prohibited", "-c DEFAULT"),
        ({"compute_mode": 3}, "Exclusive", "-c DEFAULT"),
    ],
)
def test_a_gpu_that_cannot_be_lent_is_a_failure_if_it_is_the_only_one(
    settings: dict[str, Any], words: str, remedy: str
) -> None:
    alone = machine(H100, **settings)
    check = only(gpus.checks(alone, {}), "GPU 0")
    assert check.mark == "fail"
    assert words in check.text
    assert remedy in check.advice
    assert alone.usable() == []
    beside = machine(H100, T4._replace(name="NVIDIA H100"))
    beside.settings[H100.uuid] = Settings(**settings)
    assert marks(gpus.checks(beside, {})) == {"driver": "ok", "GPU 0": "warn", "GPU 1": "ok"}


def test_memory_in_use_and_persistence_mode_are_notes() -> None:
    busy = machine(H100, persistence=False)
    busy.free[H100.uuid] = 20 * GIB
    checks = gpus.checks(busy, {})
    assert marks(checks) == {"driver": "ok", "GPU 0": "note", "persistence": "note"}
    assert "60GiB are in use" in only(checks, "GPU 0").text


@pytest.mark.parametrize("setting", ["", "-1", "9"])
def test_gpus_that_are_all_hidden_are_a_failure(setting: str) -> None:
    checks = gpus.checks(machine(H100, setting=setting), {"CUDA_VISIBLE_DEVICES": setting})
    assert only(checks, "GPU").mark == "fail"
    assert "unset CUDA_VISIBLE_DEVICES" in only(checks, "GPU").advice


def test_an_unknown_entry_is_named() -> None:
    both = (H100, T4._replace(name=H100.name))
    checks = gpus.checks(machine(*both, setting="1,7,0"), {"CUDA_VISIBLE_DEVICES": "1,7,0"})
    assert only(checks, "visible").mark == "warn"
    assert "'7'" in only(checks, "visible").text
    assert "visible" not in marks(gpus.checks(machine(*both, setting="1,0"), {"CUDA_VISIBLE_DEVICES": "1,0"}))


@pytest.mark.parametrize(("setting", "mark"), [("MIG-5c2e5a2b", "fail"), ("0,MIG-5c2e5a2b", "warn")])
def test_a_part_of_a_gpu_is_named_as_migs(setting: str, mark: str) -> None:
    checks = gpus.checks(machine(H100, setting=setting), {"CUDA_VISIBLE_DEVICES": setting})
    check = only(checks, "MIG")
    assert check.mark == mark
    assert "MIG-5c2e5a2b is a part of a GPU that MIG divides" in check.text
    assert "whole GPU" in check.advice
    assert not {"GPU", "visible"} & marks(checks).keys()  # it is neither hidden nor unknown


def test_different_gpus_are_counted_in_two_ways() -> None:
    mixed = machine(H100, T4)
    assert marks(gpus.checks(mixed, {}))["order"] == "warn"
    assert "order" not in marks(gpus.checks(mixed, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}))


def pci(root: Path, vendor: str, kind: str) -> None:
    device = root / "sys/bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(vendor + "\n")
    (device / "class").write_text(kind + "\n")


def test_without_a_driver_it_matters_whether_there_is_a_gpu(tmp_path: Path) -> None:
    silent = Machine(problem="no NVIDIA GPU can be used here (NVML Shared Library Not Found)")
    (check,) = gpus.checks(silent, {}, tmp_path)
    assert (check.mark, "--simulate-gpus" in check.advice) == ("note", True)
    assert "(NVML Shared Library Not Found)" in check.text
    pci(tmp_path, "0x10de", "0x030200")
    assert gpus.checks(silent, {}, tmp_path)[0].mark == "warn"  # a container without it, perhaps
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert gpus.checks(silent, {}, tmp_path)[0].mark == "fail"


def test_a_missing_package_is_not_the_drivers_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    unasked = gpus.look()
    pci(tmp_path, "0x10de", "0x030200")
    assert "pip install nvidia-ml-py" in gpus.checks(unasked, {}, tmp_path)[0].advice
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    (check,) = gpus.checks(unasked, {}, tmp_path)
    assert check.mark == "fail"
    assert "nvidia-ml-py is not installed" in check.text
    assert "pip install nvidia-ml-py" in check.advice
    assert "nvidia-smi" not in check.advice


@pytest.mark.parametrize(("vendor", "kind"), [("0x10de", "0x020000"), ("0x1002", "0x030000")])
def test_other_devices_are_no_nvidia_gpus(tmp_path: Path, vendor: str, kind: str) -> None:
    pci(tmp_path, vendor, kind)
    assert gpus.checks(Machine(problem="gone"), {}, tmp_path)[0].mark == "note"


# --- tiers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "available", "words"),
    [
        ("550.54.14", False, "too old"),
        ("570.158.01", None, "reported to fail with PyTorch"),
        ("575.57.08", None, "not tried"),
        ("580.95.05", None, "not tried"),
        ("", None, "unknown version"),
    ],
)
def test_the_driver_tier_by_version(driver: str, available: bool | None, words: str) -> None:
    here = machine(H100, driver=driver)
    tiers = gpus.tiers(here, ["PyTorch"], None)
    assert [tier.name for tier in tiers] == ["framework", "driver", "hold"]
    assert tiers[1].available is available
    assert words in tiers[1].reason
    advice = only(gpus.tier_checks(tiers, here), "driver").advice
    assert ("--probe" if available is None else "updated") in advice


def test_tiers_without_a_gpu_or_a_framework() -> None:
    framework, driver, hold = gpus.tiers(Machine(problem="none"), [], None)
    assert (framework.available, driver.available, hold.available) == (False, False, True)
    assert gpus.tiers(machine(H100), ["JAX"], Probe(True, "it works", 2.5))[1].available is True
    assert gpus.tiers(machine(H100), ["JAX"], Probe(False, "801"))[1] == gpus.Tier("driver", False, "tried: 801")


@pytest.mark.parametrize(
    ("problem", "driver", "words"),
    [
        ("unsupported", "580.95.05", "nothing mends that"),
        ("unsupported", "575.57.08", "driver updated to 580"),
        ("driver", "570.158.01", "driver updated to 580"),
        ("forbidden", "580.95.05", "SYS_PTRACE"),
        ("memory", "580.95.05", "free memory"),
        ("timeout", "580.95.05", "acb doctor --probe"),
        (None, "580.95.05", "nvidia-smi"),
    ],
)
def test_a_probe_that_failed_comes_with_advice(problem: str | None, driver: str, words: str) -> None:
    here = machine(H100, driver=driver)
    failed = Probe(
        False, "it went wrong", 3.0, steps=[] if problem is None else [{"op": "suspend", "problem": problem}]
    )
    check = only(gpus.tier_checks(gpus.tiers(here, ["PyTorch"], failed), here, failed), "driver")
    assert (check.mark, check.text) == ("note", "tried: it went wrong")
    assert words in check.advice
    assert "acb works all the same" in check.advice
    works = Probe(True, "it works", 2.5)
    assert only(gpus.tier_checks(gpus.tiers(here, ["PyTorch"], works), here, works), "driver").advice == ""


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
