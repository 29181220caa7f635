"""`acb doctor` as a command: its page, its JSON, its exit status, and that it touches nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from broker_harness import REPOSITORY, Site, fill

from acb.devices import nvml


def doctor(site: Site, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
    bin_directory = str(Path(sys.executable).parent)
    return subprocess.run(
        [sys.executable, "-m", "acb.cli.acb", "doctor", *arguments],
        env=site.environment(**{"PATH": f"{bin_directory}:/usr/bin:/bin", "PYTHONUTF8": "1", **changes}),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine with a GPU: an NVML and a compiled libcuda of the tests' own."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    directory = tmp_path_factory.mktemp("card")
    (directory / "states").mkdir()
    (directory / "pynvml.py").write_text(PYNVML)
    source = Path(__file__).parent / "programs" / "fake_libcuda.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", directory / "libcuda.so.1", source], check=True)
    return {
        "PYTHONPATH": f"{directory}:{REPOSITORY}",
        "LD_LIBRARY_PATH": str(directory),
        "FAKE_CUDA": str(directory / "states"),
    }


PYNVML = """
from types import SimpleNamespace
class NVMLError(Exception): pass
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlSystemGetDriverVersion(): return "580.95.05"
def nvmlSystemGetCudaDriverVersion(): return 13000
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUUID(handle): return "GPU-aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa"
def nvmlDeviceGetName(handle): return "NVIDIA H100 80GB HBM3"
def nvmlDeviceGetMemoryInfo(handle): return SimpleNamespace(total=80 << 30, free=79 << 30)
def nvmlDeviceGetMigMode(handle): raise NVMLError("Not Supported")
def nvmlDeviceGetPersistenceMode(handle): return 0
def nvmlDeviceGetComputeMode(handle): return 0
def nvmlDeviceGetComputeRunningProcesses(handle): return []
"""


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture
def without_gpu() -> None:
    try:
        nvml.devices()
    except nvml.NvmlError:
        return
    pytest.skip("this machine has an NVIDIA driver")


@pytest.mark.usefixtures("without_gpu")
def test_without_a_gpu_acb_is_usable_with_simulated_ones(site: Site) -> None:
    done = doctor(site)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "✓ acb can be used here, with simulated GPUs only."
    assert "--simulate-gpus 1x2GiB" in " ".join(done.stdout.split())
    for section in ("GPUs", "Moving memory off a GPU", "Frameworks", "Environment", "Host", "Broker"):
        assert section in lines
    assert (
        doctor(site, PYTHONUTF8=None, LC_ALL="POSIX", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii").returncode == 0
    )


@pytest.mark.usefixtures("without_gpu")
def test_everything_is_in_the_json(site: Site) -> None:
    done = doctor(site, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    answer = report(done)
    assert answer["usable"] is True
    assert answer["gpus"] == []
    assert [tier["name"] for tier in answer["tiers"]] == ["framework", "driver", "hold"]
    assert {"torch", "jax"} <= {framework["name"] for framework in answer["environment"]["frameworks"]}
    assert answer["host"]["memory_available"] > 0
    assert answer["broker"] is None
    assert all(check["advice"] for check in answer["checks"] if check["mark"] in ("warn", "fail"))


def test_what_must_be_mended_is_status_1(site: Site) -> None:
    done = doctor(site, "--json", ACB_DISABLE="1")
    assert done.returncode == 1
    assert report(done)["usable"] is False
    site.directory.chmod(0o755)
    done = doctor(site)
    assert done.returncode == 1
    assert "chmod 700" in done.stdout
    site.directory.chmod(0o700)


def test_on_a_machine_with_a_gpu(site: Site, card: dict[str, str]) -> None:
    done = doctor(site, **card)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[-1] == "✓ acb can be used here, with one GPU."
    assert max(map(len, lines)) <= 80
    words = " ".join(done.stdout.split())
    assert "NVIDIA 580.95.05, for CUDA up to 13.0" in words
    assert "acb doctor --probe" in words
    assert list(Path(card["FAKE_CUDA"]).iterdir()) == []  # nobody has called the driver
    answer = report(doctor(site, "--json", **card))
    assert [gpu["name"] for gpu in answer["gpus"]] == ["NVIDIA H100 80GB HBM3"]
    assert answer["probe"] is None


def test_the_probe_tries_the_driver(site: Site, card: dict[str, str]) -> None:
    done = doctor(site, "--probe", "--json", **card)
    assert (done.returncode, done.stderr) == (0, "")
    answer = report(done)
    assert answer["probe"]["works"] is True
    assert answer["tiers"][1]["available"] is True
    assert len(list(Path(card["FAKE_CUDA"]).iterdir())) == 1
    broken = report(doctor(site, "--probe", "--json", **card, FAKE_CUDA_GB10="1"))
    assert broken["usable"] is True  # the other tiers remain
    assert broken["tiers"][1]["available"] is False
    assert "CUDA_ERROR_NOT_SUPPORTED" in broken["tiers"][1]["reason"]
    (said,) = [check for check in broken["checks"] if check["subject"] == "driver" and check["section"] != "GPUs"]
    assert "acb works all the same" in said["advice"]


def test_a_full_disk_is_named(site: Site, small_disk: Path) -> None:
    elsewhere = {"ACB_STATE_DIR": str(small_disk / "state")}
    runtime = {"ACB_RUNTIME_DIR": str(small_disk)}
    assert site.gpu_assigner("start", "--simulate-gpus", "1x32MiB", **runtime).returncode == 0
    fill(small_disk / "filling")
    for variables, subject, mark in ((elsewhere, "learning", "warn"), (runtime, "directory", "warn")):
        checks = {check["subject"]: check for check in report(doctor(site, "--json", **variables))["checks"]}
        assert checks[subject]["mark"] == mark
        assert "No space left" in checks[subject]["text"]
        assert subject == "learning" or checks["broker"]["mark"] == "ok"
    assert site.gpu_assigner("stop", **runtime).returncode == 0
    fill(small_disk / "filling")
    os.truncate(small_disk / "filling", (256 - 64) << 10)  # not enough room for a simulated GPU
    done = doctor(site, **runtime)
    assert done.returncode == 1
    assert "takes no new file: No space left on device" in " ".join(done.stdout.split())
    assert os.listdir(small_disk) == ["filling"]


def test_the_broker_that_runs_is_shown(site: Site) -> None:
    site.gpu_assigner("start", "--simulate-gpus", "1x32MiB")
    answer = report(doctor(site, "--json"))
    assert answer["broker"]["devices"] == "1 simulated GPU of 32MiB"
    log = site.directory / "broker.log"
    assert log.exists()
    assert (answer["broker"]["socket"], answer["broker"]["log"]) == (str(site.socket), str(log))
    page = "".join(doctor(site).stdout.split())  # paths are folded
    assert str(site.socket) in page
    assert str(log) in page
    site.gpu_assigner("stop")


def test_nothing_is_left_behind(site: Site) -> None:
    before = sorted(site.directory.rglob("*"))
    done = doctor(
        site, "--json", ACB_RUNTIME_DIR=str(site.directory / "rt"), ACB_STATE_DIR=str(site.directory / "state")
    )
    assert done.returncode == 0
    assert {check["subject"]: check["mark"] for check in report(done)["checks"]}["directory"] == "ok"
    assert sorted(site.directory.rglob("*")) == before


def test_no_framework_is_imported_and_other_environments_are_asked(site: Site) -> None:
    watched = "import runpy, sys; sys.argv[0] = 'acb'\n" \
        "try: runpy.run_module('acb.cli.acb', run_name='__main__')\n" \
        "except SystemExit: pass\n" \
        "print({'torch', 'jax', 'numpy'} & set(sys.modules), file=sys.stderr)"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", watched, "doctor", "--json"],
        env=site.environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == "set()\n"
    other = report(doctor(site, "--json", "--python", sys.executable))["environment"]
    assert other["executable"] == sys.executable
    refused = doctor(site, "--python", "/nowhere/python")
    assert refused.returncode == 2
    assert "there is no Python" in refused.stderr
