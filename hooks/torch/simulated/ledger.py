"""The ledger: which of this process's CPU storages stand for memory on a simulated GPU, and what each is charged.

A simulated CUDA tensor is a plain CPU tensor whose storage is in the ledger. A storage's Python object lives as long as
its memory does (PyTorch keeps it), so that a weak reference to it tells when the charge ends.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from acb.devices.simulated import Card, CardOutOfMemory
from acb.hooks.torch.simulated import places

RESIDENT, EVACUATED, LOST = 0, 1, 2
"""Where an entry's memory is: on its card; resized away; in the process that this one was forked from."""

address: Callable[[Any], int] = torch._C._storage_address
_storage_of: Callable[[Any], Any] = torch._C.TensorBase.untyped_storage
_nbytes: Callable[[Any], int] = torch._C.StorageBase.nbytes
_layout: Callable[[Any], Any] = torch._C.TensorBase.layout.__get__

NO_STORAGE = (RuntimeError, NotImplementedError)
"""What PyTorch raises when asked for the storage of a tensor that has none, such as a sparse one."""


class Gpu:
    """One of the program's GPUs: its card, and what this process has done there."""

    __slots__ = ("allocations", "card", "device", "fraction", "frees", "index", "ooms")

    def __init__(self, index: int, card: Card) -> None:
        self.index = index
        self.device = places.CUDA[index]
        self.card = card
        self.allocations = 0
        self.frees = 0
        self.ooms = 0
        self.fraction = 1.0

    def charge(self, nbytes: int) -> BaseException | None:
        """Charge the card; returns the error when there is no room."""
        card = self.card
        self.allocations += 1
        try:
            if self.fraction < 1.0 and card.held() + nbytes > self.fraction * card.capacity:
                raise CardOutOfMemory(nbytes, card.held(), int(self.fraction * card.capacity))
            if nbytes:
                card.allocate(nbytes)
        except CardOutOfMemory as error:
            self.ooms += 1
            return out_of_memory(error.requested, self)
        return None

    def release(self, nbytes: int) -> None:
        """Take back a charge."""
        self.frees += 1
        if nbytes:
            self.card.free(nbytes)


class Entry(weakref.ref):  # type: ignore[type-arg]
    """One storage on a card: a weak reference to it, where it is, and what it is charged."""

    __slots__ = ("gpu", "key", "nbytes", "state")

    gpu: Gpu
    key: int
    nbytes: int
    state: int


class Ledger:
    """The storages on the cards, by the address of their C++ part."""

    def __init__(self, card_provider: Callable[[], Sequence[Card]], description: Callable[[], Sequence[Card]]) -> None:
        """`card_provider` is called at the first allocation, and gives the cards behind ``cuda:0``, ``cuda:1`` and so
        on; `description` gives cards to describe before that.
        """
        self.entries: dict[int, Entry] = {}
        self.floating: dict[int, weakref.ref[Any]] = {}
        self.lost = False  # whether this process was forked from one that used a card
        self._connecting = threading.Lock()
        self._provider = card_provider
        self._description = description
        self._gpus: list[Gpu] = []
        self._described: list[Gpu] = []

    # --- the cards --------------------------------------------------------------------------------------------------

    def gpu(self, index: int) -> Gpu:
        """A GPU to use; the first call initialises CUDA, as PyTorch would, and so passes the gate."""
        if not self._gpus:
            torch.cuda._lazy_init()
            self.connect()
        places.check_ordinal(index)  # until now it was one of as many as the program had asked for
        return self._gpus[index]

    def connect(self) -> None:
        """Get the cards; called while CUDA is being initialised."""
        with self._connecting:
            if not self._gpus:
                self._gpus = [Gpu(index, card) for index, card in enumerate(self._provider())]

    def gpus(self) -> list[Gpu]:
        """The GPUs that there are, to read capacity and use from, without using any."""
        if self._gpus:
            return self._gpus
        if not self._described:
            self._described = [Gpu(index, card) for index, card in enumerate(self._description())]
        return self._described

    def after_fork(self) -> None:
        """In a forked child: what the parent has on its cards is not the child's to use, or to free."""
        self.lost = self.lost or bool(self._gpus)
        self._gpus = []
        self._connecting = threading.Lock()
        for entry in self.entries.values():
            entry.nbytes = 0
            entry.state = LOST

    # --- what is there ----------------------------------------------------------------------------------------------

    def storages(self) -> list[Any]:
        """The storages on the cards, evacuated ones included."""
        return [storage for storage in [entry() for entry in list(self.entries.values())] if storage is not None]

    def resident(self) -> int:
        """Bytes that these storages take on the cards."""
        return sum(entry.nbytes for entry in list(self.entries.values()))

    def entry(self, tensor: Any) -> Entry | None:
        """The entry of a tensor's storage; None: it is on the host."""
        entries = self.entries
        if not entries:
            return None
        try:
            return entries.get(address(tensor))
        except NO_STORAGE:
            for part in parts(tensor):
                return self.entry(part)
            return None

    # --- putting and taking -----------------------------------------------------------------------------------------

    def put(self, tensor: Any, gpu: Gpu) -> BaseException | None:
        """Charge a tensor's storage to this GPU, if it is not on one already.

        Returns the error when there is no room, so that the caller can let go of the tensor before it raises it.
        """
        try:
            key = address(tensor)
        except NO_STORAGE:
            errors = (self.put(part, gpu) for part in parts(tensor))
            return next((error for error in errors if error is not None), None)
        if key in self.entries:
            return None
        return self.put_storage(_storage_of(tensor), key, gpu)

    def put_storage(self, storage: Any, key: int, gpu: Gpu) -> BaseException | None:
        """As put(), for the storage at the address `key`."""
        nbytes = _nbytes(storage)
        error = gpu.charge(nbytes)
        if error is not None:
            return error
        entry = Entry(storage, self._dead)
        entry.gpu, entry.key, entry.nbytes, entry.state = gpu, key, nbytes, RESIDENT
        self.entries[key] = entry
        self.floating.pop(key, None)
        return None

    def _dead(self, reference: Any) -> None:
        """A storage is gone; may be called by the garbage collector at any moment on any thread."""
        entry: Entry = reference
        if self.entries.get(entry.key) is entry:
            del self.entries[entry.key]
            entry.gpu.release(entry.nbytes)

    def resized(self, entry: Entry, nbytes: int) -> BaseException | None:
        """A storage has, or will have, another size: charge the difference; returns the error when there is no room."""
        if nbytes > entry.nbytes:
            error = self.gpu(entry.gpu.index).charge(nbytes - entry.nbytes)
            if error is not None:
                return error
        elif nbytes < entry.nbytes:
            entry.gpu.release(entry.nbytes - nbytes)
        entry.state = EVACUATED if nbytes == 0 and (entry.nbytes or entry.state == EVACUATED) else RESIDENT
        entry.nbytes = nbytes
        return None

    # --- floating storages ------------------------------------------------------------------------------------------

    def float_storage(self, tensor: Any) -> None:
        """PyTorch's own C++ code has made this tensor: with its first use it turns out where it is.

        C++ code asks for "the device of that tensor", which for a simulated CUDA tensor says CPU.
        """
        try:
            key = address(tensor)
        except NO_STORAGE:
            return
        if key not in self.entries:
            self.floating[key] = weakref.ref(_storage_of(tensor), lambda _: self.floating.pop(key, None))

    def floats(self, tensor: Any) -> bool:
        """Whether float_storage() was called for this tensor's storage and nothing has decided since."""
        if not self.floating:
            return False
        try:
            return address(tensor) in self.floating
        except NO_STORAGE:
            return False

    def settle_on_host(self, tensor: Any) -> None:
        """A floating tensor has been used with tensors on the host."""
        try:
            self.floating.pop(address(tensor), None)
        except NO_STORAGE:
            pass


def parts(tensor: Any) -> Iterator[Any]:
    """The tensors of which one without storage consists: a sparse one's parts, what a functorch wrapper wraps."""
    wrapped = torch._C._functorch
    if wrapped.is_functorch_wrapped_tensor(tensor):
        yield wrapped.get_unwrapped(tensor)
        return
    layout = _layout(tensor)
    names = {
        torch.sparse_coo: ("_values", "_indices"),
        torch.sparse_csr: ("values", "crow_indices", "col_indices"),
        torch.sparse_bsr: ("values", "crow_indices", "col_indices"),
        torch.sparse_csc: ("values", "ccol_indices", "row_indices"),
        torch.sparse_bsc: ("values", "ccol_indices", "row_indices"),
    }.get(layout, ())
    for name in names:
        yield getattr(torch._C.TensorBase, name)(tensor)


def out_of_memory(nbytes: int, gpu: Gpu) -> BaseException:
    """The error that PyTorch raises on a GPU without room for `nbytes`."""
    card = gpu.card
    used, held = card.used(), card.held()
    error: BaseException = torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {_size(nbytes)}. GPU {gpu.index} has a total capacity of "
        f"{_size(card.capacity)} of which {_size(max(0, card.capacity - used))} is free. This process has "
        f"{_size(held)} memory in use, other processes have {_size(max(0, used - held))}. (simulated GPU)"
    )
    return error


def _size(nbytes: int) -> str:
    """As PyTorch's allocator writes sizes."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} bytes"


def check(entry: Entry, what: str) -> None:
    """Raise RuntimeError unless the entry's memory is on its card."""
    if entry.state == EVACUATED:
        raise RuntimeError(
            f"{what} was called on a tensor whose memory has been evacuated from the simulated GPU; "
            f"its storage must be restored before it is used"
        )
    if entry.state == LOST:
        raise RuntimeError(
            f"CUDA error: initialization error: {what} was called on a CUDA tensor in a forked subprocess "
            f"(simulated GPU). To use CUDA with multiprocessing, you must use the 'spawn' start method"
        )


def own_thread() -> bool:
    """Whether this is a thread of acb's own, which moves memory whether or not this process may compute."""
    thread = threading._active.get(threading.get_ident())  # type: ignore[attr-defined]
    return thread is not None and thread.name.startswith("acb-")
