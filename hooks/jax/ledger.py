"""What jax's arrays occupy on the simulated cards: each buffer is charged once, from its birth to its last array's end.

A buffer is known by its GPU and its address. Arrays that share one (shards, views of another type) are its owners. What
this overlooks, because an array came into being inside C++ only, audit() puts right by looking at all live arrays.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from acb.client import runtime
from acb.client.evacuation import fullest
from acb.hooks.jax.internals import Internals, in_device_memory, on_simulated, simulated_index

if TYPE_CHECKING:
    from acb.devices.simulated import Card


Sizes = Mapping[int, int]
"""Bytes, by the index of the GPU."""


class _Charge:
    """One buffer on a card. `token` is popped by whoever gives its bytes back, so that it happens once."""

    __slots__ = ("key", "nbytes", "owners", "token")

    def __init__(self, key: tuple[int, int], nbytes: int) -> None:
        self.key = key
        self.nbytes = nbytes
        self.owners: set[int] = set()
        self.token = [True]


class Ledger:
    """This process's charges. Finalizers run on any thread at any moment: nothing here waits for a lock to be free."""

    def __init__(self, internals: Internals) -> None:
        array = vars(internals.ArrayImpl)
        self._internals = internals
        # The originals: looking at an array must not count as using the device.
        self._pointer = array["unsafe_buffer_pointer"]
        self._size = array["on_device_size_in_bytes"]
        self._shards = array["_arrays"].fget
        self._is_deleted = array["is_deleted"]
        self.forget()

    def forget(self) -> None:
        """In a forked child: it holds nothing, and may be bound to other cards."""
        self._cards: list[Card] = []
        self._opening = threading.Lock()
        self._charges: dict[tuple[int, int], _Charge] = {}
        self._arrays: dict[int, tuple[weakref.ref[Any], list[_Charge]]] = {}

    @property
    def cards(self) -> list[Card]:
        """The simulated cards that this process is bound to; opened on first use. Raises CardError."""
        if not self._cards:
            with self._opening:
                if not self._cards:
                    self._cards = _open_cards()
        return self._cards

    @property
    def used(self) -> list[Card]:
        """Those that have been used; none before the first use. Asking for others would choose them, before the broker
        has said which they are."""
        return self._cards

    def buffers(self, index: int) -> list[int]:
        """Bytes of each buffer that is charged to this GPU."""
        return [charge.nbytes for charge in list(self._charges.values()) if charge.key[0] == index]

    def resident(self) -> int:
        """Bytes charged for arrays on the fullest GPU. What was freed before is free for others when this returns."""
        for card in self.used:
            card.held()
        return fullest((charge.key[0], charge.nbytes) for charge in list(self._charges.values()))

    # --- charging -----------------------------------------------------------------------------------------------------

    @contextmanager
    def room(self, sizes: Sizes) -> Iterator[list[Any]]:
        """Hold `sizes` while something is computed; then charge the arrays put into the list for what they take.

        Raises jax's own out-of-memory error before anything is computed.
        """
        held: dict[int, int] = {}
        born: list[Any] = []
        try:
            for index, nbytes in sizes.items():
                if nbytes:
                    self._allocate(index, nbytes)
                    held[index] = nbytes
            yield born
        finally:
            self._settle(held, self._enter_all(born))

    def _settle(self, held: dict[int, int], taken: Sizes) -> None:
        """Charge what is taken instead of what is held, which is used up."""
        for index, nbytes in taken.items():
            more = nbytes - held.pop(index, 0)
            if more < 0:
                self.cards[index].free(-more)
            elif more:
                self._allocate(index, more)
        for index, nbytes in held.items():
            self.cards[index].free(nbytes)

    def _allocate(self, index: int, nbytes: int) -> None:
        from acb.devices.simulated import CardOutOfMemory

        card = self.cards[index]
        try:
            card.allocate(nbytes)
        except CardOutOfMemory:
            try:
                self.audit()
                card.allocate(nbytes)
            except CardOutOfMemory as error:
                where = f"simulated GPU {index}" if len(self.cards) > 1 else "simulated GPU"
                raise self._internals.RuntimeError(
                    f"RESOURCE_EXHAUSTED: Out of memory while trying to allocate {nbytes} bytes. ({where})"
                ) from error

    def _enter_all(self, arrays: list[Any]) -> Sizes:
        """enter() for each, and the bytes of all."""
        if len(arrays) == 1:
            return self.enter(arrays[0])
        total: dict[int, int] = {}
        for array in arrays:
            for index, nbytes in self.enter(array).items():
                total[index] = total.get(index, 0) + nbytes
        return total

    def enter(self, array: Any) -> Sizes:
        """An array has come into being, or has other buffers now. Returns the bytes of buffers not known before.

        Those are not yet charged on their cards.
        """
        identity = id(array)
        old = self._arrays.pop(identity, None)
        charges: list[_Charge] = []
        new: dict[int, int] = {}
        for index, shard in self.shards(array):
            nbytes = self._size(shard)
            if not nbytes:
                continue
            key = (index, self._pointer(shard))
            charge = self._charges.get(key)
            if charge is None or charge.nbytes != nbytes or not charge.token:
                charge = self._charges[key] = _Charge(key, nbytes)
                new[index] = new.get(index, 0) + nbytes
            charge.owners.add(identity)
            charges.append(charge)
        if charges:
            self._arrays[identity] = (weakref.ref(array, lambda ref: self._dead(identity, ref)), charges)
        if old is not None and old[0]() is array:
            for charge in old[1]:
                if charge not in charges:
                    self._disown(identity, charge)
        return new

    def alias(self, array: Any) -> Any:
        """Another array object for what is there already. Returns it."""
        new = self.enter(array)
        if new:
            self._settle({}, new)
        return array

    def arrays(self, values: Iterable[Any]) -> list[Any]:
        """The arrays among a computation's arguments or results; a random key's is inside it."""
        kind = self._internals.ArrayImpl
        found = [getattr(value, "_base_array", value) for value in values]
        return [array for array in found if isinstance(array, kind)]

    def shards(self, array: Any) -> list[tuple[int, Any]]:
        """The array's single-device parts on simulated GPUs, each with its GPU's index."""
        if self._is_deleted(array) or not on_simulated(array) or not in_device_memory(array):
            return []
        shards = self._shards(array)
        if len(shards) == 1:
            return [(simulated_index(array._sharding._internal_device_list[0]) or 0, shards[0])]
        found = []
        for shard in shards:
            index = simulated_index(shard._sharding._internal_device_list[0])
            if index is not None:
                found.append((index, shard))
        return found

    def places(self, array: Any) -> list[tuple[int | None, int]]:
        """(index of the GPU, or None for the host; bytes) of each single-device part of an array, wherever it is."""
        devices = ((shard._sharding._internal_device_list[0], shard) for shard in self._shards(array))
        return [(simulated_index(device), self._size(shard)) for device, shard in devices]

    # --- giving back --------------------------------------------------------------------------------------------------

    def deleted(self, array: Any) -> None:
        """The array's buffers are gone, and with them those of all arrays that share them."""
        entry = self._arrays.pop(id(array), None)
        if entry is not None:
            for charge in entry[1]:
                self._free(charge)

    def _dead(self, identity: int, ref: weakref.ref[Any]) -> None:
        entry = self._arrays.get(identity)
        if entry is not None and entry[0] is ref:
            del self._arrays[identity]
            for charge in entry[1]:
                self._disown(identity, charge)

    def _disown(self, identity: int, charge: _Charge) -> None:
        charge.owners.discard(identity)
        if not charge.owners:
            self._free(charge)

    def _free(self, charge: _Charge) -> None:
        try:
            charge.token.pop()
        except IndexError:
            return  # somebody was faster
        if self._charges.get(charge.key) is charge:
            del self._charges[charge.key]
        if self._cards:
            self._cards[charge.key[0]].free(charge.nbytes)

    def audit(self) -> None:
        """Compare with all live arrays: charge what was overlooked, give back what is not there any more."""
        live: list[Any] = [
            array for backend in self._internals.backends() for array in backend.live_arrays() if self.shards(array)
        ]
        there = {
            (index, self._pointer(shard)) for array in live for index, shard in self.shards(array) if self._size(shard)
        }
        for charge in list(self._charges.values()):
            if charge.key not in there:
                self._free(charge)
        for index, nbytes in self._enter_all([array for array in live if id(array) not in self._arrays]).items():
            self.cards[index].allocate(nbytes)


def count_gpus() -> int:
    """How many GPUs the program sees: as many as it asked for, and there are."""
    from acb.devices.simulated import card_paths

    client = runtime.client()
    assert client.simulated is not None
    return max(1, min(client.count, len(card_paths(client.simulated))))


def _open_cards() -> list[Card]:
    """The cards of this process; another framework may have opened them already, and a process has one account each."""
    from acb.devices import simulated

    client = runtime.client()
    assert client.simulated is not None
    known = {card.path: card for card in list(simulated._cards)}
    paths = [client.simulated / f"gpu{ordinal}.card" for ordinal in client.gpus or range(count_gpus())]
    return [known.get(path) or simulated.Card.open(path) for path in paths[: count_gpus()]]
