"""Copies of device buffers in host memory: in page-locked memory where jax has such a space, else as numpy arrays.

jax's ordinary copy to the host goes through a small staging buffer, at a tenth to a half of the bus's speed (jax issue
21438: 2.7 of 25 GB/s); a copy into its ``pinned_host`` memory space is one transfer. That space is a pool of XLA's,
which reuses what was freed, and keeps it until the process ends: so once the host runs short only what fits into the
pool as it is goes there, and the rest to ordinary memory.
"""

from __future__ import annotations

import bisect
import contextlib
from typing import Any

from acb.client.evacuation import EvacuationError
from acb.client.hostmemory import Claim
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
        # Before 0.6 or so jax keeps a copy of its own beside ours until the array is gone.
        self._times = 1 if hasattr(internals.ArrayImpl, "_single_device_array_to_np_array_did_copy") else 2
        self._places: list[int] = []  # the sizes, in order, of most copies that were in XLA's pool at once: it has them
        self._grows = False  # whether the pool may, in this evacuation

    def claim(self, claim: Claim, devices: list[Any], sizes: list[int], held: list[int]) -> None:
        """Before copies of these sizes, in bytes, are made, in one go or several: claim the host memory that they will
        take. `held`: the sizes of those that are in the pool already. Raises EvacuationError when there is not enough.
        """
        self._grows = False
        if not self._roomy(devices):
            claim.cover(self._times * sum(sizes))
            return
        new = sum(size for size, fits in zip(sizes, self._fitting(sizes, held), strict=True) if not fits)
        try:
            claim.cover(GROWTH * new)
            self._grows = True
        except EvacuationError:
            claim.cover(self._times * new)

    def out(self, shards: list[Any], devices: list[Any], sizes: list[int], held: list[int], claim: Claim) -> list[Any]:
        """Copies of single-device arrays of these sizes; every copy is begun before the first is waited for.

        `held`: as for claim(). Raises MemoryError, jax's RuntimeError, or, where the pool takes less than was thought
        and the host has no more to give, EvacuationError.
        """
        fitting = self._fitting(sizes, held) if self._roomy(devices) else []
        pooled = [number for number, fits in enumerate(fitting) if fits or self._grows]
        chosen = set(pooled)
        rest = [number for number in range(len(shards)) if number not in chosen]
        self._begin(shards, sizes, rest, claim)
        copies: dict[int, Any] = {}
        try:
            made = self._put([shards[n] for n in pooled], [_sharding(devices[n]) for n in pooled]) if pooled else []
            for copy in made:
                copy.block_until_ready()
            copies.update(zip(pooled, made, strict=True))
            claim.written(GROWTH * sum(sizes[n] for n in pooled if not fitting[n]))
            self._filled([*held, *(sizes[n] for n in pooled)])
        except (self._internals.RuntimeError, TypeError, ValueError):
            rest = list(range(len(shards)))
            self._begin(shards, sizes, rest, claim)
        copies.update((n, _to_numpy(shards[n])) for n in rest)
        claim.written(self._times * sum(sizes[n] for n in rest))
        return [copies[n] for n in range(len(shards))]

    def _begin(self, shards: list[Any], sizes: list[int], numbers: list[int], claim: Claim) -> None:
        """Begin to copy these to ordinary memory."""
        claim.cover(self._times * sum(sizes[n] for n in numbers))
        for n in numbers:
            with contextlib.suppress(RuntimeError):
                shards[n]._copy_single_device_array_to_host_async()

    def back(self, copy: Any, aval: Any, sharding: Any, device: Any) -> Any:
        """A single-device array with the contents of a copy. Raises jax's RuntimeError."""
        if self.in_pool(copy):
            return self._put([copy], [sharding])[0]
        return self._internals.xla_client.batched_device_put(aval, sharding, [copy], [device], True)

    def _put(self, arrays: list[Any], shardings: list[Any]) -> list[Any]:
        devices = [sharding._internal_device_list for sharding in shardings]
        return list(self._copy(arrays, devices, shardings, [self._always] * len(arrays)))

    def _roomy(self, devices: list[Any]) -> bool:
        """Whether XLA has a pool of page-locked memory for all of these devices."""
        return self._pinned and bool(devices) and all(map(_has_space, devices))

    # --- XLA's pool, which cannot be asked ----------------------------------------------------------------------------

    def in_pool(self, copy: Any) -> bool:
        """Whether a copy is there."""
        return isinstance(copy, self._internals.ArrayImpl)

    def _fitting(self, sizes: list[int], held: list[int]) -> list[bool]:
        """Which of these fit in, beside what is there, without its growing: the sum does not tell, as a copy lies in
        one piece. The tightest place is taken, as by XLA.
        """
        free = list(self._places)
        for size in sorted(held):
            _take(free, size)
        fitting = [False] * len(sizes)
        for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
            fitting[number] = _take(free, sizes[number])
        return fitting

    def _filled(self, sizes: list[int]) -> None:
        """Copies of these sizes are in it at once."""
        if sum(sizes) >= sum(self._places):
            self._places = sorted(sizes)


def _take(free: list[int], size: int) -> bool:
    """Take a place of `size` bytes out of the smallest one, of these in order, that has them."""
    index = bisect.bisect_left(free, size)
    if index == len(free):
        return False
    left = free.pop(index) - size
    if left:
        bisect.insort(free, left)
    return True


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
