"""One part of benchmarks.gpu in a process of its own, with a time limit, and with nothing left behind when it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from acb.cli.signals import Signals
from benchmarks import report
from benchmarks.gpu_parts import Entry

SHORT = 60
"""Bytes of the path of a directory beneath which a stage's socket has a path that Linux accepts: 107."""

GRACE = 3.0
"""Seconds before its end that a part is told of as its deadline."""

STOPPED = "stopped.pid"
"""A stage's file with the process id of what has been stopped."""

TAIL = 4000
"""Bytes of the end of each program's log that are kept."""


def empty(name: str, status: str, reason: str) -> dict[str, Any]:
    """What is said of a part that has told nothing."""
    return {"name": name, "rows": [], "figures": {}, "seconds": 0.0, "status": status, "reason": reason}


def play(name: str, entry: Entry, settings: dict[str, Any], limit: float, log: Path, stop: Signals) -> dict[str, Any]:
    """What its file says when it has ended: {name, status, reason, rows, figures, seconds}; see part.Part.

    `settings` are a part's (see part.Settings) but for the deadline. A part that does not end within `limit` seconds,
    or before a signal comes, is killed with all that it has started; what it had told till then counts. That is a
    failure when it had all the time that it may need, `entry.limit`, and no verdict when it had less. What it and its
    programs have said is in `log`.
    """
    begun = time.time()
    deadline = begun + limit - GRACE
    arguments = json.dumps(settings | {"deadline": deadline})
    with scratch() as directory, log.open("wb") as stream:
        file = directory / "part.json"
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_parts", name, entry.module, arguments, str(file)],
            cwd=report.ROOT, env={**os.environ, "TMPDIR": str(directory)}, stdout=stream, stderr=stream,
            start_new_session=True,
        )  # fmt: skip
        try:
            _end(process, begun + limit, stop)
            late = time.time() >= deadline
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            go_on(directory)
            process.wait()
        result = json.loads(file.read_text()) if file.exists() else empty(name, "running", "")
        if result["status"] == "running":
            stream.write(said(directory).encode())  # which a part that comes to its end has written itself
            result |= _cut(result, process.returncode, limit if late else None, log, stop)
        if result["status"] == "failed" and late and limit < entry.limit:
            result |= {"status": "skipped", "reason": f"too little time was left, {limit:.0f} s: {result['reason']}"}
    return {**result, "seconds": round(time.time() - begun, 1)}


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory for a part and its stages: in the user's own, unless sockets in it would have too long a path."""
    home = tempfile.gettempdir()
    if len(os.fsencode(home)) > SHORT:
        home = "/tmp"
    with tempfile.TemporaryDirectory(prefix="acb-gpu-", dir=home, ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def go_on(directory: Path) -> None:
    """Whoever has been stopped (SIGSTOP) by a part whose stages are beneath: a broker's helper, in a group of its own,
    which ends by itself then."""
    for file in directory.glob(f"**/{STOPPED}"):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(file.read_text()), signal.SIGCONT)
        file.unlink(missing_ok=True)


def said(directory: Path) -> str:
    """The end of each log of the stages beneath."""
    found = []
    for log in sorted(directory.glob("**/*.txt")):
        with contextlib.suppress(OSError):
            text = log.read_bytes()[-TAIL:].decode(errors="replace").strip()
            found += [f"--- {log.name}\n{text}\n"] if text else []
    return "".join(found)


def _end(process: subprocess.Popen[bytes], deadline: float, stop: Signals) -> None:
    """Wait until it has ended, the deadline is over, or a signal has come."""
    while not stop.number and time.time() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            return


def _cut(result: dict[str, Any], status: int, limit: float | None, log: Path, stop: Signals) -> dict[str, str]:
    """Of a part that has not come to its end."""
    if stop.number:
        return {"status": "stopped", "reason": stop.reason}
    why = f"ended with status {status}" if limit is None else f"not done within {limit:.0f} s"
    after = f', after "{result["rows"][-1]["question"]}"' if result["rows"] else ""
    return {"status": "failed", "reason": f"{why}{after}; see {log}"}
