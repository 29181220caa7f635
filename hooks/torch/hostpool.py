"""Host memory for evacuated bytes: large page-locked slabs, kept between evacuations, given back when memory is short.

Slabs are anonymous maps registered with the CUDA driver, rather than PyTorch's own pinned allocations: those are
rounded up to a power of two and never go back to the operating system.

A program whose memory was evacuated may be suspended by the driver, which stops every call of its until it is resumed,
and only a lease brings that. So what comes from the program's own threads, at any moment, never calls the driver here:
dropped places wait in a queue for the agent, which has a lease, or is about to move memory for the broker.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import torch

from acb.client.hostmemory import RESERVE, available_bytes
from acb.hooks.torch.pagelocks import make_pages

SLAB = 256 << 20
"""Bytes of a slab; larger storages get one of their own."""

ALIGN = 512


class _Map(mmap.mmap):
    """Anonymous memory that forked children do not have: a data loader's workers would keep its old bytes for ever, and
    the GPU reads and writes the parent's pages.
    """

    owner: int | None = None
    """The process that has it; None when it could not be made."""

    def __new__(cls, nbytes: int) -> _Map:
        fresh = super().__new__(cls, -1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            try:
                fresh.madvise(getattr(mmap, advice))
            except (AttributeError, OSError, ValueError):
                pass  # it is only quicker, or smaller, with it
        return fresh

    def __init__(self, nbytes: int) -> None:
        self.owner = os.getpid()

    def __del__(
        self, process: Any = os.getpid, ends: Any = sys.is_finalizing, keep: Any = ctypes.pythonapi.Py_IncRef
    ) -> None:
        # In a forked child something else may lie at this address by now, which must not be unmapped with this object.
        # At the process's end it may still be page-locked.
        if self.owner is not None and (process() != self.owner or ends()):
            keep(ctypes.py_object(self))


class Slab:
    """One map, filled from its start; `tenants` are the places in it that are in use."""

    def __init__(self, nbytes: int) -> None:
        self.page_locked = False
        self.nbytes = nbytes
        self.filled = 0
        self.tenants: set[Place] = set()
        self._unregister: Callable[[int], Any] | None = None
        self._map: _Map | None = None
        self._map = _Map(nbytes)
        self.address = int(torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr())

    def lock(self, register: Callable[[int, int], Any], unregister: Callable[[int], Any] | None) -> None:
        """Page-lock it, if that can be done: an ordinary copy, slower, works as well."""
        self._unregister = unregister
        try:
            self.page_locked = not int(register(self.address, self.nbytes))
        except Exception:
            pass

    def storage(self, offset: int, nbytes: int) -> Any:
        """The bytes at `offset` as a storage of exactly `nbytes`."""
        return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=offset).untyped_storage()

    def close(self) -> None:
        """Give the memory back; at once, if nothing looks at it any more."""
        here = self._map is not None and self._map.owner == os.getpid()
        if here and self.page_locked and self._unregister is not None:
            try:
                self._unregister(self.address)
            except Exception:
                pass
        self.page_locked = False
        self._map = None

    def __del__(self, ends: Any = sys.is_finalizing) -> None:
        # Or else the driver would take this address for page-locked when the next map comes to lie there. A process
        # that ends needs nothing, and the driver may have suspended it.
        if not ends():
            self.close()


class Place:
    """A stretch of a slab that holds one storage's bytes. `filled`: they are there, or on their way."""

    __slots__ = ("filled", "nbytes", "offset", "slab")

    def __init__(self, slab: Slab, offset: int, nbytes: int) -> None:
        self.slab = slab
        self.offset = offset
        self.nbytes = nbytes
        self.filled = False

    def storage(self) -> Any:
        """The bytes, as a storage on the host."""
        return self.slab.storage(self.offset, self.nbytes)


class _Room:
    """A slab as a plan fills it; `slab` is None as long as it has yet to be made."""

    __slots__ = ("filled", "nbytes", "slab")

    def __init__(self, slab: Slab | None, nbytes: int, filled: int) -> None:
        self.slab = slab
        self.nbytes = nbytes
        self.filled = filled


class _Plan:
    """Which size goes where: a place is one stretch, so what is free in several slabs is not one room for it."""

    def __init__(self, sizes: list[int], begun: list[Slab], empty: list[Slab]) -> None:
        """In what is left of the slabs that are begun, in empty ones, and in as many new ones as it takes."""
        rooms = [_Room(slab, slab.nbytes, slab.filled) for slab in begun]
        rooms += [_Room(slab, slab.nbytes, 0) for slab in empty]
        rooms.sort(key=lambda room: room.nbytes)  # a large one is for what needs it, as far as there are others
        total = sum(map(_stretch, sizes))
        spots: dict[int, tuple[_Room, int]] = {}
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            stretch = _stretch(sizes[index])
            room = next((room for room in rooms if room.nbytes - room.filled >= stretch), None)
            if room is None:
                room = _Room(None, max(min(SLAB, _pages(total)), _pages(stretch)), 0)
                rooms.insert(0, room)
            spots[index] = (room, room.filled)
            room.filled += stretch
            if room.nbytes - room.filled < ALIGN:
                rooms.remove(room)
        self._spots = [spots[index] for index in range(len(sizes))]
        self.rooms = list(dict.fromkeys(room for room, _ in self._spots))

    def new(self) -> int:
        """Bytes of the slabs that it takes and that are not there yet."""
        return sum(room.nbytes for room in self.rooms if room.slab is None)

    def used(self) -> set[Slab]:
        """The slabs that it takes and that are there."""
        return {room.slab for room in self.rooms if room.slab is not None}

    def carry_out(self, sizes: list[int]) -> list[Place]:
        """The places, once every slab has been made."""
        places = []
        for (room, offset), nbytes in zip(self._spots, sizes, strict=True):
            assert room.slab is not None
            places.append(Place(room.slab, offset, nbytes))
            room.slab.filled = room.filled
            room.slab.tenants.add(places[-1])
        return places


class HostPool:
    """Slabs, reused from one evacuation to the next.

    All methods but drop() are called by one thread at a time, when the driver may be called.
    """

    def __init__(
        self,
        register: Callable[[int, int], Any] | None = None,
        unregister: Callable[[int], Any] | None = None,
        available: Callable[[], int | None] | None = None,
    ) -> None:
        """`register(address, nbytes)` page-locks and returns 0, `unregister(address)` undoes it; None: ordinary memory.

        `available()` says how many bytes the host can still give; None when that cannot be known.
        """
        self._register = register
        self._unregister = unregister
        self._available = available or available_bytes
        self._slabs: list[Slab] = []
        self._dropped: deque[Place] = deque()

    def anew(self) -> HostPool:
        """An empty pool of the same kind."""
        return HostPool(self._register, self._unregister, self._available)

    def held(self) -> int:
        """Bytes of host memory in the pool, used or not."""
        return sum(slab.nbytes for slab in self._slabs)

    def take(self, sizes: list[int], beside: list[Place] | None = None) -> list[Place]:
        """A place for each size in bytes, in slabs that are empty, or that these other places were the last to be put
        into. Raises MemoryError, with nothing taken, when the host has not enough.
        """
        self.sweep()
        begun = list(dict.fromkeys(place.slab for place in beside or ()))
        plan = _Plan(sizes, begun, [slab for slab in self._slabs if not slab.tenants])
        if self._missing(plan):
            self.trim(plan.used())
        if self._missing(plan):
            self.trim()
            plan = _Plan(sizes, begun, [])
            missing = self._missing(plan)
            if missing:
                raise MemoryError(f"{plan.new()} bytes more are needed and the host has {plan.new() - missing} to give")
        made: list[Slab] = []
        try:
            for room in plan.rooms:
                if room.slab is None:
                    room.slab = Slab(room.nbytes)
                    made.append(room.slab)
            self._page_lock(made)
        except (OSError, MemoryError, RuntimeError) as error:
            for slab in made:
                slab.close()
            raise MemoryError(f"the host gives no more memory: {error}") from None
        self._slabs.extend(made)
        return plan.carry_out(sizes)

    def _missing(self, plan: _Plan) -> int:
        """How many bytes the host has too little for the plan, and for what must be left of it."""
        new = plan.new()
        left = self._available() if new else None
        return 0 if left is None else min(new, max(0, new + RESERVE - left))

    def _page_lock(self, slabs: list[Slab]) -> None:
        if self._register is None or not slabs:
            return
        make_pages([(slab.address, slab.nbytes) for slab in slabs])
        for slab in slabs:
            slab.lock(self._register, self._unregister)

    def give_back(self, places: list[Place]) -> None:
        """These places are free again; their slabs stay in the pool."""
        for place in places:
            place.slab.tenants.discard(place)

    def drop(self, place: Place) -> None:
        """What was in this place is gone for good; sweep() will see to the rest.

        May be called by the garbage collector, on any thread, at any moment: takes no lock, and calls no driver.
        """
        self._dropped.append(place)

    def sweep(self) -> None:
        """Give back the slabs in which nothing is any more since it was dropped."""
        while self._dropped:
            place = self._dropped.popleft()
            place.slab.tenants.discard(place)
            if not place.slab.tenants:
                self._close(place.slab)

    def trim(self, keep: Collection[Slab] = ()) -> None:
        """Give back every slab that nothing is in, but for those to keep."""
        for slab in [slab for slab in self._slabs if not slab.tenants and slab not in keep]:
            self._close(slab)

    def trim_if_short(self) -> None:
        """trim(), when the host is short of memory: keeping slabs only saves the time to page-lock them again."""
        left = self._available()
        if left is not None and left < self.held() + RESERVE:
            self.trim()

    def _close(self, slab: Slab) -> None:
        try:
            self._slabs.remove(slab)
        except ValueError:
            return
        slab.close()


def _stretch(nbytes: int) -> int:
    """The bytes of a slab that a place of this size takes."""
    return -(-nbytes // ALIGN) * ALIGN


def _pages(nbytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
