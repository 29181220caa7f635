"""The agent: the process's side of the talk with the broker, on a thread of its own.

It carries requests, opens the gate when a lease is granted, decides when a revoked lease is given back, and has memory
moved. Its rules:

- the lease is kept until the broker revokes it; `yielding` says when it is given back then;
- it is given back only at a safe point: the gate is closed first, then no thread may be inside, then the device is
  drained;
- when the broker dies the client keeps what it holds and tells the next broker; without a lease it stays at the gate.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from acb.client import visible
from acb.client.connection import Connection
from acb.client.hello import hello
from acb.client.memory import Memory, Moved
from acb.client.outside import Outside
from acb.client.patience import Patience
from acb.client.refusal import refused
from acb.client.room import Room
from acb.client.trace import Trace
from acb.client.yielding import Yielding
from acb.protocol import (
    Evacuate,
    Evacuated,
    Goodbye,
    Grant,
    Headroom,
    Hello,
    Holds,
    Message,
    Ping,
    Pong,
    ProtocolError,
    Refused,
    Request,
    Restored,
    Revoke,
    Status,
    Uncontended,
    Welcome,
    Yield,
)
from acb.protocol import Room as RoomAnswer

if TYPE_CHECKING:
    from acb.client.evacuation import Evacuator
    from acb.client.gate import Gate

HEARTBEAT = 5.0
"""Seconds: as long as the agent can be deaf, should a thread that listens be interrupted at the wrong microsecond.

Also how often it says what the program holds, when that has changed.
"""

TRACE_LINGER = 0.02
"""Seconds of idleness that a trace shows as such."""


class AgentThread(threading.Thread):
    """Runs the agent. The name tells acb's thread hooks to leave it alone."""

    def __init__(self, run: Any) -> None:
        super().__init__(target=run, name="acb-agent", daemon=True)


class Agent:
    """See the module. Methods without an underscore are called by the program's threads."""

    gate: Gate

    def __init__(self, evacuators: list[Evacuator], name: str, simulated: bool) -> None:
        self.gpu: int | None = None
        self.gpus: tuple[int, ...] = ()
        self.lease = False
        self.beside = 0
        """Bytes of others' memory on the GPU, as of the last grant, that could make way for more of ours."""
        self.outside = Outside()
        self._evacuators = evacuators
        self._name = name
        self._simulated = simulated
        self._lock = threading.RLock()  # of the fields below, and of whoever moves memory or gives up the lease
        self._thread: AgentThread | None = None
        self._connection = Connection(self._lock, self)
        self._memory = Memory(evacuators)
        self._yielding = Yielding(self._memory, self._reopen)
        self._room = Room(self._lock, self._connection, self._memory, self._may_ask_room)
        self._requested = False
        self._wanted = False
        self._need = 0
        self._refusal = ""
        self._stranded = ""  # why what is asked for waits for another broker
        self._evacuation_due = False  # asked for, perhaps while a thread was inside
        self._piece = 0  # bytes of which the broker wants to know when they are gone
        self._alone = False  # the program goes on without a broker, for good
        self._said: Holds | None = None
        self._say_at = 0.0
        self._patience = Patience(self._connection)
        self._finishing = False
        self._trace = Trace(os.environ.get("ACB_TRACE"), name)

    # --- called by the program's threads ----------------------------------------------------------------------------

    def ask(self) -> None:
        """A thread stands at the closed gate: see that a lease is asked for. Raises LeaseRefused when it cannot be
        had."""
        with self._lock:
            if self._refusal:
                reason, self._refusal, self._wanted, self._need = self._refusal, "", False, 0
                raise refused(reason)
            if not self.gate.closed:
                return  # it was opened while this thread waited for the lock
            if self._finishing:
                raise refused("the interpreter is ending: it is too late to get the GPU back")
            self._want("GPU entry")
            if self._thread is None:
                self._start()
            self._request()

    def listen(self) -> bool:
        """A thread has asked for a lease and has nothing else to do: it reads the grant by itself, which spares a
        hand-over the way through the agent's thread. False: that cannot be, or something else has come.

        Another message than a grant stays on the socket, for the agent's thread to take: the program's threads must not
        move memory.
        """

        def ready() -> bool:
            return self._requested and not self._memory.evacuated and not self._evacuation_due

        if not self._connection.listen(ready, self._granted):
            return False
        if self._trace.enabled:
            self._connection.wake()  # the thread observes a granted lease
        return True

    def idle(self) -> None:
        """A thread left its region while the gate is watched, or said that it does something else."""
        if self._yielding.closing or self._evacuation_due or self.gate.marked():
            self._connection.wake()

    def need(self, nbytes: int) -> None:
        """Before a phase that needs `nbytes` in all (0: not said): what the next request is to ask for."""
        with self._lock:
            self._need, self._refusal = nbytes, ""

    def reserve(self, nbytes: int) -> None:
        """Inside a region: see that there is room for `nbytes` in all. Raises LeaseRefused when it cannot be had."""
        missing = self._room.missing(nbytes)
        reason = self._room_refused(missing) if missing else ""
        if reason:
            raise refused(reason)

    def end_phase(self) -> None:
        """The program says that its phase is over: give the lease back at once if somebody waits for it."""
        with self._lock:
            now = self._yielding.ended_at = time.monotonic()
            # Here and now, which is quickest, unless a framework is involved: its device may only be waited for on the
            # agent's thread, which no gate stops.
            if self.lease and self._yielding.revoked and (self._evacuators or self._consider(now) is not None):
                self._connection.wake()

    def more_room(self, nbytes: int) -> bool:
        """Inside a region: ask for `nbytes` beyond what is held, and wait for the answer."""
        return self._room_refused(nbytes) == ""

    def _room_refused(self, nbytes: int) -> str | None:
        """Ask for more room and wait: why there is none; '' when there is; None when nobody answers."""
        if self._thread is None or threading.get_ident() == self._thread.ident:
            return None
        return self._room.ask(nbytes)

    def _may_ask_room(self) -> bool:
        return self.lease and self.gpu is not None and not self._alone and not self._finishing

    def finish(self) -> None:
        """The process ends: return when the agent's thread has, which is soon.

        Left to itself it would be ended by the interpreter wherever it is, and in the middle of a framework's C++ code
        that ends the whole process with SIGABRT.
        """
        thread = self._thread
        if thread is not None and thread.ident not in (None, threading.get_ident()):
            self._finishing = True
            self._connection.wake()
            while thread.is_alive() and not self._connection.outside:
                thread.join(0.05)
        with self._lock:
            if thread is not None:
                self._trace.change("gone", "the program ends")
                self._say_what_is_held()
            self._connection.leave()
            self._room.wake()

    def abandon(self) -> None:
        """In a forked child: drop the parent's connection without a word."""
        self._trace.close()
        self._connection.abandon()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._connection.prepare()
        self._thread = AgentThread(self._run)
        try:
            self._thread.start()
        except RuntimeError as error:  # there can be no more threads, or the interpreter is ending
            from acb.client.runtime import warn_once

            warn_once(
                "no-thread", f"no thread can be started to talk to the GPU broker; going on without one ({error})"
            )
            self._alone = True
            self._let_all_in("no thread")

    def _run(self) -> None:
        import signal

        # Signals are for the program's own threads, as without acb. Not those that the kernel sends for a fault.
        faults = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - faults)
        while not self._finishing:
            try:
                self._turn()
            except Exception as error:  # whatever it is, the program must not hang because of it
                from acb.client.runtime import warn_once

                warn_once("agent", f"something went wrong while talking to the broker, going on: {error!r}")
                self._connection.lose(pause=0.25)

    def _turn(self) -> None:
        """Wait for something to happen, and deal with it."""
        connection = self._connection
        if not connection.up and not self._alone and not connection.due_in(time.monotonic()):
            error = connection.connect(self._hello)
            if error is not None:
                self._missing(error)
        while True:
            with self._lock:
                now = time.monotonic()
                wait = self._consider(now)
                if not connection.up and not self._alone:
                    left = connection.due_in(now)
                    wait = left if wait is None else min(wait, left)
            happened = connection.wait(HEARTBEAT if wait is None else min(wait, HEARTBEAT))
            if not happened and time.monotonic() >= self._say_at:
                self._say_at = time.monotonic() + HEARTBEAT
                self._say_what_is_held()
            self._say_that_it_waits()
            if not connection.up or self._finishing:
                return

    def _say_that_it_waits(self) -> None:
        """To a person; see Patience."""
        if not self._wanted or self.lease:
            self._patience.over()
        elif self._patience.waits():
            with self._lock:
                self._patience.ask()

    def _say_what_is_held(self) -> None:
        """Let the broker know, once in a while, and see what it learns from."""
        with self._lock:
            holds = (
                Holds(self._memory.resident(), self._memory.peak())
                if self.lease and not self._memory.evacuated
                else None
            )
            if holds is not None and holds != self._said and self._connection.welcomed:
                self._said = holds
                self._connection.send(holds)

    def _hello(self) -> Hello:
        return hello(self._name, self.gpu, self.gpus, self._memory, lease=self.lease, simulated=self._simulated)

    def _missing(self, error: Exception) -> None:
        """No broker answers. See that there is one, or say how; with no way at all let the program run without."""
        from acb.client.runtime import warn_once

        unheard_of = self.gpu is None
        now = time.monotonic()
        problem = self._connection.missing(may_start=not (unheard_of and self.lease))
        if problem and unheard_of:
            warn_once("no-broker", f"no GPU broker runs and none can be started; going on without one ({problem})")
            self._let_all_in("there is no broker")
        if self._connection.lost_at is not None and now - self._connection.lost_at > 5 and not self.lease:
            warn_once(
                "waiting-for-broker",
                f"process {os.getpid()} waits for a GPU broker ({error}); start one with: gpu_assigner start",
            )

    def _let_all_in(self, cause: str) -> None:
        """Never worse than no acb: the gate opens, as if the lease were held."""
        with self._lock:
            self.lease, self._yielding.revoked = True, False
            if self._memory.evacuated:
                self._restore()
            else:
                self._run_on(cause)

    # --- messages ---------------------------------------------------------------------------------------------------

    def lost(self) -> None:
        """The broker is gone: keep what is held; whoever waits goes on waiting."""
        self._requested = self._evacuation_due = False
        self._room.lost()
        if self.lease and self._yielding.revoked:
            self._yielding.revoked = False
            self._reopen()

    def heard(self, message: Message) -> None:
        """Deal with one message of the broker's."""
        if isinstance(message, Grant):
            self._granted(message)
        elif isinstance(message, Revoke):
            self._revoke(message)
        elif isinstance(message, Evacuate):
            self._evacuation_due, self._piece = True, message.piece  # as soon as no thread is inside
        elif isinstance(message, Headroom):
            self._more_has_come(message)
        elif isinstance(message, Uncontended):
            if self.lease and self._yielding.revoked:
                self._yielding.revoked = False
                self._reopen()
        elif isinstance(message, RoomAnswer):
            self._room.answered(message)
        elif isinstance(message, Ping):
            self._connection.send(Pong())
            if self.outside.stuck() and not self.lease:
                self._want("blocked in the driver")
                self._request()
        elif isinstance(message, Welcome):
            self._welcome(message)
        elif isinstance(message, Status):
            self._patience.told(message)
        elif isinstance(message, Refused):
            self._refused(message)
        elif isinstance(message, Goodbye):
            self._connection.farewell = True
        else:
            raise ProtocolError(f"a broker may not send {message.type} messages")

    def _welcome(self, message: Welcome) -> None:
        self._connection.welcome()
        self._stranded = message.stranded
        if self.lease and not message.lease:
            # Another holds it now. Stop at the gate; what runs in a region cannot be called back.
            self.gate.close()
            self.lease = self._yielding.closing = self._yielding.revoked = self._memory.unrestored = False
            state = "waiting" if self._wanted else "evacuated" if self._memory.evacuated else "resident"
            cause = message.stranded or "the new broker has lent the GPU to another client"
            self._trace.change(state, cause)
        elif self._memory.unrestored or (self.lease and self.gate.closed and self._memory.evacuated):
            self._restore()
        elif self.lease and self.gate.closed:
            self._run_on("the new broker has confirmed the lease")
        self._room.wake()
        self._request()

    def _refused(self, message: Refused) -> None:
        from acb.client.runtime import warn_once

        self._requested = False
        if not self._connection.welcomed and os.environ.get("ACB_BROKER") != "require":
            warn_once(
                "refused", f"the GPU broker does not take this process, which goes on without it: {message.reason}"
            )
            self._alone = True
            self._let_all_in("the broker refused")
        else:
            self._refusal = message.reason
            self.gate.refuse()

    def _want(self, cause: str) -> None:
        """From now on a lease is wanted, if none is held."""
        if not self._wanted:
            self._wanted = True
            if not self.lease:
                self._trace.change("waiting", cause)

    def _request(self) -> None:
        """Ask for a lease if one is wanted and has not been asked for."""
        if self._wanted and self._connection.welcomed and not self.lease and not self._requested:
            self._requested = True
            self._connection.send(Request(self._need))
            if self._stranded:
                from acb.client.runtime import warn_once

                warn_once("stranded", self._stranded)

    def _granted(self, grant: Grant) -> None:
        self.gpu, self.beside = grant.gpu, grant.beside
        self._room.granted(grant)
        self.gpus = tuple(map(int, grant.gpus.split(","))) if grant.gpus else (grant.gpu,)
        self.lease, self._requested = True, False
        self._memory.granted()
        self._yielding.granted()
        self._need, self._refusal = 0, ""
        self._say_at = time.monotonic() + HEARTBEAT
        if not self._simulated and grant.visible:
            visible.bind(grant.visible)  # without effect, and without harm, once CUDA has started
        if self._memory.evacuated or self._room.coming:
            self._restore()
        else:
            self._run_on()

    def _run_on(self, cause: str = "granted") -> None:
        """All memory is there: let the program's threads in."""
        self._wanted = self._yielding.closing = self._memory.unrestored = False
        self._memory.reset_peak()
        self._trace.change("running", cause, gpu=self.gpu)
        self.gate.open(watched=self._yielding.revoked or self._trace.enabled)

    def _restore(self) -> None:
        """Bring all memory back, then let the program in; without room for it, ask for some and try again.

        While others are still leaving the GPU, as much of it as has room.
        """
        memory = self._memory
        if not memory.unrestored:
            self._trace.change("restoring", "granted", gpu=self.gpu, bytes=memory.evacuated)
        try:
            moved = memory.restore(max(0, self._room.headroom - memory.resident()) if self._room.coming else None)
        except MemoryError:
            if self._connection.welcomed and not self._room.coming:  # have the broker make room
                self._room.ask_to_restore()
            return
        if self._room.coming:
            return
        self._run_on()
        self._connection.send(Restored(memory.resident(), moved.nbytes, moved.seconds))

    def _more_has_come(self, message: Headroom) -> None:
        if not self.lease:
            return  # it crossed our Yield
        self._room.granted(message)
        if self._memory.unrestored:
            self._restore()

    def _revoke(self, message: Revoke) -> None:
        if not self.lease:
            return  # it crossed our Yield
        self._yielding.revoke(time.monotonic() + message.quantum, message.swap)
        if not self._yielding.closing and not self.gate.closed:
            self.gate.watch()
        self._say_what_is_held()  # from which follows how long it is protected

    def _evacuate(self) -> None:
        """Move all memory to the host. No lease is held, and no thread is inside."""
        self._evacuation_due = False
        memory = self._memory
        self._trace.change("evacuating", "another client needs the room", bytes=memory.resident())

        def gone(moved: Moved) -> None:
            self._connection.send(Evacuated(memory.resident(), moved.nbytes, moved.seconds, more=True))

        before, begun = memory.evacuated, time.monotonic()
        moved = memory.evacuate(self._piece, gone)
        left = memory.resident()
        self._trace.change(
            "waiting" if self._wanted else "evacuated" if memory.evacuated > before or not left else "resident",
            moved.reason or "evacuated", bytes=memory.evacuated - before, left=left,
            seconds=round(time.monotonic() - begun, 6),
        )  # fmt: skip
        self._connection.send(Evacuated(left, moved.nbytes, moved.seconds, moved.reason[:1000]))

    # --- giving the lease back --------------------------------------------------------------------------------------

    def _consider(self, now: float) -> float | None:
        """Give the lease back if it is time to; else say in how many seconds to look again (None: not by the clock)."""
        if not self.lease:
            if self._evacuation_due and not self.gate.busy():  # else idle() wakes us
                self._evacuate()
            return None
        if self._memory.unrestored:
            return self._consider_restoring(now)
        if not self._yielding.revoked:
            return self._observe(now) if self._trace.enabled else None
        found = self._yielding.consider(self.gate, now)
        if not isinstance(found, str):
            return found
        self._give_up(found, wants=self._wanted)
        return None

    def _give_up(self, cause: str, wants: bool) -> None:
        """Hand the lease back. The gate is closed and no thread is inside."""
        self._memory.synchronize()
        resident = self._memory.resident()
        phase = self.gate.last_exit - self.gate.phase_began
        self.lease = self._yielding.revoked = self._yielding.closing = self._memory.unrestored = False
        self._room.coming = 0
        self._memory.swap.yielded()
        self._requested = wants
        self._trace.change("waiting" if wants else "resident" if resident else "detached", cause, bytes=resident)
        self._connection.send(Yield(resident, self._memory.peak(), wants, cause, phase if phase > 0 else -1.0))

    def _consider_restoring(self, now: float) -> float | None:
        """The lease is held, but memory must come back first and there was no room for it."""
        if self._room.coming or self._room.due:
            return None  # the broker makes room; to give up before anything has run would waste the copy
        if now >= self._memory.restore_at:
            self._restore()
            return 0.0
        if self._yielding.revoked:
            self._give_up("no room to restore", wants=True)
            return None
        return self._memory.restore_at - now

    def _reopen(self) -> None:
        """The lease stays for now."""
        if self._memory.unrestored:
            return
        self._yielding.closing = self._wanted = False
        self.gate.open(watched=self._yielding.revoked or self._trace.enabled)

    def _observe(self, now: float) -> float:
        """Without anybody waiting, only for the trace: tell running from idle."""
        idle = not self.gate.busy() and now - self.gate.last_exit > TRACE_LINGER
        if idle and self._trace.state == "running":
            self._trace.change("idle", "no region", at=self.gate.last_exit)
        elif not idle and self._trace.state == "idle":
            self._trace.change("running", "GPU entry", at=self.gate.last_entry)
        return TRACE_LINGER
