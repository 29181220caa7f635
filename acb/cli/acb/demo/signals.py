"""Signals that end a program, held back until what it has begun can be put away."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """One has come."""


class Signals:
    """A context manager: inside, a signal only makes check() raise Interrupted; on leaving, it takes effect.

    So nothing is cut off between beginning something and noting it down, nor while it is put away. A signal that is
    ignored (by nohup, say) stays so.
    """

    def __init__(self) -> None:
        self._came = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in _ENDING:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._came:
            signal.raise_signal(self._came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = self._came or number

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self._came:
            raise Interrupted(128 + self._came)
