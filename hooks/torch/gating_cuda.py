"""Gating of ``torch.cuda``: first use, synchronisation, streams, events, graphs, allocator, legacy constructors."""

from __future__ import annotations

import functools
import sys
import weakref
from typing import Any

import torch

from acb.hooks.torch import devices, reach
from acb.hooks.torch.patching import Patches
from acb.hooks.torch.regions import Stretch, always, first_use, gated, when_used

cuda: Any = torch.cuda

_CALLS = (
    "synchronize ipc_collect set_device current_blas_handle current_solver_handle can_device_access_peer "
    "make_graphed_callables _sleep"
)
_MEMORY_CALLS = (
    "empty_cache mem_get_info caching_allocator_alloc caching_allocator_delete set_per_process_memory_fraction "
    "change_current_allocator list_gpu_processes"
)
_ACCELERATOR_CALLS = "synchronize empty_cache set_device_index get_memory_info"


def patch_first_use(patches: Patches) -> None:
    """torch.cuda._lazy_init(): which GPU this process is bound to is only known once the gate has let it in."""
    original = cuda._lazy_init

    @functools.wraps(original)
    def _lazy_init() -> Any:
        if cuda.is_initialized():
            return original()
        return first_use(original)

    for name, module in list(sys.modules.items()):
        if name.startswith("torch.cuda") and vars(module).get("_lazy_init") is original:
            patches.set(module, "_lazy_init", _lazy_init)


def patch_availability(patches: Patches) -> None:
    """torch.cuda.is_available() asks NVML: the CUDA runtime would fix which GPU the process sees too early."""
    if hasattr(cuda, "_nvml_based_avail"):
        patches.replace(cuda, "_nvml_based_avail", lambda original: functools.wraps(original)(lambda: True))


def patch_calls(patches: Patches) -> None:
    """Functions of torch.cuda that reach the driver. Before the first use they do nothing, or pass first_use()."""

    def make(original: Any) -> Any:
        return gated(original, when_used)

    patches.replace_all(cuda, _CALLS.split(), make)
    patches.replace_all(cuda.memory, _MEMORY_CALLS.split(), make, cuda)
    if hasattr(torch, "accelerator"):
        patches.replace_all(torch.accelerator, _ACCELERATOR_CALLS.split(), make)


def patch_streams_and_events(patches: Patches) -> None:
    """Streams and events. Making one can be a process's first use of the GPU; later it is the host's business."""

    def unused(args: Any, kwargs: Any) -> bool:
        return not cuda.is_initialized()

    for kind, names in (
        (cuda.Stream, "wait_event wait_stream record_event query synchronize"),
        (cuda.Event, "record wait query elapsed_time synchronize"),
    ):
        patches.replace_all(kind, names.split(), lambda original: gated(original, always))
        patches.set(kind, "__new__", staticmethod(gated(kind.__new__, unused)))


def patch_graphs(patches: Patches) -> None:
    """CUDA graphs hold raw addresses: from its capture on, a graph keeps this process's memory where it is.

    A capture is one region: a wait for the device in the midst of it, as for giving the lease back, would spoil it.
    """
    kind = cuda.CUDAGraph
    capture, end = gated(kind.capture_begin, always), gated(kind.capture_end, always)
    capturing: weakref.WeakKeyDictionary[Any, Stretch] = weakref.WeakKeyDictionary()

    @functools.wraps(kind.capture_begin)
    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        new = reach.captured(self)
        stretch = Stretch()
        stretch.enter()
        try:
            result = capture(self, *args, **kwargs)
        except BaseException:
            stretch.exit()
            if new:
                reach.uncaptured(self)
            raise
        capturing[self] = stretch
        return result

    def ended(self: Any) -> None:
        stretch = capturing.pop(self, None)
        if stretch is not None:
            stretch.exit()

    @functools.wraps(kind.capture_end)
    def capture_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return end(self, *args, **kwargs)
        finally:
            ended(self)

    patches.set(kind, "capture_begin", capture_begin)
    patches.set(kind, "capture_end", capture_end)
    patches.replace_all(kind, ("replay", "instantiate"), lambda original: gated(original, always))

    @functools.wraps(kind.reset)
    def reset(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = released(self, *args, **kwargs)
        finally:
            ended(self)
        reach.uncaptured(self)
        return result

    released = gated(kind.reset, always)
    patches.set(kind, "reset", reset)


def patch_comm(patches: Patches) -> None:
    """Copies between GPUs."""
    import torch.nn.parallel.comm as comm

    names = ("broadcast", "broadcast_coalesced", "reduce_add", "reduce_add_coalesced", "scatter", "gather")
    patches.replace_all(comm, names, gated)


# --- legacy constructors --------------------------------------------------------------------------------------------


class _LegacyType(type):
    """The type of stand-ins for ``torch.cuda.FloatTensor`` and its kin, whose C types cannot be patched."""

    _legacy: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return gated(cls._legacy, always, retried=True)(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls._legacy)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls._legacy, name)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls._legacy

    def __hash__(cls) -> int:
        return hash(cls._legacy)

    def __repr__(cls) -> str:
        return repr(cls._legacy)


def patch_legacy_constructors(patches: Patches) -> None:
    """``torch.cuda.FloatTensor(...)`` and its kin, and torch.set_default_tensor_type(), which wants the real ones."""
    for name, legacy in list(vars(cuda).items()):
        if name.endswith("Tensor") and type(legacy).__name__ == "tensortype":
            stand_in = _LegacyType(f"torch.cuda.{name}", (), {"_legacy": legacy, "__module__": "torch.cuda"})
            patches.set(cuda, name, stand_in)
    original = torch.set_default_tensor_type

    @functools.wraps(original)
    def set_default_tensor_type(t: Any) -> None:
        if isinstance(t, str) and t.startswith("torch.cuda."):
            t = getattr(cuda, t.rpartition(".")[2], t)
        original(vars(t)["_legacy"] if isinstance(t, _LegacyType) else t)

    patches.set(torch, "set_default_tensor_type", set_default_tensor_type)


# --- storages -------------------------------------------------------------------------------------------------------

_STORAGE_METHODS = (
    "copy_ fill_ resize_ __getitem__ __setitem__ nbytes size __len__ data_ptr new tolist clone cpu to type pin_memory "
    "_write_file _set_from_file _byteswap share_memory_"
)


def storage_touches(args: Any, kwargs: Any) -> bool:
    """Whether a storage, another one given to it, or a device named, is gated."""
    return (
        args[0].device.type in devices.GATED
        or any(isinstance(value, torch.UntypedStorage) and value.device.type in devices.GATED for value in args[1:])
        or devices.touches(args[1:], kwargs)
    )


def patch_storages(patches: Patches) -> None:
    """Storages, which function modes do not see; also their sizes, which are zero while they are evacuated."""
    kind: Any = torch.UntypedStorage

    def moves(args: Any, kwargs: Any) -> bool:
        return "cuda" in devices.GATED or storage_touches(args, kwargs)

    patches.replace_all(kind, _STORAGE_METHODS.split(), lambda original: gated(original, storage_touches))
    patches.replace(kind, "cuda", lambda original: gated(original, moves))
    share = kind._share_cuda_

    @functools.wraps(share)
    def _share_cuda_(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = share(self, *args, **kwargs)
        reach.pin_storage(self, "is shared with another process")
        return handle

    patches.set(kind, "_share_cuda_", gated(_share_cuda_, storage_touches))
    make = gated(kind.__new__, lambda args, kwargs: devices.touches(args[1:], kwargs), retried=True)
    patches.set(kind, "__new__", staticmethod(make))


def patch_load(patches: Patches) -> None:
    """torch.load(): the moment when each storage goes to its device; reading the file waits for nobody."""
    import torch.serialization as serialization

    def to_gated(args: Any, kwargs: Any) -> bool:
        return any(devices.names_gated(value) for value in (*args[1:], *kwargs.values()))

    patches.replace(serialization, "default_restore_location", lambda original: gated(original, to_gated, retried=True))


def patch_collectives(patches: Patches) -> None:
    """Collectives of torch.distributed, where there are any."""
    import torch.distributed as distributed

    if not distributed.is_available():
        return
    import torch.distributed.distributed_c10d as c10d

    names = (
        "all_reduce all_reduce_coalesced reduce broadcast all_gather all_gather_into_tensor all_gather_coalesced "
        "gather scatter reduce_scatter reduce_scatter_tensor all_to_all all_to_all_single send recv isend irecv "
        "batch_isend_irecv"
    )
    patches.replace_all(c10d, names.split(), gated, distributed)


STEPS = (
    patch_availability,
    patch_first_use,
    patch_calls,
    patch_streams_and_events,
    patch_graphs,
    patch_comm,
    patch_legacy_constructors,
    patch_storages,
    patch_load,
    patch_collectives,
)
"""In the order in which they are applied."""
