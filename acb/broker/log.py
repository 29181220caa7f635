"""The broker's log: its stderr, which in the background is the file beside its socket."""

from __future__ import annotations

import contextlib
import itertools
import os
import time

LINES = 10_000
"""So much is logged in a broker's life: whoever floods it must not fill the disk."""

_numbers = itertools.count(1)


def log(message: str) -> None:
    """One line. A full disk is no reason to end."""
    number = next(_numbers)
    if number == LINES:
        message = "there was too much to log; nothing more is logged"
    if number <= LINES:
        _write(message)


def log_event(what: str, details: str) -> None:
    """A line of the broker's own life, with the time of day; never too much."""
    _write(f"{what} {time.strftime('%Y-%m-%d %H:%M:%S')}: {details}")


def _write(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"gpu_assigner: {message}\n".encode("utf-8", "replace"))
