"""The broker's end of the checkpoint helper: requests go out, answers come in; neither a hang nor a death holds it up.

    helper = Helper()                                   # starts nothing yet
    ticket = helper.submit("suspend", pid, deadline=30, timeout=5)
    poller.register(helper, select.EPOLLIN)             # one descriptor for the helper's whole life, restarts included
    for answer in helper.receive(): ...                 # when that is readable, or due() has come

Requests are carried out one by one, in order. A helper that dies, or that does not answer by a request's deadline, is
killed; the request is answered with the problem "helper", and a new one is started for the next. What state the process
is in then, nobody knows: ask ("state"), and "release" it or "resume" it. A new helper knows nothing of what the last
one moved: keep an Outcome's `moved`, and give it to "resume" as `needs`. Deadlines should be generous, at a GiB a
second say: a helper that is killed in the midst of a copy may cost the program.

A helper that is killed in a call that the kernel cannot interrupt does not end. It is given GRACE to, during which the
next request waits, but nobody who calls receive(); then it is left to itself, and reaped whenever it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from acb.broker.checkpoint_helper import MODULE, PACKET, START
from acb.devices.checkpoint import Outcome, Problem
from acb.devices.checkpoint_probe import Probe

DEATHS = 3
"""So many helpers in a row that die without an answer, and there will be no further one."""

GRACE = 1.0
"""Seconds beyond a request's deadline, within which the helper is ended by its own alarm; and that it has to end in."""


class Answer(NamedTuple):
    """What became of the request with this ticket."""

    ticket: int
    result: Outcome | Probe


class _Request(NamedTuple):
    ticket: int
    op: str
    pid: int
    deadline: float
    arguments: dict[str, Any]


class _Ending(NamedTuple):
    """A helper that has hung up, or was killed: `late`, since its time was up; `ready`: it had initialised CUDA."""

    process: subprocess.Popen[bytes]
    ready: bool
    late: bool

    def how(self) -> str:
        """How its end came, for a sentence about it."""
        if self.late or self.process.returncode == -signal.SIGALRM:
            return "hung in the driver, and was ended" if self.ready else "did not start in time, and was ended"
        if self.process.returncode is None:
            return "has hung up, and does not end"
        return f"has died (status {self.process.returncode})"


class Helper:
    """The helper process, started when it is first needed. Not for several threads."""

    def __init__(self, tier: str | None = None, environment: dict[str, str] | None = None) -> None:
        """`tier`: MODULE:FUNCTION that makes the tier in the helper, None: the real one. `environment`: for it, None:
        this process's."""
        self.unavailable = ""
        """Why there is no driver tier here, once that is known."""
        self._tier = tier
        self._environment = dict(os.environ if environment is None else environment)
        self._epoll = select.epoll()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._ending: _Ending | None = None
        self._left: dict[int, subprocess.Popen[bytes]] = {}  # to be reaped, by a descriptor that tells of the end
        self._ready = False
        self._queue: deque[_Request] = deque()
        self._in_flight: _Request | None = None
        self._due: float | None = None
        self._deaths = 0
        self._tickets = 0
        self._answers: list[Answer] = []

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """A descriptor that is readable when receive() has something to do, but for a deadline."""
        return self._epoll.fileno()

    def due(self) -> float | None:
        """When receive() has to be called even if nothing is readable, on time.monotonic()'s clock; None: never."""
        return 0.0 if self._answers else self._due

    def submit(self, op: str, pid: int = 0, *, deadline: float, **arguments: Any) -> int:
        """Have `op` done: "state", "suspend", "resume", "release" (see Checkpointer for their arguments), "probe".

        Its answer, from receive(), bears the ticket returned. `deadline`: seconds from when its turn comes.
        """
        self._tickets += 1
        self._queue.append(_Request(self._tickets, op, pid, deadline, arguments))
        self._pump()
        return self._tickets

    def receive(self) -> list[Answer]:
        """The answers that have come since; does not wait."""
        while found := self._epoll.poll(0):
            for descriptor, _ in found:
                if descriptor in self._left:
                    self._reap(descriptor)
                elif self._connection is not None:
                    self._read(self._connection)
        if self._due is not None and time.monotonic() >= self._due:
            if self._ending is None:
                self._lost()
            else:
                self._ended(self._ending)
        answers, self._answers = self._answers, []
        return answers

    def ask(self, op: str, pid: int = 0, *, deadline: float, **arguments: Any) -> Outcome | Probe:
        """submit(), and wait for its answer. Only where no other request is under way."""
        ticket = self.submit(op, pid, deadline=deadline, **arguments)
        while True:
            for answer in self.receive():
                if answer.ticket == ticket:
                    return answer.result
            due = self.due()
            self._epoll.poll(-1 if due is None else max(0.0, due - time.monotonic()))

    def again(self) -> None:
        """Forget why there was no helper: for what must be done, another start is tried."""
        self.unavailable, self._deaths = "", 0

    def close(self) -> None:
        """Let the helper go: it ends when it has done what it is at, at once if that is nothing, which is waited for.

        Unanswered requests stay so.
        """
        self._queue.clear()
        self._hang_up()
        if self._process is not None and self._in_flight is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        for descriptor in self._left:
            os.close(descriptor)
        ending = [self._ending.process] if self._ending is not None else []
        for process in (self._process, *ending, *self._left.values()):
            if process is not None and process.returncode is None:
                process.returncode = 0  # it is meant to outlive us: no warning that it does
        self._process = self._ending = self._in_flight = self._due = None
        self._left.clear()
        self._epoll.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send the next request, if there is one and its turn has come."""
        while self.unavailable and self._queue:
            self._answer(self._queue.popleft(), "unsupported", self.unavailable)
        if not self._queue or self._in_flight is not None or self._ending is not None:
            return
        if self._connection is None:
            self._start()
        if self._connection is None or not self._ready:
            return
        request = self._in_flight = self._queue.popleft()
        message = {"id": request.ticket, "op": request.op, "pid": request.pid, "deadline": request.deadline}
        self._due = time.monotonic() + request.deadline + GRACE
        with contextlib.suppress(OSError):  # it has died: the end of the connection says so
            self._connection.send(json.dumps({**message, **request.arguments}).encode())

    def _start(self) -> None:
        home = str(Path(__file__).parents[2])
        path = [home, *filter(None, self._environment.get("PYTHONPATH", "").split(os.pathsep))]
        environment = {**self._environment, "ACB_DISABLE": "1", "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, *(["--tier", self._tier] if self._tier else [])],
                stdin=its.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C meant for the broker is not for it
                cwd="/",
                env=environment,
            )
        except OSError as error:
            ours.close()
            self._give_up(f"the checkpoint helper cannot be started: {error}")
            return
        finally:
            its.close()
        ours.setblocking(False)
        self._connection = ours
        self._ready = False
        self._epoll.register(ours, select.EPOLLIN)
        self._due = time.monotonic() + START + GRACE

    def _read(self, connection: socket.socket) -> None:
        packet = b""
        with contextlib.suppress(OSError):
            packet = connection.recv(PACKET)
        if packet:
            self._take(packet)
        else:
            self._lost()

    def _take(self, packet: bytes) -> None:
        message: dict[str, Any] = json.loads(packet)
        self._due = None
        if "ready" in message:
            self._ready = bool(message["ready"])
            if not self._ready:
                self._hang_up()
                self._leave()
                self._give_up(message["reason"])
        elif self._in_flight is not None and message["id"] == self._in_flight.ticket:
            request, self._in_flight, self._deaths = self._in_flight, None, 0
            if "error" in message:
                self._answer(request, "helper", f"the checkpoint helper refused {request.op}: {message['error']}")
            else:
                del message["id"]
                result = Probe(**message) if request.op == "probe" else Outcome(**message)
                self._answers.append(Answer(request.ticket, result))
        self._pump()

    def _lost(self) -> None:
        """It has died, or its time is up: see that it ends, and when it has, go on with another one."""
        ready, late = self._ready, self._due is not None and time.monotonic() >= self._due
        self._hang_up()
        process = self._process
        assert process is not None
        if late:
            process.kill()
        self._ending = _Ending(process, ready, late)
        self._due = time.monotonic() + GRACE
        self._leave()
        if process.returncode is not None:
            self._ended(self._ending)

    def _leave(self) -> None:
        """Nothing more is asked of the process: it is to be reaped when it ends."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        try:
            descriptor = os.pidfd_open(process.pid)
        except OSError:  # an old kernel, or too many files: what is left then is to wait out the GRACE
            return
        self._left[descriptor] = process
        self._epoll.register(descriptor, select.EPOLLIN)

    def _reap(self, descriptor: int) -> None:
        process = self._left.pop(descriptor)
        self._epoll.unregister(descriptor)
        os.close(descriptor)
        process.poll()
        if self._ending is not None and self._ending.process is process:
            self._ended(self._ending)

    def _ended(self, ending: _Ending) -> None:
        """Answer what it was at: it has ended, or has had its time to."""
        ending.process.poll()
        self._ending = self._due = None
        how = ending.how()
        self._deaths += 1
        if self._in_flight is not None:
            request, self._in_flight = self._in_flight, None
            on = f"; in which state process {request.pid} is, is not known" if request.pid else ""
            self._answer(request, "helper", f"the checkpoint helper {how}{on}")
        if self._deaths >= DEATHS:
            self._give_up(f"the checkpoint helper {how}, {DEATHS} times in a row")
        self._pump()

    def _hang_up(self) -> None:
        self._ready, self._due = False, None
        if self._connection is not None:
            self._epoll.unregister(self._connection)
            self._connection.close()
            self._connection = None

    def _give_up(self, reason: str) -> None:
        self.unavailable = reason
        self._pump()

    def _answer(self, request: _Request, problem: Problem, reason: str) -> None:
        result: Outcome | Probe
        if request.op == "probe":
            result = Probe(False, reason)
        else:
            result = Outcome(request.op, request.pid).fail(problem, reason)
        self._answers.append(Answer(request.ticket, result))
