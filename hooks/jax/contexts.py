"""The CUDA contexts that this process works in, reached past jax, which has no way to wait for a whole device."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any


def drain() -> None:
    """Wait until the GPUs of this process have done all that was queued on them, whoever still has the results."""
    in_each(lambda cuda, device: None)


def in_each(then: Callable[[Any, ctypes.c_int], object]) -> None:
    """Drain every GPU that this process has a context on, and call ``then(libcuda, device)`` with that one current.

    Does nothing where there is no CUDA driver, or none in use. What the driver says of work that failed is left for
    the program to see.
    """
    with contextlib.suppress(OSError, AttributeError):
        cuda = _library()
        count = ctypes.c_int()
        if cuda.cuDeviceGetCount(ctypes.byref(count)) == 0:
            for ordinal in range(count.value):
                _drained(cuda, ordinal, then)


def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _drained(cuda: Any, ordinal: int, then: Callable[[Any, ctypes.c_int], object]) -> None:
    """See in_each. Only looks at a GPU without a context: to make one would cost memory on it."""
    device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    context = ctypes.c_void_p()
    if cuda.cuDeviceGet(ctypes.byref(device), ordinal) or cuda.cuDevicePrimaryCtxGetState(
        device, ctypes.byref(flags), ctypes.byref(active)
    ):
        return
    if not active.value or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return
    try:
        if cuda.cuCtxPushCurrent_v2(context):
            return
        try:
            cuda.cuCtxSynchronize()
            then(cuda, device)
        finally:
            cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
    finally:
        cuda.cuDevicePrimaryCtxRelease_v2(device)
