"""Hooks of Triton: the gate in front of every kernel that a program launches itself.

Triton has neither memory nor streams of its own: it takes PyTorch's, and so its launches are regions of PyTorch's
hooks. Known are Triton 2.0 to 3.9; of a version that is built otherwise, the parts that do not fit are left out.
"""

from __future__ import annotations

from types import ModuleType


def install(triton: ModuleType) -> None:
    """Gate Triton; called once, when ``import triton`` is done. PyTorch may be imported later, or never."""
    from acb.client.runtime import client, warn_once

    if not client().gating or getattr(triton, "_acb_installed", False):
        return
    triton._acb_installed = True  # type: ignore[attr-defined]  # kept when the module is reloaded
    from acb.hooks.torch import patching
    from acb.hooks.triton import launches

    patching.apply(patching.Patches(), launches.STEPS, warn_once, "Triton")
