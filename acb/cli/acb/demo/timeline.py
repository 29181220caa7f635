"""A picture of who used the GPU when, drawn from a trace: one row a program."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

COLOURS = {
    "GPU phase": "#2a9d4a",
    "lease kept, idle": "#b7e0c1",
    "waiting for the GPU": "#f2b134",
    "evacuation": "#b5179e",
    "restoring": "#7209b7",
    "on the CPU": "#d9dde3",
}
_KINDS = {
    "running": "GPU phase",
    "idle": "lease kept, idle",
    "waiting": "waiting for the GPU",
    "evacuating": "evacuation",
    "restoring": "restoring",
}


class Span(NamedTuple):
    """What a process did from `begin` to `end`, in seconds of the trace's clock."""

    pid: int
    kind: str
    begin: float
    end: float


def spans(lines: Iterable[str], start: float, ends: Mapping[int, float]) -> list[Span]:
    """The spans in a trace's lines, for the processes that began at `start` and ended as `ends` says.

    A process is on the CPU where its trace says nothing of the GPU.
    """
    by_pid: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        try:
            event = json.loads(line)
            by_pid.setdefault(int(event["pid"]), []).append(event)
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a process that was killed
    found: list[Span] = []
    for pid, events in by_pid.items():
        if pid not in ends:
            continue  # a child of a program's
        end = ends[pid]
        events.sort(key=lambda event: event["t"])
        found.append(Span(pid, "on the CPU", start, max(start, events[0]["t"])))
        for event, after in zip(events, [*events[1:], {"t": end}], strict=True):
            kind = _KINDS.get(event["state"], "on the CPU")
            if after["t"] > event["t"]:
                found.append(Span(pid, kind, event["t"], min(end, after["t"])))
    return found


def draw(out: Path, summary: dict[str, Any], title: str) -> Path:
    """Draw ``timeline.png`` from the trace in `out`; its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    begin, end = summary["trace"]["start_t"], summary["trace"]["end_t"]
    ends = {process["pid"]: process["end_t"] for process in summary["processes"]}
    found = spans((out / summary["trace"]["file"]).read_text().splitlines(), begin, ends)
    rows = {process["pid"]: process["name"] for process in summary["processes"]}
    figure, axes = pyplot.subplots(figsize=(11, 1.7 + 0.55 * len(rows)))
    for row, pid in enumerate(rows):
        for kind in COLOURS:
            bars = [(s.begin - begin, s.end - s.begin) for s in found if s.pid == pid and s.kind == kind]
            axes.broken_barh(bars, (row - 0.36, 0.72), facecolors=COLOURS[kind])
    axes.set_yticks(range(len(rows)), list(rows.values()))
    axes.invert_yaxis()
    axes.set_xlim(0, end - begin)
    axes.set_xlabel("seconds")
    axes.set_title(f"{title}, with acb", loc="left", fontsize=11)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(
        handles=[Patch(color=colour, label=kind) for kind, colour in COLOURS.items()],
        loc="lower center",
        ncols=len(COLOURS),
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    path = out / "timeline.png"
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
