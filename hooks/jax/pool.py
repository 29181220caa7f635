"""What jax's allocator keeps of freed GPU memory, and how it is given back to the driver, so that others can have it.

jax's default allocator keeps what it once took until the process ends: with it, evacuation would free nothing.
CUDA's own pool (``XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async``) is as fast and can be trimmed; ``platform`` keeps
nothing, but pays for every allocation.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from acb.client.evacuation import EvacuationError
from acb.hooks.jax.contexts import in_each
from acb.hooks.jax.internals import is_simulated_device

VARIABLE = "XLA_PYTHON_CLIENT_ALLOCATOR"


def choose_allocator() -> None:
    """Before the backend starts: the allocator that can give memory back, unless the user has chosen one."""
    if not os.environ.get(VARIABLE):
        os.environ[VARIABLE] = "cuda_async"


def check_pool(device: Any) -> None:
    """Raise EvacuationError when memory freed on this device would stay out of reach for other processes."""
    if is_simulated_device(device) or device.platform == "cpu":
        return
    if os.environ.get(VARIABLE, "") not in ("platform", "cuda_async"):
        raise EvacuationError(
            f"jax's allocator does not give freed GPU memory back; start the program with {VARIABLE}=cuda_async"
        )


def trim_pool() -> None:
    """Give what CUDA's default pools keep, on devices that this process uses, back to the driver."""
    if os.environ.get(VARIABLE) != "cuda_async":
        return
    in_each(_trim)


def _trim(cuda: Any, device: ctypes.c_int) -> None:
    """Trim one device's pool; freed memory is in it only once the device has come to the point where it was freed."""
    pool = ctypes.c_void_p()
    if cuda.cuDeviceGetDefaultMemPool(ctypes.byref(pool), device) == 0:
        cuda.cuMemPoolTrimTo(pool, ctypes.c_size_t(0))
