"""The process's client: one gate, one agent, the evacuators of the frameworks in use. Made on first call of client().

Nothing is connected, and no thread is started, before the program's first GPU entry: until then it costs no GPU
anything.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from acb.client.evacuation import Evacuator

from acb.client import visible, wishes
from acb.client.gate import Gate


class Client:
    """This process, as the broker will know it."""

    def __init__(self) -> None:
        from acb.client.agent import Agent

        simulated = os.environ.get("ACB_SIMULATED")
        self.gating = os.environ.get("ACB_BROKER") != "off" and bool(simulated or not _out_of_reach())
        self.simulated = Path(simulated) if simulated else None
        if simulated:
            from acb.devices import simulated_folder

            simulated_folder.enter_given(os.environ)
            _at_end[:] = [simulated_folder.leave_all]
        self.evacuators: list[Evacuator] = []
        self.agent = Agent(self.evacuators, name=_program_name(), simulated=self.simulated is not None)
        self.gate = Gate(self.agent.ask, self.agent.idle, self.agent.listen)
        self.agent.gate = self.gate
        self.outside = self.agent.outside
        if not self.gating:
            self.gate.open()

    @property
    def gpu(self) -> int | None:
        """The ordinal of the GPU that this process is bound to; None before the first lease."""
        return self.agent.gpu if self.gating else 0

    @property
    def gpus(self) -> tuple[int, ...]:
        """The ordinals of the GPUs behind ``cuda:0``, ``cuda:1`` and so on of this program; empty before the first
        lease."""
        return self.agent.gpus if self.gating else tuple(range(self.count))

    @property
    def count(self) -> int:
        """How many GPUs the program sees: one, unless it asked for more or is one of several that run together."""
        if self.gating and self.agent.gpus:
            return len(self.agent.gpus)
        return wishes.visible_gpus()

    @property
    def bound(self) -> bool:
        """Whether it is known which GPUs the program sees."""
        return not self.gating or bool(self.agent.gpus) or self.agent.lease

    def add_evacuator(self, evacuator: Evacuator) -> None:
        """Let the agent move this framework's memory."""
        self.evacuators.append(evacuator)

    @property
    def beside(self) -> int:
        """Bytes of others' memory on the GPU that could make way when this program runs short."""
        return self.agent.beside if self.gating else 0

    def more_room(self, nbytes: int) -> bool:
        """Inside a region: ask for `nbytes` beyond what is held now. True: it is there, try again."""
        return self.gating and self.agent.more_room(nbytes)


_client: Client | None = None
_making = threading.Lock()
_after_fork: list[Callable[[], None]] = []
_at_end: list[Callable[[], None]] = []
_warned: set[str] = set()


def client() -> Client:
    """The client of this process."""
    global _client
    if _client is None:
        with _making:
            if _client is None:
                _client = Client()
    return _client


def after_fork(callback: Callable[[], None]) -> None:
    """Call `callback()` in every forked child, before the program goes on there. It must not lock, nor log."""
    _after_fork.append(callback)


def _forget() -> None:
    """In a forked child: it is another process, which holds nothing. The parent's connection must not live on here."""
    global _client, _making
    parents, _client, _making = _client, None, threading.Lock()
    if parents is not None:
        parents.agent.abandon()
    for callback in _after_fork:
        callback()


os.register_at_fork(after_in_child=_forget)


def _finish() -> None:
    """At the interpreter's end, while its threads still run."""
    if _client is not None:
        _client.agent.finish()
    for last in _at_end:  # in a forked child, too, which has no client of its own
        last()


atexit.register(_finish)


def warn_once(key: str, message: str, *, error: bool = False) -> None:
    """One line on stderr, once a process for each key; with ``ACB_QUIET=1`` only an `error`: what was asked for is not
    done."""
    if key in _warned:
        return
    _warned.add(key)
    if os.environ.get("ACB_QUIET") == "1" and not error:
        return
    try:
        print(f"acb: {message}", file=sys.stderr, flush=True)  # noqa: T201 - the one place that talks to the person
    except (OSError, ValueError, AttributeError):
        pass  # the program has closed its stderr


def _out_of_reach() -> bool:
    """Whether the program's environment leaves it no GPU of the broker's."""
    if visible.hidden():
        return True
    if visible.foreign():
        warn_once(
            "foreign",
            f"CUDA_VISIBLE_DEVICES={visible.users()} names no GPU that the broker lends, so process {os.getpid()} runs "
            f"there without acb; unset it to let the broker choose",
        )
        return True
    return False


def _program_name() -> str:
    """What ``acb-launch --name`` said, else the program's file name."""
    name = os.environ.get("ACB_NAME") or os.path.basename(
        sys.argv[0] if sys.argv and sys.argv[0] not in ("", "-c") else ""
    )
    return (name or "python")[:64].encode("utf-8", "replace").decode()
