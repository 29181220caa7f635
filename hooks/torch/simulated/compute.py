"""One operation of PyTorch on a simulated GPU: which device it is on, whether its arguments go together, its charge.

How the device of a result is known: an explicit ``cuda`` wins. A result without a device, or with the ``cpu`` that
PyTorch's C++ code reads off a simulated CUDA tensor, goes where the arguments are. A ``cpu`` that the program itself
asked for is told apart by the `pin_memory` argument, which Python's bindings always pass and C++ code does not.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from acb.hooks.torch.simulated import places
from acb.hooks.torch.simulated.ledger import NO_STORAGE, Gpu, Ledger, address, check, out_of_memory
from acb.hooks.torch.simulated.operations import Operation
from acb.hooks.torch.simulated.places import CPU, CUDA

_Tensor: Any = torch.Tensor
_dim: Any = torch._C.TensorBase.dim
_is_meta: Any = torch._C.TensorBase.is_meta.__get__
_SEQUENCES = (list, tuple)


class _Found:
    """What the arguments of an operation are: on which GPU the first is that is on one, whether some are on `another`,
    and which on the host have dimensions.
    """

    __slots__ = ("another", "gpu", "hosts")

    def __init__(self) -> None:
        self.gpu: Gpu | None = None
        self.another: Gpu | None = None
        self.hosts: list[Any] | None = None

    def look(self, ledger: Ledger, tensor: Any, name: str) -> None:
        try:
            entry = ledger.entries.get(address(tensor))
        except NO_STORAGE:
            entry = ledger.entry(tensor)
        if entry is None:
            if _dim(tensor):
                if self.hosts is None:
                    self.hosts = [tensor]
                else:
                    self.hosts.append(tensor)
        else:
            if entry.state:
                check(entry, name)
            if entry.gpu is not self.gpu:
                if self.gpu is None:
                    self.gpu = entry.gpu
                else:
                    self.another = entry.gpu


def find(ledger: Ledger, operation: Operation, args: Any, kwargs: Any) -> _Found:
    """Look at every tensor among the arguments. Raises RuntimeError for one whose memory is not there."""
    found = _Found()
    name = operation.name
    for values in (args, kwargs.values()) if kwargs else (args,):
        for value in values:
            if isinstance(value, _Tensor):
                found.look(ledger, value, name)
            elif isinstance(value, _SEQUENCES):
                for item in value:
                    if isinstance(item, _Tensor):
                        found.look(ledger, item, name)
    return found


def compute(ledger: Ledger, func: Any, operation: Operation, args: Any, kwargs: Any) -> Any:
    """One operation, whatever it is."""
    device = pinned = target = None
    explicit = False
    if operation.takes_device and kwargs:
        device = kwargs.get("device")
        pinned = kwargs.get("pin_memory")
        explicit = device is not None and pinned is not None
        if device is not None:
            if device.type == "cuda":
                target = ledger.gpu(places.index_of(device))
                kwargs = {**kwargs, "device": CPU}
            elif device.type != "cpu":
                return func(*args, **kwargs)
        if pinned:
            kwargs = {**kwargs, "pin_memory": False}
    if not ledger.entries and device is None and not pinned:
        return func(*args, **kwargs)
    found = find(ledger, operation, args, kwargs)
    gpu = found.gpu
    if target is None and not explicit:
        target = gpu
    if gpu is None and target is None:
        if operation.random and kwargs:
            _check_generator(kwargs.get("generator"), None)
        out = func(*args, **kwargs)
        if pinned:
            pin(out)
        elif ledger.floating or (operation.factory and pinned is None and ledger.entries):
            _drift(ledger, operation, args, kwargs, found, out)
        return out
    if operation.like:
        if target is None:
            return func(*args, **kwargs)
        gpu = target
    elif gpu is not None:
        if operation.indexes:
            _check_index(ledger, args[0])
        if found.hosts is not None:
            _check_hosts(ledger, operation, found.hosts, gpu)
        if operation.written:
            _check_written(ledger, operation, args, gpu)
        if found.another is not None:
            return _across(ledger, func, operation, args, kwargs, found)
    else:
        gpu = target
    assert gpu is not None
    if operation.random and kwargs:
        _check_generator(kwargs.get("generator"), target)
    if device is not None and operation.factory:
        _check_size(gpu, args, kwargs)
    out = run(gpu, func, operation, args, kwargs)
    if target is not None:
        error = settle(ledger, operation, args, kwargs, out, target)
        if error is not None:
            del out, found  # so that a caller that catches the error has the memory back
            try:
                raise error
            finally:
                del error  # a frame that its own error holds lives until the next garbage collection
    return out


def run(gpu: Gpu, func: Any, operation: Operation, args: Any, kwargs: Any) -> Any:
    """Call `func` as an operation of a GPU. When the host cannot give the memory, the card had not got it either."""
    try:
        with gpu.card.operation(operation.name):
            return func(*args, **kwargs)
    except RuntimeError as error:
        wanted = str(error).partition("DefaultCPUAllocator: ")[2].partition("you tried to allocate ")[2]
        if not wanted:
            raise
        nbytes = int(wanted.split(" ")[0])
    raise out_of_memory(nbytes, gpu)


def settle(ledger: Ledger, operation: Operation, args: Any, kwargs: Any, out: Any, gpu: Gpu) -> BaseException | None:
    """Charge what an operation has returned, and what it has resized; returns the error when there is no room."""
    error = None
    if isinstance(out, _Tensor):
        error = ledger.put(out, gpu)
    elif isinstance(out, _SEQUENCES):
        for value in out:
            if isinstance(value, _Tensor):
                error = error or ledger.put(value, gpu)
            elif isinstance(value, _SEQUENCES):
                error = error or settle(ledger, operation, (), {}, value, gpu)
    if operation.resizes and error is None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, _Tensor):
                error = error or _recharge(ledger, value)
    return error


def settled(ledger: Ledger, operation: Operation, args: Any, out: Any) -> Any:
    """What has been made without an operation of the card, charged if it comes from something there."""
    entry = next((entry for entry in map(ledger.entry, _tensors(args)) if entry is not None), None)
    if entry is not None:
        error = settle(ledger, operation, args, {}, out, entry.gpu)
        if error is not None:
            del out
            try:
                raise error
            finally:
                del error  # a frame that its own error holds lives until the next garbage collection
    return out


def _recharge(ledger: Ledger, tensor: Any) -> BaseException | None:
    """Charge a tensor's storage at the size that it has now; when there is no room, it gets its old size back."""
    entry = ledger.entry(tensor)
    storage = entry() if entry is not None else None
    if entry is None or storage is None:
        return None
    nbytes = torch._C.StorageBase.nbytes(storage)
    if nbytes == entry.nbytes:
        return None
    error = ledger.resized(entry, nbytes)
    if error is not None:
        torch._C.StorageBase.resize_(storage, entry.nbytes)
    return error


# --- which devices go together --------------------------------------------------------------------------------------


def _across(ledger: Ledger, func: Any, operation: Operation, args: Any, kwargs: Any, found: _Found) -> Any:
    """An operation whose arguments are on several GPUs: an error, but for those that take lists, one tensor at a time,
    and a single number that is written into a tensor.
    """
    gpu, another = found.gpu, found.another
    assert gpu is not None
    assert another is not None
    if operation.indexes:
        for index in args[1]:
            entry = None if index is None else ledger.entry(index)
            if entry is not None and entry.gpu is not gpu:
                raise RuntimeError(
                    f"indices should be either on cpu or on the same device as the indexed tensor ({gpu.device})"
                )
        if _dim(args[2]):
            raise _mixed(operation, gpu.device, another.device)
    elif not operation.base.startswith("_foreach_"):
        raise _mixed(operation, gpu.device, another.device)
    entries = [ledger.entry(tensor) for tensor in _tensors((*args, *kwargs.values()))]
    others = {entry.gpu for entry in entries if entry is not None and entry.gpu is not gpu}
    with contextlib.ExitStack() as stack:
        for other in others:
            stack.enter_context(other.card.operation(operation.name))
        out = run(gpu, func, operation, args, kwargs)
    error = None
    for first, made in [(args[0], out)] if operation.indexes else zip(args[0], out or (), strict=False):
        entry = ledger.entry(first)
        error = error or ledger.put(made, gpu if entry is None else entry.gpu)
    if error is not None:
        del out, made
        try:
            raise error
        finally:
            del error  # a frame that its own error holds lives until the next garbage collection
    return out


def _check_hosts(ledger: Ledger, operation: Operation, hosts: list[Any], gpu: Gpu) -> None:
    """Tensors on the host beside ones on a GPU: floating ones join them, others are an error, as on a real GPU."""
    for tensor in hosts:
        if ledger.floats(tensor):
            take_aboard(ledger, tensor, gpu)
        elif not operation.mixes and not _is_meta(tensor):
            raise _mixed(operation, gpu.device, CPU)


def _check_index(ledger: Ledger, indexed: Any) -> None:
    """Only what is on a GPU can be indexed by what is there."""
    if ledger.entry(indexed) is None and not ledger.floats(indexed):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")


_cuda_generators: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""By the address of their C++ part: operations get Python objects of their own for it."""


class CudaGenerator(torch._C.Generator):  # type: ignore[misc]
    """A generator of random numbers that says it is a GPU's; the numbers are the CPU's."""

    _index: int

    def __new__(cls, index: int) -> CudaGenerator:
        self: CudaGenerator = super().__new__(cls)
        self._index = index
        _cuda_generators[self._cdata] = self
        return self

    @property
    def device(self) -> Any:
        """Where it says it is."""
        return CUDA[self._index]


def _check_generator(generator: Any, gpu: Gpu | None) -> None:
    """A generator serves its own device; PyTorch's default one is every simulated GPU's as well."""
    if generator is None or generator._cdata == torch.default_generator._cdata:
        return
    known = _cuda_generators.get(generator._cdata)
    found, wanted = CPU if known is None else known.device, CPU if gpu is None else gpu.device
    if found.type != wanted.type:
        raise RuntimeError(f"Expected a '{wanted.type}' device type for generator but found '{found.type}'")
    if found != wanted:
        raise RuntimeError(f"Expected a '{wanted}' generator device but found '{found}'")


def _check_written(ledger: Ledger, operation: Operation, args: Any, gpu: Gpu) -> None:
    """A result on a GPU cannot be written into a tensor on the host, not even into a scalar one."""
    for index in operation.written:
        value = args[index] if index < len(args) else None
        if isinstance(value, _Tensor) and ledger.entry(value) is None:
            if ledger.floats(value):
                take_aboard(ledger, value, gpu)
            elif not operation.mixes and not _is_meta(value):
                raise _mixed(operation, gpu.device, CPU)


def _mixed(operation: Operation, *devices: Any) -> RuntimeError:
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {devices[0]} and "
        f"{devices[1]}! (when checking arguments for {operation.name})"
    )


def take_aboard(ledger: Ledger, tensor: Any, gpu: Gpu) -> None:
    """A floating tensor turns out to be on this GPU."""
    error = ledger.put(tensor, gpu)
    if error is not None:
        try:
            raise error
        finally:
            del error  # a frame that its own error holds lives until the next garbage collection


def _drift(ledger: Ledger, operation: Operation, args: Any, kwargs: Any, found: _Found, out: Any) -> None:
    """On the host: decide floating arguments, or pass their state on to the result."""
    floating = [tensor for tensor in _tensors((*args, *kwargs.values())) if ledger.floats(tensor)]
    if found.hosts is not None and not all(map(ledger.floats, found.hosts)):
        for tensor in floating:
            ledger.settle_on_host(tensor)
    elif floating or (operation.factory and kwargs.get("pin_memory") is None):
        for tensor in _tensors((out,)):
            ledger.float_storage(tensor)


def _tensors(values: Any) -> Iterator[Any]:
    """The tensors among some values, and in lists among them."""
    for value in values:
        if isinstance(value, _Tensor):
            yield value
        elif isinstance(value, _SEQUENCES):
            yield from _tensors(value)


def _check_size(gpu: Gpu, args: Any, kwargs: Any) -> None:
    """Refuse a new tensor larger than the card before the host tries to make it."""
    size = args[0] if args else None
    if isinstance(size, _SEQUENCES) and all(isinstance(length, int) for length in size):
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        nbytes = math.prod(size) * dtype.itemsize
        if nbytes > gpu.card.capacity:
            gpu.ooms += 1
            raise out_of_memory(nbytes, gpu)


# --- pinned host memory ---------------------------------------------------------------------------------------------


def pin(tensor: Any) -> None:
    """Let a tensor on the host count as pinned; storages keep what is written on them."""
    torch._C.TensorBase.untyped_storage(tensor)._acb_pinned = True


def pinned(tensor: Any) -> bool:
    """Whether pin() was called for this tensor's storage."""
    return hasattr(torch._C.TensorBase.untyped_storage(tensor), "_acb_pinned")
