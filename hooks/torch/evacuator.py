"""PyTorch's evacuator: every storage on the GPU copied to host memory and freed in place, and brought back.

A storage resized to zero gives its memory back and stays the storage of all its tensors, views and saved tensors;
resized again and filled, all of them are as they were. Nothing of a tensor changes, not even its version counter.
Works on CUDA and on the simulated GPU alike.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import weakref
from collections.abc import Generator
from typing import Any

import torch

from acb.client.evacuation import EvacuationError, batches, fullest
from acb.hooks.torch import devices, reach
from acb.hooks.torch.hostpool import HostPool, Place
from acb.hooks.torch.memory import OutOfMemoryError
from acb.hooks.torch.pagelocks import page_locking
from acb.hooks.torch.peaks import Peaks
from acb.hooks.torch.streams import Owners, Streams, owners

cuda: Any = torch.cuda


AHEAD = 5 << 28
"""Bytes, about, whose copies are begun before all memory has been found: beside an H100 that took some 20 ms."""


class _Parked:
    """A storage whose bytes are in host memory. It is held weakly: what the program drops meanwhile must not stay."""

    __slots__ = ("__weakref__", "nbytes", "ordinal", "place", "storage", "stream")

    def __init__(self, storage: Any, place: Place, pool: HostPool, stream: int) -> None:
        self.nbytes = place.nbytes
        self.ordinal = _ordinal(storage)
        self.stream = stream
        self.place = place
        self.storage = weakref.ref(storage, functools.partial(_dropped, pool, place))


def _dropped(pool: HostPool, place: Place, _: Any) -> None:
    """The program has dropped an evacuated storage: nobody will want its bytes. On any thread, without a lease."""
    pool.drop(place)


class TorchEvacuator:
    """Moves what PyTorch holds on gated devices. Made before the gate's patches: it must never stop at the gate."""

    name = "torch"

    def __init__(self, pool: HostPool | None = None) -> None:
        kind: Any = torch.UntypedStorage
        self._resize = kind.resize_
        self._copy = kind.copy_
        self._synchronize = cuda.synchronize
        self._empty_cache = cuda.empty_cache
        self.peaks = Peaks()
        self._real = not _is_simulated() and (torch.version.cuda is not None or torch.version.hip is not None)
        self._pool = pool if pool is not None else HostPool(*(page_locking() if self._real else ()))
        self._parked: list[_Parked] = []
        self._came_back: list[weakref.ref[Any]] = []  # what restore() has brought back
        self._streams: dict[int, Any] = {}
        self._allocating = Streams()

    def anew(self) -> TorchEvacuator:
        """The evacuator of a forked child, which holds nothing."""
        fresh = copy.copy(self)
        fresh._pool = self._pool.anew()
        fresh._parked, fresh._came_back = [], []
        fresh._streams = {}
        fresh._allocating = Streams()
        return fresh

    # --- what is there ---------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Block until the work queued on every GPU of this process is done."""
        for ordinal in self._ordinals():
            self._synchronize(ordinal)

    def resident(self) -> int:
        """Bytes that PyTorch's allocator holds on the fullest GPU, used or cached."""
        return max((int(cuda.memory_reserved(ordinal)) for ordinal in self._ordinals()), default=0)

    def peak(self) -> int:
        """The most bytes that PyTorch's allocator has held on one GPU at once since reset_peak()."""
        return max((self.peaks.peak(ordinal) for ordinal in self._ordinals()), default=0)

    def reset_peak(self) -> None:
        """Forget the peak."""
        for ordinal in self._ordinals():
            self.peaks.reset(ordinal)

    def _ordinals(self) -> list[int]:
        """The GPUs that this process uses; none before it has used one. Asking others would begin to use them."""
        if not cuda.is_initialized():
            return []
        used = getattr(torch._C, "_cuda_hasPrimaryContext", None) if self._real else None
        return [ordinal for ordinal in range(cuda.device_count()) if used is None or used(ordinal)]

    def _on_used_device(self) -> Any:
        """A context in which CUDA calls for no device in particular go to one that this process uses anyway."""
        ordinals = self._ordinals() if self._real else []
        return cuda.device(ordinals[0]) if ordinals else contextlib.nullcontext()

    # --- evacuation ------------------------------------------------------------------------------------------------

    def evacuate(self) -> int:
        """All of evacuation() at once; the bytes moved."""
        return sum(self.evacuation())

    def evacuation(self, piece: int = 0) -> Generator[int]:
        """See acb.client.evacuation.Evacuator."""
        in_pieces = piece > 0 and len(self._ordinals()) == 1
        pieces = list(batches(self._booked(in_pieces), piece if in_pieces else 0))
        try:
            yield 0
            self.synchronize()
            known = owners() if self._real else Owners(())
            while pieces:
                yield self._move_out(pieces[0], known)
                del pieces[0]
        finally:
            self._call_off([pair for pairs in pieces for pair in pairs])

    def _booked(self, in_order: bool) -> list[tuple[tuple[Any, Place], int]]:
        """Every storage that is to leave, with its place in host memory, and its bytes."""
        ahead = self._begin()
        try:
            storages = reach.find_storages()
            obstacle = reach.obstacle(storages)
            if obstacle is not None:
                raise EvacuationError(f"PyTorch's memory has to stay on the GPU: {obstacle}")
            # Memory that belongs to another framework or process is not ours to move, and stays.
            storages = [storage for storage in storages if storage.resizable()]
            places = {storage._cdata: place for storage, place in ahead}
            rest = [storage for storage in storages if storage._cdata not in places]
            sizes = [_nbytes(storage) for storage in rest]
            try:
                with self._on_used_device():
                    more = self._pool.take(sizes, [place for _, place in ahead])
            except MemoryError as error:
                raise EvacuationError(f"no room in host memory for {sum(sizes)} bytes of PyTorch's: {error}") from None
            places.update(zip([storage._cdata for storage in rest], more, strict=True))
        except BaseException:
            self._call_off(ahead)
            raise
        found = {storage._cdata for storage in storages}
        self._call_off([(storage, place) for storage, place in ahead if storage._cdata not in found])
        if in_order:
            # What lies side by side goes together: only a block of the allocator's that is empty can be given back.
            storages.sort(key=lambda storage: int(storage.data_ptr()))
        return [((storage, places[storage._cdata]), _nbytes(storage)) for storage in storages]

    def _begin(self) -> list[tuple[Any, Place]]:
        """Begin to copy some of what came back last time, and most likely leaves again. Nothing is changed by that."""
        refs, self._came_back = self._came_back, []
        storages = [storage for storage in [ref() for ref in refs] if storage is not None]
        storages = [s for s in storages if s.device.type in devices.GATED and _nbytes(s) and s.resizable()]
        storages.sort(key=lambda storage: int(storage.data_ptr()))
        chosen = next(batches([(storage, _nbytes(storage)) for storage in storages], AHEAD), [])
        try:
            with self._on_used_device():
                places = self._pool.take([_nbytes(storage) for storage in chosen])
        except MemoryError:
            return []  # whoever takes places for all will say so
        begun: list[tuple[Any, Place]] = list(zip(chosen, places, strict=True))
        try:
            self.synchronize()
            with _Copying(self._streams, chosen, self._real, wait=False):
                for storage, place in begun:
                    self._copy(place.storage(), storage, place.slab.page_locked)
                    place.filled = True
        except RuntimeError:
            self._call_off(begun)
            return []  # it will fail again, and be reported
        return begun

    def _call_off(self, pairs: list[tuple[Any, Place]]) -> None:
        """These storages do not leave: their places are free, once nothing is being copied there any more."""
        if any(place.filled for _, place in pairs):
            with contextlib.suppress(RuntimeError), _Copying(self._streams, [s for s, _ in pairs], self._real):
                pass
        self._pool.give_back([place for _, place in pairs])

    def _move_out(self, pairs: list[tuple[Any, Place]], known: Owners) -> int:
        """Move storages to their places, all or none: the bytes moved. What is not to be given back leaves `pairs`."""
        try:
            with _Copying(self._streams, [storage for storage, _ in pairs], self._real):
                for storage, place in pairs:
                    if not place.filled:
                        self._copy(place.storage(), storage, place.slab.page_locked)
        except (RuntimeError, MemoryError) as error:
            raise EvacuationError(f"PyTorch could not copy its memory to the host: {error}") from None
        moved = fullest((_ordinal(storage), place.nbytes) for storage, place in pairs)
        parked = [_Parked(storage, place, self._pool, known.of(storage.data_ptr())) for storage, place in pairs]
        self._parked += parked
        try:
            for storage, _ in pairs:
                self._resize(storage, 0)
        except RuntimeError as error:
            pairs.clear()
            self._move_in(parked)
            raise EvacuationError(f"PyTorch could not free its memory on the GPU: {error}") from None
        pairs.clear()
        del storage
        if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
            torch._C._cuda_clearCublasWorkspaces()  # made again when they are needed
        self._empty_cache()
        return moved

    def restore(self, limit: int | None = None) -> int:
        """See acb.client.evacuation.Evacuator."""
        moved, failure = self._move_in(self._parked, limit)
        self._pool.sweep()
        if failure is not None:
            left = sum(parked.nbytes for parked in self._parked)
            raise MemoryError(f"the GPU has no room for {left} bytes of PyTorch's: {failure}")
        if not self._parked:
            self._pool.trim_if_short()
        return moved

    def _move_in(self, chosen: list[_Parked], limit: int | None = None) -> tuple[int, str | None]:
        """Bring these back, in order, as far as the limit and the room go: the bytes moved; why not more."""
        back: list[tuple[Any, _Parked]] = []
        failure: str | None = None
        total = 0
        try:
            for parked in chosen:
                storage = parked.storage()
                if storage is None:
                    continue
                total += parked.nbytes
                if limit is not None and total > limit:
                    break
                try:
                    with self._allocating.on(parked.ordinal, parked.stream):
                        self._resize(storage, parked.nbytes)
                except OutOfMemoryError as error:
                    failure = str(error)
                    break
                back.append((storage, parked))
            with _Copying(self._streams, [storage for storage, _ in back], self._real):
                for storage, parked in back:
                    self._copy(storage, parked.place.storage(), parked.place.slab.page_locked)
        except BaseException:
            # What is in host memory counts, and stays there.
            for storage, _ in back:
                with contextlib.suppress(RuntimeError):
                    self._resize(storage, 0)
            raise
        moved = fullest((parked.ordinal, parked.nbytes) for _, parked in back)
        self._came_back += [weakref.ref(storage) for storage, _ in back]
        self._pool.give_back([parked.place for _, parked in back])
        done = {id(parked) for _, parked in back}
        self._parked = [parked for parked in self._parked if id(parked) not in done and parked.storage() is not None]
        return moved, failure


class _Copying:
    """Copies between host and GPU started inside run side by side, on a stream of their own, and are done at its end,
    or, with `wait` off, at the next one's for the same GPUs.

    Without a real GPU there are no streams, and each copy is done when it returns.
    """

    def __init__(self, streams: dict[int, Any], storages: list[Any], real: bool, *, wait: bool = True) -> None:
        self._wait = wait
        self._ordinals = sorted(set(map(_ordinal, storages))) if real else []
        self._streams = streams
        self._contexts: list[Any] = []

    def __enter__(self) -> None:
        for ordinal in self._ordinals:
            stream = self._streams.get(ordinal)
            if stream is None:
                stream = self._streams[ordinal] = cuda.Stream(ordinal)
            context = cuda.stream(stream)
            context.__enter__()
            self._contexts.append(context)

    def __exit__(self, *error: Any) -> None:
        while self._contexts:
            self._contexts.pop().__exit__(None, None, None)
        for ordinal in self._ordinals if self._wait else ():
            self._streams[ordinal].synchronize()


def _nbytes(storage: Any) -> int:
    """Its size, past every hook."""
    return int(torch._C.StorageBase.nbytes(storage))


def _ordinal(storage: Any) -> int:
    """The GPU that a storage is on."""
    return int(storage.device.index or 0)


def _is_simulated() -> bool:
    """Whether ``cuda`` is a simulated GPU, which a build of PyTorch for real ones can have as well."""
    simulated = sys.modules.get("acb.hooks.torch.simulated")
    return simulated is not None and simulated.current_ledger() is not None
