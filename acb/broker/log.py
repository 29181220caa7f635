"""The broker's log: its stderr, which in the background is the file beside its socket.

What a broker has logged, but for its start and its end, outlives it by a week at most, in ``broker.log.1``: the last
one's that had anything to say, or that did not end as it should.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from pathlib import Path

LINES = 10_000
"""So much is logged in a broker's life: whoever floods it must not fill the disk."""

KEPT = 7 * 86400.0
"""Seconds that the log of a broker that has ended is kept."""

_numbers = itertools.count(1)
_said = False  # anything but the start and the end


def log(message: str) -> None:
    """One line, with the time of day. A full disk is no reason to end."""
    global _said
    _said = True
    number = next(_numbers)
    if number == LINES:
        message = "there was too much to log; nothing more is logged"
    if number <= LINES:
        _write(f"{_now()}: {message}")


def log_event(what: str, details: str) -> None:
    """A line of the broker's own life, with the time of day; never too much."""
    _write(f"{what} {_now()}: {details}")


def keep(path: Path) -> None:
    """A log is there that nobody writes to any more: let it be the last one. Old ones of other jobs go."""
    with contextlib.suppress(OSError):
        os.replace(path, _kept(path))
    for old in path.parent.glob("broker*.log.1"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > KEPT:
                old.unlink()


def close(path: Path) -> None:
    """The broker has ended as it should: keep its log, or remove it when it says nothing."""
    if _said:
        keep(path)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _kept(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _write(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"gpu_assigner: {message}\n".encode("utf-8", "replace"))
