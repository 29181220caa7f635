"""Signals that end a program, held back until what it has begun can be put away."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""By which a closed terminal, a person or a batch system ends a program."""


class Interrupted(SystemExit):
    """One has come."""


class Signals:
    """A context manager: inside, a signal is only noted, and whoever waits looks at `number`, or calls check(). On
    leaving, it takes effect, with `in_the_end`.

    So nothing is cut off between beginning something and noting it down, nor while it is put away. A signal that is
    ignored (by nohup, say) stays so.
    """

    def __init__(self, *, in_the_end: bool = True) -> None:
        self.number = 0
        """The first that has come; 0: none has."""
        self._in_the_end = in_the_end
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in ENDING:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.number and self._in_the_end:
            signal.raise_signal(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number

    @property
    def reason(self) -> str:
        """In words; '' while none has come."""
        return f"stopped by {signal.Signals(self.number).name}" if self.number else ""

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.number:
            raise Interrupted(128 + self.number)
