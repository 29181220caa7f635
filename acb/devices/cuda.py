"""The CUDA driver library by ctypes: as much of it as moving another process's memory off a GPU takes.

The calls named cuCheckpointProcess act on another process, by its id. Their arguments are structures of 64 bytes, all
zero but for the fields below. The caller must have called cuInit, or the GPU's persistence mode must be on.
Source: CUDA driver API, "CUDA Checkpointing"; field order from cuda.h (the pages list fields by name).
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from typing import Any, Protocol

LIBRARY = "libcuda.so.1"

CHECKPOINT_SINCE = "570 (CUDA 12.8)"
MIGRATION_SINCE = 13000
"""cuDriverGetVersion of driver 580, the first that restores onto another GPU."""


class Result(enum.IntEnum):
    """The CUresult values that the checkpoint calls are known to return, by their names in cuda.h."""

    SUCCESS = 0
    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    NOT_INITIALIZED = 3
    NO_DEVICE = 100
    INVALID_DEVICE = 101
    OPERATING_SYSTEM = 304
    ILLEGAL_STATE = 401
    NOT_READY = 600
    NOT_PERMITTED = 800
    NOT_SUPPORTED = 801
    UNKNOWN = 999


class State(enum.IntEnum):
    """CUprocessState. Drivers may report newer ones, by numbers that are not here: see state_name."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3
    CHECKPOINTING = 4
    RESTORING = 5


def state_name(number: int) -> str:
    """``running``, ``locked``, …; ``state 9`` for one that is not known here."""
    try:
        return State(number).name.lower()
    except ValueError:
        return f"state {number}"


class CudaUnavailable(Exception):
    """There is no driver, or it lacks what is asked for; one sentence says what, and since when it exists."""


class CudaError(Exception):
    """A driver call failed. `call` is its name, `code` its CUresult, `name` what cuda.h calls that."""

    def __init__(self, call: str, code: int, name: str, meaning: str = "") -> None:
        super().__init__(f"{call}: {name}" + (f" ({meaning})" if meaning else ""))
        self.call, self.code, self.name, self.meaning = call, code, name, meaning


class Driver(Protocol):
    """What acb asks of the CUDA driver; tests put one of their own in its place.

    Every call that takes a process id raises CudaError when the driver refuses, CudaUnavailable when it is too old.
    """

    def version(self) -> int:
        """The newest CUDA supported: 13000 for 13.0."""

    def devices(self) -> list[str]:
        """UUIDs of the GPUs that this process may use."""

    def state(self, pid: int) -> int:
        """A State, or a newer number."""

    def restore_thread(self, pid: int) -> int:
        """The id of the thread of that process which must be able to run for a restore."""

    def lock(self, pid: int, timeout_ms: int) -> None:
        """Wait for its work to end and block its further calls; NOT_READY after the timeout, nothing changed.

        0 would mean to wait for ever.
        """

    def checkpoint(self, pid: int) -> None:
        """Move the memory of a locked process to the host."""

    def restore(self, pid: int, pairs: Sequence[tuple[str, str]] = ()) -> None:
        """Bring it back, each pair naming the UUID of a GPU that it was on and of that which it will be on."""

    def unlock(self, pid: int) -> None:
        """Let a locked process go on."""


class _Uuid(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * 16),)


class _Pair(ctypes.Structure):
    _fields_ = (("old", _Uuid), ("new", _Uuid))


class _LockArgs(ctypes.Structure):
    _fields_ = (("timeout_ms", ctypes.c_uint32), ("reserved0", ctypes.c_uint32), ("reserved1", ctypes.c_uint64 * 7))


class _RestoreArgs(ctypes.Structure):
    _fields_ = (
        ("pairs", ctypes.POINTER(_Pair)),
        ("count", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("reserved", ctypes.c_uint64 * 6),
    )


class _NoArgs(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_uint64 * 8),)


class LibCuda:
    """The real driver. Making one initialises CUDA in this process (seconds), but makes no context."""

    def __init__(self, library: Any = None) -> None:
        """`library`: what ctypes loaded; None: load it. Raises CudaUnavailable."""
        if library is None:
            try:
                library = ctypes.CDLL(LIBRARY)
            except OSError as error:
                raise CudaUnavailable(f"there is no CUDA driver here ({error})") from None
        self._library = library
        try:
            self._call("cuInit", ctypes.c_uint(0))
        except CudaError as error:
            raise CudaUnavailable(f"CUDA does not start here: {error}") from None

    def version(self) -> int:
        """As Driver says."""
        number = ctypes.c_int(0)
        self._call("cuDriverGetVersion", ctypes.byref(number))
        return number.value

    def devices(self) -> list[str]:
        """As Driver says."""
        count = ctypes.c_int(0)
        self._call("cuDeviceGetCount", ctypes.byref(count))
        get_uuid = "cuDeviceGetUuid_v2" if hasattr(self._library, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
        found = []
        for ordinal in range(count.value):
            device, uuid = ctypes.c_int(0), _Uuid()
            self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
            self._call(get_uuid, ctypes.byref(uuid), device)
            found.append(_text(uuid))
        return found

    def state(self, pid: int) -> int:
        """As Driver says."""
        number = ctypes.c_int(-1)
        self._checkpoint("GetState", pid, ctypes.byref(number))
        return number.value

    def restore_thread(self, pid: int) -> int:
        """As Driver says."""
        number = ctypes.c_int(0)
        self._checkpoint("GetRestoreThreadId", pid, ctypes.byref(number))
        return number.value

    def lock(self, pid: int, timeout_ms: int) -> None:
        """As Driver says."""
        self._checkpoint("Lock", pid, ctypes.byref(_LockArgs(timeout_ms=timeout_ms)))

    def checkpoint(self, pid: int) -> None:
        """As Driver says."""
        self._checkpoint("Checkpoint", pid, ctypes.byref(_NoArgs()))

    def restore(self, pid: int, pairs: Sequence[tuple[str, str]] = ()) -> None:
        """As Driver says. Raises ValueError when a text is no UUID."""
        named = (_Pair * len(pairs))(*(_Pair(_uuid(old), _uuid(new)) for old, new in pairs))
        args = _RestoreArgs(count=len(pairs))
        if pairs:
            args.pairs = ctypes.cast(named, ctypes.POINTER(_Pair))
        self._checkpoint("Restore", pid, ctypes.byref(args))

    def unlock(self, pid: int) -> None:
        """As Driver says."""
        self._checkpoint("Unlock", pid, ctypes.byref(_NoArgs()))

    # --- inside ------------------------------------------------------------------------------------------------------

    def _checkpoint(self, name: str, pid: int, argument: Any) -> None:
        self._call(f"cuCheckpointProcess{name}", ctypes.c_int(pid), argument)

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            since = f"; it exists since driver {CHECKPOINT_SINCE}" if name.startswith("cuCheckpoint") else ""
            raise CudaUnavailable(f"this NVIDIA driver has no {name}{since}") from None
        code = int(function(*arguments))
        if code != Result.SUCCESS:
            raise CudaError(name, code, *self._describe(code))

    def _describe(self, code: int) -> tuple[str, str]:
        """The name and the meaning of a CUresult, as the driver gives them."""
        texts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            function = getattr(self._library, name, None)
            known = function is not None and function(ctypes.c_int(code), ctypes.byref(text)) == Result.SUCCESS
            texts.append((text.value or b"").decode(errors="replace") if known else "")
        return texts[0] or result_name(code), texts[1]


def result_name(code: int) -> str:
    """What cuda.h calls a CUresult, as far as it is listed here; else ``CUDA error 999``."""
    try:
        return f"CUDA_ERROR_{Result(code).name}"
    except ValueError:
        return f"CUDA error {code}"


def _text(uuid: _Uuid) -> str:
    """As NVML writes it: ``GPU-`` and 8-4-4-4-12 hexadecimal digits."""
    digits = bytes(uuid.bytes).hex()
    return "GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _uuid(text: str) -> _Uuid:
    raw = bytes.fromhex(text.removeprefix("GPU-").replace("-", ""))
    if len(raw) != 16:
        raise ValueError(f"{text!r} is not the UUID of a GPU")
    return _Uuid((ctypes.c_ubyte * 16)(*raw))
