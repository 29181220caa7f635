"""Storages: how memory moves on and off the cards below tensors, which is also how evacuation moves it."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from acb.hooks.torch.patching import Patches
from acb.hooks.torch.simulated.ledger import Ledger, check, own_thread
from acb.hooks.torch.simulated.places import device_of

_Base: Any = torch._C.StorageBase
_Storage: Any = torch.UntypedStorage


def patch_attributes(patches: Patches, ledger: Ledger) -> None:
    """``.device``, from which a storage's ``is_cuda`` and ``get_device()`` follow."""
    original = vars(_Base)["device"].__get__

    def device(self: Any) -> Any:
        entry = ledger.entries.get(self._cdata)
        return original(self) if entry is None else entry.gpu.device

    patches.set(_Storage, "device", property(device))


def patch_new(patches: Patches, ledger: Ledger) -> None:
    """``torch.UntypedStorage(nbytes, device="cuda")``."""
    original = _Base.__new__

    def __new__(cls: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        device = None if device is None else device_of(device)
        if device is None or device.type != "cuda":
            return original(cls, *args, **kwargs) if device is None else original(cls, *args, device=device, **kwargs)
        gpu = ledger.gpu(device.index)
        storage = original(cls, *args, **kwargs)
        error = ledger.put_storage(storage, storage._cdata, gpu)
        if error is not None:
            del storage
            try:
                raise error
            finally:
                del error  # a frame that its own error holds lives until the next garbage collection
        return storage

    patches.set(_Storage, "__new__", staticmethod(__new__))


def patch_resize(patches: Patches, ledger: Ledger) -> None:
    """``resize_``: to zero it gives the card's memory back, and whoever touches it then is told so."""
    original = _Base.resize_

    @functools.wraps(original)
    def resize_(self: Any, size: int) -> Any:
        entry = ledger.entries.get(self._cdata)
        if entry is None:
            return original(self, size)
        if entry.nbytes == size and entry.state != 1:
            return original(self, size)
        before, state = entry.nbytes, entry.state
        error = ledger.resized(entry, size)
        if error is not None:
            try:
                raise error
            finally:
                del error  # a frame that its own error holds lives until the next garbage collection
        try:
            return original(self, size)
        except BaseException:
            ledger.resized(entry, before)
            entry.state = state
            raise

    patches.set(_Storage, "resize_", resize_)


def patch_copy(patches: Patches, ledger: Ledger) -> None:
    """``copy_``, between any two places; acb's own threads copy whoever has the lease."""
    original = _Base.copy_

    @functools.wraps(original)
    def copy_(self: Any, source: Any, non_blocking: Any = None) -> Any:
        found = [ledger.entries.get(getattr(storage, "_cdata", 0)) for storage in (self, source)]
        entries = [entry for entry in found if entry is not None]
        if not entries:
            return original(self, source, bool(non_blocking))
        for entry in entries:
            if entry.state:
                check(entry, "UntypedStorage.copy_")
        gpus = {entry.gpu for entry in entries}
        with torch._C._DisableTorchDispatch(), contextlib.ExitStack() as stack:
            if not own_thread():
                for gpu in gpus:
                    stack.enter_context(gpu.card.operation("storage.copy_"))
            original(self, source, False)
        if len(entries) == 1 or len(gpus) == 2:
            entries[0].gpu.card.copied(_Base.nbytes(source))
        return self

    patches.set(_Storage, "copy_", copy_)


def patch_access(patches: Patches, ledger: Ledger) -> None:
    """Everything else that reads or writes a storage's bytes directly: operations, refused while there are no bytes."""

    def make(name: str, original: Any) -> Any:
        @functools.wraps(original)
        def access(self: Any, *args: Any, **kwargs: Any) -> Any:
            entry = ledger.entries.get(self._cdata)
            if entry is None:
                return original(self, *args, **kwargs)
            check(entry, f"UntypedStorage.{name}")
            with entry.gpu.card.operation(f"storage.{name}"):
                return original(self, *args, **kwargs)

        return access

    for name in ("__getitem__", "__setitem__", "fill_", "_write_file", "_set_from_file", "_byteswap"):
        patches.set(_Storage, name, make(name, getattr(_Storage, name)))


def patch_sharing(patches: Patches, ledger: Ledger) -> None:
    """Sharing with other processes: not simulated for memory on the card."""
    is_shared, share = _Storage.is_shared, _Storage._share_cuda_

    @functools.wraps(is_shared)
    def is_shared_(self: Any) -> Any:
        return self._cdata in ledger.entries or is_shared(self)

    @functools.wraps(share)
    def _share_cuda_(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._cdata in ledger.entries:
            raise RuntimeError(
                "the simulated GPU cannot share CUDA tensors between processes; move them to the CPU first"
            )
        return share(self, *args, **kwargs)

    def is_pinned(self: Any, device: Any = None) -> bool:
        """Determine whether the CPU storage is already pinned on device."""
        return hasattr(self, "_acb_pinned")

    patches.set(_Storage, "is_shared", is_shared_)
    patches.set(_Storage, "_share_cuda_", _share_cuda_)
    patches.set(_Storage, "is_pinned", is_pinned)


def patch_pinning(patches: Patches, ledger: Ledger) -> None:
    """``pin_memory``, which works on any thread."""

    def pin_memory(self: Any, device: Any = None) -> Any:
        """Copy the CPU storage to pinned memory, if it's not already pinned."""
        if self._cdata in ledger.entries:
            raise TypeError(f"cannot pin '{self.type()}' only CPU memory can be pinned")
        if hasattr(self, "_acb_pinned"):
            return self
        copy = torch.UntypedStorage(_Base.nbytes(self)).copy_(self, False)
        copy._acb_pinned = True
        return copy

    patches.set(_Storage, "pin_memory", pin_memory)


STEPS = (patch_attributes, patch_new, patch_resize, patch_copy, patch_access, patch_sharing, patch_pinning)
