"""A throw-away process with a CUDA context and some memory on a GPU, for trying the driver tier on. A script.

It says ``pid PID`` on stdout, then ``ready UUID NBYTES`` or ``failed REASON``; then it answers each line on stdin with
``same`` or ``different``, after what it holds on the GPU. It dies when stdin ends. It is no descendant of whoever
started it: where processes may act on their descendants only, a trial on one would say nothing of programs under acb.
Standard library only; run by its path, so that nothing of anybody's gets into it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

NBYTES = 64 << 20


class Memory:
    """NBYTES on the first GPU that this process may use."""

    def __init__(self) -> None:
        """Raises RuntimeError when one of the driver's calls fails, OSError without a driver."""
        self._cuda: Any = ctypes.CDLL("libcuda.so.1")
        self._pattern = os.urandom(1 << 20) * (NBYTES >> 20)
        device, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        context, self._address = ctypes.c_void_p(), ctypes.c_uint64()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self._call("cuDeviceGetUuid", ctypes.byref(uuid), device)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuMemAlloc_v2", ctypes.byref(self._address), ctypes.c_size_t(NBYTES))
        self._call("cuMemcpyHtoD_v2", self._address, self._pattern, ctypes.c_size_t(NBYTES))
        self._call("cuCtxSynchronize")
        digits = bytes(uuid).hex()
        self.uuid = "GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))

    def same(self) -> bool:
        """Whether what was written is still there."""
        back = ctypes.create_string_buffer(NBYTES)
        self._call("cuMemcpyDtoH_v2", back, self._address, ctypes.c_size_t(NBYTES))
        return back.raw == self._pattern

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} returned CUDA error {code}")


def main() -> None:
    """Be that process."""
    if os.fork():
        os._exit(0)  # the parent's end makes the child an orphan
    os.setsid()
    _say(f"pid {os.getpid()}")  # before anything that may hang
    try:
        memory = Memory()
    except (OSError, RuntimeError, AttributeError) as error:
        _say(f"failed {error}")
    else:
        _say(f"ready {memory.uuid} {NBYTES}")
        for _ in sys.stdin:
            _say("same" if memory.same() else "different")
    os.kill(os.getpid(), signal.SIGKILL)  # an orderly end would call the driver, which may not answer


def _say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


if __name__ == "__main__":
    main()
