"""The tables of ``gpu_assigner status`` at every width: whole figures, or none."""

from __future__ import annotations

import re

import pytest

from acb.cli.gpu_assigner import table
from acb.cli.gpu_assigner.table import Column

PROGRAMS = [
    Column("process", 0, ["19133", "4194304"]),
    Column(
        "program", 2, ["a_program_of_a_long_name.py", "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 20], left=True, is_name=True
    ),
    Column("state", 1, ["running", "evacuated"], left=True),
    Column("GPU", 3, ["0", "0,1"]),
    Column("resident", 4, ["300MiB", "-"]),
    Column("peak", 5, ["300MiB", "1.5GiB"]),
]
GPUS = [
    Column("GPU", 0, ["0"]),
    Column("memory", 2, ["512MiB"]),
    Column("held by", 1, [", ".join(["4194304"] * 40)], left=True, is_list=True),
]


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("width", [*range(1, 101), 200])
def test_no_figure_is_cut_at_any_width(width: int, unicode: bool) -> None:
    blank, heading, rule, *rows = table.lines(PROGRAMS, width, unicode=unicode)
    assert blank == ""
    shown = heading.split()
    assert shown[0] == "process"
    if len(rows) == 3:
        note = rows.pop()
        assert {*shown, *note.removeprefix("(no room for: ").rstrip(")").split(", ")} == {c.heading for c in PROGRAMS}
    else:
        assert shown == [column.heading for column in PROGRAMS]
    for number, row in enumerate(rows):
        cells = dict(zip(shown, row.split(), strict=True))
        for column in PROGRAMS:
            if column.heading in cells and not column.is_name:
                assert cells[column.heading] == column.cells[number]
    if width > len("evacuated") + len("process") + 2:
        assert "state" in shown
        assert max(map(table.cells, (heading, rule, *rows))) <= width + 1
    if not unicode:
        assert rule.strip().strip("-") == ""
        assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(rows)


def test_room_goes_to_the_name() -> None:
    widths = [table.cells(next(iter(re.findall(r"a_prog\S*", "".join(table.lines(PROGRAMS, width, unicode=True)))), ""))
              for width in range(60, 90)]  # fmt: skip
    assert widths == sorted(widths)
    assert widths[-1] == len("a_program_of_a_long_name.py")


def test_a_long_list_of_holders_takes_no_other_column_away() -> None:
    _, heading, _, row = table.lines(GPUS, 40, unicode=True)
    assert heading.split() == ["GPU", "memory", "held", "by"]
    assert row.count("4194304") == 40
