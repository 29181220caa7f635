"""What was learned of programs, kept between brokers in one small JSON file of the user's.

Several brokers, on several nodes, may share it: each replaces what it has learned itself and keeps the rest. To lose it
costs nothing but learning again, so no trouble with it is anybody's.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from acb.broker.learning import Programs

SAVE_EVERY = 10.0
"""Seconds, at least, between two writings while the broker runs."""


class History:
    """The file at `path`; None: nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.programs = Programs()
        self._saved_at = time.monotonic()
        self._dirty = False
        self.programs.load(self._read())

    def client_ended(self) -> None:
        """There is something to keep; write it, unless that was done a moment ago."""
        self._dirty = True
        if time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write what has been learned, if anything has."""
        self._saved_at = time.monotonic()
        if self.path is None or not self._dirty:
            return
        self._dirty = False
        found = self._read()
        mine = self.programs.to_json()
        merged = (
            {**{name: found[name] for name in found if name not in mine}, **mine} if isinstance(found, dict) else mine
        )
        draft = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            try:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                draft.write_text(json.dumps(merged))
                os.replace(draft, self.path)
            finally:
                with contextlib.suppress(OSError):
                    draft.unlink()

    def _read(self) -> object:
        try:
            return json.loads(self.path.read_bytes()) if self.path is not None else None
        except (OSError, ValueError, RecursionError):
            return None
