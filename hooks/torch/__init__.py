"""Hooks of PyTorch: the gate in front of everything that uses the GPU, and the evacuator of its memory."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from acb.hooks import require

if TYPE_CHECKING:
    from acb.client.gate import Gate
    from acb.hooks.torch.patching import Patches

_installed = False
_adopting = False
_patches: Patches | None = None


def install(torch: ModuleType) -> None:
    """Simulate the GPU if that was asked for, and gate PyTorch; called once, when ``import torch`` is done.

    Raises RuntimeError for a PyTorch that is too old.
    """
    global _installed
    if _installed:
        return
    _installed = True
    from acb.client.runtime import after_fork, client, warn_once

    this = client()
    if this.gating or this.simulated is not None:
        require("torch", str(torch.__version__))
    if this.simulated is not None:
        from acb.hooks.torch import simulated

        simulated.install(torch)  # first: the sentinel has to lie above its modes
    if not this.gating or not (this.simulated is not None or _built_for_gpus(torch)):
        return
    from acb.hooks.torch import patching, regions
    from acb.hooks.torch.evacuator import TorchEvacuator

    evacuator = TorchEvacuator()  # before the patches, which must never stop it
    install_gating(this.gate)
    if _patches is not None:
        patching.apply(_patches, (evacuator.peaks.patch,), warn_once)
        if this.simulated is None:
            from acb.hooks.torch import binding

            patching.apply(_patches, binding.STEPS, warn_once)
    this.add_evacuator(evacuator)

    def rebuild() -> None:
        child = client()
        regions.after_fork(child.gate)
        child.add_evacuator(evacuator.anew())

    after_fork(rebuild)


def install_gating(gate: Gate) -> None:
    """Put `gate` in front of PyTorch. Every thread started from now on is gated, and so is the calling one."""
    global _adopting, _patches
    from acb.client.runtime import warn_once
    from acb.hooks import threads
    from acb.hooks.torch import extensions, gating, gating_compiled, gating_cuda, patching, regions

    regions.bind(gate)
    if _patches is None:
        _patches = patching.Patches()
        steps = (*gating.STEPS, *gating_compiled.STEPS, *gating_cuda.STEPS, *extensions.STEPS)
        patching.apply(_patches, steps, warn_once)
        if not _adopting:
            _adopting = True
            threads.on_thread_start(regions.adopt_thread)
    regions.adopt_thread()


def uninstall_gating() -> None:
    """Undo install_gating(), for tests: PyTorch as it was, but for optimizer classes, whose steps pass an open gate."""
    global _patches
    from acb.hooks.torch import regions

    regions.release_thread()
    regions.unbind()
    if _patches is not None:
        _patches.undo()
        _patches = None


def gate_device_type(name: str) -> None:
    """Gate the tensors of another device type as well, such as ``cpu``: to measure gating without a GPU.

    Installs the gating if this build of PyTorch has no GPU and none is simulated.
    """
    from acb.client.runtime import client
    from acb.hooks.torch import devices

    devices.gate_device_type(name)
    if _patches is None:
        install_gating(client().gate)


def _built_for_gpus(torch: Any) -> bool:
    """Whether this PyTorch can use a GPU at all."""
    return bool(torch.version.cuda is not None or torch.version.hip is not None)
