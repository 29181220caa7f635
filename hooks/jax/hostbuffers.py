"""Keeps NumPy from reading a CPU array through C alone, past every patch, where CPU arrays stand for a GPU's."""

from __future__ import annotations

import ctypes

_TP_AS_BUFFER = 160
"""Where a type object of CPython 3.10 to 3.13 on a 64-bit machine points at its buffer functions."""


def hide_memory(kind: type) -> None:
    """Take the C function that exposes an array's memory out of its type: NumPy asks ``__array__``, as on a GPU."""
    functions = ctypes.c_void_p.from_address(id(kind) + _TP_AS_BUFFER)
    if functions.value:
        ctypes.c_void_p.from_address(functions.value).value = None
