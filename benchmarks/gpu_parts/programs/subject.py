"""A program that obeys: one JSON array a line on stdin, [method, argument, …]; one JSON object a line on stdout."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


def serve(subject: Any) -> None:
    """Obey until stdin ends."""
    stdout, sys.stdout = sys.stdout, sys.stderr  # for us alone, whatever a framework prints
    print(json.dumps({"ready": os.getpid()}), file=stdout, flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"done": name, "result": getattr(subject, name)(*arguments)}
        except Exception as error:
            answer = {"failed": name, "kind": type(error).__name__, "message": str(error)[:2000]}
        print(json.dumps(answer), file=stdout, flush=True)


def make(mark: str) -> None:
    """Make a mark: a file by which the one who started this process sees that it has come to a certain point."""
    with open(mark, "x"):
        pass


def stand(mark: str) -> None:
    """Make a mark, and wait until it is gone."""
    make(mark)
    while os.path.exists(mark):
        pause()


def pause() -> None:
    """For a moment, by a call that no hook of acb's takes for the end of a phase."""
    threading.Event().wait(0.002)


class Moving:
    """Evacuation from inside, as acb's agent does it: on a thread of its own, between operations."""

    def __init__(self, make: Callable[[], Any]) -> None:
        """`make`: an evacuator, for a process that is not under a broker."""
        self._make = make
        self._evacuators: list[Any] = []

    def evacuators(self) -> list[Any]:
        """Those that the hooks have made, or else one made now."""
        if not self._evacuators:
            if os.environ.get("ACB_SOCKET"):
                from acb.client import runtime

                self._evacuators = runtime.client().evacuators
            else:
                self._evacuators = [self._make()]
        return self._evacuators

    def evacuate(self) -> dict[str, Any]:
        """`moved` bytes in `seconds`; or `refused`, with the reason."""
        from acb.client.evacuation import EvacuationError, evacuate_all

        def work() -> dict[str, Any]:
            begun = time.perf_counter()
            try:
                moved = sum(evacuate_all(self.evacuators()))
            except EvacuationError as error:
                return {"refused": str(error)}
            return {"moved": moved, "seconds": time.perf_counter() - begun}

        return on_a_thread(work)

    def restore(self) -> dict[str, Any]:
        """`moved` bytes in `seconds`."""

        def work() -> dict[str, Any]:
            begun = time.perf_counter()
            moved = sum(evacuator.restore() for evacuator in self.evacuators())
            return {"moved": moved, "seconds": time.perf_counter() - begun}

        return on_a_thread(work)


def on_a_thread(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Its result. The thread's name is one of acb's own, which no gate stops."""
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(work()), name="acb-benchmark")
    thread.start()
    thread.join()
    if not found:
        raise RuntimeError("evacuation failed; see stderr")
    return found[0]
