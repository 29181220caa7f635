"""Moves every jax array off the GPU and back: the framework tier of evacuation for jax.

An array object stays what it is; its device buffers are deleted, and later it is pointed at new ones with the same
bits. Arrays that share a buffer share one again afterwards. A program that drops an evacuated array drops its host
copy too.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

from acb.client.evacuation import EvacuationError, batches, fullest
from acb.client.hostmemory import Claim
from acb.hooks.jax import contexts
from acb.hooks.jax.hostcopies import HostCopies
from acb.hooks.jax.internals import GATED, Internals, in_device_memory, like, moving, on_gated, repoint
from acb.hooks.jax.ledger import Ledger
from acb.hooks.jax.pool import check_pool, trim_pool
from acb.hooks.jax.room import out_of_memory


class _Buffer:
    """One device buffer: its bits in host memory, and the single-device array that holds them again once restored."""

    __slots__ = ("array", "aval", "device", "host", "nbytes", "sharding")

    def __init__(self, shard: Any, device: Any, nbytes: int) -> None:
        self.aval, self.sharding, self.device, self.nbytes = shard.aval, shard._sharding, device, nbytes
        self.host: Any = None
        self.array: Any = None


def _fullest(buffers: list[_Buffer]) -> int:
    """Bytes of these buffers on the GPU that has most of them."""
    return fullest((id(buffer.device), buffer.nbytes) for buffer in buffers)


class _Evacuated(NamedTuple):
    """What an array needs to come back."""

    ref: weakref.ref[Any]
    aval: Any
    sharding: Any
    committed: bool
    format: Any
    """The layout, with its sharding, where it is not the default one."""
    buffers: list[_Buffer]


class JaxEvacuator:
    """See acb.client.evacuation.Evacuator."""

    name = "jax"

    def __init__(self, internals: Internals, ledger: Ledger | None = None, *, pinned: bool = True) -> None:
        """With a simulated GPU, `ledger` is that of its memory. `pinned`: see HostCopies."""
        self._internals = internals
        self._copies = HostCopies(internals, pinned=pinned)
        self._ledger = ledger
        array: Any = internals.ArrayImpl
        methods = vars(array)
        # The originals: acb's own calls must not pass the patches of the array type.
        self._pointer: Callable[[Any], int] = methods["unsafe_buffer_pointer"]
        self._is_deleted: Callable[[Any], bool] = methods["is_deleted"]
        self._delete: Callable[[Any], None] = methods["delete"]
        self._lock = threading.RLock()  # evacuation against deletion by the program
        self._evacuated: dict[int, _Evacuated] = {}
        self._pinned: dict[int, weakref.ref[Any]] = {}
        self._tokens: dict[tuple[int, Any], Any] = {}
        self._known_peak = 0

    # --- what is there ----------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Wait until all arrays are computed, all effects have happened, and the device has no other work left.

        A computation whose results the program has dropped goes on, and neither an array nor a token tells.
        """
        with moving():
            waiting: list[Any] = self._live()
            waiting += [self._tokens.pop(key, None) for key in list(self._tokens)]
            for value in waiting:
                if value is not None:
                    # A failed computation is done too; the program will see its error.
                    with contextlib.suppress(RuntimeError, ValueError):
                        value.block_until_ready()
            if self._ledger is None and next(self._devices(), None) is not None:
                contexts.drain()  # a simulated GPU's work is done when its call returns

    def resident(self) -> int:
        """See Evacuator.resident."""
        if self._ledger is not None:
            return self._ledger.resident()  # what was freed is free for others: nobody is granted before
        with moving():
            most = 0
            for device in self._devices():
                stats = _memory_stats(device)
                # What the allocator keeps is out of reach for others, in use or not.
                most = max(most, stats.get("bytes_in_use", 0), stats.get("pool_bytes", 0))
            if not most:
                most = _fullest(self._plan(self._live(), strict=False)[1])
            self._known_peak = max(self._known_peak, most)
            return most

    def peak(self) -> int:
        """See Evacuator.peak; as jax's allocator counts from the start of the process, it may be an earlier one."""
        if self._ledger is not None:
            return max((card.peak() for card in self._ledger.used), default=0)
        with moving():
            peaks = (_memory_stats(device).get("peak_bytes_in_use", 0) for device in self._devices())
            lifetime = max(peaks, default=0)
        return max(lifetime, self._known_peak, self.resident())

    def reset_peak(self) -> None:
        """See Evacuator.reset_peak."""
        self._known_peak = 0
        if self._ledger is not None:
            for card in self._ledger.used:
                card.reset_peak()

    def _devices(self) -> Iterator[Any]:
        for backend in self._internals.backends():
            if backend.platform in GATED:
                yield from backend.local_devices()

    def _live(self) -> list[Any]:
        """All arrays in the memory of gated devices that still have their data."""
        return [
            array
            for backend in self._internals.backends()
            if backend.platform in GATED
            for array in backend.live_arrays()
            if not self._is_deleted(array) and in_device_memory(array) and not self._away(array)
        ]

    def _away(self, array: Any) -> bool:
        """Whether its data are in host memory, whatever else it has."""
        entry = self._evacuated.get(id(array))
        return entry is not None and entry.ref() is array

    # --- away -------------------------------------------------------------------------------------------------------

    def evacuate(self) -> int:
        """All of evacuation() at once; the bytes moved."""
        return sum(self.evacuation())

    def evacuation(self, piece: int = 0) -> Generator[int]:
        """See acb.client.evacuation.Evacuator."""
        with contextlib.closing(Claim()) as claim:
            with moving(), self._lock:
                for device in self._devices():
                    check_pool(device)
                buffers = self._plan(self._live(), strict=True)[1]
                devices, sizes = [buffer.device for buffer in buffers], [buffer.nbytes for buffer in buffers]
                self._copies.claim(claim, devices, sizes, self._pooled())
                in_pieces = piece > 0 and len(set(map(id, devices))) == 1
            del buffers
            yield 0
            with moving(), self._lock:
                plans = self._plan(self._live(), strict=True)[0]
                for batch in batches(_sharing(plans), piece if in_pieces else 0):
                    yield self._move_out([plan for group in batch for plan in group], claim)

    def _pooled(self) -> list[int]:
        """The bytes of each host copy that is in XLA's pool."""
        buffers = _buffers(list(self._evacuated.values()))
        return [buffer.nbytes for buffer in buffers if self._copies.in_pool(buffer.host)]

    def _move_out(self, plans: list[_Evacuated], claim: Claim) -> int:
        """Move these arrays, which share no buffer with others, all or none: the bytes moved."""
        moved = _fullest(_buffers(plans))
        self._copy_out(plans, claim)
        try:
            leaving = []
            for plan in plans:
                array = plan.ref()
                if array is not None:
                    leaving.append(self._alias(array))
                    self._evacuated[id(array)] = plan
            for alias in leaving:
                self._delete(alias)
        except Exception as error:
            self._move_in([plan for plan in plans if plan.ref() is not None])
            raise EvacuationError(f"jax did not free an array: {error}") from error
        array = alias = None
        leaving.clear()
        trim_pool()
        if self._ledger is not None:
            self._ledger.audit()  # arrays that are just being dropped have freed their buffers, but not said so yet
        return moved

    def _alias(self, array: Any) -> Any:
        """What to delete so that the array's buffers go: a second array of the same buffers.

        An array that was itself deleted has forgotten its buffers, and since 0.11 jax points no such array at others.
        """
        if not hasattr(array, "_replace_with"):
            return array  # see repoint()
        return self._internals.ArrayImpl(
            array.aval, array._sharding, array._arrays, committed=array._committed, _skip_checks=True
        )

    def _plan(self, arrays: list[Any], *, strict: bool) -> tuple[list[_Evacuated], list[_Buffer]]:
        """What is to be done for each array, and each buffer once.

        With `strict`, raises EvacuationError for an array that cannot be moved; else such arrays are only counted.
        """
        buffers: dict[Any, _Buffer] = {}
        plans = []
        for array in arrays:
            try:
                shards = array._arrays
            except RuntimeError:
                shards = None
            if shards is None:
                continue  # deleted by the program just now
            if strict:
                self._refuse_immovable(array)
            own = []
            for shard in shards:
                device = shard._sharding._internal_device_list[0]
                nbytes = shard.on_device_size_in_bytes()
                key = (id(device), self._pointer(shard), nbytes) if nbytes else (id(shard),)
                if key not in buffers:
                    buffers[key] = _Buffer(shard, device, nbytes)
                    if strict:
                        buffers[key].array = shard
                own.append(buffers[key])
            if strict:
                plans.append(self._describe(array, own))
        return plans, list(buffers.values())

    def _describe(self, array: Any, buffers: list[_Buffer]) -> _Evacuated:
        identity = id(array)
        evacuated = self._evacuated

        def forget(ref: weakref.ref[Any]) -> None:
            entry = evacuated.get(identity)
            if entry is not None and entry.ref is ref:
                evacuated.pop(identity, None)

        return _Evacuated(
            weakref.ref(array, forget), array.aval, array._sharding, array._committed, _special_format(array), buffers
        )

    def _refuse_immovable(self, array: Any) -> None:
        if not array._sharding.is_fully_addressable:
            raise EvacuationError("a jax array spans GPUs of other processes")
        pinned = self._pinned.get(id(array))
        if pinned is not None and pinned() is array:
            raise EvacuationError("the program holds the GPU address of a jax array")

    def _copy_out(self, plans: list[_Evacuated], claim: Claim) -> None:
        """Fill in every buffer's host copy."""
        buffers = _buffers(plans)
        arrays, devices = [buffer.array for buffer in buffers], [buffer.device for buffer in buffers]
        sizes = [buffer.nbytes for buffer in buffers]
        try:
            copies = self._copies.out(arrays, devices, sizes, self._pooled(), claim)
        except (MemoryError, RuntimeError) as error:
            raise EvacuationError(f"jax arrays could not be copied to host memory: {error}") from error
        for buffer, copy in zip(buffers, copies, strict=True):
            buffer.host, buffer.array = copy, None

    # --- and back ---------------------------------------------------------------------------------------------------

    def restore(self, limit: int | None = None) -> int:
        """See Evacuator.restore."""
        try:
            with moving(), self._lock:
                return self._move_in(list(self._evacuated.values()), limit)
        except Exception as error:
            if out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise

    def _move_in(self, plans: list[_Evacuated], limit: int | None = None) -> int:
        """Bring these back, in order, as far as the limit goes: the bytes moved. What fails counts as still away."""
        begun: list[tuple[Any, list[_Buffer]]] = []
        failure: Exception | None = None
        total = 0
        with self._internals.config.enable_x64(True):
            try:
                for entry in plans:
                    array = entry.ref()
                    if array is None:
                        continue
                    missing = [buffer for buffer in entry.buffers if buffer.array is None]
                    total += sum(buffer.nbytes for buffer in missing)
                    if limit is not None and total > limit:
                        break
                    for buffer in missing:
                        buffer.array = self._put(buffer)
                    repoint(array, self._assemble(entry))
                    begun.append((array, missing))
            except Exception as error:
                failure = error
            moved: list[_Buffer] = []
            for array, missing in begun:
                try:
                    array.block_until_ready()
                except Exception as error:
                    failure = failure or error
                    for buffer in missing:
                        buffer.array = None
                else:
                    self._evacuated.pop(id(array), None)
                    moved += missing
        if failure is not None:
            raise failure
        return _fullest(moved)

    def _put(self, buffer: _Buffer) -> Any:
        return self._copies.back(buffer.host, buffer.aval, buffer.sharding, buffer.device)

    def _assemble(self, entry: _Evacuated) -> Any:
        """A new array of restored buffers, the same as the evacuated one in every respect."""
        shards = [buffer.array for buffer in entry.buffers]
        array = self._internals.ArrayImpl(
            entry.aval, entry.sharding, shards, committed=entry.committed, _skip_checks=True
        )
        if entry.format is None:
            return array
        import jax

        special = jax.jit(lambda x: x, out_shardings=entry.format)(array)
        special.block_until_ready()
        return self._internals.ArrayImpl(
            entry.aval, entry.sharding, list(special._arrays), committed=entry.committed, _skip_checks=True
        )

    # --- what the program does meanwhile ------------------------------------------------------------------------------

    def pin(self, array: Any) -> None:
        """The program has the address of `array`: refuse to move it as long as it lives."""
        identity = id(array)
        pinned = self._pinned
        pinned[identity] = weakref.ref(array, lambda ref: pinned.pop(identity, None))

    def wrap_is_deleted(self, original: Callable[[Any], bool]) -> Callable[[Any], bool]:
        """ArrayImpl.is_deleted, for which an evacuated array is not deleted."""
        evacuated = self._evacuated

        @like(original)
        def is_deleted(array: Any) -> bool:
            return original(array) and id(array) not in evacuated

        return is_deleted

    def wrap_delete(self, original: Callable[[Any], None]) -> Callable[[Any], None]:
        """ArrayImpl.delete, after which an evacuated array does not come back."""

        @like(original)
        def delete(array: Any) -> None:
            if not on_gated(array):
                original(array)
                return
            with self._lock:
                entry = self._evacuated.pop(id(array), None)
                if entry is not None:
                    self._forget_aliases(entry)
                original(array)

        return delete

    def _forget_aliases(self, deleted: _Evacuated) -> None:
        """Deleting an array deletes its buffers, and so every array that shares one."""
        gone = {id(buffer) for buffer in deleted.buffers}
        for identity, entry in list(self._evacuated.items()):
            if any(id(buffer) in gone for buffer in entry.buffers):
                self._evacuated.pop(identity, None)

    def wrap_tokens(self, original: Callable[..., None]) -> Callable[..., None]:
        """RuntimeTokenSet.set_output_runtime_token, which is per thread, seen by synchronize()."""
        tokens = self._tokens

        @like(original)
        def set_output_runtime_token(token_set: Any, device: Any, token: Any) -> None:
            original(token_set, device, token)
            if device.platform in GATED:
                tokens[threading.get_ident(), device] = token

        return set_output_runtime_token


def _buffers(plans: list[_Evacuated]) -> list[_Buffer]:
    """Each buffer of these arrays once."""
    return list({id(buffer): buffer for plan in plans for buffer in plan.buffers}.values())


def _sharing(plans: list[_Evacuated]) -> Iterator[tuple[list[_Evacuated], int]]:
    """The arrays in groups that share buffers, each with its bytes: a buffer is moved with all arrays that have it."""
    groups: dict[int, list[_Evacuated]] = {}  # by id of a buffer
    for plan in plans:
        group = [plan]
        for buffer in plan.buffers:
            other = groups.get(id(buffer), group)
            if other is not group:
                group += other
                groups.update({id(shared): group for member in other for shared in member.buffers})
            groups[id(buffer)] = group
    for group in {id(group): group for group in groups.values()}.values():
        yield group, sum(buffer.nbytes for buffer in _buffers(group))


def _memory_stats(device: Any) -> dict[str, int]:
    """What the device's allocator says; nothing where it says nothing."""
    try:
        return device.memory_stats() or {}
    except (RuntimeError, AttributeError):
        return {}


def _special_format(array: Any) -> Any:
    """The array's format when its layout in memory is not the default one, else None."""
    try:
        array_format = array.format if hasattr(type(array), "format") else array.layout
        layout = array_format.layout if hasattr(array_format, "layout") else array_format.device_local_layout
        order = layout.major_to_minor
        plain = tuple(range(len(order)))
        return None if tuple(order) == plain else array_format
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None
