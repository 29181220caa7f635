"""The simulated GPUs by their numbers: ``cuda:0``, ``cuda:1`` and so on, and the one that each thread has chosen."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from acb.config import MAX_GPUS

CPU: Any = torch.device("cpu")

CUDA: list[Any] = [torch.device("cuda", index) for index in range(MAX_GPUS)]
"""The devices, by index."""


class _OnThread(threading.local):
    index = 0


_current = _OnThread()
_count: Callable[[], int] = int  # none, before there are any


def bind(count: Callable[[], int]) -> None:
    """`count()` says how many GPUs there are; the first one is everybody's current one."""
    global _count, _current
    _count, _current = count, _OnThread()


def count() -> int:
    """How many GPUs the program sees."""
    return _count()


def current() -> int:
    """The index of the GPU that this thread has chosen."""
    return _current.index


def choose(index: int) -> int:
    """Make a GPU this thread's current one; a negative index changes nothing. Returns the index of the former one.

    Raises RuntimeError for one that is not there.
    """
    if index < 0:
        return -1
    check_ordinal(index)
    before, _current.index = _current.index, index
    return before


def check_ordinal(index: int) -> None:
    """Raise RuntimeError unless the program has that many GPUs."""
    if index and not 0 < index < _count():
        have = (
            "one simulated GPU, cuda:0"
            if _count() == 1
            else f"{_count()} simulated GPUs, cuda:0 to cuda:{_count() - 1}"
        )
        raise RuntimeError(f"CUDA error: invalid device ordinal: cuda:{index} does not exist; this process has {have}")


def index_of(device: Any) -> int:
    """The index of a device of type ``cuda``; without one it is the current GPU. Raises RuntimeError."""
    index: int | None = device.index
    if index is None:
        return _current.index
    if index:
        check_ordinal(index)
    return index


def device_of(value: Any) -> Any:
    """A device from how a program may write it: a device, a name, an ordinal of a GPU. A GPU's has its index, and the
    host's is CPU.
    """
    if value is CPU:
        return CPU
    if isinstance(value, int) and not isinstance(value, bool):
        check_ordinal(value)
        return CUDA[value]  # made long ago: making one counts as using a GPU
    device = value if isinstance(value, torch.device) else torch.device(value)
    if device.type == "cuda":
        return CUDA[index_of(device)]
    return CPU if device.type == "cpu" else device


def ordinal(device: Any) -> int:
    """The index of a GPU as given to functions of torch.cuda, which is the current one for None, and -1 for a negative
    number. Raises RuntimeError for one that is not there.
    """
    if device is None:
        return _current.index
    if isinstance(device, int) and device < 0:
        return -1
    device = device_of(device)
    if device.type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
    index: int = device.index
    return index
