"""What the next broker must know if this one ends before its clients: its options, which processes they are, and whom
the driver has suspended.

One small JSON file beside the socket, replaced as a whole when a client comes or goes, is suspended or resumed, never
on the way of another lease.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from acb.processes import start_time


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


class Journal:
    """The file at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.options: dict[str, Any] = {}
        self._clients: dict[int, int] = {}
        self._suspended: dict[int, Suspended] = {}

    def read(self) -> bool:
        """Take in what the broker before left; False when there is nothing, or nothing that can be understood."""
        try:
            found = json.loads(self.path.read_text())
            self.options = dict(found["options"])
            self._clients = {int(pid): int(start) for pid, start in found["clients"].items()}
            for pid, (nbytes, needs, *target) in found.get("suspended", {}).items():
                sizes = {str(gpu): int(size) for gpu, size in needs.items()}
                self._suspended[int(pid)] = Suspended(int(nbytes), sizes, *map(str, target[:1]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
        return True

    def survivors(self) -> set[int]:
        """The clients of the broker before that still run."""
        return {pid for pid, start in self._clients.items() if start_time(pid) == start}

    def begin(self, options: dict[str, Any]) -> None:
        """A new broker has begun with these options. Raises OSError when the file cannot be written."""
        self.options = options
        self._clients = {pid: self._clients[pid] for pid in self.survivors()}
        self._suspended = {pid: kept for pid, kept in self._suspended.items() if pid in self._clients}
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
        if self._clients.pop(pid, None) is not None:
            self._write_if_possible()

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

    def _write_if_possible(self) -> None:
        try:
            self._write()
        except OSError:
            pass  # a full disk must not stop the broker; at worst its successor waits for nobody

    def _write(self) -> None:
        draft = self.path.with_suffix(".draft")
        try:
            draft.write_text(
                json.dumps({"options": self.options, "clients": self._clients, "suspended": self._suspended})
            )
            os.replace(draft, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise
