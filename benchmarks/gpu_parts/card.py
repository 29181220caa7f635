"""The GPU that benchmarks.gpu measures: the first that this job may use, if it can be lent and nobody else is on it."""

from __future__ import annotations

import contextlib
import time
from typing import Any, NamedTuple

from benchmarks.gpu_parts.part import GB

OTHERS = 0.05
"""Of its memory, what others may hold: a screen, a monitor."""

PATIENCE = 5.0
"""Seconds for the memory of a part that has been killed to be free again."""


class Card(NamedTuple):
    """The GPU, in words and in bytes; `obstacle`: why there is none to use."""

    facts: dict[str, Any]
    capacity: int
    obstacle: str = ""

    @property
    def simulated(self) -> bool:
        """Whether it is none."""
        return self.facts.get("name") == "simulated"


def simulated(capacity: int) -> Card:
    """One that the CPU plays."""
    return Card({"name": "simulated"}, capacity)


def find() -> Card:
    """The first GPU that this job may use, as NVML describes it."""
    from acb.devices.nvml import Nvml, NvmlError

    try:
        with Nvml() as nvml:
            if not nvml.devices:
                return Card({}, 0, "no NVIDIA GPU: this job may use none")
            device = nvml.devices[0]
            settings = nvml.settings(device.ordinal)
            facts = {
                **device._asdict(), "free": nvml.free(device.ordinal), "driver": nvml.driver_version(),
                "cuda": nvml.cuda_version(), "gpus": len(nvml.devices), **settings._asdict(),
            }  # fmt: skip
            obstacle = settings.obstacle(device)
            return Card(facts, device.capacity, f"no NVIDIA GPU to lend: {obstacle}" if obstacle else "")
    except NvmlError as error:
        words = str(error)
        return Card({}, 0, words if words.startswith("no NVIDIA GPU") else f"no NVIDIA GPU can be found: {words}")


def others(card: Card, patience: float = PATIENCE) -> str:
    """Why a part cannot be played now: so much of the GPU is somebody else's; '' when it is not."""
    if card.simulated or card.obstacle:
        return ""
    from acb.devices.nvml import Nvml, NvmlError

    deadline = time.monotonic() + patience
    try:
        with Nvml() as nvml:
            most = nvml.most(card.facts["uuid"])
            while (taken := most - nvml.free(card.facts["uuid"])) > OTHERS * most:
                if time.monotonic() >= deadline:
                    who = "".join(
                        f", process {pid}{'' if nbytes is None else f' {nbytes / GB:.1f} GB'}"
                        for pid, nbytes in _processes(nvml, card.facts["uuid"]).items()
                    )
                    return (
                        f"somebody else holds {taken / GB:.1f} of {most / GB:.1f} GB of {card.facts['name']}{who}; "
                        "wait for its end, or choose another GPU with CUDA_VISIBLE_DEVICES"
                    )
                time.sleep(0.1)
    except NvmlError as error:
        return str(error)
    return ""


def _processes(nvml: Any, uuid: str) -> dict[int, int | None]:
    """Who they are, as far as the driver says."""
    from acb.devices.nvml import NvmlError

    with contextlib.suppress(NvmlError):
        found: dict[int, int | None] = nvml.processes(uuid)
        return found
    return {}
