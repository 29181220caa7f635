"""jax's environment variables about GPU memory: sets what acb needs, and says what does not go together with it."""

from __future__ import annotations

import os

from acb.client.hostmemory import available_bytes
from acb.client.runtime import warn_once
from acb.hooks.jax.pool import choose_allocator


def prepare() -> None:
    """Called before a GPU backend starts."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    choose_allocator()
    free = available_bytes()
    if free is not None:  # XLA's own limit for page-locked host memory, 64 GiB, is less than many a GPU has
        os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(max(64, free >> 30)))
    if os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"].lower() not in ("false", "0"):
        warn_once(
            "jax:preallocate",
            "XLA_PYTHON_CLIENT_PREALLOCATE is on: jax takes most of the GPU's memory, and other programs must wait for "
            "all of it; unset it",
        )
    try:
        fraction = float(
            os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or os.environ.get("XLA_CLIENT_MEM_FRACTION") or 0
        )
    except ValueError:
        fraction = 0.0
    if fraction > 1 or os.environ.get("TF_FORCE_UNIFIED_MEMORY", "").lower() in ("1", "true"):
        warn_once(
            "jax:unified",
            "TF_FORCE_UNIFIED_MEMORY or a memory fraction above 1 makes jax use managed memory, which cannot be moved "
            "off the GPU by the driver; unset both, every program has the whole GPU under acb",
        )
