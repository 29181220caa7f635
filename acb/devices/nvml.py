"""The machine's NVIDIA GPUs, asked through NVML: it needs no CUDA context and touches no GPU's memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

PROHIBITED, EXCLUSIVE = 2, 3
"""Compute modes of NVML in which GPUs cannot be lent: no context at all, and one process at a time."""

UNEVEN = 256 << 20
"""Bytes, more than by which GPUs of one kind differ in what their drivers keep for themselves."""

_UNKNOWN = (1 << 64) - 1  # NVML_VALUE_NOT_AVAILABLE, which old bindings hand through


NO_BINDING = "the package nvidia-ml-py is not installed"
"""Why the GPUs cannot be asked where it is neither theirs nor the driver's fault."""


class NvmlError(Exception):
    """The GPUs cannot be asked; one sentence says why."""


class Device(NamedTuple):
    """A GPU. `ordinal` as the job sees it (its place in CUDA_VISIBLE_DEVICES, where that is set); `capacity` in bytes,
    without what the driver keeps for itself."""

    ordinal: int
    uuid: str
    name: str
    capacity: int


class Settings(NamedTuple):
    """How a GPU is set up; None: the driver does not say. `compute_mode` is NVML's number, 0 the default."""

    mig: bool | None = None
    persistence: bool | None = None
    compute_mode: int | None = None

    def obstacle(self, device: Device) -> str | None:
        """Why acb cannot lend this GPU, in a sentence with what to do; None when it can."""
        which = f"GPU {device.ordinal} ({device.name})"
        if self.mig:
            return (
                f"{which} is divided by MIG, and acb lends whole GPUs; have MIG turned off: "
                f"nvidia-smi -i {device.uuid} -mig 0"
            )
        if self.compute_mode == PROHIBITED:
            return (
                f"{which} is closed to computing (compute mode Prohibited); have it opened: "
                f"nvidia-smi -i {device.uuid} -c DEFAULT"
            )
        if self.compute_mode == EXCLUSIVE:
            return (
                f"{which} admits one process at a time (compute mode Exclusive_Process), and programs that take turns "
                f"each keep a context; have it opened: nvidia-smi -i {device.uuid} -c DEFAULT"
            )
        return None


class Nvml:
    """NVML kept open, for whoever asks again and again; ``with Nvml() as nvml`` or close() ends it.

    Not for several threads at once, and not to be carried through a fork.
    """

    def __init__(self) -> None:
        """Raises NvmlError when there is no driver, or it does not answer."""
        try:
            import pynvml
        except ImportError:
            raise NvmlError(NO_BINDING) from None
        self._pynvml: Any = pynvml
        self._handles: dict[str, Any] = {}
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NvmlError(f"no NVIDIA GPU can be used here ({error})") from None
        self._open = True
        try:
            self.all = self._find()
            """Every GPU of the machine, as NVML counts them: by PCI bus."""
        except BaseException:
            self.close()
            raise
        self.devices = visible(self.all, os.environ.get("CUDA_VISIBLE_DEVICES"))
        """Those that this job may use, as the job counts them."""

    def __enter__(self) -> Nvml:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let NVML go. May be called twice."""
        if self._open:
            self._open = False
            self._ask("nvmlShutdown")

    # --- the machine -----------------------------------------------------------------------------------------------

    def driver_version(self) -> str | None:
        """Such as ``580.95.05``."""
        return _text(self._ask("nvmlSystemGetDriverVersion"))

    def cuda_version(self) -> str | None:
        """The newest CUDA that this driver supports, such as ``13.0``."""
        number = self._ask("nvmlSystemGetCudaDriverVersion")
        return f"{number // 1000}.{number % 1000 // 10}" if isinstance(number, int) and number > 0 else None

    # --- one GPU, by its ordinal in `devices` or by its UUID ---------------------------------------------------------

    def settings(self, which: int | str) -> Settings:
        """How it is set up. Raises NvmlError when there is no such GPU."""
        handle = self._handle(which)
        mig = self._ask("nvmlDeviceGetMigMode", handle)  # the current one, and the one after the next reset
        persistence = self._ask("nvmlDeviceGetPersistenceMode", handle)
        mode = self._ask("nvmlDeviceGetComputeMode", handle)
        return Settings(
            bool(mig[0]) if isinstance(mig, (list, tuple)) and mig else None,
            None if persistence is None else bool(persistence),
            None if mode is None else int(mode),
        )

    def free(self, which: int | str) -> int:
        """Bytes of its memory that nobody holds. Raises NvmlError when it does not answer."""
        handle = self._handle(which)
        try:
            return int(self._pynvml.nvmlDeviceGetMemoryInfo(handle).free)
        except self._pynvml.NVMLError as error:
            _gone(which, error)

    def most(self, which: int | str) -> int:
        """Bytes that are free when nobody holds any: the driver keeps some for itself. Raises NvmlError as free()."""
        try:
            return self._usable(self._handle(which))
        except self._pynvml.NVMLError as error:
            _gone(which, error)

    def processes(self, which: int | str) -> dict[int, int | None]:
        """Bytes that each process holds on it, by process id; None: the driver does not say how many.

        The ids are those of the machine: inside a container's namespace of its own, no process here may bear them.
        Raises NvmlError when the GPU does not answer.
        """
        handle = self._handle(which)
        found: dict[int, int | None] = {}
        answered = False
        for kind in ("Compute", "Graphics"):  # what does both is in both lists, with the same figure
            listed = self._ask(f"nvmlDeviceGet{kind}RunningProcesses", handle)
            answered = answered or listed is not None
            for process in listed or ():
                used = getattr(process, "usedGpuMemory", None)
                known = None if used is None or used == _UNKNOWN else int(used)
                pid = int(process.pid)
                found[pid] = known if found.get(pid) is None else max(known or 0, found[pid] or 0)
        if not answered:
            _gone(which, "it does not list its processes")
        return found

    # --- inside ------------------------------------------------------------------------------------------------------

    def _find(self) -> list[Device]:
        problem: Exception | None = None
        found = []
        try:
            for index in range(self._pynvml.nvmlDeviceGetCount()):
                try:
                    found.append(self._device(index))
                except self._pynvml.NVMLError as error:
                    problem = error  # it has fallen off the bus: the others work
            if problem is not None and not found:
                raise problem
        except self._pynvml.NVMLError as error:
            raise NvmlError(f"the NVIDIA driver does not answer ({error})") from None
        return [device._replace(capacity=_of_its_kind(device, found)) for device in found]

    def _device(self, index: int) -> Device:
        handle = self._pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid = _text(self._pynvml.nvmlDeviceGetUUID(handle)) or ""
        self._handles[uuid] = handle
        name = _text(self._ask("nvmlDeviceGetName", handle)) or "NVIDIA GPU"
        return Device(index, uuid, name, self._usable(handle))

    def _usable(self, handle: Any) -> int:
        """Bytes that are free when nobody holds any."""
        later = self._ask("nvmlDeviceGetMemoryInfo", handle, getattr(self._pynvml, "nvmlMemory_v2", None))
        known = later if hasattr(later, "reserved") else self._pynvml.nvmlDeviceGetMemoryInfo(handle)
        return int(known.total) - int(getattr(known, "reserved", 0))

    def _handle(self, which: int | str) -> Any:
        if isinstance(which, int):
            which = next((device.uuid for device in self.devices if device.ordinal == which), str(which))
        if which not in self._handles:
            raise NvmlError(f"there is no GPU {which} here")
        return self._handles[which]

    def _ask(self, function: str, *arguments: Any) -> Any:
        """What an NVML function says; None when this driver, binding or GPU does not know it."""
        call: Callable[..., Any] | None = getattr(self._pynvml, function, None)
        if call is None:
            return None
        try:
            return call(*arguments)
        except (self._pynvml.NVMLError, AttributeError, TypeError):
            return None


def devices() -> list[Device]:
    """The GPUs that this job may use. Raises NvmlError when there is no driver, or it does not answer."""
    with Nvml() as nvml:
        return nvml.devices


def visible(found: Sequence[Device], setting: str | None) -> list[Device]:
    """Those of the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; it names ordinals or (beginnings of) UUIDs.

    As in CUDA, an entry that names nothing ends the list; so does one that was there before.
    """
    if setting is None:
        return list(found)
    chosen: list[Device] = []
    for entry in (part.strip() for part in setting.split(",")):
        match = [d for d in found if entry == str(d.ordinal) or (entry.startswith("GPU-") and d.uuid.startswith(entry))]
        if len(match) != 1 or match[0].uuid in (device.uuid for device in chosen):
            break
        chosen.append(match[0]._replace(ordinal=len(chosen)))
    return chosen


def _of_its_kind(device: Device, found: Sequence[Device]) -> int:
    """Its capacity, or the least of its kind, where that is a little less: such GPUs stand in for each other."""
    alike = [other.capacity for other in found if other.name == device.name]
    return min(capacity for capacity in alike if capacity >= device.capacity - UNEVEN)


def mig_obstacle(found: Sequence[Device], setting: str | None) -> str | None:
    """Why acb cannot lend where CUDA_VISIBLE_DEVICES stops naming GPUs, in a sentence with what to do, if that is at a
    part of one; else None."""
    entries = [part.strip() for part in (setting or "").split(",")]
    entry = next(iter(entries[len(visible(found, setting)) :]), "")
    if not entry.startswith("MIG-"):
        return None
    return (
        f"{entry} is a part of a GPU that MIG divides, and acb lends whole GPUs; ask for a whole GPU, or run the "
        f"program without acb"
    )


def _text(value: Any) -> str | None:
    """Old bindings answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value if isinstance(value, str) else None


def _gone(which: int | str, error: object) -> NoReturn:
    raise NvmlError(f"GPU {which} does not answer ({error})") from None
