"""Where PyTorch's Python code chooses how to compute by the kind of device: here always as on the CPU.

That keeps results the same, bit for bit, as without the simulated GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from acb.hooks.torch.patching import Patches
from acb.hooks.torch.simulated.ledger import Ledger


def patch_foreach(patches: Patches, ledger: Ledger) -> None:
    """Optimizers loop over parameters on a CPU, and use multi-tensor operations on a GPU, unless told otherwise."""
    import torch.optim.optimizer as optimizer
    import torch.optim.swa_utils as swa_utils

    for module in (optimizer, swa_utils):
        original = getattr(module, "_get_foreach_kernels_supported_devices", None)
        if original is not None:
            without = functools.partial(_without_cuda, original)
            patches.set(module, "_get_foreach_kernels_supported_devices", without)


def _without_cuda(original: Any) -> list[str]:
    return [kind for kind in original() if kind != "cuda"]


def patch_grouping(patches: Patches, ledger: Ledger) -> None:
    """Tensors are grouped by device for multi-tensor operations, in C++ code that takes all for the CPU's."""
    original = torch._C._group_tensors_by_device_and_dtype

    def grouped(lists: Any, with_indices: bool = False) -> Any:
        groups = original(lists, True)
        result = {}
        for (_, dtype), (tensors, indices) in groups.items():
            places = [tensor.device for tensor in tensors[0]]
            for place in dict.fromkeys(places):
                chosen = [i for i, device in enumerate(places) if device == place]
                split = [[column[i] for i in chosen] if column else column for column in tensors]
                result[(place, dtype)] = (split, [indices[i] for i in chosen] if with_indices else [])
        return result

    patches.set(torch._C, "_group_tensors_by_device_and_dtype", grouped)


def patch_cudnn(patches: Patches, ledger: Ledger) -> None:
    """Recurrent networks ask whether cuDNN would do; a build without it would warn."""
    patches.set(torch.backends.cudnn, "is_acceptable", lambda tensor: False)


def patch_compile(patches: Patches, ledger: Ledger) -> None:
    """torch.compile(): compiled code would bypass the ledger, so functions run as they are written."""
    original = torch.compile

    @functools.wraps(original)
    def compile(model: Any = None, **kwargs: Any) -> Any:
        if model is None:
            return lambda model: compile(model, **kwargs)
        import torch._dynamo.config as config

        patches.set(config, "disable", True)
        return original(model, backend="eager")

    patches.set(torch, "compile", compile)


STEPS = (patch_foreach, patch_grouping, patch_cudnn, patch_compile)
