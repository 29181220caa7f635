"""The checklist as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from acb._version import __version__
from acb.cli import output
from acb.cli.acb.doctor.check import Check, Mark

_MARKS: dict[Mark, tuple[str, str, str]] = {
    "ok": ("✓", "ok", "green"),
    "note": ("·", "-", "cyan"),
    "warn": ("!", "!", "yellow"),
    "fail": ("✗", "x", "bold red"),
}
"""As sign, as sign where the terminal has no Unicode, and in which colour."""


def show(checks: Sequence[Check], verdict: str, usable: bool, console: Console | None = None) -> None:
    """Print the checks by section, and the verdict last."""
    console = console or output.console()
    unicode = console.encoding.lower().startswith("utf")
    arrow = "→" if unicode else "->"
    subjects = max(len(check.subject) for check in checks)
    console.print(Text(f"acb {__version__} doctor", "bold"))
    for section in dict.fromkeys(check.section for check in checks):
        console.print()
        console.print(Text(section, "bold"))
        table = Table.grid(padding=(0, 1), expand=False)
        table.add_column(width=2, justify="right", no_wrap=True)
        table.add_column(width=subjects, no_wrap=True)
        table.add_column(overflow="fold")
        for check in checks:
            if check.section == section:
                sign, plain, style = _MARKS[check.mark]
                table.add_row(Text(sign if unicode else plain, style), check.subject, check.text)
                if check.advice:
                    table.add_row("", "", Text(f"{arrow} {check.advice}", "dim" if check.mark == "note" else ""))
        console.print(table)
    console.print()
    sign, plain, style = _MARKS["ok" if usable else "fail"]
    console.print(Text.assemble((sign if unicode else plain, style), " ", (verdict, "bold")))
