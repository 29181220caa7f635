"""Operations that know about devices themselves: copies, pinned memory, packed sequences."""

from __future__ import annotations

from typing import Any

import torch

from acb.hooks.torch.simulated import places
from acb.hooks.torch.simulated.compute import find, pin, pinned, run, take_aboard
from acb.hooks.torch.simulated.ledger import Gpu, Ledger, check
from acb.hooks.torch.simulated.operations import Operation


def _transfer(source: Gpu | None, target: Gpu | None, func: Any, operation: Operation, args: Any, kwargs: Any) -> Any:
    """Run a copy between two places, of which None is the host, as an operation of both that crosses the bus."""
    gpu = source or target
    assert gpu is not None
    if source is target:
        return run(gpu, func, operation, args, kwargs)
    if source is None or target is None:
        out = run(gpu, func, operation, args, kwargs)
    else:
        with target.card.operation(operation.name):
            out = run(source, func, operation, args, kwargs)
    gpu.card.copied(out.numel() * out.element_size())
    return out


def _copy_(ledger: Ledger, func: Any, operation: Operation, args: Any, kwargs: Any) -> Any:
    """``destination.copy_(source)``: the one operation that every pair of devices may take part in."""
    destination, source = args[0], args[1]
    there, here = ledger.entry(destination), ledger.entry(source)
    if there is None and here is None:
        return func(*args, **kwargs)
    for entry in (there, here):
        if entry is not None and entry.state:
            check(entry, operation.name)
    if there is None and ledger.floats(destination):
        assert here is not None
        take_aboard(ledger, destination, here.gpu)
        there = here
    elif here is None and ledger.floats(source):
        assert there is not None
        take_aboard(ledger, source, there.gpu)
        here = there
    from_gpu, to_gpu = (None if entry is None else entry.gpu for entry in (here, there))
    return _transfer(from_gpu, to_gpu, func, operation, args, kwargs)


def _to_copy(ledger: Ledger, func: Any, operation: Operation, args: Any, kwargs: Any) -> Any:
    """Copies between devices and kinds of numbers."""
    device = kwargs.get("device")
    to_pin = kwargs.get("pin_memory")
    here = ledger.entry(args[0])
    if here is not None and here.state:
        check(here, operation.name)
    if device is not None and device.type not in ("cuda", "cpu"):
        return func(*args, **kwargs)
    source = target = None if here is None else here.gpu
    if device is not None and device.type == "cuda":
        target = ledger.gpu(places.index_of(device))
        kwargs = {**kwargs, "device": places.CPU}
    elif device is not None and to_pin is not None:
        target = None
    if to_pin:
        kwargs = {**kwargs, "pin_memory": False}
    if source is None and target is None:
        out = func(*args, **kwargs)
        if ledger.entries and (device is not None or ledger.floats(args[0])) and to_pin is None:
            ledger.float_storage(out)  # C++ code has copied it to where some other tensor is
    else:
        out = _transfer(source, target, func, operation, args, kwargs)
    if target is not None:
        error = ledger.put(out, target)
        if error is not None:
            del out
            try:
                raise error
            finally:
                del error  # a frame that its own error holds lives until the next garbage collection
    elif to_pin:
        pin(out)
    return out


def _pack_padded_sequence(ledger: Ledger, func: Any, operation: Operation, args: Any, kwargs: Any) -> Any:
    """The batch sizes that come with packed data are always on the host."""
    gpu = find(ledger, operation, args, kwargs).gpu
    if gpu is None or ledger.entry(args[0]) is None:
        return func(*args, **kwargs)
    data, batch_sizes = run(gpu, func, operation, args, kwargs)
    error = ledger.put(data, gpu)
    if error is not None:
        del data
        try:
            raise error
        finally:
            del error  # a frame that its own error holds lives until the next garbage collection
    return data, batch_sizes


def _is_pinned(ledger: Ledger, func: Any, operation: Operation, args: Any, kwargs: Any) -> bool:
    return pinned(args[0])


def _pin_memory(ledger: Ledger, func: Any, operation: Operation, args: Any, kwargs: Any) -> Any:
    out = torch.ops.aten.clone.default(args[0])
    pin(out)
    return out


def _no_output(ledger: Ledger, func: Any, operation: Operation, args: Any, kwargs: Any) -> None:
    return None


SPECIAL = {
    "copy_": _copy_,
    "_to_copy": _to_copy,
    "_pack_padded_sequence": _pack_padded_sequence,
    "is_pinned": _is_pinned,
    "_pin_memory": _pin_memory,
    "record_stream": _no_output,
}
"""By the operation's name."""
