"""The CUDA driver's calls against a fake library: what is handed over, byte by byte, and what becomes of errors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from acb.devices import cuda
from acb.devices.cuda import CudaError, CudaUnavailable, LibCuda, Result, state_name

UUIDS = ["GPU-00010203-0405-0607-0809-0a0b0c0d0e0f", "GPU-ffffffff-0000-1111-2222-333333333333"]


def raw(argument: Any) -> bytes:
    """The bytes that a byref() points at."""
    return bytes(argument._obj)


class FakeLibrary:
    """Functions as ctypes has them: they take ctypes values and return a CUresult."""

    def __init__(self, **results: int) -> None:
        self.results = results
        self.calls: list[tuple[str, int, bytes]] = []

    def cuInit(self, flags: Any) -> int:
        assert flags.value == 0
        return self.results.get("cuInit", 0)

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13000
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(UUIDS)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: Any) -> int:
        device._obj.value = ordinal.value + 10
        return 0

    def cuDeviceGetUuid(self, uuid: Any, device: Any) -> int:
        text = UUIDS[device.value - 10].removeprefix("GPU-").replace("-", "")
        uuid._obj.bytes[:] = list(bytes.fromhex(text))
        return 0

    def cuGetErrorName(self, code: Any, text: Any) -> int:
        if code.value == 4242:
            return int(Result.INVALID_VALUE)
        text._obj.value = f"NAME_{code.value}".encode()
        return 0

    def cuGetErrorString(self, code: Any, text: Any) -> int:
        if code.value == 4242:
            return int(Result.INVALID_VALUE)
        text._obj.value = f"meaning of {code.value}".encode()
        return 0

    def _checkpoint(self, name: str) -> Callable[..., int]:
        def function(pid: Any, argument: Any) -> int:
            self.calls.append((name, pid.value, raw(argument)))
            if name.startswith("Get"):
                argument._obj.value = 7
            return self.results.get(name, 0)

        return function


for _name in ("GetState", "GetRestoreThreadId", "Lock", "Checkpoint", "Restore", "Unlock"):
    setattr(FakeLibrary, f"cuCheckpointProcess{_name}", property(lambda self, name=_name: self._checkpoint(name)))


def test_the_machine() -> None:
    driver = LibCuda(FakeLibrary())
    assert driver.version() == 13000
    assert driver.devices() == UUIDS


def test_arguments_are_64_bytes_with_each_field_in_its_place() -> None:
    library = FakeLibrary()
    driver = LibCuda(library)
    driver.lock(11, 2500)
    driver.checkpoint(12)
    driver.restore(13)
    driver.unlock(14)
    assert library.calls == [
        ("Lock", 11, (2500).to_bytes(4, "little") + bytes(60)),
        ("Checkpoint", 12, bytes(64)),
        ("Restore", 13, bytes(64)),
        ("Unlock", 14, bytes(64)),
    ]


def test_a_restore_elsewhere_names_its_pairs() -> None:
    library = FakeLibrary()
    seen: list[bytes] = []

    def restore(pid: Any, argument: Any) -> int:
        args = argument._obj
        assert ctypes.sizeof(args) == 64
        assert raw(argument)[8:] == (2).to_bytes(4, "little") + bytes(52)
        seen.extend(bytes(args.pairs[n]) for n in range(args.count))
        return 0

    library._checkpoint = lambda name: restore  # type: ignore[method-assign]
    LibCuda(library).restore(13, [(UUIDS[0], UUIDS[1]), (UUIDS[1], UUIDS[0])])
    ids = [bytes.fromhex(uuid.removeprefix("GPU-").replace("-", "")) for uuid in UUIDS]
    assert seen == [ids[0] + ids[1], ids[1] + ids[0]]
    with pytest.raises(ValueError, match="not the UUID"):
        LibCuda(library).restore(13, [("GPU-00", UUIDS[1])])


def test_states_are_handed_through_and_named() -> None:
    driver = LibCuda(FakeLibrary())
    assert (driver.state(1), driver.restore_thread(1)) == (7, 7)
    assert [state_name(n) for n in range(7)] == [
        "running", "locked", "checkpointed", "failed", "checkpointing", "restoring", "state 6",
    ]  # fmt: skip


@pytest.mark.parametrize("code", [1, 2, 3, 304, 401, 600, 800, 801, 999])
def test_an_error_carries_its_call_code_name_and_meaning(code: int) -> None:
    driver = LibCuda(FakeLibrary(Checkpoint=code))
    with pytest.raises(CudaError) as caught:
        driver.checkpoint(12)
    error = caught.value
    assert (error.call, error.code, error.name) == ("cuCheckpointProcessCheckpoint", code, f"NAME_{code}")
    assert str(error) == f"cuCheckpointProcessCheckpoint: NAME_{code} (meaning of {code})"


def test_errors_that_the_driver_cannot_name_have_a_number() -> None:
    with pytest.raises(CudaError, match="CUDA error 4242"):
        LibCuda(FakeLibrary(Lock=4242)).lock(1, 1)
    assert cuda.result_name(801) == "CUDA_ERROR_NOT_SUPPORTED"


def test_a_driver_without_the_calls_says_which_and_since_when(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(FakeLibrary):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith(("cuCheckpoint", "cuGetError")):
                raise AttributeError(name)
            return super().__getattribute__(name)

    with pytest.raises(CudaUnavailable, match=r"no cuCheckpointProcessLock; it exists since driver 570"):
        LibCuda(Old()).lock(1, 1)
    with pytest.raises(CudaUnavailable, match="CUDA_ERROR_NO_DEVICE"):
        LibCuda(Old(cuInit=100))
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-that-is-not-there.so")
    with pytest.raises(CudaUnavailable, match="there is no CUDA driver here"):
        LibCuda()
