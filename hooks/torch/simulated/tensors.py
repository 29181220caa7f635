"""Methods and attributes of tensors that know about devices: ``.to``, ``.cuda``, ``.device``, ``.numpy`` and kin."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from acb.hooks.torch.patching import Patches
from acb.hooks.torch.simulated import compute, dispatch, places
from acb.hooks.torch.simulated.ledger import NO_STORAGE, Entry, Ledger, address, check
from acb.hooks.torch.simulated.places import CPU, CUDA, device_of

_Base: Any = torch._C.TensorBase
_Tensor: Any = torch.Tensor
_preserve = torch.preserve_format


def legacy_type(name: str) -> tuple[Any, Any] | None:
    """Device and dtype that ``torch.cuda.FloatTensor`` or ``torch.FloatTensor`` mean; None: no such type."""
    prefix, _, kind = name.rpartition(".")
    dtype = LEGACY_DTYPES.get(kind)
    if dtype is None or prefix not in ("torch", "torch.cuda"):
        return None
    return (CUDA[places.current()] if prefix == "torch.cuda" else CPU), dtype


LEGACY_DTYPES = {
    "FloatTensor": torch.float32,
    "DoubleTensor": torch.float64,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "ByteTensor": torch.uint8,
    "CharTensor": torch.int8,
    "ShortTensor": torch.int16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
    "BoolTensor": torch.bool,
}


# --- moving ---------------------------------------------------------------------------------------------------------


class _Move(torch.autograd.Function):  # type: ignore[misc]
    """A copy to another device whose gradient comes back; to PyTorch itself both are on the CPU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Any, source: Any, target: Any, memory_format: Any) -> Any:
        return _copy(tensor, target, memory_format)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.source, ctx.target, _ = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return move(gradient, ctx.target, ctx.source), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Any, *_: Any) -> Any:
        return move(tangent, ctx.source, ctx.target)


def _copy(tensor: Any, target: Any, memory_format: Any) -> Any:
    kwargs = {"memory_format": memory_format} if memory_format is not None else {}
    if target is not CPU and target.type == "cuda":
        return torch.ops.aten._to_copy.default(tensor, device=target, **kwargs)
    return torch.ops.aten._to_copy.default(tensor, device=CPU, pin_memory=False, **kwargs)


def move(tensor: Any, source: Any, target: Any, memory_format: Any = None) -> Any:
    """A copy on the device `target` of a tensor on `source`."""
    with_gradient = torch._C.is_grad_enabled() and tensor.requires_grad
    if with_gradient or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return _Move.apply(tensor, source, target, memory_format)
    return _copy(tensor, target, memory_format)


def patch_moves(patches: Patches, ledger: Ledger) -> None:
    """Tensor.to(), .cuda(), .cpu()."""
    original = _Base.to

    def transfer(tensor: Any, source: Any, target: Any, dtype: Any, memory_format: Any) -> Any:
        """To another device, and to another dtype, which the host's side of the copy sees to."""
        dispatch.enter(ledger)
        if target is not CPU and dtype is not None and dtype is not tensor.dtype:
            return move(original(tensor, dtype), source, target, memory_format)
        moved = move(tensor, source, target, memory_format)
        return moved if dtype is None else original(moved, dtype)

    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if has_torch_function_unary(self):
            return handle_torch_function(_Tensor.to, (self,), self, *args, **kwargs)
        first: Any = args[0] if args else None
        if isinstance(first, torch.dtype):
            return original(self, *args, **kwargs)
        if isinstance(first, _Tensor) or "other" in kwargs:
            other: Any = first if args else kwargs.pop("other")
            device, dtype, rest = other.device, other.dtype, args[1:]
        elif args:
            device, dtype, rest = first, None, args[1:]
            if rest and (rest[0] is None or isinstance(rest[0], torch.dtype)):
                dtype, rest = rest[0], rest[1:]
            elif "dtype" in kwargs:
                dtype = kwargs.pop("dtype")
        else:
            device, dtype, rest = kwargs.pop("device", None), kwargs.pop("dtype", None), ()
        # Left in `rest` and `kwargs`: non_blocking, copy, memory_format.
        if device is not None:
            device = device_of(device)
            if device is not CPU and device.type != "cuda":
                return original(self, device, dtype or self.dtype, *rest, **kwargs)
            here = self.device
            if here != device:
                if here.type != "meta":
                    return transfer(self, here, device, dtype, kwargs.get("memory_format"))
                if device is not CPU:
                    raise NotImplementedError(
                        "Cannot copy out of meta tensor; no data! Please use torch.nn.Module.to_empty() instead of "
                        "torch.nn.Module.to() when moving module from meta to a different device."
                    )
                return original(self, device, dtype or self.dtype, *rest, **kwargs)
        return original(self, dtype or self.dtype, *rest, **kwargs)

    @functools.wraps(_Base.cuda)
    def cuda(self: Any, device: Any = None, non_blocking: bool = False, memory_format: Any = _preserve) -> Any:
        if has_torch_function_unary(self):
            return handle_torch_function(_Tensor.cuda, (self,), self, device, non_blocking, memory_format)
        return to(self, device_of("cuda" if device is None else device), memory_format=memory_format)

    @functools.wraps(_Base.cpu)
    def cpu(self: Any, memory_format: Any = _preserve) -> Any:
        if has_torch_function_unary(self):
            return handle_torch_function(_Tensor.cpu, (self,), self, memory_format)
        return to(self, CPU, memory_format=memory_format)

    @functools.wraps(_Base.type_as)
    def type_as(self: Any, other: Any) -> Any:
        return to(self, other)

    for function in (to, cuda, cpu, type_as):
        patches.set(_Tensor, function.__name__, function)


def patch_type(patches: Patches, ledger: Ledger) -> None:
    """Tensor.type(): names and asks for devices the old way, ``torch.cuda.FloatTensor``."""
    original = _Base.type

    @functools.wraps(original)
    def type(self: Any, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if has_torch_function_unary(self):
            return handle_torch_function(_Tensor.type, (self,), self, dtype, non_blocking, **kwargs)
        if dtype is None:
            name = original(self)
            return name if ledger.entry(self) is None else name.replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, torch.dtype):
            return self.to(dtype)
        wanted = legacy_type(dtype if isinstance(dtype, str) else f"{dtype.__module__}.{dtype.__name__}")
        return original(self, dtype, non_blocking, **kwargs) if wanted is None else self.to(*wanted)

    patches.set(_Tensor, "type", type)


# --- reading --------------------------------------------------------------------------------------------------------


def patch_reading(patches: Patches, ledger: Ledger) -> None:
    """Methods that read memory without an operation: refused for the card, or done on a copy, as on a real GPU."""
    numpy, tolist = _Base.numpy, _Base.tolist

    @functools.wraps(numpy)
    def numpy_(self: Any, *args: Any, force: bool = False) -> Any:
        if has_torch_function_unary(self):
            return handle_torch_function(_Tensor.numpy, (self,), self, *args, force=force)
        if ledger.entry(self) is None:
            return numpy(self, force=force)
        if force:
            return self.detach().cpu().resolve_conj().resolve_neg().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    @functools.wraps(tolist)
    def tolist_(self: Any) -> Any:
        if has_torch_function_unary(self):
            return handle_torch_function(_Tensor.tolist, (self,), self)
        return tolist(self if ledger.entry(self) is None else self.detach().cpu())

    patches.set(_Tensor, "numpy", numpy_)
    patches.set(_Tensor, "tolist", tolist_)


def patch_repr(patches: Patches, ledger: Ledger) -> None:
    """Printing, for which PyTorch switches every mode off."""
    import torch._tensor_str as tensor_str

    original = tensor_str._str

    @functools.wraps(original)
    def _str(self: Any, *args: Any, **kwargs: Any) -> Any:
        entry = ledger.entry(self)
        if entry is None:
            return original(self, *args, **kwargs)
        check(entry, "repr")
        with entry.gpu.card.operation("aten.repr"):
            return original(self, *args, **kwargs)

    patches.set(tensor_str, "_str", _str)


def patch_dlpack(patches: Patches, ledger: Ledger) -> None:
    """DLPack and ``__cuda_array_interface__`` would hand out addresses of a GPU that is not there."""

    def refuse(self: Any) -> None:
        if ledger.entry(self) is not None:
            raise RuntimeError(
                "the simulated GPU cannot share memory with another framework; copy through the host instead"
            )

    dlpack, device = _Tensor.__dlpack__, _Tensor.__dlpack_device__
    interface: Any = _Tensor.__cuda_array_interface__

    @functools.wraps(dlpack)
    def __dlpack__(self: Any, **kwargs: Any) -> Any:
        refuse(self)
        return dlpack(self, **kwargs)

    @functools.wraps(device)
    def __dlpack_device__(self: Any) -> Any:
        refuse(self)
        return device(self)

    def __cuda_array_interface__(self: Any) -> Any:
        if ledger.entry(self) is not None:
            raise AttributeError("a tensor on the simulated GPU has no CUDA array interface")
        return interface.__get__(self)

    patches.set(_Tensor, "__dlpack__", __dlpack__)
    patches.set(_Tensor, "__dlpack_device__", __dlpack_device__)
    patches.set(_Tensor, "__cuda_array_interface__", property(__cuda_array_interface__))


# --- pinned memory, streams -----------------------------------------------------------------------------------------


def patch_pinning(patches: Patches, ledger: Ledger) -> None:
    """Tensor.pin_memory() and .is_pinned(): nothing is page-locked, but the program is told so."""

    def pin_memory(self: Any, device: Any = None) -> Any:
        """Copy the tensor to pinned memory, if it's not already pinned."""
        if has_torch_function_unary(self):
            return handle_torch_function(_Tensor.pin_memory, (self,), self, device)
        if ledger.entry(self) is not None:
            raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")
        if compute.pinned(self):
            return self
        copy = self.detach().clone()
        compute.pin(copy)
        return copy.requires_grad_(self.requires_grad)

    def is_pinned(self: Any, device: Any = None) -> bool:
        """Returns true if this tensor resides in pinned memory."""
        if has_torch_function_unary(self):
            return bool(handle_torch_function(_Tensor.is_pinned, (self,), self, device))
        return ledger.entry(self) is None and compute.pinned(self)

    def record_stream(self: Any, stream: Any) -> None:
        """Marks the tensor as having been used by this stream; here each operation is done when it returns."""

    for function in (pin_memory, is_pinned, record_stream):
        patches.set(_Tensor, function.__name__, function)


# --- attributes -----------------------------------------------------------------------------------------------------


def patch_attributes(patches: Patches, ledger: Ledger) -> None:
    """``.device``, ``.is_cuda``, ``.is_cpu`` and ``.get_device()``."""
    entries = ledger.entries
    device_, is_cuda_, is_cpu_ = (vars(_Base)[name].__get__ for name in ("device", "is_cuda", "is_cpu"))
    get_device_ = _Base.get_device

    def found(tensor: Any) -> Entry | None:
        if not entries:
            return None
        try:
            return entries.get(address(tensor))
        except NO_STORAGE:
            return ledger.entry(tensor)

    def device(self: Any) -> Any:
        entry = found(self)
        return device_(self) if entry is None else entry.gpu.device

    def is_cuda(self: Any) -> bool:
        return found(self) is not None or is_cuda_(self)

    def is_cpu(self: Any) -> bool:
        return is_cpu_(self) and found(self) is None

    def get_device(self: Any) -> int:
        entry = found(self)
        return int(get_device_(self)) if entry is None else entry.gpu.index

    for function in (device, is_cuda, is_cpu):
        patches.set(_Tensor, function.__name__, property(function))
    patches.set(_Tensor, "get_device", get_device)
    patches.set(torch, "get_device", lambda input: input.get_device())


STEPS = (patch_moves, patch_type, patch_reading, patch_repr, patch_dlpack, patch_pinning, patch_attributes)
