"""The trace: whole JSON lines, from several processes at once, and no harm when it cannot be written."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import time
from pathlib import Path

import pytest

from acb.client import runtime
from acb.client.trace import Trace


@pytest.fixture(autouse=True)
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_warned", set())
    monkeypatch.delenv("ACB_QUIET", raising=False)


def test_every_change_is_a_line(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    trace = Trace(str(file), "a \N{SNOWMAN} name")
    assert trace.state == "detached"
    earlier = time.monotonic() - 5
    trace.change("waiting", "GPU entry")
    trace.change("running", "granted", gpu=0, bytes=5)
    trace.change("idle", "no region", at=earlier)
    trace.close()
    trace.change("resident", "after its end")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["state"], line["cause"]) for line in lines] == [
        ("waiting", "GPU entry"),
        ("running", "granted"),
        ("idle", "no region"),
    ]
    assert all((line["pid"], line["name"]) == (os.getpid(), "a \N{SNOWMAN} name") for line in lines)
    assert (lines[1]["gpu"], lines[1]["bytes"]) == (0, 5)
    assert lines[2]["t"] == pytest.approx(earlier, abs=1e-5)
    assert abs((time.time() - time.monotonic()) - (lines[2]["time"] - lines[2]["t"])) < 1
    assert trace.state == "resident"


def test_without_a_path_it_only_knows_the_state() -> None:
    for path in (None, ""):
        trace = Trace(path, "x")
        assert not trace.enabled
        trace.change("waiting", "GPU entry")
        assert trace.state == "waiting"


def test_processes_append_to_one_file(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    children = []
    for number in range(4):
        if not (pid := os.fork()):
            trace = Trace(str(file), f"p{number}")
            for count in range(200):
                trace.change("running", "x" * 300, count=count)
            os._exit(0)
        children.append(pid)
    for pid in children:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 800
    for pid in children:
        assert [line["count"] for line in lines if line["pid"] == pid] == list(range(200))


def test_what_cannot_be_opened_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        trace = Trace(str(tmp_path / "missing" / "trace"), "x")
        assert not trace.enabled
        trace.change("waiting", "GPU entry")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "no trace is written" in captured.err


@pytest.mark.skipif(
    not stat.S_ISCHR(os.stat("/dev/null").st_mode) or not os.path.exists("/dev/full"), reason="no /dev/full"
)
@pytest.mark.parametrize("quiet", ["0", "1"])
def test_a_full_disk_ends_the_trace_and_nothing_else(
    quiet: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACB_QUIET", quiet)
    trace = Trace("/dev/full", "x")
    for state in ("waiting", "running", "idle"):
        trace.change(state, "whatever")
    assert trace.state == "idle"
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "the trace /dev/full ends too early" in captured.err
    assert "at the state waiting: No space left on device" in captured.err
    trace.close()


def test_a_line_that_is_cut_short_is_the_last_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk with room for a part of a line takes that, without an error."""
    file = tmp_path / "trace"
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    trace = Trace(str(file), "x")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
        for state in ("waiting", "running", "idle"):
            trace.change(state, "whatever")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        trace.close()
    assert len(file.read_bytes()) == 50
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "at the state waiting: No space left on device" in captured.err
