"""What the next broker must know if this one ends before its clients: its options, which processes they are, on which
GPUs, who of them holds a lease, and whom the driver has suspended.

One small JSON file beside the socket, replaced as a whole when a client comes or goes, gets its first lease, is
suspended or resumed. Every other lease only overwrites who holds one, at the file's beginning, where there is space for
that: a few microseconds, and none of the disk's room.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from acb.processes import ending, start_time

HOLDERS_SPACE = 256
"""Bytes at the file's beginning for the holders, at first."""


def as_typed(options: Mapping[str, Any]) -> str:
    """A broker's options as one would type them."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value is not None)


class Suspended(NamedTuple):
    """A process whose memory the driver has moved: `nbytes` in all, `needs` bytes by UUID of the GPU to come back.

    `target`: the UUID of another GPU on which they are being brought back, or may have been; '': not on another one.
    """

    nbytes: int
    needs: dict[str, int]
    target: str = ""


class Place(NamedTuple):
    """Where a client's memory is, or may be, and by what names it goes: what it would say of itself, if it could.

    `gpus`: what CUDA_VISIBLE_DEVICES calls the GPUs of it and, by rank, of its gang. `pool`: the folder of these GPUs,
    if they are simulated.
    """

    gpus: list[str]
    name: str = ""
    gang: str = ""
    rank: int = 0
    pool: str = ""

    @property
    def own(self) -> list[str]:
        """Its own GPUs."""
        return self.gpus[self.rank : self.rank + 1] if self.gang else self.gpus


class Journal:
    """The file at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.options: dict[str, Any] = {}
        self.holders: set[int] = set()
        """The processes that hold a lease, or are just to hear that they do."""
        self._clients: dict[int, int] = {}
        self._places: dict[int, Place] = {}
        self._suspended: dict[int, Suspended] = {}
        self._file: int | None = None  # a descriptor of it
        self._space = HOLDERS_SPACE

    def read(self) -> bool:
        """Take in what the broker before left; False when there is nothing, or nothing that can be understood."""
        try:
            found = json.loads(self.path.read_text())
            self.options = dict(found["options"])
            clients = {int(pid): int(start) for pid, start in found["clients"].items()}
            for pid, (nbytes, needs, *target) in found.get("suspended", {}).items():
                sizes = {str(gpu): int(size) for gpu, size in needs.items()}
                self._suspended[int(pid)] = Suspended(int(nbytes), sizes, *map(str, target[:1]))
            for pid, (gpus, name, gang, rank, pool) in found.get("places", {}).items():
                self._places[int(pid)] = Place(list(map(str, gpus)), str(name), str(gang), int(rank), str(pool))
            self.holders = set(map(int, found.get("holders", [])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
        self._clients = clients
        return True

    def survivors(self) -> set[int]:
        """The clients of the broker before that still run."""
        return {pid for pid, start in self._clients.items() if start_time(pid) == start}

    def ended(self, pid: int) -> bool:
        """Whether a client is no more, with all that it held: one that is just ending still has it."""
        start = self._clients.get(pid)
        if start is not None and start_time(pid) == start:
            return False
        descriptor = ending(pid)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def begin(self, options: dict[str, Any]) -> None:
        """A new broker has begun with these options. Raises OSError when the file cannot be written."""
        self.options = options
        self._clients = {pid: self._clients[pid] for pid in self.survivors()}
        self._places = {pid: place for pid, place in self._places.items() if pid in self._clients}
        self._suspended = {pid: kept for pid, kept in self._suspended.items() if pid in self._clients}
        self.holders &= self._clients.keys()
        self._write()

    def came(self, pid: int) -> None:
        """This process is a client now."""
        start = start_time(pid)
        if start is not None:
            self._clients[pid] = start
            self._write_if_possible()

    def went(self, pid: int) -> None:
        """This process is no client any more."""
        self._suspended.pop(pid, None)
        self._places.pop(pid, None)
        if self._clients.pop(pid, None) is not None:
            self._write_if_possible()

    def place(self, pid: int) -> Place | None:
        """Where this process's memory may be; None: it has never had a lease."""
        return self._places.get(pid)

    def bound(self, pid: int, place: Place) -> None:
        """This client is to have its first lease, or comes back on another GPU: said before it hears of it."""
        if self._places.get(pid) != place and pid in self._clients:
            self._places[pid] = place
            self._write_if_possible()

    def held_by(self, pids: set[int]) -> None:
        """From now on these hold leases: said before any of them hears of it."""
        if pids == self.holders:
            return
        self.holders = pids
        first = self._first()
        if len(first) > self._space or self._file is None:
            self._write_if_possible()
            return
        with contextlib.suppress(OSError):
            os.pwrite(self._file, first.ljust(self._space).encode(), 0)

    def suspended(self, pid: int) -> Suspended | None:
        """What the driver has moved, or may have moved, of this process; None: nothing."""
        return self._suspended.get(pid)

    def suspends(self, pid: int, what: Suspended) -> None:
        """The driver moves this process's memory, or has: said before it is asked, and again when it has answered."""
        self._suspended[pid] = what
        self._write_if_possible()

    def resumed(self, pid: int) -> None:
        """The process goes on."""
        if self._suspended.pop(pid, None) is not None:
            self._write_if_possible()

    def remove(self) -> None:
        """The broker has ended, and its clients before it: there is nothing to tell."""
        self.path.unlink(missing_ok=True)

    def _first(self) -> str:
        """The beginning of the file."""
        return f'{{"holders": {json.dumps(sorted(self.holders))}'

    def _write_if_possible(self) -> None:
        try:
            self._write()
        except OSError:
            pass  # a full disk must not stop the broker; at worst its successor waits for nobody

    def _write(self) -> None:
        first = self._first()
        while len(first) > self._space:
            self._space *= 2
        rest = {
            "options": self.options,
            "clients": self._clients,
            "places": self._places,
            "suspended": self._suspended,
        }
        draft = self.path.with_suffix(".draft")
        descriptor = None
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(descriptor, "w", closefd=False) as file:
                file.write(f"{first.ljust(self._space)},\n{json.dumps(rest)[1:]}")
            os.replace(draft, self.path)
        except OSError:
            if descriptor is not None:
                os.close(descriptor)
            with contextlib.suppress(OSError):
                draft.unlink()
            raise
        if self._file is not None:
            os.close(self._file)
        self._file = descriptor
