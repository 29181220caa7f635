"""The trace that ``acb-launch --trace FILE`` asks for: every state change of a client with its cause.

One JSON object a line. Fields: ``t`` (seconds, the clock of time.monotonic(), common to all processes of a machine),
``time`` (seconds since the epoch), ``pid``, ``name``, ``state``, ``cause``, and whatever the change has to tell
(``gpu``, ``bytes``, ``seconds``). While a trace is written every region is watched, which costs JAX its fast path.
"""

from __future__ import annotations

import errno
import json
import os
import time
from typing import Any


class Trace:
    """Appends whole lines, so that several processes may share one file. Does nothing without a path."""

    def __init__(self, path: str | None, name: str) -> None:
        self.enabled = bool(path)
        self.state = "detached"
        self._name = name
        self._path = path
        self._fd = -1
        if path:
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            except OSError as error:
                self._lost(f"no trace is written: cannot open {path}: {error.strerror}")

    def close(self) -> None:
        """Write nothing more."""
        self.enabled = False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def change(self, state: str, cause: str, at: float | None = None, **details: Any) -> None:
        """Note a state change that happened now, or `at` that moment of time.monotonic()."""
        self.state = state
        if not self.enabled:
            return
        now = time.monotonic()
        moment = now if at is None else at
        line: dict[str, Any] = {
            "t": round(moment, 6),
            "time": round(time.time() - (now - moment), 6),
            "pid": os.getpid(),
        }
        line |= {"name": self._name, "state": state, "cause": cause, **details}
        packet = json.dumps(line).encode() + b"\n"
        try:
            if os.write(self._fd, packet) < len(packet):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # it would say so with the next line
        except OSError as error:
            self._lost(
                f"the trace {self._path} ends too early, in process {os.getpid()} ({self._name}) at the state "
                f"{state}: {error.strerror}; make room, or choose another file"
            )

    def _lost(self, message: str) -> None:
        """Nothing more is written, which whoever asked for it has to know, with --quiet, too."""
        from acb.client.runtime import warn_once

        self.enabled = False
        warn_once("trace", message, error=True)
