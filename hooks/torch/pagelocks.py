"""Page-locks host memory, which the GPU can then read and write by itself, by the driver's own calls.

Most of the time that takes is the kernel's, for finding and clearing the pages. So they are made first, by several
threads: on 16 cores with an H100 that came to 17 GiB/s, against 4 when the driver was left to do it.

The calls are not the CUDA runtime's: one of those that fails, for a limit on locked memory, say, leaves its error
behind, and PyTorch takes that for the failure of the next thing that the program does.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

LIBRARY = "libcuda.so.1"
PORTABLE = 1
"""CU_MEMHOSTREGISTER_PORTABLE: for every context, and so for every GPU of this process."""

INVALID_CONTEXT = 201
"""CUDA_ERROR_INVALID_CONTEXT: this thread has used no GPU yet."""


POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, of Linux since 5.14."""

THREADS = 8
"""That make pages, at most."""

_PIECE = 64 << 20


def make_pages(maps: Iterable[tuple[int, int]]) -> None:
    """Have the pages of these maps, each an address and a length in bytes, made now. What fails is made when used."""
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    todo = [(begin + at, min(_PIECE, nbytes - at)) for begin, nbytes in maps for at in range(0, nbytes, _PIECE)]

    def work() -> None:
        while todo:
            try:
                address, nbytes = todo.pop()
            except IndexError:
                return  # another thread has taken the last one
            if madvise(address, nbytes, POPULATE_WRITE):
                todo.clear()

    threads = []
    for number in range(min(THREADS, len(os.sched_getaffinity(0)), len(todo)) - 1):
        thread = threading.Thread(target=work, name=f"acb-pages-{number}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            break  # no more threads, or the interpreter ends
        threads.append(thread)
    work()
    for thread in threads:
        thread.join()


class Driver:
    """The two calls of libcuda, which need a context, and what makes the process's own this thread's."""

    def __init__(self, library: Any, enter: Callable[[], Any]) -> None:
        self._register = library.cuMemHostRegister_v2
        self._register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
        self._unregister = library.cuMemHostUnregister
        self._unregister.argtypes = [ctypes.c_void_p]
        self._enter = enter

    def register(self, address: int, nbytes: int) -> int:
        """0, or the driver's error (CUresult). Other threads run meanwhile: it takes about half a second a GiB."""
        return self._call(self._register, address, nbytes, PORTABLE)

    def unregister(self, address: int) -> int:
        """The same, back."""
        return self._call(self._unregister, address)

    def _call(self, function: Any, *arguments: int) -> int:
        code = int(function(*arguments))
        if code == INVALID_CONTEXT:
            self._enter()
            code = int(function(*arguments))
        return code


def page_locking() -> tuple[Callable[[int, int], int], Callable[[int], int]] | tuple[()]:
    """The functions that page-lock memory and undo it, for HostPool; none where that cannot be done."""
    cuda: Any = torch.cuda
    if torch.version.hip is not None:
        return (
            lambda address, nbytes: int(cuda.cudart().cudaHostRegister(address, nbytes, PORTABLE)),
            lambda address: int(cuda.cudart().cudaHostUnregister(address)),
        )
    try:
        # Any call of the runtime's for a GPU makes its context current; this one is for the current GPU.
        driver = Driver(ctypes.CDLL(LIBRARY), lambda: cuda.cudart().cudaMemGetInfo(cuda.current_device()))
    except (OSError, AttributeError):
        return ()
    return driver.register, driver.unregister
