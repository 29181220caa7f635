"""Finds every storage of this process on a gated device, and knows which of them may not be moved.

There is no list of storages in PyTorch. They are reached through the tensors and storages that the garbage collector
knows, their gradients, what the autograd graph has saved, and the parameters of scripted modules. A storage that only
C++ code knows is not found: it simply stays on the GPU.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from itertools import chain, compress, islice, repeat
from typing import Any

import torch

from acb.hooks.torch import devices

_Tensor: Any = torch.Tensor
_Base: Any = torch._C.TensorBase
_Storage: Any = torch.UntypedStorage

_pinned: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_graphs: weakref.WeakSet[Any] = weakref.WeakSet()


# --- what may not be moved ------------------------------------------------------------------------------------------


def pin_storage(storage: Any, reason: str) -> None:
    """From now on this storage has to stay where it is, if it is on a gated device: somebody knows its address."""
    if storage.device.type in devices.GATED:
        _pinned[storage] = reason


def pin(tensor: Any, reason: str) -> None:
    """As pin_storage(), for the storage of a tensor."""
    if devices.on_gated(tensor):
        _pinned[tensor.untyped_storage()] = reason


def captured(graph: Any) -> bool:
    """A CUDA graph is being captured: it will know the addresses of whatever it uses. Whether it knew none before."""
    new = graph not in _graphs
    _graphs.add(graph)
    return new


def uncaptured(graph: Any) -> None:
    """A CUDA graph has been reset."""
    _graphs.discard(graph)


def obstacle(storages: Iterable[Any]) -> str | None:
    """Why these storages cannot all be moved, for a person; None: they can."""
    if len(_graphs):
        return "a captured CUDA graph holds addresses of this process's GPU memory"
    if len(_pinned):
        for storage in storages:
            reason = _pinned.get(storage)
            if reason is not None:
                return f"a tensor's memory {reason}"
    return None


_frozen: list[weakref.ref[Any]] = []


def remember() -> None:
    """gc.freeze() is about to take everything that exists out of the lists in which find_storages() looks."""
    kinds = _subclasses(_Tensor) | _subclasses(torch.jit.ScriptModule) | {_Storage}
    _frozen.extend(map(weakref.ref, _instances(kinds)))


# --- what there is --------------------------------------------------------------------------------------------------


def find_storages() -> list[Any]:
    """Every storage with bytes on a gated device, each once. Runs no code of the program's."""
    found: dict[int, Any] = {}
    with torch._C.DisableTorchFunctionSubclass():
        kinds, scripted = _subclasses(_Tensor), _subclasses(torch.jit.ScriptModule)
        wanted = kinds | scripted | {_Storage}
        things = _instances(wanted) + [thing for thing in [ref() for ref in _frozen] if thing is not None]
        tensors = [thing for thing in things if type(thing) in kinds]
        storages = [thing for thing in things if type(thing) is _Storage]
        for thing in things:
            if type(thing) in scripted:
                tensors.extend(_held_by_script(thing))
        del things
        roots = []
        for tensor in tensors:
            _add(found, tensor)
            gradient = _Base.grad.__get__(tensor) if _Base.is_leaf.__get__(tensor) else None
            if gradient is not None:
                _add(found, gradient)
            node = _Base.grad_fn.__get__(tensor)
            if node is not None:
                roots.append(node)
        for tensor in _saved(roots):
            _add(found, tensor)
        for storage in storages:
            if storage.device.type in devices.GATED:
                found.setdefault(storage._cdata, storage)
    return [storage for storage in found.values() if _size(storage) > 0]


def _instances(kinds: set[Any]) -> list[Any]:
    """Everything of exactly these types that the garbage collector knows.

    The collector also knows the tuple that another thread is still filling, and nobody can finish a tuple that somebody
    else refers to. So one call of C code does it all: no other thread runs before the list of everything is gone again.
    """
    wanted = set(map(id, kinds))
    # The list twice, from one call of get_objects(). What comes after each is there to use it up: an iterator that
    # keeps the list would be in the list, and neither would go away.
    everything = chain.from_iterable(map(repeat, map(gc.get_objects, (None,)), (2,)))
    collecting = gc.isenabled()
    gc.disable()
    once, again = islice(everything, 1), islice(everything, 1)
    try:
        return list(
            compress(
                chain(chain.from_iterable(once), repeat(None)),
                chain(map(wanted.__contains__, map(id, map(type, chain.from_iterable(again)))), everything),
            )
        )
    finally:
        if collecting:
            gc.enable()


def _size(storage: Any) -> int:
    return int(torch._C.StorageBase.nbytes(storage))


def _subclasses(kind: Any) -> set[Any]:
    """A class and every class below it."""
    known = {kind}
    todo = [kind]
    while todo:
        for below in type.__subclasses__(todo.pop()):
            if below not in known:
                known.add(below)
                todo.append(below)
    return known


def _add(found: dict[int, Any], tensor: Any) -> None:
    """Note a tensor's storage, or those of the parts of a sparse tensor."""
    try:
        if not devices.on_gated(tensor):
            return
        if _Base.layout.__get__(tensor) is not torch.strided:
            for part in _parts(tensor):
                _add(found, part)
            return
        storage = _Base.untyped_storage(tensor)
        if torch._C.StorageBase.device.__get__(storage).type != "meta":
            found.setdefault(storage._cdata, storage)
    except (RuntimeError, NotImplementedError, AttributeError, ValueError):
        pass  # a wrapper without memory of its own; what it wraps is found by itself


def _parts(tensor: Any) -> list[Any]:
    """The dense tensors of which a sparse or a jagged one consists."""
    names = {
        torch.sparse_coo: ("_indices", "_values"),
        torch.sparse_csr: ("crow_indices", "col_indices", "values"),
        torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
        torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
        torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
        torch.jagged: ("values", "offsets"),
    }.get(tensor.layout, ())
    return [getattr(tensor, name)() for name in names]


def _held_by_script(module: Any) -> list[Any]:
    """Parameters and buffers that live in a scripted module's C++ part; Python sees them only when it asks."""
    try:
        return [*module.parameters(), *module.buffers()]
    except Exception:
        return []  # half made: its tensors are still in the Python module that it is made from


def _saved(roots: list[Any]) -> list[Any]:
    """The tensors that the autograd graph above these nodes has saved for backward."""
    tensors: list[Any] = []
    seen: set[Any] = set()
    todo = roots
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        todo.extend(following for following, _ in node.next_functions if following is not None)
        variable = getattr(node, "variable", None)  # where a leaf's gradient accumulates
        if isinstance(variable, _Tensor):
            tensors.append(variable)
            gradient = _Base.grad.__get__(variable)
            if gradient is not None:
                tensors.append(gradient)
        for name in _saved_names(type(node)):
            try:
                value = getattr(node, name)
            except Exception:
                continue  # freed by a backward
            for saved in value if isinstance(value, (tuple, list)) else (value,):
                tensor = _unpacked(saved)
                if tensor is not None:
                    tensors.append(tensor)
    return tensors


_RAW = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")
_PREFIX = "_raw_saved_" if _RAW else "_saved_"
_hooks_used = False
_names: dict[type, tuple[str, ...]] = {}


def saw_saved_tensor_hooks() -> None:
    """The program has hooks on saved tensors. Where PyTorch cannot tell which, none is looked at from now on."""
    global _hooks_used
    _hooks_used = True


def _saved_names(kind: type) -> tuple[str, ...]:
    """The attributes of a kind of graph node that hold saved tensors."""
    if _hooks_used and not _RAW:
        return ()
    names = _names.get(kind)
    if names is None:
        names = _names[kind] = tuple(name for name in dir(kind) if name.startswith(_PREFIX))
    return names


def _unpacked(saved: Any) -> Any:
    """The tensor in a saved value, or None. Hooks of the program's, which may recompute, must not run for it."""
    if isinstance(saved, _Tensor):
        return saved
    try:
        packed = saved.data  # with hooks, what they packed
    except Exception:
        return None  # freed, or no tensor at all
    return packed if isinstance(packed, _Tensor) else None
