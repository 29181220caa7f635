"""Tables for a terminal of any width: columns are left out, and names cut short, but never a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple
from unicodedata import combining, east_asian_width

GAP = 2
"""Spaces between columns."""

LEAST_NAME = 7
"""To so many columns a name may be cut."""


def cells(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


class Column(NamedTuple):
    """A heading and what stands below it. `rank`: where there is no room for all, the highest is left out first."""

    heading: str
    rank: int
    cells: Sequence[str]
    left: bool = False
    is_name: bool = False
    is_list: bool = False  # the last column only: what is too long the terminal breaks

    def needs(self) -> int:
        """The width that shows all of it."""
        return max(map(cells, (self.heading, *self.cells)))

    def least(self) -> int:
        """The width that it cannot do without."""
        loose = self.is_name or self.is_list
        return min(self.needs(), max(LEAST_NAME, cells(self.heading))) if loose else self.needs()


def fitting(columns: Sequence[Column], width: int) -> tuple[list[Column], list[Column]]:
    """The columns that there is room for, at least one, and those left out."""
    shown = list(columns)
    while len(shown) > 1 and _total(column.least() for column in shown) > width:
        shown.remove(max(shown, key=lambda column: column.rank))
    return shown, [column for column in columns if column not in shown]


def lines(columns: Sequence[Column], width: int, *, unicode: bool) -> Iterator[str]:
    """The table of the columns that fit, with an empty line before it."""
    shown, left_out = fitting(columns, width)
    spare = width - _total(column.least() for column in shown)
    widths = [min(column.needs(), column.least() + max(0, spare)) for column in shown]
    dots, dash = ("\N{HORIZONTAL ELLIPSIS}", "\N{BOX DRAWINGS LIGHT HORIZONTAL}") if unicode else ("...", "-")
    yield ""
    rule = " " + dash * _total(widths)
    for row in zip(*((column.heading, *column.cells) for column in shown), strict=True):
        placed = [_place(*one, dots) for one in zip(row, shown, widths, strict=True)]
        yield (" " + (" " * GAP).join(placed)).rstrip()
        if rule:
            yield rule
            rule = ""
    if left_out:
        names = ", ".join(column.heading for column in left_out)
        yield f"(no room for: {names})"


def _total(widths: Iterator[int] | Sequence[int]) -> int:
    listed = list(widths)
    return sum(listed) + GAP * (len(listed) - 1)


def _place(cell: str, column: Column, width: int, dots: str) -> str:
    """The cell in so many columns."""
    if cells(cell) > width and not column.is_list:
        while cells(cell) > width - len(dots):
            cell = cell[:-1]
        cell = cell.rstrip() + dots
    blanks = " " * (width - cells(cell))
    return cell + blanks if column.left else blanks + cell
