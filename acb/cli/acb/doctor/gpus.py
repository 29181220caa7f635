"""The driver and the GPUs, as NVML tells, and by which tiers a program's memory can be moved off them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from acb.broker.checkpointing import Helper
from acb.cli.acb.doctor.check import Check, Mark
from acb.config import format_size
from acb.devices.checkpoint_probe import Probe
from acb.devices.nvml import NO_BINDING, Device, Nvml, NvmlError, Settings, mig_obstacle
from acb.hooks import numbers

SECTION, TIERS = "GPUs", "Moving memory off a GPU"

CHECKPOINT_DRIVER = 570
"""The first driver with the checkpoint API (CUDA 12.8)."""

REPORTED_GOOD = (575, 57)
"""Drivers before this one, 570.86 and 570.158 among them, are reported to fail with PyTorch."""

PROBE_PATIENCE = 180.0
"""Seconds until a probe is given up: it starts CUDA in two processes."""

MIGRATION_SINCE = 580
"""What to update to: a driver of this branch also brings a program back on another GPU of the same kind."""

SIMULATE = "to try acb on a simulated one: acb-launch --simulate-gpus 1x2GiB python train.py"


@dataclass
class Machine:
    """What NVML says. `devices`: those this job may use; `all`: those there are. `problem`: why it says nothing."""

    driver: str | None = None
    cuda: str | None = None
    all: list[Device] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    settings: dict[str, Settings] = field(default_factory=dict)
    free: dict[str, int] = field(default_factory=dict)
    problem: str = ""

    def usable(self) -> list[Device]:
        """The GPUs that acb can lend."""
        return [device for device in self.devices if self.obstacle(device) is None]

    def obstacle(self, device: Device) -> str | None:
        """Why this GPU cannot be lent."""
        return self.settings.get(device.uuid, Settings()).obstacle(device)

    def as_json(self) -> dict[str, Any]:
        """As ``acb doctor --json`` prints it. Sizes in bytes."""
        return {
            "driver": self.driver,
            "cuda": self.cuda,
            "gpus": [
                {
                    **device._asdict(),
                    "free": self.free.get(device.uuid),
                    **self.settings.get(device.uuid, Settings())._asdict(),
                    "obstacle": self.obstacle(device),
                }
                for device in self.devices
            ],
            "hidden": [device.uuid for device in self.all if device.uuid not in {d.uuid for d in self.devices}],
        }


def look() -> Machine:
    """Ask NVML. CUDA is not initialised."""
    try:
        with Nvml() as nvml:
            machine = Machine(nvml.driver_version(), nvml.cuda_version(), nvml.all, nvml.devices)
            for device in nvml.devices:
                machine.settings[device.uuid] = nvml.settings(device.uuid)
                with contextlib.suppress(NvmlError):
                    machine.free[device.uuid] = nvml.free(device.uuid)
    except NvmlError as error:
        return Machine(problem=str(error))
    return machine


# --- the GPUs ---------------------------------------------------------------------------------------------------------


def checks(machine: Machine, environ: Mapping[str, str], root: Path = Path("/")) -> list[Check]:
    """The driver, each GPU, and what of them CUDA_VISIBLE_DEVICES leaves. `root` is where /dev and /sys lie."""
    if machine.problem:
        return [_no_driver(machine.problem, root)]
    found = [Check(SECTION, "driver", "ok", f"NVIDIA {machine.driver or 'of unknown version'}{_cuda(machine)}")]
    setting = environ.get("CUDA_VISIBLE_DEVICES")
    for device in machine.devices:
        found += _one(machine, device)
    mig = mig_obstacle(machine.all, setting)
    if not machine.all:
        found.append(Check(SECTION, "GPU", "note", "the driver is there, but no GPU", SIMULATE))
    elif mig is not None:
        text, _, advice = mig.partition("; ")
        mark: Mark = "warn" if machine.usable() else "fail"
        found.append(Check(SECTION, "MIG", mark, f"in CUDA_VISIBLE_DEVICES, {text}", advice))
    elif not machine.devices:
        there = "one GPU" if len(machine.all) == 1 else f"{len(machine.all)} GPUs"
        found.append(
            Check(
                SECTION,
                "GPU",
                "fail",
                f"there is {there} here, but CUDA_VISIBLE_DEVICES={setting!r} hides all of it from you",
                "unset CUDA_VISIBLE_DEVICES, or ask your batch system for a GPU",
            )
        )
    elif not machine.usable():
        found.append(Check(SECTION, "GPU", "fail", "none of these GPUs can be lent", "see above; or simulate one"))
    if mig is None:
        found += _unknown_entries(machine, setting)
    if len({device.name for device in machine.all}) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        found.append(
            Check(
                SECTION,
                "order",
                "warn",
                "the GPUs differ; CUDA counts the fastest first, acb and nvidia-smi by bus",
                "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name GPUs by UUID",
            )
        )
    return found


def _cuda(machine: Machine) -> str:
    return f", for CUDA up to {machine.cuda}" if machine.cuda else ""


def _no_driver(problem: str, root: Path) -> Check:
    """NVML says nothing: is there a GPU at all?"""
    if (root / "dev/nvidiactl").exists():
        return Check(
            SECTION,
            "driver",
            "fail",
            f"the NVIDIA driver is loaded, but {problem}",
            "acb asks the driver by it: pip install nvidia-ml-py"
            if problem == NO_BINDING
            else "run nvidia-smi: it fails in the same way and says more; after a driver update, restart the machine",
        )
    if any(_is_gpu(device) for device in _listed(root / "sys/bus/pci/devices")):
        return Check(
            SECTION,
            "driver",
            "warn",
            f"an NVIDIA GPU is plugged in, but not at hand: {problem}",
            ("pip install nvidia-ml-py; if that is not all: " if problem == NO_BINDING else "")
            + f"install the driver, or start this container with its GPUs; {SIMULATE}",
        )
    cause = problem.removeprefix("no NVIDIA GPU can be used here ").strip("()")
    return Check(SECTION, "GPU", "note", f"none of NVIDIA's here ({cause}); simulated ones are available", SIMULATE)


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _is_gpu(device: Path) -> bool:
    """Whether a PCI device is NVIDIA's (0x10de) and a display or 3D controller (class 0x03)."""
    try:
        vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
    except OSError:
        return False
    return vendor == "0x10de" and kind.startswith("0x03")


def _one(machine: Machine, device: Device) -> list[Check]:
    settings = machine.settings.get(device.uuid, Settings())
    obstacle = settings.obstacle(device)
    if obstacle is not None:
        text, _, advice = obstacle.partition("; ")
        others = machine.usable()
        return [Check(SECTION, f"GPU {device.ordinal}", "warn" if others else "fail", text, advice)]
    size = format_size(device.capacity)
    free = machine.free.get(device.uuid)
    found = []
    if free is not None and free < device.capacity * 0.9:
        found.append(
            Check(
                SECTION,
                f"GPU {device.ordinal}",
                "note",
                f"{device.name}, {size}, of which {format_size(device.capacity - free)} are in use",
                "programs that run outside of acb keep what they hold: launch them with acb-launch too",
            )
        )
    else:
        found.append(Check(SECTION, f"GPU {device.ordinal}", "ok", f"{device.name}, {size}"))
    if settings.persistence is False:
        found.append(
            Check(
                SECTION,
                "persistence",
                "note",
                f"persistence mode is off on GPU {device.ordinal}: a program's first touch takes seconds longer",
                f"have it turned on: nvidia-smi -i {device.uuid} -pm 1",
            )
        )
    return found


def _unknown_entries(machine: Machine, setting: str | None) -> list[Check]:
    """Entries of CUDA_VISIBLE_DEVICES that name nothing, which end the list without a word."""
    if not setting or not machine.devices:
        return []
    entries = [entry.strip() for entry in setting.split(",")]
    if len(entries) == len(machine.devices):
        return []
    return [
        Check(
            SECTION,
            "visible",
            "warn",
            f"CUDA_VISIBLE_DEVICES={setting!r}: {entries[len(machine.devices)]!r} names no further GPU, and CUDA ends "
            f"the list there",
            "correct the entry, or unset CUDA_VISIBLE_DEVICES",
        )
    ]


# --- the tiers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tier:
    """A way to make room. `available`: None when that would have to be tried."""

    name: str
    available: bool | None
    reason: str

    def as_json(self) -> dict[str, Any]:
        """As ``acb doctor --json`` prints it."""
        return asdict(self)


def tiers(machine: Machine, frameworks: Sequence[str], probed: Probe | None) -> list[Tier]:
    """The tiers on this machine. `frameworks`: those here that acb moves; `probed`: what the driver's probe gave."""
    where = "" if machine.usable() else " (here, of simulated GPUs)"
    if frameworks:
        framework = Tier("framework", True, f"the arrays of {' and '.join(frameworks)} are copied to the host{where}")
    else:
        framework = Tier("framework", False, "neither PyTorch nor JAX is in this environment")
    return [
        framework,
        _driver_tier(machine, probed),
        Tier("hold", True, "what cannot be moved stays until its program ends, and is scheduled around"),
    ]


def probe(device: Device) -> Probe:
    """Try the driver tier on a throw-away process on this GPU, from a helper: CUDA is never initialised in this one."""
    with Helper(environment={**os.environ, "CUDA_VISIBLE_DEVICES": device.uuid}) as helper:
        result = helper.ask("probe", deadline=PROBE_PATIENCE)
    assert isinstance(result, Probe)
    return result


def _driver_tier(machine: Machine, probed: Probe | None) -> Tier:
    if probed is not None:
        speed = f", in {probed.seconds:.1f} s" if probed.works else ""
        return Tier("driver", probed.works, f"tried: {probed.reason}{speed}")
    if not machine.usable():
        return Tier("driver", False, "it needs a real GPU")
    version = numbers(machine.driver or "")
    if version and version[0] < CHECKPOINT_DRIVER:
        return Tier("driver", False, f"driver {machine.driver} is too old: {CHECKPOINT_DRIVER} or newer can do it")
    if version and version[:2] < REPORTED_GOOD:
        good = ".".join(map(str, REPORTED_GOOD))
        return Tier("driver", None, f"driver {machine.driver} is reported to fail with PyTorch, {good} to be good")
    return Tier("driver", None, f"driver {machine.driver or 'of unknown version'} should do it; not tried")


def tier_checks(found: Sequence[Tier], machine: Machine, probed: Probe | None = None) -> list[Check]:
    """The tiers as lines of the checklist. `probed`: as for tiers()."""
    lines = []
    for tier in found:
        advice = ""
        if tier.available is None:
            advice = "to try it, on a throw-away process: acb doctor --probe"
        elif tier.name == "driver" and probed is not None and not probed.works:
            advice = f"{_remedy(probed, machine)}; without this tier, acb works all the same"
        elif tier.name == "driver" and not tier.available and machine.usable() and "too old" in tier.reason:
            advice = f"have the NVIDIA driver updated to {REPORTED_GOOD[0]} or newer; without, acb works all the same"
        elif tier.name == "framework" and not tier.available:
            advice = "programs in other environments use theirs; look there with: acb doctor --python FILE"
        lines.append(Check(TIERS, tier.name, "ok" if tier.available else "note", tier.reason, advice))
    return lines


def _remedy(failed: Probe, machine: Machine) -> str:
    """What can be done about a driver tier that was tried in vain."""
    if not failed.steps:  # nothing was suspended: there was no process to do it to, or none to do it
        return "see whether nvidia-smi shows the GPU in order, and try again"
    problem = failed.steps[-1].get("problem")
    if problem == "forbidden":
        return "if this is a container, start it with --cap-add SYS_PTRACE; if not: sysctl kernel.yama.ptrace_scope=0"
    if problem == "memory":
        return "free memory on the GPU and on the host, and try again"
    if problem in ("timeout", "room", "helper"):
        return "try again when the GPU is idle: acb doctor --probe"
    if numbers(machine.driver or "")[:1] < (MIGRATION_SINCE,):
        return f"have the NVIDIA driver updated to {MIGRATION_SINCE} or newer, and try again"
    return "nothing mends that but another driver or GPU"
