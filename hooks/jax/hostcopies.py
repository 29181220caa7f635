"""Copies of device buffers in host memory: in page-locked memory where jax has such a space, else as numpy arrays.

jax's ordinary copy to the host goes through a small staging buffer, at a tenth to a half of the bus's speed (jax issue
21438: 2.7 of 25 GB/s); a copy into its ``pinned_host`` memory space is one transfer. That space is a pool of XLA's,
which reuses what was freed, and keeps it until the process ends: so ordinary memory is used once the host runs short.
"""

from __future__ import annotations

import contextlib
from typing import Any

from acb.client import hostmemory
from acb.hooks.jax.internals import Internals, is_simulated_device

KIND = "pinned_host"

GROWTH = 2
"""XLA's pool grows by ever larger regions: it may take twice what is in it."""


class HostCopies:
    """Makes them, and puts them back."""

    def __init__(self, internals: Internals, *, pinned: bool = True) -> None:
        """`pinned`: whether page-locked memory is to be used, where it can be."""
        self._internals = internals
        self._copy: Any = getattr(internals.extension, "batched_copy_array_to_devices_with_sharding", None)
        semantics = getattr(internals.extension, "ArrayCopySemantics", None)
        self._always = getattr(semantics, "ALWAYS_COPY", None)
        self._pinned = pinned and self._copy is not None and self._always is not None
        self._pool = 0  # bytes that have been in XLA's pool at once, and that it has still

    def require(self, nbytes: int) -> None:
        """Raise EvacuationError unless there is host memory for copies of `nbytes`."""
        hostmemory.require(max(0, nbytes - self._pool))

    def out(self, shards: list[Any], devices: list[Any], nbytes: int, held: int) -> list[Any]:
        """Copies of single-device arrays of `nbytes` in all; every copy is begun before the first is waited for.

        `held` bytes of others are in host memory now. Raises MemoryError or jax's RuntimeError.
        """
        if shards and self._roomy(held + nbytes) and all(map(_has_space, devices)):
            with contextlib.suppress(self._internals.RuntimeError, TypeError, ValueError):
                copies = self._put(shards, [_sharding(device) for device in devices])
                for copy in copies:
                    copy.block_until_ready()
                self._pool = max(self._pool, held + nbytes)
                return copies
        for shard in shards:
            with contextlib.suppress(RuntimeError):
                shard._copy_single_device_array_to_host_async()
        return [_to_numpy(shard) for shard in shards]

    def back(self, copy: Any, aval: Any, sharding: Any, device: Any) -> Any:
        """A single-device array with the contents of a copy. Raises jax's RuntimeError."""
        if isinstance(copy, self._internals.ArrayImpl):
            return self._put([copy], [sharding])[0]
        return self._internals.xla_client.batched_device_put(aval, sharding, [copy], [device], True)

    def _put(self, arrays: list[Any], shardings: list[Any]) -> list[Any]:
        devices = [sharding._internal_device_list for sharding in shardings]
        return list(self._copy(arrays, devices, shardings, [self._always] * len(arrays)))

    def _roomy(self, nbytes: int) -> bool:
        """Whether XLA's pool may hold so many bytes."""
        if not self._pinned:
            return False
        available = hostmemory.available_bytes()
        return available is None or GROWTH * max(0, nbytes - self._pool) + hostmemory.RESERVE <= available


def _has_space(device: Any) -> bool:
    """Whether page-locked memory belongs to the device; on a simulated one the host's is not apart from its own."""
    return not is_simulated_device(device) and any(memory.kind == KIND for memory in device.addressable_memories())


def _sharding(device: Any) -> Any:
    from jax.sharding import SingleDeviceSharding

    return SingleDeviceSharding(device, memory_kind=KIND)


def _to_numpy(shard: Any) -> Any:
    """A copy of a single-device array in host memory of its own, bit for bit."""
    import numpy

    if hasattr(shard, "_single_device_array_to_np_array_did_copy"):
        host, copied = shard._single_device_array_to_np_array_did_copy()
    else:
        host, copied = shard._single_device_array_to_np_array(), False
    return host if copied else numpy.array(host, copy=True, order="C")
