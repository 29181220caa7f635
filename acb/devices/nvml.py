"""The machine's NVIDIA GPUs, asked through NVML: it needs no CUDA context and touches no GPU's memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple


class NvmlError(Exception):
    """The GPUs cannot be asked; one sentence says why."""


class Device(NamedTuple):
    """A GPU. `ordinal` as the job sees it (its place in CUDA_VISIBLE_DEVICES, where that is set); `capacity` in
    bytes."""

    ordinal: int
    uuid: str
    name: str
    capacity: int


def devices() -> list[Device]:
    """The GPUs that this job may use. Raises NvmlError when there is no driver, or it does not answer."""
    try:
        import pynvml
    except ImportError:
        raise NvmlError("the package nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlError(f"no NVIDIA GPU can be used here ({error})") from None
    try:
        indices = range(pynvml.nvmlDeviceGetCount())
        found, problem = [], None
        for index in indices:
            try:
                found.append(_device(pynvml, index))
            except pynvml.NVMLError as error:
                problem = error  # it has fallen off the bus: the others work
        if problem is not None and not found:
            raise problem
    except pynvml.NVMLError as error:
        raise NvmlError(f"the NVIDIA driver does not answer ({error})") from None
    finally:
        pynvml.nvmlShutdown()
    return visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


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


def _device(pynvml: Any, index: int) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    text = [value.decode() if isinstance(value, bytes) else value for value in (
        pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle),
    )]  # fmt: skip
    return Device(index, text[0], text[1], int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
