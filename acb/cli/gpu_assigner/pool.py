"""The GPUs a broker lends: real ones from NVML, or simulated cards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from acb.broker.core import Gpu
from acb.broker.drivertier import DriverTier
from acb.broker.journal import Journal
from acb.broker.meter import Meter
from acb.config import (
    EX_CANTCREAT,
    EX_DATAERR,
    EX_UNAVAILABLE,
    ConfigError,
    SimulatedSpec,
    describe_simulated,
    format_pool,
    format_size,
    simulated_dir,
)

if TYPE_CHECKING:
    from acb.devices.simulated import Card

T = TypeVar("T")

CHECKPOINT_SINCE = 570
"""NVIDIA's driver branch that has the checkpoint calls."""

MIGRATION_SINCE = 580
"""The branch that can bring a process back on another GPU of the same kind."""

SIMULATED_TIER = "acb.devices.simulated_driver:tier"


@dataclass
class Pool:
    """GPUs to lend, `cards` when they are simulated, and what the programs' environment must say of them."""

    gpus: list[Gpu]
    description: str
    cards: list[Card] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    directory: Path | None = None
    driver_version: str | None = None

    def variables(self) -> dict[str, str]:
        """The environment, and the pool's sizes, by which a launcher can tell what is too much."""
        return {**self.environment, "ACB_POOL": format_pool(gpu.capacity for gpu in self.gpus)}

    def driver_tier(self, choice: str, journal: Journal) -> DriverTier | None:
        """What has the driver move memory, as ``--driver-tier`` has it: ``auto``, ``on`` or ``off``."""
        if self.cards:
            return DriverTier(journal, SIMULATED_TIER, self.environment, migrates=True) if choice == "on" else None
        major = (self.driver_version or "").partition(".")[0]
        branch = int(major) if major.isdigit() else 0
        if choice == "on" or (choice == "auto" and branch >= CHECKPOINT_SINCE):
            return DriverTier(journal, migrates=branch >= MIGRATION_SINCE)
        return None

    def meter(self) -> Meter | None:
        """What tells how much each process holds of a real GPU. (Simulated ones are asked with every message.)"""
        if self.cards:
            return None
        from acb.devices import nvml

        try:
            return Meter(nvml.Nvml().processes)  # open for the broker's life
        except nvml.NvmlError:
            return None

    def close(self) -> None:
        """Leave the simulated cards; they are removed unless a program still uses them, or with the last that does."""
        if self.directory is not None:
            from acb.devices import simulated_folder

            simulated_folder.leave(self.directory)


def parse_gpu_list(text: str) -> list[str]:
    """``0,1`` or UUIDs; ``all``. Raises ConfigError when an entry is missing or given twice."""
    entries = [entry.strip() for entry in text.split(",")]
    if "" in entries or len(set(entries)) != len(entries):
        raise ConfigError(f"{text!r} is not a list of GPUs; write ordinals or UUIDs, each once, such as 0,1")
    return entries


def real(chosen: Sequence[str] | None) -> Pool:
    """The machine's GPUs, or those chosen. Raises ConfigError when there are none, or one is unknown.

    One that cannot be lent (it is divided by MIG, say) is left out of all, and refused where it was chosen.
    """
    from acb.devices import nvml

    try:
        with nvml.Nvml() as session:
            found, version = session.devices, session.driver_version()
            indices = {device.uuid: device.ordinal for device in session.all}
            obstacles = {device: session.settings(device.uuid).obstacle(device) for device in found}
    except nvml.NvmlError as error:
        raise ConfigError(
            f"{error}; to try acb without a GPU, simulate one: --simulate-gpus 1x2GiB", EX_UNAVAILABLE
        ) from None
    if not found:
        reason = nvml.mig_obstacle(found, os.environ.get("CUDA_VISIBLE_DEVICES")) or "this job may use no GPU"
        raise ConfigError(f"{reason}; to try acb without a GPU, simulate one: --simulate-gpus 1x2GiB", EX_UNAVAILABLE)
    known = {str(d.ordinal): d for d in found} | {d.uuid: d for d in found}
    every = chosen in (None, ["all"])
    for entry in chosen or ():
        if (obstacle := nvml.mig_obstacle((), entry)) is not None:
            raise ConfigError(obstacle, EX_UNAVAILABLE)
    picked = found if every else [_pick(known, entry) for entry in chosen or ()]
    lendable = [device for device in picked if obstacles[device] is None]
    if not lendable or not every:
        for device in picked:
            if (obstacle := obstacles[device]) is not None:
                raise ConfigError(obstacle, EX_UNAVAILABLE)
    picked = lendable
    gpus = [Gpu(device.ordinal, device.capacity, device.uuid, kind=device.name) for device in picked]
    words = ", ".join(f"{device.name} ({format_size(device.capacity)})" for device in picked)
    # By which a program's own CUDA_VISIBLE_DEVICES is understood: see acb.client.visible.
    devices = [f"{'' if device in picked else '-'}{indices[device.uuid]}={device.uuid}" for device in found]
    return Pool(gpus, words, environment={"ACB_DEVICES": ",".join(devices)}, driver_version=version)


def simulated(spec: SimulatedSpec, chosen: Sequence[str] | None) -> Pool:
    """Simulated GPUs. Raises ConfigError when their files cannot be made, or an unknown one is chosen."""
    from acb.devices import simulated_folder
    from acb.devices.simulated import Card, CardError

    ordinals = {str(n): n for n in range(len(spec.capacities))}
    picked = (
        list(ordinals.values()) if chosen in (None, ["all"]) else [_pick(ordinals, entry) for entry in chosen or ()]
    )
    directory = simulated_dir(spec)
    simulated_folder.sweep(directory.parent)
    try:
        simulated_folder.enter(directory, spec)
        cards = [Card.open(directory, n) for n in picked]
    except (CardError, OSError) as error:
        simulated_folder.leave(directory)
        raise ConfigError(f"cannot make the simulated GPUs in {directory}: {error}", EX_CANTCREAT) from None
    return Pool(
        [Gpu(n, spec.capacities[n], str(n), kind="simulated") for n in picked],
        describe_simulated(spec.capacities[n] for n in picked),
        cards,
        {"ACB_SIMULATED": str(directory), "ACB_SIMULATED_GPUS": str(spec)},
        directory,
    )


def _pick(known: dict[str, T], entry: str) -> T:
    if entry not in known:
        raise ConfigError(f"there is no GPU {entry!r} here; there are: {', '.join(known)}", EX_DATAERR)
    return known[entry]
