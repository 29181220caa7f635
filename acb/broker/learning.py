"""What the broker learns of programs: how long their phases are, what memory they need, what swapping them costs.

It is kept for each client and for each program's name; the latter outlives the broker (see history). Estimates are
percentiles of the last samples: Fujitsu's broker takes the 90th of the execution time and the 99th of the memory.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable
from typing import Any

MARGIN = 1.1
"""Headroom over the measured peak: the factor that Fujitsu's broker uses on its 99th percentile."""

SAMPLES = 64
"""So many of the last values count."""

ENOUGH = 3
"""Fewer samples than these are no knowledge."""

SPREAD = 1.1
"""Peaks of a program's runs that differ by more than this factor say nothing of its next run."""

PROGRAMS = 500
"""So many programs are remembered, those seen last."""

COMMANDS = 32
"""So many command lines of a program are remembered, those that ended last."""


class Samples:
    """The last SAMPLES values, also in order."""

    __slots__ = ("_last", "_sorted", "total")

    def __init__(self, values: Iterable[float] = ()) -> None:
        self._last: deque[float] = deque(maxlen=SAMPLES)
        self._sorted: list[float] = []
        self.total = 0.0
        for value in values:
            self.add(value)

    def __len__(self) -> int:
        return len(self._last)

    def __iter__(self) -> Any:
        return iter(self._last)

    def add(self, value: float) -> None:
        """Take one in; the eldest goes."""
        if len(self._last) == SAMPLES:
            del self._sorted[bisect.bisect_left(self._sorted, self._last[0])]
            self.total -= self._last[0]
        self._last.append(value)
        self.total += value
        bisect.insort(self._sorted, value)

    def mean(self) -> float | None:
        """None with fewer than ENOUGH."""
        return max(0.0, self.total) / len(self._last) if len(self._last) >= ENOUGH else None

    def percentile(self, percent: float) -> float | None:
        """The least sample that so many percent do not exceed (nearest rank); None with fewer than ENOUGH."""
        if len(self._sorted) < ENOUGH:
            return None
        return self._sorted[max(0, math.ceil(len(self._sorted) * percent / 100) - 1)]


class Profile:
    """Of one program, or of one client, which falls back on its program's where it knows too little.

    What a program needs depends on its input, so peaks are kept by command line: another one may need far more, and
    would run out of memory in the midst of a computation beside others who could have made way before.
    """

    __slots__ = ("arguments", "gaps", "peaks", "phases", "program", "swaps")

    FIELDS = ("phases", "gaps", "swaps")

    def __init__(self, program: Profile | None = None, arguments: str = "") -> None:
        """`arguments`: of a client, a digest of its command line's."""
        self.program = program
        self.arguments = arguments
        self.phases = Samples()
        """Seconds of its GPU phases."""
        self.gaps = Samples()
        """Seconds between a lease given back and the next request."""
        self.peaks: dict[str, Samples] = {}
        """Of a program: the most bytes of each run, once that has settled, by its arguments."""
        self.swaps = Samples()
        """Seconds a byte, out and in again."""

    def phase_seconds(self) -> float | None:
        """What nine of ten of its phases do not exceed; None: unknown."""
        return self._estimate("phases", 90)

    def gap_seconds(self) -> float | None:
        """How long it typically does without the GPU; None: unknown."""
        return self._estimate("gaps", 50)

    def swap_seconds(self, nbytes: int) -> float | None:
        """What moving so many bytes out and in again takes; None: unknown."""
        rate = self._estimate("swaps", 50)
        return None if rate is None else rate * nbytes

    def peak_bytes(self) -> int | None:
        """What a run of the program with these arguments needs, without margin; None: unknown, or its runs differ."""
        runs = self.program.peaks.get(self.arguments, Samples()) if self.program is not None else Samples()
        most, least = runs.percentile(99), runs.percentile(1)
        return None if most is None or least is None or most > SPREAD * least else int(most)

    def share(self) -> float | None:
        """The part of its time in which the program would use a GPU, if it never had to wait; None: unknown."""
        phase, gap = self.phases.mean(), self.gaps.mean()
        if phase is None or gap is None:
            return self.program.share() if self.program is not None else None
        return phase / max(phase + gap, 1e-9)

    def swapped(self, nbytes: int, seconds: float) -> None:
        """Moving `nbytes` out and in again took `seconds`."""
        if nbytes > 0:
            self._add("swaps", seconds / nbytes)

    def phase(self, seconds: float) -> None:
        """A phase that the client itself ended took `seconds`."""
        self._add("phases", seconds)

    def gap(self, seconds: float) -> None:
        """The client did without the GPU for `seconds`."""
        self._add("gaps", seconds)

    def settled(self, peak: int) -> None:
        """This run of the client's program needs so many bytes, it seems."""
        if self.program is not None:
            self.program.add_peaks(self.arguments, [peak])

    def add_peaks(self, arguments: str, peaks: Iterable[float]) -> None:
        """Of a program: runs with these arguments have needed so many bytes."""
        runs = self.peaks.pop(arguments, None) or Samples()
        self.peaks[arguments] = runs
        for peak in peaks:
            runs.add(peak)
        while len(self.peaks) > COMMANDS:
            del self.peaks[next(iter(self.peaks))]

    def _add(self, what: str, value: float) -> None:
        getattr(self, what).add(value)
        if self.program is not None:
            getattr(self.program, what).add(value)

    def _estimate(self, what: str, percent: float) -> float | None:
        known: float | None = getattr(self, what).percentile(percent)
        if known is None and self.program is not None:
            return self.program._estimate(what, percent)
        return known


class Programs:
    """The profiles by program name."""

    def __init__(self) -> None:
        self._profiles: dict[str, Profile] = {}

    def __getitem__(self, name: str) -> Profile:
        """The profile of a name, a new one if need be. Those asked for least recently are forgotten."""
        profile = self._profiles.pop(name, None) or Profile()
        self._profiles[name] = profile
        while len(self._profiles) > PROGRAMS:
            del self._profiles[next(iter(self._profiles))]
        return profile

    def to_json(self) -> dict[str, dict[str, Any]]:
        """All of it, for a file."""
        return {
            name: {field: list(getattr(profile, field)) for field in Profile.FIELDS}
            | {"peaks": {arguments: list(runs) for arguments, runs in profile.peaks.items()}}
            for name, profile in self._profiles.items()
        }

    def load(self, found: object) -> None:
        """Take in what to_json() gave; what is not of its form is left out."""
        for name, fields in found.items() if isinstance(found, dict) else ():
            if not isinstance(fields, dict):
                continue
            profile = self[str(name)]
            for field in Profile.FIELDS:
                for value in _numbers(fields.get(field)):
                    getattr(profile, field).add(value)
            commands = fields.get("peaks")
            for arguments, peaks in commands.items() if isinstance(commands, dict) else ():
                profile.add_peaks(arguments, _numbers(peaks))


def _numbers(found: object) -> Iterable[float]:
    """What makes sense of a list in the file."""
    for value in found if isinstance(found, list) else ():
        if isinstance(value, (int, float)) and 0 <= value < 1e18:
            yield float(value)
