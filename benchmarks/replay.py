"""The programs of benchmarks.throughput: each replays a job's phases on the simulated GPU, and does nothing else.

CPU phases wait; GPU phases keep the simulated GPU busy, which is waiting, too: so sixteen programs fit on two cores and
what is measured is scheduling. A program is an ordinary user of acb's gate with an evacuator of its own. It reads what
to do as one JSON object from stdin, prints ``ready``, begins at ``go`` and prints one JSON object when all have ended.

Each program is a process, forked from this one after its imports, so that no interpreter starts while others are being
measured. It connects to no broker, and touches no GPU, before its first GPU phase.

With a broker a GPU phase is a run of regions, with a safe point between any two. Without one the GPU is time-sliced, as
a real one is between processes: short slices under a lock of the card's, so that two programs that compute at once take
twice as long each.

Clock: time.monotonic(), common to all processes. Waits that take longer than they should are counted as work done.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from acb.client import runtime
from acb.client.evacuation import EvacuationError
from acb.devices.simulated import Card, CardOutOfMemory

REGION = 0.02
"""Seconds: a forward pass or so; longer than the kernel's launches, shorter than any phase."""

SLICE = 0.005
"""Seconds that a program computes before another that computes at the same time has its turn."""


class Memory:
    """What the program has on the GPU, all one block, and the evacuator that moves it at the speed of the bus."""

    name = "replay"

    def __init__(self, directory: Path, nbytes: int) -> None:
        self.nbytes = nbytes
        self.card: Card | None = None
        self._directory = directory
        self._on_host = False

    def bind(self, gpu: int) -> Card:
        """The card of this GPU; another one than before only while nothing lies there."""
        if self.card is None or self.card.ordinal != gpu:
            if self.card is not None:
                self.card.close()
            self.card = Card.open(self._directory, gpu)
        return self.card

    def load(self, card: Card, more_room: Callable[[int], bool]) -> None:
        """The first phase's first act; raises CardOutOfMemory when the broker, too, finds no room."""
        while True:
            try:
                card.allocate(self.nbytes)
            except CardOutOfMemory:
                if not more_room(self.nbytes):
                    raise
            else:
                card.copied(self.nbytes)
                return

    def synchronize(self) -> None:
        pass

    def resident(self) -> int:
        return self.card.held() if self.card else 0

    def peak(self) -> int:
        return self.card.peak() if self.card else 0

    def reset_peak(self) -> None:
        if self.card:
            self.card.reset_peak()

    def evacuate(self) -> int:
        if self.card is None or not self.card.held():
            return 0
        if self._on_host:
            raise EvacuationError("its memory is in two places")
        self.card.copied(self.nbytes)
        self.card.free(self.nbytes)
        self._on_host = True
        return self.nbytes

    def restore(self) -> int:
        if not self._on_host:
            return 0
        card = self.bind(runtime.client().gpu or 0)
        try:
            card.allocate(self.nbytes)
        except CardOutOfMemory as error:
            raise MemoryError(str(error)) from None
        card.copied(self.nbytes)
        self._on_host = False
        return self.nbytes


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
        os.environ["ACB_NAME"] = f"job {number}"
        client = runtime.client()
        assert client.simulated is not None
        self._gate = client.gate
        self._client = client
        self._memory = Memory(client.simulated, wish["memory"])
        self._marked: bool = wish["marked"]
        client.add_evacuator(self._memory)

    def gpu(self, seconds: float) -> None:
        """A GPU phase."""
        while seconds > 0:
            asked = time.monotonic()
            self._gate.enter()
            try:
                got = begin = time.monotonic()
                card = self._memory.bind(self._client.gpu or 0)
                with card.operation("replay"):
                    if not card.held():
                        self._memory.load(card, self._client.more_room)
                        begin = time.monotonic()
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
        # Two locks, so that who has just had the GPU cannot have it again before the next in the queue.
        self._next, self._turn = (
            os.open(directory / f"gpu{gpu}.{name}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC) for name in ("next", "turn")
        )

    def gpu(self, seconds: float) -> None:
        """A GPU phase."""
        if not self._card.held():
            self._memory.load(self._card, lambda missing: False)
        while seconds > 0:
            asked = time.monotonic()
            fcntl.flock(self._next, fcntl.LOCK_EX)
            fcntl.flock(self._turn, fcntl.LOCK_EX)
            fcntl.flock(self._next, fcntl.LOCK_UN)
            got = time.monotonic()
            with self._card.operation("replay"):
                _wait(min(seconds, SLICE))
            left = time.monotonic()
            fcntl.flock(self._turn, fcntl.LOCK_UN)
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
    except runtime.LeaseRefused as refusal:
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
