"""Takes everything that moves arrays to and from a GPU, or looks at one there, through the gate.

An evacuated array is deleted for jax's C++: its methods would raise, or worse. So everything that needs the data
waits at the gate, behind which the data is back; what does not (shape, type, sharding) answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from acb.hooks.jax.evacuator import JaxEvacuator
from acb.hooks.jax.gate import in_region
from acb.hooks.jax.hostbuffers import hide_memory
from acb.hooks.jax.internals import GATED, Internals, as_assigned, like, on_gated, replace
from acb.hooks.jax.room import again_with_more_room

_READS = (
    "_copy_single_device_array_to_host_async",
    "_single_device_array_to_np_array",
    "_single_device_array_to_np_array_did_copy",
    "_to_np_array_did_copy",
    "_fully_replicated_shard",
)
_METHODS = (
    *_READS,
    "block_until_ready",
    "is_ready",
    "clone",
    "platform",
    "on_device_size_in_bytes",
    "_rewrap_with_aval_and_sharding",
    "_replace_with",
)
_MANY = (
    "batched_block_until_ready",
    "batched_copy_to_host_async",
    "reorder_shards",
    "copy_array_to_devices_with_sharding",
)
_PROPERTIES = ("_arrays", "_pjrt_layout", "layout", "traceback")
_POINTERS = ("unsafe_buffer_pointer", "unsafe_raw_buffer", "__cuda_array_interface__")


def patches(evacuator: JaxEvacuator) -> list[Callable[[Internals], None]]:
    """The patches of transfers and of the array type."""

    def to_devices(internals: Internals) -> None:
        """Every array that comes from host memory, and every move between devices."""

        def put(original: Any) -> Any:
            return in_region(again_with_more_room(original), _put_concerns)

        replace(internals.xla_client, "batched_device_put", put)

    def between_devices(internals: Internals) -> None:
        def copy(original: Any) -> Any:
            return in_region(again_with_more_room(original), _copy_concerns)

        replace(internals.xla_client, "batched_copy_array_to_devices_with_sharding", copy)

    def many_arrays(internals: Internals) -> None:
        """Functions that take arrays in a list, or one array first."""
        for owner in (internals.xla_client, internals.extension):  # jax takes some of them from here, some from there
            for name in _MANY:
                if hasattr(owner, name):
                    replace(owner, name, lambda original: in_region(original, _any_concerns))
        if hasattr(internals.extension, "shard_args"):  # NumPy arrays too, since 0.11, with jax_use_cpp_shard_args

            def shard(original: Any) -> Any:
                return in_region(again_with_more_room(original), _any_concerns)

            replace(internals.extension, "shard_args", shard)
        replace(
            internals.array,
            "make_array_from_single_device_arrays",
            lambda original: in_region(original, _any_concerns),
        )

    def wrapping(internals: Internals) -> None:
        """New array objects for buffers that others hold: with one evacuated in between, they would have none."""
        kind = internals.extension.ResultHandler
        replace(kind, "__call__", lambda original: in_region(original, _any_concerns))

    def exchange(internals: Internals) -> None:
        """DLPack and CUDA's array interface, both ways."""
        for name in (
            "buffer_to_dlpack_managed_tensor",
            "dlpack_managed_tensor_to_buffer",
            "cuda_array_interface_to_buffer",
        ):
            if hasattr(internals.extension, name):
                replace(internals.extension, name, lambda original: in_region(original, _any_concerns))

    def assigned_arrays(internals: Internals) -> None:
        """Before 0.6 or so: see as_assigned."""
        if hasattr(internals.ArrayImpl, "_replace_with"):
            return
        for name in _READS:
            if name in vars(internals.ArrayImpl):
                replace(internals.ArrayImpl, name, _of_assigned)

    def array_methods(internals: Internals) -> None:
        for name in _METHODS:
            if name in vars(internals.ArrayImpl):
                replace(internals.ArrayImpl, name, lambda original: in_region(original, _self_concerns))

    def construction(internals: Internals) -> None:
        """An array made of others; it has nothing yet that could be asked for its device."""
        replace(internals.ArrayImpl, "__init__", lambda original: in_region(original, _new_concerns))

    def array_properties(internals: Internals) -> None:
        for name in _PROPERTIES:
            if isinstance(vars(internals.ArrayImpl).get(name), property):
                replace(internals.ArrayImpl, name, _gated_property)

    def pointers(internals: Internals) -> None:
        """An address that the program has seen must stay what it is."""
        for name in _POINTERS:
            original = vars(internals.ArrayImpl).get(name)
            if original is not None:
                replace(internals.ArrayImpl, name, lambda original: _noted_pointer(original, evacuator))

    def host_memory(internals: Internals) -> None:
        """Where the CPU is gated; a real GPU's memory cannot be read that way."""
        if "cpu" in GATED:
            hide_memory(internals.ArrayImpl)

    def deletion(internals: Internals) -> None:
        """An evacuated array is not deleted as far as the program can see, and can be."""
        replace(internals.ArrayImpl, "is_deleted", evacuator.wrap_is_deleted)
        replace(internals.ArrayImpl, "delete", evacuator.wrap_delete)

    def pending_effects(internals: Internals) -> None:
        """Computations without results, such as callbacks: what there is to wait for."""
        replace(internals.dispatch.RuntimeTokenSet, "set_output_runtime_token", evacuator.wrap_tokens)

    return [
        to_devices, between_devices, many_arrays, wrapping, exchange, assigned_arrays, array_methods, construction,
        array_properties, pointers, host_memory, deletion, pending_effects,
    ]  # fmt: skip


def _self_concerns(self: Any, *args: Any, **kwargs: Any) -> bool:
    return on_gated(self) or any(map(_concerns, args))


def _new_concerns(self: Any, *args: Any, **kwargs: Any) -> bool:
    return any(map(_concerns, args)) or any(map(_concerns, kwargs.values()))


def _put_concerns(aval: Any, sharding: Any, xs: Any, devices: Any, *rest: Any, **kwargs: Any) -> bool:
    return any(_concerns(device) for device in list(devices)[:1]) or any(map(on_gated, xs))


def _copy_concerns(arrays: Any, devices: Any, *rest: Any, **kwargs: Any) -> bool:
    return any(map(on_gated, arrays)) or any(_concerns(device) for group in devices for device in list(group)[:1])


def _any_concerns(*args: Any, **kwargs: Any) -> bool:
    return any(map(_concerns, args)) or any(map(_concerns, kwargs.values()))


def _concerns(value: Any) -> bool:
    """Whether an argument is an array on, or a device, backend or sharding of, a gated platform, or a list with one."""
    if isinstance(value, (list, tuple)):
        return any(map(_concerns, value))
    platform = getattr(value, "platform", None)
    if isinstance(platform, str):
        return platform in GATED
    if on_gated(value):
        return True
    devices = getattr(value, "_internal_device_list", None)
    try:
        return devices is not None and devices[0].platform in GATED
    except (IndexError, TypeError):
        return False


def _of_assigned(original: Any) -> Any:
    @like(original)
    def read(self: Any) -> Any:
        return original(as_assigned(self))

    return read


def _gated_property(original: property) -> property:
    assert original.fget is not None
    return property(in_region(original.fget, _self_concerns), original.fset, original.fdel, original.__doc__)


def _noted_pointer(original: Any, evacuator: JaxEvacuator) -> Any:
    """The same method or property, which tells the evacuator that this array must not move any more."""
    getter: Any = original.fget if isinstance(original, property) else original

    def noted(self: Any) -> Any:
        pointer = getter(self)
        if on_gated(self):
            evacuator.pin(self)
        return pointer

    gated = in_region(noted, _self_concerns)
    return property(gated, doc=original.__doc__) if isinstance(original, property) else gated
