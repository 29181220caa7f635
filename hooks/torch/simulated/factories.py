"""Functions that make tensors: ``torch.tensor`` and kin, ordinals as devices, generators, legacy constructors."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from acb.hooks.torch.patching import Patches
from acb.hooks.torch.simulated import dispatch
from acb.hooks.torch.simulated.compute import CudaGenerator
from acb.hooks.torch.simulated.ledger import Ledger
from acb.hooks.torch.simulated.places import CPU, CUDA, current, device_of
from acb.hooks.torch.simulated.tensors import LEGACY_DTYPES, legacy_type

_Base: Any = torch._C.TensorBase
_Tensor: Any = torch.Tensor


def _script_takes(original: Any, wrapper: Any) -> Any:
    """Let TorchScript compile calls of this Python function as calls of the original."""
    import torch.jit._builtins as builtins

    table = builtins._builtin_table
    if table is not None and id(original) in table:  # else it will be filled by names, when it is first needed
        table[id(wrapper)] = table[id(original)]
    return wrapper


# --- from data ------------------------------------------------------------------------------------------------------


def patch_tensor(patches: Patches, ledger: Ledger) -> None:
    """torch.tensor(), torch.as_tensor(), torch.asarray(), which PyTorch fills without any operation to be seen."""
    tensor_, as_tensor_, asarray_ = torch.tensor, torch.as_tensor, torch.asarray

    @functools.wraps(tensor_)
    def tensor(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Any:
        if has_torch_function((data,)):
            return handle_torch_function(
                torch.tensor, (data,), data, dtype=dtype, device=device, requires_grad=requires_grad, **kwargs
            )
        device = None if device is None else device_of(device)
        if isinstance(data, _Tensor) and ledger.entries:
            warnings.warn(
                "To copy construct from a tensor, it is recommended to use sourceTensor.detach().clone() or "
                "sourceTensor.detach().clone().requires_grad_(True), rather than torch.tensor(sourceTensor).",
                stacklevel=2,
            )
            made = data.detach().to(data.device if device is None else device, dtype or data.dtype, copy=True)
        elif device is None or device.type != "cuda":
            if kwargs.pop("pin_memory", False):
                return tensor(data, dtype=dtype, device=device, **kwargs).pin_memory().requires_grad_(requires_grad)
            if device is not None:
                kwargs["device"] = device
            return tensor_(data, dtype=dtype, requires_grad=requires_grad, **kwargs)
        else:
            dispatch.enter(ledger)
            kwargs.pop("pin_memory", None)
            made = torch.ops.aten._to_copy.default(tensor_(data, dtype=dtype, device=CPU, **kwargs), device=device)
        return made.requires_grad_() if requires_grad else made

    @functools.wraps(as_tensor_)
    def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Any:
        if has_torch_function((data,)):
            return handle_torch_function(torch.as_tensor, (data,), data, dtype=dtype, device=device)
        device = None if device is None else device_of(device)
        if isinstance(data, _Tensor):
            return data.to(data.device if device is None else device, dtype or data.dtype)
        if device is None or device.type != "cuda":
            return as_tensor_(data, dtype=dtype, device=device)
        return as_tensor_(data, dtype=dtype, device=CPU).to(device)

    @functools.wraps(asarray_)
    def asarray(
        obj: Any, *, dtype: Any = None, device: Any = None, copy: Any = None, requires_grad: bool = False
    ) -> Any:
        if has_torch_function((obj,)):
            return handle_torch_function(
                torch.asarray, (obj,), obj, dtype=dtype, device=device, copy=copy, requires_grad=requires_grad
            )
        device = None if device is None else device_of(device)
        on_card = isinstance(obj, _Tensor) and ledger.entry(obj) is not None
        if not on_card and (device is None or device.type != "cuda"):
            return asarray_(obj, dtype=dtype, device=device, copy=copy, requires_grad=requires_grad)
        made = obj if on_card else asarray_(obj, dtype=dtype, device=CPU)
        there = made.to(made.device if device is None else device, dtype or made.dtype, copy=bool(copy))
        if copy is False and there is not made:
            raise ValueError("can't alias tensor: it is on another device or of another dtype")
        return there.detach().requires_grad_() if requires_grad else there

    for original, function in ((tensor_, tensor), (as_tensor_, as_tensor), (asarray_, asarray)):
        patches.set(torch, function.__name__, _script_takes(original, function))


def patch_new_tensor(patches: Patches, ledger: Ledger) -> None:
    """Tensor.new_tensor() and Tensor.new()."""
    new_tensor_, new_ = _Base.new_tensor, _Base.new

    @functools.wraps(new_tensor_)
    def new_tensor(
        self: Any, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False, **kwargs: Any
    ) -> Any:
        if has_torch_function((self, data)):
            return handle_torch_function(
                _Tensor.new_tensor, (self, data), self, data, dtype=dtype, device=device, requires_grad=requires_grad
            )
        device = self.device if device is None else device_of(device)
        if device.type == "cuda" or isinstance(data, _Tensor):
            return torch.tensor(data, dtype=dtype or self.dtype, device=device, requires_grad=requires_grad)
        return new_tensor_(self, data, dtype=dtype, device=device, requires_grad=requires_grad)

    @functools.wraps(new_)
    def new(self: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if has_torch_function_unary(self):
            return handle_torch_function(_Tensor.new, (self,), self, *args, device=device, **kwargs)
        device = self.device if device is None else device_of(device)
        if device.type != "cuda" or self.layout is not torch.strided:
            return new_(self, *args, **kwargs)
        return _legacy_new(self.dtype, args, device)

    patches.set(_Tensor, "new_tensor", new_tensor)
    patches.set(_Tensor, "new", new)


def patch_sparse(patches: Patches, ledger: Ledger) -> None:
    """Sparse tensors are made from their parts, wherever these are, and moved."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def sparse(*args: Any, device: Any = None, **kwargs: Any) -> Any:
            device = None if device is None else device_of(device)
            if device is None or device.type != "cuda":
                return original(*args, **kwargs) if device is None else original(*args, device=device, **kwargs)
            args = tuple(value.to(device) if isinstance(value, _Tensor) else value for value in args)
            made = original(*args, **kwargs)
            return made if ledger.entry(made) is not None else made.to(device)

        return sparse

    names = ("sparse_coo_tensor", "sparse_csr_tensor", "sparse_csc_tensor", "sparse_compressed_tensor")
    patches.replace_all(torch, names, make)


# --- from sizes -----------------------------------------------------------------------------------------------------

_FACTORIES = (
    "empty zeros ones full arange linspace logspace eye rand randn randint randperm empty_strided normal tril_indices "
    "triu_indices scalar_tensor empty_like zeros_like ones_like full_like rand_like randn_like randint_like"
)


def patch_ordinals(patches: Patches, ledger: Ledger) -> None:
    """``device=0``, which a build of PyTorch without GPUs does not understand."""
    from torch.utils import _device

    originals = set()

    def make(original: Any) -> Any:
        originals.add(original)

        @functools.wraps(original)
        def factory(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device").__class__ is int:
                kwargs["device"] = device_of(kwargs["device"])
            return original(*args, **kwargs)

        return _script_takes(original, factory)

    patches.replace_all(torch, _FACTORIES.split(), make)
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"):
        patches.replace(_Tensor, name, lambda original: functools.wraps(original)(make(original)))
    # Where PyTorch's default device looks up who takes a device: both the function and what it calls.
    constructors: Any = getattr(_device, "_device_constructors", None)
    if constructors is not None:
        known = set(getattr(constructors, "__wrapped__", constructors)()) | originals  # past its cache
        patches.set(_device, "_device_constructors", lambda: known)


# --- generators -----------------------------------------------------------------------------------------------------


class _GeneratorType(type):
    """``torch.Generator``: makes one of either kind, and both are instances of it."""

    def __call__(cls, device: Any = "cpu") -> Any:
        device = device_of(device)
        return CudaGenerator(device.index) if device.type == "cuda" else torch._C.Generator(device=device)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, torch._C.Generator)

    def __subclasscheck__(cls, kind: Any) -> bool:
        return issubclass(kind, torch._C.Generator)


class Generator(metaclass=_GeneratorType):
    """Stands for torch.Generator."""


def patch_generator(patches: Patches, ledger: Ledger) -> None:
    """``torch.Generator(device="cuda")``."""
    patches.set(torch, "Generator", Generator)


# --- legacy constructors --------------------------------------------------------------------------------------------


def _legacy_new(dtype: Any, args: Any, device: Any) -> Any:
    """What ``torch.cuda.FloatTensor(*args)`` makes: uninitialised of some size, or from data."""
    if not args:
        return torch.empty(0, dtype=dtype, device=device)
    first = args[0]
    if isinstance(first, _Tensor):
        return first.to(device, dtype)
    if isinstance(first, (int, torch.Size)):
        return torch.empty(first if isinstance(first, torch.Size) else args, dtype=dtype, device=device)
    return torch.tensor(first, dtype=dtype, device=device)


class _LegacyType(type):
    """The type of ``torch.cuda.FloatTensor`` and its kin."""

    dtype: Any
    is_cuda = True

    def __call__(cls, *args: Any) -> Any:
        return _legacy_new(cls.dtype, args, CUDA[current()])

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _Tensor) and value.is_cuda and value.dtype == cls.dtype


def patch_legacy(patches: Patches, ledger: Ledger) -> None:
    """``torch.cuda.FloatTensor(...)`` and its kin, and torch.set_default_tensor_type()."""
    for name, dtype in LEGACY_DTYPES.items():
        patches.set(torch.cuda, name, _LegacyType(name, (), {"dtype": dtype, "__module__": "torch.cuda"}))
    original = torch.set_default_tensor_type

    @functools.wraps(original)
    def set_default_tensor_type(t: Any) -> None:
        wanted = legacy_type(t if isinstance(t, str) else f"{t.__module__}.{t.__name__}")
        if wanted is None or wanted[0].type != "cuda":
            original(t)
        else:
            torch.set_default_dtype(wanted[1])
            torch.set_default_device("cuda")

    patches.set(torch, "set_default_tensor_type", set_default_tensor_type)


STEPS = (patch_tensor, patch_new_tensor, patch_sparse, patch_ordinals, patch_generator, patch_legacy)
