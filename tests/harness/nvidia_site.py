"""A site on the machine's NVIDIA GPUs. Nothing here has a CUDA context: the device is asked through NVML alone."""

from __future__ import annotations

import os
from typing import Any

import pytest
from broker_harness import MIB, Program, Site

from acb.devices.nvml import Device, Nvml

NOISE = 32 * MIB
"""Bytes: far less than a CUDA context takes."""

VARIABLE = "CUDA_VISIBLE_DEVICES"


class NvidiaSite(Site):
    """See Site. Tests take a GPU to have 64 units, so on a larger one less than all of it is used: see its methods."""

    place = "nvidia"
    unit = 100 * MIB
    patience = 150.0  # the driver tier moves a few gigabytes a second, and three programs wait for each other
    slack = 2048 * MIB
    """CUDA's contexts and the libraries' workspaces of three processes."""

    def __init__(self, memory: str = "torch") -> None:
        super().__init__("torch")
        self._nvml = Nvml()
        self._before = [self._nvml.free(device.ordinal) for device in self.gpus]
        self._lent = 1

    @property
    def gpus(self) -> list[Device]:
        """Those that this job may use."""
        return self._nvml.devices

    def index(self, ordinal: int) -> int:
        """A GPU's place in the machine."""
        return next(device.ordinal for device in self._nvml.all if device.uuid == self.gpus[ordinal].uuid)

    def environment(self, **changes: str | None) -> dict[str, str]:
        """As in Site, but the job's GPUs stay the job's."""
        return super().environment(**{VARIABLE: os.environ.get(VARIABLE), **changes})

    def which(self, gpus: str) -> list[str]:
        """As many of the machine's as Site.start() is asked for."""
        self._lent = int(gpus.partition("x")[0])
        self.needs(self._lent)
        return ["--gpu-list", ",".join(str(device.ordinal) for device in self.gpus[: self._lent])]

    def needs(self, count: int) -> None:
        """Skip the test where there are not so many GPUs."""
        if len(self.gpus) < count:
            pytest.skip(f"{'one GPU' if len(self.gpus) == 1 else f'{len(self.gpus)} GPUs'} here, this needs {count}")

    def capacity(self, ordinal: int = 0) -> int:
        return self.gpus[ordinal].capacity

    def processes(self, ordinal: int = 0) -> dict[int, int]:
        """As NVML says; in a container that has process ids of its own, no id here is one of ours."""
        return {pid: nbytes or 0 for pid, nbytes in self._nvml.processes(ordinal).items()}

    def used(self, ordinal: int = 0) -> int:
        """Bytes that are in use beyond those that were so when the site was made; 0 when it is the driver's noise."""
        used = self._before[ordinal] - self._nvml.free(ordinal)
        return used if used > NOISE else 0

    @staticmethod
    def complaints(program: Program) -> str:
        """Of acb, and of Python: frameworks and libraries say what they like."""
        return "\n".join(line for line in program.errors.splitlines() if "acb" in line or "Traceback" in line)

    def violations(self) -> list[Any]:
        """A real GPU has no referee."""
        return []

    def program(self, **changes: str | None) -> Program:
        needs_cuda("torch")
        return super().program(**changes)

    def leave_nothing(self) -> None:
        super().leave_nothing()
        self._nvml.close()


def needs_cuda(framework: str) -> None:
    """Skip the test where this framework cannot use a GPU. Starts no CUDA."""
    if framework == "torch":
        torch: Any = pytest.importorskip("torch")
        if torch.version.cuda is None:
            pytest.skip("PyTorch's CPU build")
    else:
        pytest.importorskip("jax")
        from acb.hooks.jax.gate import _has_cuda_plugin

        if not _has_cuda_plugin():
            pytest.skip("JAX without its CUDA plugin")
