"""How much room there is on each GPU, how much a process takes of it, and waiting until it has it again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from acb.config import format_size
from acb.devices.nvml import NvmlError

OVERHEAD = 512 << 20
"""Bytes a GPU: more than a context takes beyond what the driver accounts to its process."""

CONTEXT = 1 << 30
"""Bytes a GPU: more than a context with its libraries takes, none of which a program counts itself."""

POLL = 0.02
"""Seconds between two looks at how much of a GPU is free."""

SETTLE = 0.5
"""Seconds after which memory that has been given up counts as free, if it ever does."""


class Memory(Protocol):
    """What NVML says of a GPU; acb.devices.nvml.Nvml is one. All raise NvmlError when it does not answer."""

    def free(self, which: str, /) -> int:
        """Bytes that nobody holds on the GPU of this UUID."""

    def most(self, which: str, /) -> int:
        """Bytes that are free when nobody holds any."""

    def processes(self, which: str, /) -> Mapping[int, int | None]:
        """Bytes that each process holds on it; None: not known."""


class Rooms:
    """The memory of these GPUs, by their UUIDs."""

    def __init__(self, gpus: Sequence[str], memory: Memory | None) -> None:
        """`memory` None: nothing can be measured."""
        self.gpus = list(gpus)
        self._memory = memory

    def free(self) -> dict[str, int]:
        """Bytes free by GPU, where that is known."""
        found = {}
        for uuid, memory in self._each():
            with contextlib.suppress(NvmlError):
                found[uuid] = memory.free(uuid)
        return found

    def held(self, pid: int) -> dict[str, int]:
        """Bytes that the process holds by GPU; {} when the driver does not know it by this id (in a container, say)."""
        found = {}
        for uuid, memory in self._each():
            with contextlib.suppress(NvmlError):
                nbytes = memory.processes(uuid).get(pid)
                if nbytes is not None:
                    found[uuid] = nbytes
        return found

    def won(
        self, held: Mapping[str, int], before: Mapping[str, int], claimed: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """What a restore will need again: moved(), since free() gave `before`; waits a moment if nothing has moved yet.

        Where the driver does not know the process, it is what is `claimed`: others' memory comes and goes, and with too
        little a restore would cost the process.
        """
        if not held and claimed is not None:
            return dict(claimed)
        deadline = time.monotonic() + SETTLE
        while True:
            found = moved(held, before, self.free())
            if found or not before or time.monotonic() >= deadline:
                return found
            time.sleep(POLL)

    def wait(
        self,
        needs: Mapping[str, int],
        gpu_map: Mapping[str, str],
        free: Callable[[str], int] | None,
        clock: Callable[[], float],
        patience: float,
    ) -> str:
        """Wait up to `patience` seconds for the room: what has just ended takes a moment. "" or why there is none.

        `needs` is in bytes by GPU, `gpu_map` says where another GPU takes its place, `free` answers in NVML's place.
        """
        if not needs:
            return "nobody knows how much memory it needs"
        if free is None and self._memory is not None:
            free, needs = self._memory.free, self._at_most(needs, gpu_map)
        if free is None:
            return "nobody knows how much is free"
        deadline = clock() + patience
        while True:
            short = _short(needs, gpu_map, free)
            if not short or clock() >= deadline:
                return short
            time.sleep(POLL)

    def _at_most(self, needs: Mapping[str, int], gpu_map: Mapping[str, str]) -> dict[str, int]:
        """The same, but not more than an empty GPU has: the overhead in them is an upper bound."""
        found = dict(needs)
        for uuid, memory in self._each():
            for source, nbytes in needs.items():
                if gpu_map.get(source, source) == uuid:
                    with contextlib.suppress(NvmlError):
                        found[source] = min(nbytes, memory.most(uuid))
        return found

    def _each(self) -> Iterator[tuple[str, Memory]]:
        if self._memory is not None:
            for uuid in self.gpus:
                yield uuid, self._memory


def _short(needs: Mapping[str, int], gpu_map: Mapping[str, str], free: Callable[[str], int]) -> str:
    """Which GPU has too little; "": none."""
    for uuid, nbytes in needs.items():
        target = gpu_map.get(uuid, uuid)
        try:
            there = free(target)
        except NvmlError as error:
            return str(error)
        if there < nbytes:
            return f"it needs {format_size(nbytes)} on {target}, of which {format_size(there)} are free"
    return ""


def moved(held: Mapping[str, int], before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """How much room each GPU has won between two looks at free(), which is what a restore will need again.

    What the driver accounts to the process, and what is free beyond that, as far as a context explains it: others may
    have freed memory at the same time. Where the driver does not know the process, all that has become free, which is
    only right while nobody else uses the GPU.
    """
    found = {}
    for uuid, then in before.items():
        if held and uuid not in held:
            continue
        freed = max(0, after.get(uuid, then) - then)
        nbytes = max(held[uuid], min(freed, held[uuid] + OVERHEAD)) if held else freed
        if nbytes:
            found[uuid] = nbytes
    return found
