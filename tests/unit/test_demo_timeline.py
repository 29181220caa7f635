"""The timeline of the demo: spans from a trace, and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from acb.cli.acb.demo.timeline import Span, draw, spans


def _line(t: float, state: str, pid: int = 7) -> str:
    return json.dumps({"t": t, "pid": pid, "state": state})


def test_a_trace_becomes_spans_with_the_cpu_before_between_and_after() -> None:
    lines = [
        _line(13.0, "running"),
        _line(12.0, "waiting"),
        _line(14.0, "evacuated"),
        _line(15.0, "running", pid=8),
        "{",
    ]
    assert spans(lines, 10.0, {7: 20.0, 8: 16.0}) == [
        Span(7, "on the CPU", 10.0, 12.0),
        Span(7, "waiting for the GPU", 12.0, 13.0),
        Span(7, "GPU phase", 13.0, 14.0),
        Span(7, "on the CPU", 14.0, 20.0),
        Span(8, "on the CPU", 10.0, 15.0),
        Span(8, "GPU phase", 15.0, 16.0),
    ]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "trace.jsonl").write_text(_line(1.0, "running") + "\n")
    summary = {
        "trace": {"file": "trace.jsonl", "start_t": 0.0, "end_t": 2.0},
        "processes": [{"pid": 7, "name": "fold 1", "end_t": 2.0}],
    }
    picture = draw(tmp_path, summary, "a title")
    assert picture.read_bytes().startswith(b"\x89PNG")
