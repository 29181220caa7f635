"""Which device a PyTorch program runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING or __package__:
    from .program import InputError
else:
    from program import InputError


def choose_device(wanted: str | None) -> torch.device:
    """Return the device asked for, by default the GPU where there is one; raise InputError where it is missing."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise InputError("--device cuda: PyTorch sees no CUDA device here; --device cpu works without one")
    return torch.device(wanted or ("cuda" if available else "cpu"))
