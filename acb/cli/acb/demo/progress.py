"""What a person sees while the demo runs: a row a program on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_STYLES = {"running": "bold green", "waiting": "yellow", "evacuating": "magenta", "restoring": "magenta"}
_STYLES |= {"finished": "bold blue", "out of memory": "bold red", "failed": "bold red"}


class Progress:
    """Shows one scene after the other; a context manager."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False)
        self._live: Live | None = None
        self._title = ""
        self._start = 0.0
        self._states: list[tuple[str, str]] = []

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:

        self.end()

    def begin(self, title: str) -> None:
        """A new scene."""
        self.end()
        self._title, self._start, self._states = title, time.monotonic(), []
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, refresh_per_second=8)
            self._live.start()
        else:
            self._console.print(f"{title} ...", soft_wrap=True)

    def show(self, states: list[tuple[str, str]]) -> None:
        """The programs' names and what each does now; without a terminal only how they ended is told."""
        if self._live is not None:
            self._states = states
            self._live.update(self._table())
            return
        before = dict(self._states)
        for name, state in states:
            if state in ("finished", "out of memory", "failed") and before.get(name) != state:
                self._console.print(f"  {time.monotonic() - self._start:5.1f} s  {name}: {state}", soft_wrap=True)
        self._states = states

    def end(self) -> None:
        """The scene is over; what was last seen stays."""
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()
            self._live = None

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_row(Text(self._title, style="bold"), Text(f"{time.monotonic() - self._start:5.1f} s"))
        for name, state in self._states:
            table.add_row(Text(f"  {name}"), Text(state, style=_STYLES.get(state, "dim")))
        return table


def plain(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)
