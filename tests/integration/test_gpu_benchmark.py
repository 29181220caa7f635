"""What benchmarks.gpu makes of parts that fail, crash, hang or are cut off: stand-ins play them, each in a moment."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broker_harness import wait_until

from benchmarks import gpu
from benchmarks.gpu_parts import Entry
from benchmarks.gpu_parts.playing import GRACE

HARNESS = Path(__file__).parents[1] / "harness"


class Outcome:
    """Of a run: its status, what it has printed, and the parts in its file."""

    def __init__(self, status: int, printed: str, out: Path) -> None:
        self.status, self.printed, self.out = status, printed, out
        [file] = out.glob("*.json")
        self.parts: dict[str, Any] = json.loads(file.read_text())["parts"]

    def said(self, name: str) -> tuple[str, str]:
        """A part's status and reason."""
        return self.parts[name]["status"], self.parts[name]["reason"]

    def log(self, name: str) -> str:
        """What a part has left in its log."""
        return (self.out / f"{name}.log").read_text()


Play = Callable[..., Outcome]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Play:
    """Play stand-in parts by their names, each with so many seconds."""
    monkeypatch.setenv("PYTHONPATH", str(HARNESS))
    monkeypatch.setenv("STANDIN_FILE", str(tmp_path / "pid"))

    def run(*names: str, limit: float = 30, left: float = 60) -> Outcome:
        parts = {name: Entry("standin_part", f"one that {name}", (), limit / gpu.PATIENCE, 0) for name in names}
        monkeypatch.setattr(gpu, "PARTS", parts)
        status = gpu.main(["--simulate", "--out", str(tmp_path / "out"), "--only", ",".join(names),
                           "--limit", str(left)])  # fmt: skip
        return Outcome(status, capsys.readouterr().out, tmp_path / "out")

    return run


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("fails", "done", ""),
        ("crashes", "failed", "RuntimeError: [/broken]"),
        ("dies", "failed", 'ended with status -11, after "it begins"; see '),
    ],
)
def test_what_is_wrong_in_one_part_is_told_and_stops_no_other(play: Play, name: str, status: str, reason: str) -> None:
    outcome = play(name, "skips")
    assert outcome.status == 1
    assert outcome.said(name)[0] == status
    assert outcome.said(name)[1].startswith(reason)
    assert outcome.said("skips") == ("skipped", "there is nothing to do")
    kinds = {row["question"]: row["kind"] for row in outcome.parts[name]["rows"]}
    assert kinds == {"it begins": "passed"} | ({"one is two": "failed"} if name == "fails" else {})
    assert "missed" in outcome.printed


def test_nothing_wrong_is_status_0(play: Play) -> None:
    outcome = play("passes", "skips")
    assert outcome.status == 0
    assert {row["kind"] for part in outcome.parts.values() for row in part["rows"]} == {"passed", "measured"}


def test_every_remark_is_told_as_it_is(play: Play) -> None:
    """None is taken for markup."""
    outcome = play("passes")
    assert outcome.status == 0
    assert {"[/tmp/x]", "[gpu:0]"} <= set(outcome.printed.split())


def test_a_program_s_last_words_are_kept_when_its_part_breaks(play: Play) -> None:
    outcome = play("crashes")
    assert outcome.said("crashes") == ("failed", "RuntimeError: [/broken]")
    assert "--- 1-program.txt\nwhat the program has said\n" in outcome.log("crashes")


def test_a_part_that_hangs_is_ended_with_all_that_it_has_started(play: Play, tmp_path: Path) -> None:
    outcome = play("hangs", "passes", limit=3, left=5)
    status, reason = outcome.said("hangs")
    assert (status, outcome.status) == ("failed", 1)
    assert reason.startswith('not done within 3 s, after "it begins"; see ')
    assert "--- 1-program.txt\nI lie here\n" in outcome.log("hangs")
    assert outcome.said("passes") == ("done", "")
    assert ended(tmp_path)


def test_a_part_that_had_less_time_than_it_may_need_is_no_failure(play: Play) -> None:
    outcome = play("hangs", left=1)
    status, reason = outcome.said("hangs")
    assert (status, outcome.status) == ("skipped", 0)
    assert reason.startswith("too little time was left, 1 s: not done within 1 s")


def test_a_part_has_the_time_that_no_later_one_needs(play: Play) -> None:
    """Of 60 s: but for what the other may need, and what is kept to end it."""
    first = play("measures", "passes", limit=20).parts["measures"]["figures"]["left"]
    assert 20 < first <= 60 - 20 - GRACE


def test_what_a_part_has_stopped_goes_on_when_the_part_is_killed(play: Play, tmp_path: Path) -> None:
    outcome = play("stops")
    assert outcome.said("stops")[1].startswith("ended with status -9")
    wait_until("it to go on", (tmp_path / "pid").exists)


def ended(tmp_path: Path) -> bool:
    """Whether the program of the part that hangs has."""
    pid = int((tmp_path / "pid").read_text())
    return wait_until("the program's end", lambda: not alive(pid))


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_and_loses_nothing(play: Play, tmp_path: Path, number: int) -> None:
    """Sent when the second part has started its program; the file of the first is there by then."""
    seen: list[bool] = []

    def send() -> None:
        wait_until("the program", (tmp_path / "pid").exists)
        [file] = (tmp_path / "out").glob("*.json")
        seen.append(list(json.loads(file.read_text())["parts"]) == ["passes"])
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    before = signal.getsignal(number)
    outcome = play("passes", "hangs", "skips")
    thread.join()
    why = f"stopped by {signal.Signals(number).name}"
    assert seen == [True]
    assert outcome.status == 128 + number
    assert [outcome.said(name) for name in outcome.parts] == [("done", ""), ("stopped", why), ("skipped", why)]
    assert [row["question"] for row in outcome.parts["hangs"]["rows"]] == ["it begins"]
    assert why in " ".join(outcome.printed.split())
    assert ended(tmp_path)
    assert signal.getsignal(number) is before


def test_sockets_have_short_paths_wherever_temporary_files_lie(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / ("x" * 70)
    home.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    outcome = play("listens")
    assert outcome.said("listens") == ("done", "")
    assert outcome.status == 0, outcome.log("listens")
