"""Late binding: what would start CUDA, or fix which GPUs it sees, before the broker has said which they are.

CUDA reads CUDA_VISIBLE_DEVICES once, when it is initialised in a process (``cuInit``), and the broker's grant sets it.
So until this process is bound,

- how many GPUs there are is answered without asking CUDA: as many as the program will see;
- questions that only a GPU can answer (its name, its properties, its free memory, which one is current) and calls that
  need a context (pinned memory, generators, NCCL) pass first_use(): they bind the process, at the price of a lease;
- the few that ask whether something has happened on the device yet are answered "no".

Once it is bound all is PyTorch's own, ordinals beyond the last GPU and their errors too. Pinned memory passes the gate
only once, for it lies on the host: a data loader pins in CPU phases, too, and must not fetch the GPU for that. (What
happens then in a suspended program: acb.client.outside.) Not for the simulated GPU, which has no context to start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from acb.client import runtime, visible
from acb.hooks.torch import devices, regions
from acb.hooks.torch.patching import Patches

cuda: Any = torch.cuda


def unbound() -> bool:
    """Whether CUDA has not started here, and it is not known yet which GPUs it is to see."""
    return not cuda.is_initialized() and not visible.hidden() and not runtime.client().bound


def bind() -> None:
    """Start CUDA behind the gate, unless it has started or has no GPU to start on."""
    if not cuda.is_initialized() and not visible.hidden() and not cuda._is_in_bad_fork():
        cuda._lazy_init()


def _binding(original: Any, concerns: Callable[..., bool] = lambda *args, **kwargs: True) -> Any:
    """`original`, after bind() if ``concerns(*args, **kwargs)``."""

    @functools.wraps(original)
    def bound(*args: Any, **kwargs: Any) -> Any:
        if not cuda.is_initialized() and concerns(*args, **kwargs):
            bind()
        return original(*args, **kwargs)

    return bound


def _answered(original: Any, answer: Callable[[], Any]) -> Any:
    """`original` in a process that is bound; before that what `answer` says."""

    @functools.wraps(original)
    def answered(*args: Any, **kwargs: Any) -> Any:
        return answer() if unbound() else original(*args, **kwargs)

    return answered


def _outside(original: Any) -> Any:
    """`original`, a call of the driver outside regions that lets the interpreter's lock go."""

    @functools.wraps(original)
    def noted(*args: Any, **kwargs: Any) -> Any:
        return runtime.client().outside.run(original, *args, **kwargs)

    return noted


def _count() -> int:
    return runtime.client().count


def patch_counts(patches: Patches) -> None:
    """How many GPUs there are. Versions of PyTorch that remember the answer are only asked once it is right."""
    for owner, name in ((cuda, "device_count"), (cuda, "_device_count_nvml"), (torch._C, "_cuda_getDeviceCount")):
        if hasattr(owner, name):
            patches.replace(owner, name, lambda original: _answered(original, _count))


def patch_history(patches: Patches) -> None:
    """Whether a graph is being captured (which optimizers ask on the CPU too) or a GPU has a context: not yet."""
    import torch.cuda.graphs as graphs

    for owner in (graphs, torch._C):
        if hasattr(owner, "_cuda_isCurrentStreamCapturing"):
            patches.replace(
                owner, "_cuda_isCurrentStreamCapturing", lambda original: _answered(original, lambda: False)
            )
    if hasattr(torch._C, "_cuda_hasPrimaryContext"):
        patches.replace(torch._C, "_cuda_hasPrimaryContext", lambda original: _answered(original, lambda: False))


def patch_current_device(patches: Patches) -> None:
    """Which GPU is current: PyTorch's C++ starts CUDA for it, some versions without telling Python."""

    def chooses(index: Any = 0, *rest: Any) -> bool:
        return not isinstance(index, int) or index >= 0  # a negative one changes nothing

    for owner, names in (
        (torch._C, "_cuda_setDevice _cuda_exchangeDevice _cuda_maybeExchangeDevice _cuda_getDevice"),
        (torch._C, "_accelerator_setDeviceIndex _accelerator_exchangeDevice _accelerator_maybeExchangeDevice"),
        (cuda, "_exchange_device _maybe_exchange_device"),
    ):
        patches.replace_all(owner, names.split(), lambda original: _binding(original, chooses))


def patch_accelerator(patches: Patches) -> None:
    """torch.accelerator: which kind there is takes CUDA's own count in C++, which is never taken back."""
    for name in ("_accelerator_getAccelerator", "_get_accelerator"):
        if hasattr(torch._C, name):
            patches.replace(torch._C, name, lambda original: _answered(original, lambda: torch.device("cuda")))
    names = (
        "_accelerator_getDeviceIndex _accelerator_getDeviceCapability _accelerator_getStream _accelerator_setStream "
        "_accelerator_getMemoryInfo"
    )
    patches.replace_all(torch._C, names.split(), _binding)
    if hasattr(torch, "accelerator"):
        patches.replace_all(torch.accelerator, ("device_count",), lambda original: _answered(original, _count))


def patch_pinned_memory(patches: Patches) -> None:
    """The first pinned buffer starts CUDA. (Those of factories, ``torch.empty(pin_memory=True)``: see `devices`.)"""
    kind: Any = torch.Tensor
    patches.replace(kind, "pin_memory", lambda original: _binding(_outside(original)))
    patches.replace(kind, "is_pinned", lambda original: _answered(_outside(original), lambda: False))


class _GeneratorType(type):
    """The type of the stand-in for torch.Generator, a C type that cannot be patched."""

    def __call__(cls, device: Any = None, *args: Any, **kwargs: Any) -> Any:
        if device is None:
            return torch._C.Generator(*args, **kwargs)
        if devices.names_gated(device):
            bind()
        return torch._C.Generator(device, *args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, torch._C.Generator)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, torch._C.Generator)


def patch_generators(patches: Patches) -> None:
    """``torch.Generator(device="cuda")``, which counts the GPUs in C++."""
    stand_in = _GeneratorType("Generator", (), {"__module__": "torch", "__doc__": torch._C.Generator.__doc__})
    patches.set(torch, "Generator", stand_in)


def patch_process_groups(patches: Patches) -> None:
    """torch.distributed's NCCL counts the GPUs in C++ when a group is made, often before the worker chooses its own."""
    import torch.distributed as distributed

    if not distributed.is_available():
        return
    import torch.distributed.distributed_c10d as c10d

    def on_gpus(*args: Any, **kwargs: Any) -> bool:
        named = [str(value).lower() for value in (*args, *kwargs.values()) if isinstance(value, (str, c10d.Backend))]
        said = [name for name in named if "nccl" in name or "gloo" in name or "mpi" in name]
        return c10d.is_nccl_available() and (any("nccl" in name for name in said) or not said)

    for name in ("init_process_group", "new_group"):
        patches.replace(c10d, name, lambda original: _binding(original, on_gpus), distributed)


def patch_memory_questions(patches: Patches) -> None:
    """How much memory is free: the question makes a context, so even the first one is a region."""

    def asks(args: Any, kwargs: Any) -> bool:
        return not visible.hidden()

    patches.replace(cuda.memory, "mem_get_info", lambda original: regions.gated(original, asks), cuda)
    if hasattr(torch, "accelerator"):
        patches.replace_all(torch.accelerator, ("get_memory_info",), lambda original: regions.gated(original, asks))


STEPS = (
    patch_counts,
    patch_history,
    patch_current_device,
    patch_accelerator,
    patch_pinned_memory,
    patch_generators,
    patch_process_groups,
    patch_memory_questions,
)
"""In the order in which they are applied."""
