"""Tensors without memory, with which torch.export and its kin trace programs, as if there were a GPU.

Python code sees such a tensor on ``cuda``, so that what is traced is what a real GPU would give. PyTorch's C++ code is
told that it is on the CPU: it asks the device for what a build without CUDA lacks, at places where an exception aborts
the process.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from acb.hooks.torch.patching import Patches
from acb.hooks.torch.simulated.ledger import Ledger
from acb.hooks.torch.simulated.places import CPU

_where_is: Any = torch.ops.prim.device.default
"""How C++ code asks for the device of a tensor whose class is Python's; Python code reads an attribute."""


def patch_fake_devices(patches: Patches, ledger: Ledger) -> None:
    """What C++ code is told."""

    def told(answer: Any) -> Any:
        return CPU if isinstance(answer, torch.device) and answer.type == "cuda" else answer

    of_tensor: Any = FakeTensor.__torch_dispatch__.__func__
    of_mode: Any = FakeTensorMode.__torch_dispatch__

    @functools.wraps(of_tensor)
    def by_tensor(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = of_tensor(cls, func, types, args, kwargs or {})
        return told(answer) if func is _where_is else answer

    @functools.wraps(of_mode)
    def by_mode(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = of_mode(self, func, types, args, kwargs or {})
        return told(answer) if func is _where_is else answer

    patches.set(FakeTensor, "__torch_dispatch__", classmethod(by_tensor))
    patches.set(FakeTensorMode, "__torch_dispatch__", by_mode)


def patch_fake_attributes(patches: Patches, ledger: Ledger) -> None:
    """What Python code reads, but for ``.device``, comes from C++ code."""

    def is_cuda(self: Any) -> bool:
        return bool(self.device.type == "cuda")

    def is_cpu(self: Any) -> bool:
        return bool(self.device.type == "cpu")

    def get_device(self: Any) -> int:
        return int(self.device.index or 0) if self.device.type == "cuda" else -1

    for function in (is_cuda, is_cpu):
        patches.set(FakeTensor, function.__name__, property(function))
    patches.set(FakeTensor, "get_device", get_device)


def patch_fake_mixing(patches: Patches, ledger: Ledger) -> None:
    """What C++ code then makes beside such a tensor says that it is on the CPU: it joins those on the GPU.

    So is what the program has on the CPU by mistake; that is found when the traced program runs.
    """
    original: Any = FakeTensor._find_common_device

    @functools.wraps(original)
    def _find_common_device(func: Any, flat_args: Any) -> Any:
        try:
            return original(func, flat_args)
        except (RuntimeError, AssertionError):
            there = [arg for arg in flat_args if not isinstance(arg, FakeTensor) or arg.fake_device.type != "cpu"]
            if not any(isinstance(arg, FakeTensor) for arg in there) or len(there) == len(flat_args):
                raise
        return original(func, there)

    patches.set(FakeTensor, "_find_common_device", staticmethod(_find_common_device))


STEPS = (patch_fake_devices, patch_fake_attributes, patch_fake_mixing)
