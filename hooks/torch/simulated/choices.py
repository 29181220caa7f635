"""Where PyTorch's Python code chooses how to compute by the kind of device: here always as on the CPU.

That keeps results the same, bit for bit, as without the simulated GPU.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from acb.hooks.torch.patching import Patches
from acb.hooks.torch.simulated.ledger import Ledger
from acb.hooks.torch.simulated.places import CPU, CUDA, current, device_of


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


def patch_parsing(patches: Patches, ledger: Ledger) -> None:
    """Module.to() has its arguments parsed in C++, which knows no ordinals of GPUs and no tensors there."""
    original = torch._C._nn._parse_to

    @functools.wraps(original)
    def _parse_to(*args: Any, **kwargs: Any) -> Any:
        if args and (args[0].__class__ is int or isinstance(args[0], torch.Tensor)):
            like: Any = args[0]
            parsed = original(*args[1:], **kwargs)
            if like.__class__ is int:
                return device_of(like), *parsed[1:]
            return like.device, like.dtype, *parsed[2:]
        if kwargs.get("device").__class__ is int:
            kwargs["device"] = device_of(kwargs["device"])
        return original(*args, **kwargs)

    patches.set(torch._C._nn, "_parse_to", _parse_to)


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


def patch_script_load(patches: Patches, ledger: Ledger) -> None:
    """torch.jit.load(): the C++ code that reads parameters knows no GPU, so they are moved when they have been read."""
    import torch.jit._serialization as serialization

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
            device = None if map_location is None else device_of(map_location)
            if device is None or device.type != "cuda":
                return original(f, map_location, *args, **kwargs)
            return original(f, CPU, *args, **kwargs).to(device)

        return load

    patches.replace(serialization, "load", make, torch.jit)


def patch_ctc_loss(patches: Patches, ledger: Ledger) -> None:
    """torch.ctc_loss() takes lengths on the host and moves them to the device in C++ code, which sees no difference."""
    original = torch.ctc_loss

    @functools.wraps(original)
    def ctc_loss(
        log_probs: Any, targets: Any, input_lengths: Any, target_lengths: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(input_lengths, torch.Tensor) and isinstance(target_lengths, torch.Tensor):
            input_lengths, target_lengths = input_lengths.to(log_probs.device), target_lengths.to(log_probs.device)
        return original(log_probs, targets, input_lengths, target_lengths, *args, **kwargs)

    patches.set(torch, "ctc_loss", ctc_loss)


def patch_profiler(patches: Patches, ledger: Ledger) -> None:
    """Profiles asked for the GPU have the CPU's part alone: there is nothing in C++ to record the other."""
    kind: Any = torch.autograd.profiler.profile
    original = kind.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("use_device") == "cuda":
            kwargs["use_device"] = None
        original(self, *args, **kwargs)

    patches.set(kind, "__init__", __init__)


def patch_data_parallel(patches: Patches, ledger: Ledger) -> None:
    """torch.nn.DataParallel, and torch.cuda.comm, on which it stands: copies between GPUs, in C++ code that is missing
    in a build without them.
    """

    def _broadcast(tensor: Any, devices: list[int]) -> list[Any]:
        return [tensor.to(CUDA[index]) for index in devices]

    def _broadcast_out(tensor: Any, out: list[Any]) -> list[Any]:
        return [target.copy_(tensor) for target in out]

    def _broadcast_coalesced(tensors: list[Any], devices: list[int], buffer_size: int) -> list[list[Any]]:
        return [[tensor.to(CUDA[index]) for tensor in tensors] for index in devices]

    def _scatter(tensor: Any, devices: list[int], sizes: Any, dim: int, streams: Any) -> list[Any]:
        parts = tensor.chunk(len(devices), dim) if sizes is None else tensor.split(list(sizes), dim)
        return [part.contiguous().to(CUDA[index]) for part, index in zip(parts, devices, strict=False)]

    def _scatter_out(tensor: Any, out: list[Any], dim: int, streams: Any) -> list[Any]:
        parts = tensor.split([target.size(dim) for target in out], dim)
        return [target.copy_(part) for target, part in zip(out, parts, strict=True)]

    def _gather(tensors: list[Any], dim: int, destination: int | None) -> Any:
        place = CPU if destination == -1 else CUDA[current() if destination is None else destination]
        return torch.cat([tensor.to(place) for tensor in tensors], dim)

    def _gather_out(tensors: list[Any], out: Any, dim: int) -> Any:
        return out.copy_(_gather(tensors, dim, out.get_device()))

    def get_stream(device: Any) -> Any:
        return None if device.type == "cpu" else torch.cuda.Stream(device)

    def forward(ctx: Any, target_gpus: Any, chunk_sizes: Any, dim: int, input: Any) -> Any:
        # As PyTorch's own, but for torch.device(0), which such a build does not know either.
        ctx.dim, ctx.input_device = dim, input.get_device()
        parts = torch.nn.parallel.comm.scatter(input, target_gpus, chunk_sizes, dim)
        return tuple(map(torch.view_as_complex, parts)) if input.is_complex() else parts

    import torch.nn.parallel._functions as parallel

    patches.set(parallel, "_get_stream", get_stream)
    patches.set(parallel.Scatter, "forward", staticmethod(forward))
    patches.set(torch.cuda.nccl, "is_available", lambda tensors: False)
    for function in (_broadcast, _broadcast_out, _broadcast_coalesced, _scatter, _scatter_out, _gather, _gather_out):
        patches.set(torch._C, function.__name__, function)


def patch_pinning_threads(patches: Patches, ledger: Ledger) -> None:
    """The thread that pins batches asks for one computing thread, which later threads of the program would take over.

    Without a GPU there is no such thread, and how many threads compute a sum changes its last bits.
    """
    from torch.utils.data._utils import pin_memory

    original = torch.set_num_threads
    pinning = pin_memory._pin_memory_loop.__code__

    @functools.wraps(original)
    def set_num_threads(count: int) -> None:
        if sys._getframe(1).f_code is not pinning:
            original(count)

    patches.set(torch, "set_num_threads", set_num_threads)


STEPS = (
    patch_parsing,
    patch_foreach,
    patch_grouping,
    patch_cudnn,
    patch_compile,
    patch_script_load,
    patch_ctc_loss,
    patch_pinning_threads,
    patch_profiler,
    patch_data_parallel,
)
