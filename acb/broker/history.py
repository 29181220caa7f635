"""What was learned of programs, kept between brokers in one small JSON file of the user's.

Several brokers, on several nodes, may share it: each replaces what it has learned itself and keeps the rest. To lose it
costs nothing but learning again, so trouble with it ends nobody; but it is logged, once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from pathlib import Path

from acb import disk
from acb.broker.learning import Programs
from acb.broker.log import log

SAVE_EVERY = 10.0
"""Seconds, at least, between two writings while the broker runs."""

_SPARE = 4096
"""Bytes, beside what the file has, that there must be room for."""


def obstacle(path: Path | None) -> str:
    """Why nothing can be kept at `path`; '': it can."""
    if path is None:
        return "there is no home directory"
    if os.path.isdir(path):
        return os.strerror(errno.EISDIR)
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    return disk.obstacle(path.parent, size + _SPARE)


class History:
    """The file at `path`; None: nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.programs = Programs()
        self._saved_at = time.monotonic()
        self._dirty = False
        self._complained = False
        self.programs.load(self._read())

    def check(self) -> None:
        """Log if nothing can be kept, while there is somebody to read it, and not only when the broker ends."""
        self._complain(obstacle(self.path))

    def _complain(self, reason: str) -> None:
        if not reason or self._complained:
            return
        self._complained = True
        where = f" in {self.path}" if self.path is not None else ""
        log(
            f"what is learned of programs cannot be kept{where} for the next broker: {reason}; "
            f"set ACB_STATE_DIR to a directory that can be written when you start that one"
        )

    def client_ended(self) -> None:
        """There is something to keep; write it, unless that was done a moment ago."""
        self._dirty = True
        if time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write what has been learned, if anything has; what cannot be written is tried again when a client ends."""
        self._saved_at = time.monotonic()
        if self.path is None or not self._dirty:
            return
        found = self._read()
        mine = self.programs.to_json()
        merged = (
            {**{name: found[name] for name in found if name not in mine}, **mine} if isinstance(found, dict) else mine
        )
        draft = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.write_text(json.dumps(merged))
            os.replace(draft, self.path)
            self._dirty = False
        except OSError as error:
            self._complain(error.strerror or str(error))
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()

    def _read(self) -> object:
        try:
            return json.loads(self.path.read_bytes()) if self.path is not None else None
        except (OSError, ValueError, RecursionError):
            return None
