"""The hardware of a node in virtual time, what came of a run on it, and its bound."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

LOSSES = ("copying", "lingering", "empty")
"""Why a GPU computes nothing although somebody waits for it: see Outcome."""


class SimulationError(AssertionError):
    """Something happened that never may: two on one slot, memory that does not fit, somebody who waits for ever."""


@dataclass(slots=True)
class Machine:
    """A node's hardware: GPUs of `capacity` bytes with `bandwidth` bytes a second to host memory each, and `cores`.

    `cores` None: as many as there are jobs, so that nobody ever waits for one.
    """

    gpus: int
    capacity: int
    bandwidth: float
    cores: int | None = None
    slots: int = 1


@dataclass(slots=True)
class Outcome:
    """What came of a run: times in virtual seconds, sizes in bytes, and what the bound is made of.

    `waits`: by the jobs' kind, from each request to the moment when the GPU works for the client, restoring included.
    `lost`: GPU-seconds without computing on a GPU for which somebody waited, by the reason: "copying"; "lingering",
    its holder pauses; "empty", it has no holder. `fullest`: seconds of GPU work that the busiest GPU has done; a
    process cannot change its GPU, so with its choices made the broker cannot be done earlier.
    """

    makespan: float = 0.0
    gpus: int = 0
    cores: int = 0
    jobs: int = 0
    gpu_seconds: float = 0.0
    cpu_seconds: float = 0.0
    longest: float = 0.0
    fullest: float = 0.0
    waits: dict[str, array[float]] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOSSES, 0.0))
    copies: int = 0
    copied: int = 0
    leases: int = 0
    messages: int = 0
    failed: int = 0
    real_seconds: float = 0.0

    def add(self, other: Outcome) -> None:
        """Take in another node's outcome of the same run."""
        for name in ("gpus", "cores", "jobs", "gpu_seconds", "cpu_seconds", "copies", "copied", "leases", "messages",
                     "failed", "real_seconds"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.makespan = max(self.makespan, other.makespan)
        self.longest = max(self.longest, other.longest)
        self.fullest = max(self.fullest, other.fullest)
        for reason, seconds in other.lost.items():
            self.lost[reason] += seconds
        for kind, waits in other.waits.items():
            self.waits.setdefault(kind, array("d")).extend(waits)

    @property
    def bound(self) -> float:
        """Seconds that no scheduler can beat: all GPU work on all GPUs, all CPU work on all cores, the longest job."""
        return max(self.gpu_seconds / self.gpus, self.cpu_seconds / max(1, self.cores), self.longest)

    @property
    def efficiency(self) -> float:
        """Bound over makespan."""
        return self.bound / self.makespan


class Card:
    """A simulated GPU: the truth about who holds it and what lies on it, told by the clients, not by the broker."""

    def __init__(self, ordinal: int, machine: Machine, lost: dict[str, float]) -> None:
        self.ordinal = ordinal
        self.capacity, self.slots, self.bandwidth = machine.capacity, machine.slots, machine.bandwidth
        self.holders = self.computing = self.copying = self.waiting = 0
        self.used = 0
        self.computed = 0.0
        self.link_free = {"out": 0.0, "in": 0.0}
        self._lost = lost
        self._since = 0.0

    def settle(self, now: float, unbound: int) -> None:
        """Before anything here changes: account for the time since the last change. `unbound` wait for any GPU."""
        if not self.computing and (self.waiting or unbound):
            reason = "copying" if self.copying else "lingering" if self.holders else "empty"
            self._lost[reason] += now - self._since
        self._since = now

    def occupy(self, nbytes: int) -> None:
        """So many bytes more, or less, are in use."""
        self.used += nbytes
        if self.used > self.capacity:
            raise SimulationError(f"{self.used} bytes are in use on GPU {self.ordinal}, which has {self.capacity}")

    def copy(self, direction: str, nbytes: int, now: float) -> float:
        """When a copy that is asked for now has ended."""
        end = max(now, self.link_free[direction]) + nbytes / self.bandwidth
        self.link_free[direction] = end
        return end
