"""Two readings of one allocator's peaks: the program's own, and acb's, each of which can be reset without the other.

PyTorch's allocator keeps one peak a statistic, and a program may print it. So whoever resets it first notes, for the
other, how high it had been.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from acb.hooks.torch.patching import Patches

Statistics = dict[str, Any]


class Peaks:
    """The peaks of every device, as acb sees them; patch() gives the program its own."""

    def __init__(self) -> None:
        self._statistics: Callable[[int], Statistics] = torch._C._cuda_memoryStats
        self._reset: Callable[[int], None] = torch._C._cuda_resetPeakMemoryStats
        self._programs: dict[int, dict[tuple[str, str], int]] = {}
        self._own: dict[int, int] = {}

    def peak(self, ordinal: int) -> int:
        """The most bytes that the allocator has held on this device at once since reset()."""
        return max(self._own.get(ordinal, 0), int(self._statistics(ordinal)["reserved_bytes"]["all"]["peak"]))

    def reset(self, ordinal: int) -> None:
        """Forget acb's peak."""
        saved = self._programs.setdefault(ordinal, {})
        for key, statistic in _with_peaks(self._statistics(ordinal)):
            saved[key] = max(saved.get(key, 0), int(statistic["peak"]))
        self._own.pop(ordinal, None)
        self._reset(ordinal)

    def patch(self, patches: Patches) -> None:
        """Let the program read and reset its own peaks."""
        statistics, reset = self._statistics, self._reset

        @functools.wraps(statistics)
        def _cuda_memoryStats(ordinal: int) -> Statistics:
            result = statistics(ordinal)
            saved = self._programs.get(ordinal)
            if saved:
                for key, statistic in _with_peaks(result):
                    statistic["peak"] = max(statistic["peak"], saved.get(key, 0))
            return result

        @functools.wraps(reset)
        def _cuda_resetPeakMemoryStats(ordinal: int) -> None:
            self._own[ordinal] = self.peak(ordinal)
            self._programs.pop(ordinal, None)
            reset(ordinal)

        patches.set(torch._C, "_cuda_memoryStats", _cuda_memoryStats)
        patches.set(torch._C, "_cuda_resetPeakMemoryStats", _cuda_resetPeakMemoryStats)


def _with_peaks(statistics: Statistics) -> list[tuple[tuple[str, str], dict[str, Any]]]:
    """Every statistic that has a peak, by its name and pool."""
    return [
        ((name, pool), numbers)
        for name, pools in statistics.items()
        if isinstance(pools, dict)
        for pool, numbers in pools.items()
        if isinstance(numbers, dict) and "peak" in numbers
    ]
