"""Whether the driver tier works here, tried once on a throw-away process: no version number tells for sure."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from acb.devices import checkpoint_target
from acb.devices.checkpoint import Checkpointer, Outcome

START, ANSWER, REST = 60.0, 20.0, 10.0
"""Seconds for the process to have its context, to look at its memory, and to come to rest."""

PATIENCE = 5.0
"""Seconds for the room to be free again before the restore."""


@dataclass
class Probe:
    """What came of it. `reason` says in a sentence what failed; `steps` are the outcomes; `seconds` it all took.

    `moved`: bytes by GPU that left it.
    """

    works: bool
    reason: str
    seconds: float = 0.0
    moved: dict[str, int] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the helper's answers."""
        return asdict(self)


def probe(checkpointer: Checkpointer, command: Sequence[str] | None = None) -> Probe:
    """Suspend such a process, resume it and look at its memory. It is killed whatever happens.

    `command` starts it; None: acb.devices.checkpoint_target.
    """
    begun = time.monotonic()
    result = Probe(False, "")
    try:
        with _Target(command or [sys.executable, "-I", "-S", checkpoint_target.__file__]) as target:
            result.reason = _cycle(checkpointer, target, result)
    except OSError as error:
        result.reason = f"the process to try it on does not start: {error}"
    result.works = not result.reason
    if result.works:
        result.reason = "a process was suspended and resumed with its memory intact"
    result.seconds = round(time.monotonic() - begun, 3)
    return result


def _cycle(checkpointer: Checkpointer, target: _Target, result: Probe) -> str:
    """Why it does not work; "" when it does."""
    target.pid = int(target.read(START).partition("pid ")[2] or 0)
    words = target.read(START).split()
    if not target.pid or len(words) != 3 or words[0] != "ready":
        return f"the process to try it on has no GPU memory: {' '.join(words[1:]) or 'it says nothing'}"
    uuid, nbytes = words[1], int(words[2])
    out = _step(result, checkpointer.suspend(target.pid, REST))
    result.moved = dict(out.moved)
    if not out.done:
        return out.reason
    back = _step(result, checkpointer.resume(target.pid, out.moved or {uuid: nbytes}, patience=PATIENCE))
    if not back.done:
        return back.reason
    answer = target.ask(ANSWER)
    if answer != "same":
        return "its memory was not the same afterwards" if answer else "the process did not go on afterwards"
    return ""


def _step(result: Probe, outcome: Outcome) -> Outcome:
    result.steps.append(outcome.as_json())
    return outcome


class _Target:
    """The process, by the pipes to it. `pid` is 0 until it has said it."""

    def __init__(self, command: Sequence[str]) -> None:
        self.pid = 0
        self._unread = b""
        environment = {**os.environ, "ACB_DISABLE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, close_fds=True
        )

    def __enter__(self) -> _Target:
        return self

    def __exit__(self, *_: object) -> None:
        for number in (self.pid, self._process.pid):
            if number and not (number == self._process.pid and self._process.poll() is not None):
                with contextlib.suppress(OSError):
                    os.kill(number, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

    def read(self, patience: float) -> str:
        """Its next line, within so many seconds; "" when it says none, or has ended."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + patience
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return ""
            part = os.read(descriptor, 4096)
            if not part:
                return ""
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode(errors="replace").strip()

    def ask(self, patience: float) -> str:
        """What it says of its memory; "" when it does not answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(b"?\n")
            self._process.stdin.flush()
        return self.read(patience)
