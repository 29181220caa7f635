"""The server's end of the driver tier: the core's Suspend and Resume become requests to the checkpoint helper.

    tier = DriverTier(journal)                          # starts nothing before the first suspend()
    tier.suspend(client_id, pid, nbytes, needs); poller.register(tier, select.EPOLLIN)
    for done in tier.done(): ...                        # when that is readable, or due() has come

Whether it works here is tried first, once, on a throw-away process. Who is suspended stands in the journal from before
the driver is asked: should the broker die, the next one must know of programs that are stopped.

A helper may die, or hang, in the middle of it. What has become of the process is then asked for until somebody knows:
it may be stopped in the driver, and may have its memory on the GPU or on the host. An attempt that has ended before the
driver was asked for anything but the process's state has changed nothing. A process that was suspended, and that the
driver does not know any more, has lost its memory.
"""

from __future__ import annotations

import heapq
import itertools
import os
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from acb import hostmemory
from acb.broker.checkpointing import Helper
from acb.broker.journal import Journal, Suspended
from acb.broker.log import log
from acb.broker.migration import gpu_map
from acb.devices.checkpoint import Outcome
from acb.devices.checkpoint_probe import Probe
from acb.devices.rooms import CONTEXT

Op = Literal["suspend", "resume", "find"]

REST = 5.0
"""Seconds in which a process without a lease must come to rest: it should have no work queued at all."""

DEADLINE, RATE = 30.0, 1 << 30
"""Seconds, and bytes a second, that a request is given: a helper that is ended in the midst may cost the program."""

PROBE_DEADLINE = 120.0
"""Seconds for the throw-away process."""

ROOM = 2.0
"""Seconds in which memory that others have given up must have become free."""

PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds until a process whose state is not known is asked for again: the first time, doubled with each, and the most.
"""

SILENCE = 5
"""So many answers, half a minute, that do not tell, and the process is taken for one that only its end can move."""

REVIVAL = 10.0
"""Seconds between two attempts to start a helper although several have died or there is no driver for it."""


class Done(NamedTuple):
    """A request's end: `problem` is a sentence, '' when it was done. `lost`: nothing can bring the memory back; `kept`:
    it is on the host, as it was. `unclear`: it is no end yet, the driver only has not told for long."""

    client: int
    op: Op
    problem: str
    seconds: float = 0.0
    lost: bool = False
    kept: bool = False
    unclear: bool = False


class _Request(NamedTuple):
    op: Op
    client: int
    pid: int
    nbytes: int
    unclear: str = ""
    """Why what has become of the process is to be found out, after a suspend by letting it go if it is only locked."""
    tries: int = 0
    """So often that has not told either."""
    moved: bool = False
    """The driver has had its memory for sure."""


class DriverTier:
    """See the module. Not for several threads."""

    def __init__(
        self,
        journal: Journal,
        tier: str | None = None,
        environment: dict[str, str] | None = None,
        *,
        migrates: bool = False,
    ) -> None:
        """`tier`: MODULE:FUNCTION for the helper, which is then known to work, with this `environment` besides this
        process's; None: the real driver. `migrates`: it can bring memory back on another GPU."""
        self.migrates = migrates
        self._helper = Helper(tier, {**os.environ, **(environment or {})})
        self._journal = journal
        self._works: bool | None = None if tier is None else True
        self._probe: int | None = None
        self._held_back: list[Callable[[], None]] = []
        self._requests: dict[int, _Request] = {}
        self._done: list[Done] = []
        self._again: list[tuple[float, int, _Request]] = []
        self._order = itertools.count()
        self._unclear: set[int] = set()
        self._revive_at = 0.0
        self.unavailable = ""
        """Why there is no driver tier here, once that is known."""

    def fileno(self) -> int:
        """Readable when done() has something to do, but for a deadline."""
        return self._helper.fileno()

    def due(self) -> float | None:
        """When done() has to be called all the same, on time.monotonic()'s clock; None: not."""
        moments = [self._helper.due(), self._again[0][0] if self._again else None]
        return 0.0 if self._done else min((moment for moment in moments if moment is not None), default=None)

    def suspend(self, client: int, pid: int, nbytes: int, needs: dict[str, int]) -> None:
        """Have the process's memory moved, `nbytes` as the broker counts; `needs`: the same by UUID of the GPU.

        To these a context is added, which is not in them where NVML does not know the process.
        """
        request = _Request("suspend", client, pid, nbytes)
        claimed = {gpu: size + CONTEXT for gpu, size in needs.items()}
        self._journal.suspends(pid, Suspended(nbytes, claimed))
        free = hostmemory.available_bytes()
        limit = None if free is None else max(0, free - hostmemory.RESERVE)
        self._when_it_works(
            lambda: self._submit(request, "suspend", timeout=REST, host_free=limit, claimed=claimed), request
        )

    def resume(self, client: int, pid: int, source: str = "", target: str = "") -> None:
        """Have it brought back, on the GPU `target` instead of `source`, by their UUIDs, if they are given: the room is
        there, as far as the broker knows.

        The target is in the journal until it is known what came of it: should this broker die, its memory may be there.
        """
        kept = self._journal.suspended(pid) or Suspended(0, {})
        moves = None
        if target:
            moves = gpu_map(kept.needs, source, target)
            self._journal.suspends(pid, kept._replace(target=target))
        request = _Request("resume", client, pid, kept.nbytes)
        self._revive()
        self._submit(request, "resume", needs=kept.needs, patience=ROOM, gpu_map=moves)

    def find(self, client: int, pid: int, *, moved: bool = False) -> None:
        """Find out what the driver has of a process that a broker before this one may have suspended; or, `moved`, that
        was suspended for sure, and may have been brought back."""
        kept = self._journal.suspended(pid) or Suspended(0, {})
        self._revive()
        self._submit(
            _Request("find", client, pid, kept.nbytes, "it is not suspended (any more)", moved=moved), "release"
        )

    def done(self) -> list[Done]:
        """What has been answered since; does not wait."""
        while self._again and self._again[0][0] <= time.monotonic():
            request = heapq.heappop(self._again)[2]
            self._revive()
            self._submit(request, "release")
        for answer in self._helper.receive():
            if isinstance(answer.result, Probe):
                self._probed(answer.result)
            else:
                self._take(self._requests.pop(answer.ticket), answer.result)
        if self._helper.unavailable and self._works is not False:
            self._works, self.unavailable = False, self._helper.unavailable
        found, self._done = self._done, []
        return found

    def close(self) -> None:
        """The broker ends."""
        self._helper.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _when_it_works(self, submit: Callable[[], None], request: _Request) -> None:
        if self._works is None:
            if self._probe is None:
                self._probe = self._helper.submit("probe", deadline=PROBE_DEADLINE)
            self._held_back.append(lambda: self._when_it_works(submit, request))
        elif self._works:
            submit()
        else:
            self._end(request, self.unavailable)

    def _probed(self, result: Probe) -> None:
        self._works, self.unavailable = result.works, "" if result.works else result.reason
        waiting, self._held_back = self._held_back, []
        for again in waiting:
            again()

    def _submit(self, request: _Request, op: str, **arguments: object) -> None:
        deadline = DEADLINE + request.nbytes / RATE
        self._requests[self._helper.submit(op, request.pid, deadline=deadline, **arguments)] = request

    def _revive(self) -> None:
        """Where no helper was to be started any more, start one all the same: nothing else brings a process back."""
        if self._helper.unavailable and time.monotonic() >= self._revive_at:
            self._revive_at = time.monotonic() + REVIVAL
            self._helper.again()

    def _take(self, request: _Request, outcome: Outcome) -> None:
        seconds = sum(outcome.seconds.values())
        if request.unclear and request.op != "resume":
            if outcome.state == "checkpointed":
                self._end(request, "", seconds)
            elif request.op == "find" and _is_lost(outcome, known=request.moved):
                self._end(request, outcome.reason, seconds, lost=True)
            elif outcome.state in ("running", "failed") or outcome.problem == "gone" or _unknown_to_cuda(outcome):
                self._end(request, request.unclear, seconds)
            else:
                self._ask_again(request, outcome)
        elif request.op == "suspend":
            if outcome.done:
                kept = self._journal.suspended(request.pid)
                self._journal.suspends(
                    request.pid, Suspended(request.nbytes, outcome.moved or (kept.needs if kept else {}))
                )
                self._end(request, "", seconds)
            elif outcome.state in ("running", "failed") or outcome.problem == "gone" or _untouched(outcome):
                self._end(request, outcome.reason, seconds)
            else:  # what state it is in is to be found out; if it is only locked, let it go
                self._submit(request._replace(unclear=outcome.reason), "release")
        elif outcome.problem == "helper" and not request.unclear:
            self._submit(request._replace(unclear=outcome.reason), "state")
        else:
            lost = _is_lost(outcome, known=True)
            if request.unclear:
                outcome.fail(outcome.problem, outcome.reason if lost else request.unclear)
            as_it_was = not request.unclear and _untouched(outcome) and request.pid not in self._unclear
            stays = not (outcome.done or lost) and (outcome.state == "checkpointed" or as_it_was)
            if stays and outcome.state == "unknown":
                outcome.reason += "; its memory is safe on the host, and it is tried again"
            kept = self._journal.suspended(request.pid)
            if stays and kept is not None and kept.target:
                self._journal.suspends(request.pid, kept._replace(target=""))
            self._end(request, "" if outcome.done else outcome.reason or "unknown", seconds, lost, stays)
            if not (outcome.done or lost or stays):
                self._unclear.add(request.pid)

    def _ask_again(self, request: _Request, outcome: Outcome) -> None:
        if not request.tries:
            log(f"process {request.pid} may be stopped in the driver, which is asked until it says: {outcome.reason}")
        elif request.tries == SILENCE:
            log(
                f"the driver still does not say whether it has stopped process {request.pid}, which gets no lease till "
                f"it does, and whose memory counts as on the GPU; if others need that, end it: kill -9 {request.pid}"
            )
            self._done.append(Done(request.client, request.op, outcome.reason, unclear=True))
        due = time.monotonic() + min(LONGEST_PAUSE, PAUSE * 2 ** min(request.tries, 16))
        heapq.heappush(self._again, (due, next(self._order), request._replace(tries=request.tries + 1)))

    def _end(
        self, request: _Request, problem: str, seconds: float = 0.0, lost: bool = False, kept: bool = False
    ) -> None:
        note = self._journal.suspended(request.pid)
        moved = request.op == "find" and note is not None and note.target  # and has still to hear of it
        if bool(problem) == (request.op != "resume") and not moved:
            self._journal.resumed(request.pid)
        self._unclear.discard(request.pid)
        self._done.append(Done(request.client, request.op, problem, seconds, lost, kept))


def _untouched(outcome: Outcome) -> bool:
    """Whether the attempt has ended before the driver was asked for anything but the process's state."""
    return outcome.state == "unknown" and outcome.problem != "helper" and outcome.seconds.keys() <= {"state"}


def _unknown_to_cuda(outcome: Outcome) -> bool:
    """Whether the driver says that it is no process of CUDA's, which cannot be stopped there either."""
    return _untouched(outcome) and outcome.problem == "foreign"


def _is_lost(outcome: Outcome, *, known: bool) -> bool:
    """Whether nothing brings the process's memory back; `known`: the driver has had it."""
    return outcome.state == "failed" or (known and (outcome.problem == "gone" or _unknown_to_cuda(outcome)))
