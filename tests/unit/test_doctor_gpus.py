"""What `acb doctor` says of GPUs and drivers unlike this machine's, and of the ways to move memory off them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from doctor_checks import marks, only

from acb.cli.acb.doctor import gpus
from acb.cli.acb.doctor.gpus import Machine
from acb.devices.checkpoint_probe import Probe
from acb.devices.nvml import Device, Settings, visible

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
