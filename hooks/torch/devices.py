"""Which operations touch a gated device: a look at their arguments, cheap enough for every stray operation."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from typing import Any

import torch

GATED: set[str] = {"cuda"}
"""The device types behind the gate. Change it with gate_device_type() only."""

_SEQUENCES = (list, tuple)
_DEPTH = 2  # levels of lists and dictionaries looked into
_LEGACY_PREFIX = {"cuda": "torch.cuda."}  # x.type("torch.cuda.FloatTensor")
_Tensor: Any = torch.Tensor
_device: Any = torch.device


def _answers(types: set[str]) -> Callable[[Any], bool]:
    """The quickest test of whether a tensor lies on one of these device types: one attribute where there is one."""
    if types == {"cuda"}:
        return operator.attrgetter("is_cuda")
    if types == {"cpu", "cuda"} and torch.version.cuda is None and not os.environ.get("ACB_SIMULATED"):
        return operator.attrgetter("is_cpu")
    return lambda tensor: tensor.device.type in types


on_gated: Callable[[Any], bool] = _answers(GATED)
"""Whether a tensor lies on a gated device."""


def gate_device_type(name: str) -> None:
    """Gate the tensors of one more device type, such as ``cpu`` to measure gating on a machine without a GPU."""
    global on_gated
    GATED.add(name)
    on_gated = _answers(GATED)


def ungate_device_type(name: str) -> None:
    """Take gate_device_type() back."""
    global on_gated
    GATED.discard(name)
    on_gated = _answers(GATED)


def names_gated(value: Any) -> bool:
    """Whether a device, a device's name, an ordinal or a legacy tensor type's name means a gated device."""
    if isinstance(value, str):
        return value.partition(":")[0] in GATED or any(
            prefix is not None and value.startswith(prefix) for prefix in map(_LEGACY_PREFIX.get, GATED)
        )
    if isinstance(value, _device):
        return value.type in GATED
    return isinstance(value, int) and not isinstance(value, bool) and "cuda" in GATED


def touches(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    """Whether any argument is on, or names, a gated device; looks into two levels of lists and dictionaries."""
    for value in args:
        if isinstance(value, _Tensor):
            if on_gated(value):
                return True
        elif isinstance(value, _SEQUENCES):
            if value and _inside(value, _DEPTH):
                return True
        elif isinstance(value, (str, _device)):
            if names_gated(value):
                return True
        elif isinstance(value, dict) and _inside(value.values(), _DEPTH):
            return True
    return bool(kwargs) and _keywords_touch(kwargs)  # type: ignore[arg-type]


def _keywords_touch(kwargs: dict[str, Any]) -> bool:
    """As touches(), for keyword arguments, where ``device=0`` is a GPU's ordinal."""
    for name, value in kwargs.items():
        if name == "device" or name == "map_location":
            if names_gated(value):
                return True
        elif touches((value,), None):
            return True
    return False


def _inside(values: Any, depth: int) -> bool:
    """As touches(), for what a list or a dictionary holds."""
    for value in values:
        if isinstance(value, _Tensor):
            if on_gated(value):
                return True
        elif depth > 1:
            if isinstance(value, _SEQUENCES):
                if _inside(value, depth - 1):
                    return True
            elif isinstance(value, dict) and _inside(value.values(), depth - 1):
                return True
    return False


def _factories() -> frozenset[Any]:
    """The functions that make a tensor on the default device when no device is given."""
    try:
        from torch.utils._device import _device_constructors

        return frozenset(_device_constructors())
    except Exception:
        names = "empty ones zeros full arange eye linspace rand randn randint randperm tensor as_tensor asarray"
        return frozenset(getattr(torch, name) for name in names.split())


_FACTORIES = _factories()
_current: Any = torch.utils._device


def operation_touches(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    """Whether an operation that a function mode sees would run on, or allocate on, a gated device."""
    if touches(args, kwargs):
        return True
    if args and isinstance(args[0], _Tensor):
        # By name, for a simulated GPU puts functions of its own in place of these.
        name = getattr(func, "__name__", "")
        return (name == "to" and len(args) > 1 and names_gated(args[1])) or (name == "cuda" and "cuda" in GATED)
    if kwargs and kwargs.get("pin_memory") and "cuda" in GATED and not torch.cuda.is_initialized():
        return True  # the first pinned buffer starts CUDA
    return func in _FACTORIES and (not kwargs or kwargs.get("device") is None) and default_is_gated()


def default_is_gated() -> bool:
    """Whether factories without a device use a gated one: torch.set_default_device() and its elders."""
    default = getattr(_current, "CURRENT_DEVICE", None)
    if default is not None:
        return default.type in GATED
    return torch._C._get_default_device().partition(":")[0] in GATED


def runs_foreign_code(types: Any) -> bool:
    """Whether a tensor subclass of the program's will handle this operation, in code hidden from the sentinel."""
    for kind in types:
        handler = getattr(kind, "__torch_function__", None)
        if handler is not _DISABLED and getattr(handler, "__func__", None) is not _PLAIN:
            return True
    return False


_DISABLED = torch._C._disabled_torch_function_impl
_PLAIN = torch.Tensor.__torch_function__.__func__


def _host_only() -> frozenset[Any]:
    """Attributes and methods of tensors that ask or change only what the host knows: they never wait at the gate."""
    attributes = (
        "shape dtype device layout ndim names is_leaf requires_grad grad grad_fn retains_grad output_nr is_cuda is_cpu "
        "is_sparse is_sparse_csr is_quantized is_meta is_mps is_xpu is_nested is_mkldnn itemsize nbytes _version "
        "_backward_hooks _grad name volatile"
    )
    methods = (
        "size dim numel nelement stride storage_offset is_contiguous element_size get_device is_floating_point "
        "is_complex is_signed is_inference is_conj is_neg __len__ __hash__ requires_grad_ register_hook "
        "register_post_accumulate_grad_hook retain_grad ndimension is_same_size has_names"
    )
    free: set[Any] = set()
    for name in attributes.split():
        descriptor = getattr(torch._C.TensorBase, name, None)
        for access in ("__get__", "__set__", "__delete__"):
            if hasattr(descriptor, access):
                free.add(getattr(descriptor, access))
        descriptor = torch.Tensor.__dict__.get(name)
        if hasattr(descriptor, "__get__"):
            free.add(descriptor.__get__)
    for name in methods.split():
        for owner in (torch._C.TensorBase, torch.Tensor):
            if hasattr(owner, name):
                free.add(getattr(owner, name))
    for name in ("_set_grad_enabled", "is_grad_enabled", "_get_default_device"):
        if hasattr(torch._C, name):
            free.add(getattr(torch._C, name))
    for name in ("is_tensor", "is_floating_point", "is_complex", "numel", "get_device", "is_storage"):
        if hasattr(torch, name):
            free.add(getattr(torch, name))
    return frozenset(free)


HOST_ONLY = _host_only()
