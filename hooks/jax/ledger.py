"""What jax's arrays occupy on the simulated card: each buffer is charged once, from its birth to its last array's end.

A buffer is known by its address. Arrays that share one (shards, views of another type) are its owners. What this
overlooks, because an array came into being inside C++ only, audit() puts right by looking at all live arrays.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from acb.client import runtime
from acb.hooks.jax.internals import Internals, in_device_memory, on_simulated

if TYPE_CHECKING:
    from acb.devices.simulated import Card


class _Charge:
    """One buffer on the card. `token` is popped by whoever gives its bytes back, so that it happens once."""

    __slots__ = ("nbytes", "owners", "pointer", "token")

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.pointer = pointer
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
        """In a forked child: it holds nothing, and may be bound to another card."""
        self._card: Card | None = None
        self._opening = threading.Lock()
        self._charges: dict[int, _Charge] = {}
        self._arrays: dict[int, tuple[weakref.ref[Any], list[_Charge]]] = {}

    @property
    def card(self) -> Card:
        """The simulated card that this process is bound to; opened on first use. Raises CardError."""
        if self._card is None:
            with self._opening:
                if self._card is None:
                    self._card = _open_card()
        return self._card

    def __len__(self) -> int:
        """How many buffers are charged."""
        return len(self._charges)

    @property
    def largest(self) -> int:
        """Bytes of the largest buffer there is now."""
        return max((charge.nbytes for charge in list(self._charges.values())), default=0)

    def total(self) -> int:
        """Bytes charged for arrays."""
        return sum(charge.nbytes for charge in list(self._charges.values()))

    # --- charging -----------------------------------------------------------------------------------------------------

    @contextmanager
    def room(self, nbytes: int) -> Iterator[list[Any]]:
        """Hold `nbytes` while something is computed; then charge the arrays put into the list for what they take.

        Raises jax's own out-of-memory error before anything is computed.
        """
        self._allocate(nbytes)
        born: list[Any] = []
        try:
            yield born
        finally:
            self._settle(nbytes, sum(map(self.enter, born)))

    def _settle(self, held: int, taken: int) -> None:
        if taken < held:
            self.card.free(held - taken)
        elif taken > held:
            self._allocate(taken - held)

    def _allocate(self, nbytes: int) -> None:
        from acb.devices.simulated import CardOutOfMemory

        if not nbytes:
            return
        try:
            self.card.allocate(nbytes)
        except CardOutOfMemory:
            try:
                self.audit()
                self.card.allocate(nbytes)
            except CardOutOfMemory as error:
                raise self._internals.RuntimeError(
                    f"RESOURCE_EXHAUSTED: Out of memory while trying to allocate {nbytes} bytes. (simulated GPU)"
                ) from error

    def enter(self, array: Any) -> int:
        """An array has come into being, or has other buffers now. Returns the bytes of buffers not known before.

        Those are not yet charged on the card.
        """
        identity = id(array)
        old = self._arrays.pop(identity, None)
        charges, new = [], 0
        for shard in self._on_card(array):
            nbytes = self._size(shard)
            if not nbytes:
                continue
            pointer = self._pointer(shard)
            charge = self._charges.get(pointer)
            if charge is None or charge.nbytes != nbytes or not charge.token:
                charge = self._charges[pointer] = _Charge(pointer, nbytes)
                new += nbytes
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
        self._settle(0, self.enter(array))
        return array

    def arrays(self, values: Iterable[Any]) -> list[Any]:
        """The arrays among a computation's arguments or results; a random key's is inside it."""
        kind = self._internals.ArrayImpl
        found = [getattr(value, "_base_array", value) for value in values]
        return [array for array in found if isinstance(array, kind)]

    def _on_card(self, array: Any) -> list[Any]:
        """The array's single-device parts on simulated devices."""
        if self._is_deleted(array) or not on_simulated(array) or not in_device_memory(array):
            return []
        return list(self._shards(array))

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
        if self._charges.get(charge.pointer) is charge:
            del self._charges[charge.pointer]
        if self._card is not None:
            self._card.free(charge.nbytes)

    def audit(self) -> None:
        """Compare with all live arrays: charge what was overlooked, give back what is not there any more."""
        live: list[Any] = [
            array for backend in self._internals.backends() for array in backend.live_arrays() if self._on_card(array)
        ]
        there = {self._pointer(shard) for array in live for shard in self._shards(array) if self._size(shard)}
        for charge in list(self._charges.values()):
            if charge.pointer not in there:
                self._free(charge)
        overlooked = sum(self.enter(array) for array in live if id(array) not in self._arrays)
        if overlooked:
            self.card.allocate(overlooked)


def _open_card() -> Card:
    """The card of this process; another framework may have opened it already, and a process has one account."""
    from acb.devices import simulated

    client = runtime.client()
    assert client.simulated is not None
    path = client.simulated / f"gpu{client.gpu or 0}.card"
    for card in list(simulated._cards):
        if card.path == path:
            return card
    return simulated.Card.open(path)
