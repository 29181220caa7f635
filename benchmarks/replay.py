"""The programs of benchmarks.throughput: each replays a job's phases on the simulated GPU, and does nothing else.

CPU phases wait; GPU phases keep the simulated GPU busy, which is waiting, too: so sixteen programs fit on two cores and
what is measured is scheduling. A program is an ordinary user of acb's gate with an evacuator of its own. It reads what
to do as one JSON object from stdin, prints ``ready``, begins at ``go`` and prints one JSON object when all have ended.

Each program is a process, forked from this one after its imports, so that no interpreter starts while others are being
measured. It connects to no broker, and touches no GPU, before its first GPU phase.

With a broker a GPU phase is a run of regions, with a safe point between any two. Without one the GPU is time-sliced, as
a real one is between processes: short slices under a lock of the card's, so that two programs that compute at once take
twice as long each. (Regions are under the same lock, in case a policy lets several programs in.)

Clock: time.monotonic(), common to all processes. Waits that take longer than they should are counted as work done.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acb.client import runtime
from acb.client.refusal import LeaseRefused
from acb.devices.simulated import CardOutOfMemory
from benchmarks.replay_card import Memory, Turn

REGION = 0.02
"""Seconds: a forward pass or so; longer than the kernel's launches, shorter than any phase."""

SLICE = 0.005
"""Seconds that a program computes before another that computes at the same time has its turn."""


class Uses:
    """When a program has asked for the GPU, got it and let it go, each in seconds of time.monotonic()."""

    JOIN = 0.0002
    """Seconds: what is closer together than this is one use."""

    def __init__(self) -> None:
        self.found: list[list[float]] = []

    def add(self, asked: float, got: float, left: float) -> None:
        """One region, or one slice."""
        if self.found and got - self.found[-1][2] < self.JOIN:
            self.found[-1][2] = left
        else:
            self.found.append([asked, got, left])


class Brokered:
    """How a program under acb computes."""

    def __init__(self, wish: dict[str, Any], number: int) -> None:
        self.uses = Uses()
        os.environ["ACB_NAME"] = "replay"  # one program on many inputs, as in life
        client = runtime.client()
        assert client.simulated is not None
        self._gate = client.gate
        self._client = client
        self._memory = Memory(client.simulated, wish["memory"])
        self._turns: dict[int, Turn] = {}
        self._marked: bool = wish["marked"]
        client.add_evacuator(self._memory)

    def gpu(self, seconds: float) -> None:
        """A GPU phase."""
        while seconds > 0:
            asked = time.monotonic()
            self._gate.enter()
            try:
                got = time.monotonic()
                card = self._memory.bind(self._client.gpu or 0)
                if not card.held():
                    self._memory.load(card, self._client.more_room)
                if card.ordinal not in self._turns:
                    self._turns[card.ordinal] = Turn(card.path.parent, card.ordinal)
                with self._turns[card.ordinal]:
                    begin = time.monotonic()
                    with card.operation("replay"):
                        _wait(min(seconds, REGION))
                    left = time.monotonic()
            finally:
                self._gate.exit()
            seconds -= left - begin
            self.uses.add(asked, got, left)

    @property
    def ordinal(self) -> int:
        """The GPU that was used last."""
        return self._memory.card.ordinal if self._memory.card else -1

    def cpu(self, seconds: float) -> float:
        """A CPU phase; marked, it counts as a wait for a child process (acb.hooks.stdlib). How long it was late."""
        if self._marked:
            self._gate.mark()
        late = _wait(seconds)
        if self._marked:
            self._gate.unmark()
        return late


class TimeSliced:
    """How a program computes without a broker: on the GPU it is told to use, in turn with whoever else is there."""

    def __init__(self, wish: dict[str, Any], number: int) -> None:
        self.uses = Uses()
        directory = Path(wish["cards"])
        self.ordinal = gpu = number % wish["gpus"]
        self._memory = Memory(directory, wish["memory"])
        self._card = self._memory.bind(gpu)
        self._turn = Turn(directory, gpu)

    def gpu(self, seconds: float) -> None:
        """A GPU phase."""
        if not self._card.held():
            self._memory.load(self._card, lambda missing: False)
        while seconds > 0:
            asked = time.monotonic()
            with self._turn:
                got = time.monotonic()
                with self._card.operation("replay"):
                    _wait(min(seconds, SLICE))
                left = time.monotonic()
            seconds -= left - got
            self.uses.add(asked, got, left)

    def cpu(self, seconds: float) -> float:
        """A CPU phase; how long it was late."""
        return _wait(seconds)


def _wait(seconds: float) -> float:
    """By a call that no hook takes for the program's own sleeping; how much longer it took, in seconds."""
    if seconds <= 0:
        return -seconds
    begin = time.monotonic()
    select.select([], [], [], seconds)
    return time.monotonic() - begin - seconds


def program(how: Brokered | TimeSliced, job: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Replay one job; how it ended, and when. Ends early when nobody is there any more to be told."""
    outcome, parent = "finished", os.getppid()
    late = 0.0  # seconds that CPU phases took too long, made up for in the next: they are the kernel's doing
    try:
        for kind, seconds in job:
            if os.getppid() != parent:
                break
            if kind == "gpu":
                how.gpu(seconds)
            else:
                late = how.cpu(seconds - late)
    except CardOutOfMemory:
        outcome = "out of memory"
    except LeaseRefused as refusal:
        outcome = f"refused: {refusal}"
    end = time.monotonic()
    return {
        "outcome": outcome,
        "end_t": end,
        "gpu": how.ordinal,
        "uses": how.uses.found,
        "processor_s": time.process_time(),
    }


def main() -> int:
    """All programs of one scene; see the module."""
    wish: dict[str, Any] = json.loads(sys.stdin.readline())
    start_read, start_write = os.pipe()
    children = []
    for number in range(len(wish["jobs"])):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            _child(wish, number, start_read, start_write, write)
        os.close(write)
        children.append((pid, read))
    for _, read in children:
        os.read(read, 1)  # it is ready, too
    print("ready", flush=True)
    if sys.stdin.readline() != "go\n":
        return 1  # whoever started us is gone; the children see the closed pipe, and what they print nobody reads
    go = time.monotonic()
    os.write(start_write, b"g" * len(children))
    told = []
    for pid, read in children:
        with open(read) as stream:
            text = stream.read()
        os.waitpid(pid, 0)
        told.append(json.loads(text) if text else {"outcome": "failed", "end_t": time.monotonic()})
    print(json.dumps({"go_t": go, "programs": told}), flush=True)
    return 0


def _child(wish: dict[str, Any], number: int, start: int, others: int, report: int) -> None:
    """Never returns."""
    status = 1
    try:
        os.close(others)
        how = Brokered(wish, number) if wish["broker"] else TimeSliced(wish, number)
        os.write(report, b"\n")
        if os.read(start, 1):
            text = json.dumps(program(how, wish["jobs"][number]))
            with contextlib.suppress(BrokenPipeError), open(report, "w") as stream:
                stream.write(text)
            status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)  # the kernel closes the connection: lease and memory are free


if __name__ == "__main__":
    sys.exit(main())
