"""The agent: the process's side of the talk with the broker, on a thread of its own.

It carries requests, opens the gate when a lease is granted, decides when a revoked lease is given back, and has memory
moved. Its rules:

- the lease is kept until the broker revokes it; then it is given back when the program is idle for the linger, or says
  that it does something else, or (after the quantum that came with the revoke) at the next safe point;
- it is given back only at a safe point: the gate is closed first, then no thread may be inside, then the device is
  drained;
- when the broker dies the client keeps what it holds and tells the next broker; without a lease it stays at the gate.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from acb import config
from acb.client import visible, wishes
from acb.client.evacuation import EvacuationError, Evacuator, evacuate_all
from acb.client.gate import LONG_GAP
from acb.client.phases import MAX_LINGER, MIN_LINGER, SwapCost, choose_linger
from acb.client.trace import Trace
from acb.protocol import (
    MAX_PACKET,
    VERSION,
    Evacuate,
    Evacuated,
    Goodbye,
    Grant,
    Hello,
    Holds,
    Message,
    MoreRoom,
    ProtocolError,
    Refused,
    Request,
    Restored,
    Revoke,
    Room,
    Uncontended,
    Welcome,
    Yield,
    decode,
    encode,
)

if TYPE_CHECKING:
    from acb.client.gate import Gate

RESTART_AFTER = 0.5
"""Seconds without a broker, after it died, before a client tries to start one."""

RESTART_EVERY = 10.0
"""Seconds between a client's tries to start one."""

OUTAGE = 30.0
"""Seconds that a program short of memory waits for the broker after one that died, before it sees its own error."""

MAX_RETRY = 2.0
"""Seconds, at most, between tries to bring memory back to a GPU on which somebody acb knows nothing of takes room."""

MAX_GRANT = 1024
"""Bytes: no packet with a grant is longer."""

HEARTBEAT = 5.0
"""Seconds: as long as the agent can be deaf, should a thread that listens be interrupted at the wrong microsecond.

Also how often it says what the program holds, when that has changed.
"""

_receive = socket.SocketType.recv
"""Not socket.socket's, which acb's own hooks replace to learn of what the program waits for."""

STALL = 0.25
"""Seconds that a thread inside may keep others at the closed gate, at first, before it is thought to wait for them."""

MAX_STALL = 8.0
"""Seconds, at most, of that patience: what takes longer than this inside one region is let go on."""

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
        self._evacuators = evacuators
        self._name = name
        self._simulated = simulated
        self._lock = threading.RLock()  # of the fields below, and of whoever moves memory or gives up the lease
        self._thread: AgentThread | None = None
        self._socket: socket.socket | None = None
        self._poller: select.epoll | None = None  # of the agent's thread: the wake-up call, and the socket
        self._reading = threading.Lock()  # held by the thread that reads the socket and deals with what it says
        self._wake_fd = -1
        self._welcomed = False
        self._requested = False
        self._wanted = False
        self._need = 0
        self._headroom = 0
        self._evacuated = 0
        self._revoked = False
        self._swap_expected = -1.0  # what the broker expects yielding to cost, in seconds; -1: it does not know
        self._preempt_at = 0.0
        self._ended_at = 0.0  # when the program last said that its phase is over
        self._closing = False  # the gate is closed although the lease is held
        self._closed_at = 0.0  # since when
        self._stall_after = STALL
        self._refusal = ""
        self._room: tuple[bool, str] | None = None
        self._room_due = 0  # questions for more room that the broker has not answered
        self._room_changed = threading.Condition(self._lock)
        self._asking_room = threading.RLock()  # one thread at a time: an answer does not say whose it is
        self._unrestored = False  # the lease is held, but there was no room for the memory that must come back
        self._restore_at = 0.0  # when to try again
        self._restore_wait = 0.0
        self._evacuation_due = False  # asked for while a thread was inside
        self._swap = SwapCost()
        self._alone = False  # the program goes on without a broker, for good
        self._lost_at: float | None = None  # since when no broker answers
        self._patience = 0.02  # seconds between tries to connect
        self._try_at = 0.0  # when to try to connect next
        self._restart_at = 0.0
        self._said: Holds | None = None
        self._say_at = 0.0
        self._farewell = False
        self._finishing = False
        self._outside = False  # the thread waits for other processes, in nobody's C++ code
        self._trace = Trace(os.environ.get("ACB_TRACE"), name)

    # --- called by the program's threads ----------------------------------------------------------------------------

    def ask(self) -> None:
        """A thread stands at the closed gate: see that a lease is asked for. Raises LeaseRefused when it cannot be
        had."""
        with self._lock:
            if self._refusal:
                from acb.client.runtime import LeaseRefused

                reason, self._refusal, self._wanted, self._need = self._refusal, "", False, 0
                raise LeaseRefused(reason)
            if not self.gate.closed:
                return  # it was opened while this thread waited for the lock
            if self._finishing:
                from acb.client.runtime import LeaseRefused

                raise LeaseRefused("the interpreter is ending: it is too late to get the GPU back")
            if not self._wanted:
                self._wanted = True
                if not self.lease:
                    self._trace.change("waiting", "GPU entry")
            if self._thread is None:
                self._start()
            self._request()

    def listen(self) -> bool:
        """A thread has asked for a lease and has nothing else to do: it reads the grant by itself, which spares a
        hand-over the way through the agent's thread. False: that cannot be, or something else has come.

        Another message than a grant stays on the socket, for the agent's thread to take: the program's threads must not
        move memory. A grant is taken off only when it has been dealt with, so that none is lost to a KeyboardInterrupt.
        """
        connection = None
        with self._reading:
            try:
                with self._lock:
                    if self._socket is None or self._poller is None or not self._requested or self._evacuated:
                        return False
                    connection = self._socket
                    self._poller.unregister(connection)
                message = decode(_receive(connection, MAX_GRANT, socket.MSG_PEEK))
                if isinstance(message, Grant):
                    with self._lock:
                        self._granted(message)
                        _receive(connection, 1)
                    if self._trace.enabled:
                        self._wake()  # it observes a granted lease
                    return True
            except (OSError, ProtocolError):
                pass  # the agent's thread will see it, too
            finally:
                if connection is not None:
                    self._hear(connection)
        return False

    def idle(self) -> None:
        """A thread left its region while the gate is watched, or said that it does something else."""
        if self._closing or self._evacuation_due or self.gate.marked():
            self._wake()

    def need(self, nbytes: int) -> None:
        """Before a phase that needs `nbytes` in all (0: not said): what the next request is to ask for."""
        with self._lock:
            self._need, self._refusal = nbytes, ""

    def reserve(self, nbytes: int) -> None:
        """Inside a region: see that there is room for `nbytes` in all. Raises LeaseRefused when it cannot be had."""
        with self._lock:
            missing = nbytes - max(self._headroom, self._resident())
            if missing <= 0:
                return
            missing = nbytes - self._resident()
        reason = self._room_refused(missing)
        if reason:
            from acb.client.runtime import LeaseRefused

            raise LeaseRefused(reason)

    def end_phase(self) -> None:
        """The program says that its phase is over: give the lease back at once if somebody waits for it."""
        with self._lock:
            self._ended_at = time.monotonic()
            # Here and now, which is quickest, unless a framework is involved: its device may only be waited for on the
            # agent's thread, which no gate stops.
            if self.lease and self._revoked and (self._evacuators or self._consider(self._ended_at) is not None):
                self._wake()

    def more_room(self, nbytes: int) -> bool:
        """Inside a region: ask for `nbytes` beyond what is held, and wait for the answer."""
        return self._room_refused(nbytes) == ""

    def _room_refused(self, nbytes: int) -> str | None:
        """Ask for more room and wait: why there is none; '' when there is; None when nobody answers."""
        if self._thread is None or threading.get_ident() == self._thread.ident:
            return None
        with self._asking_room, self._lock:
            while self.lease and self.gpu is not None and not self._alone and not self._finishing:
                if self._welcomed:
                    self._room = None
                    self._room_due += 1
                    self._send(MoreRoom(self._resident(), nbytes))
                    while self._room is None and self._welcomed:
                        self._room_changed.wait()
                    if self._room is not None:
                        granted, reason = self._room
                        if granted:
                            self._headroom = max(self._headroom, self._resident() + nbytes)
                        return "" if granted else reason or "there is no room"
                # The broker died. Its successor will know more.
                left = OUTAGE if self._lost_at is None else self._lost_at + OUTAGE - time.monotonic()
                if left <= 0:
                    return None
                self._room_changed.wait(left)
            return None

    def finish(self) -> None:
        """The process ends: return when the agent's thread has, which is soon.

        Left to itself it would be ended by the interpreter wherever it is, and in the middle of a framework's C++ code
        that ends the whole process with SIGABRT.
        """
        thread = self._thread
        if thread is not None and thread.ident not in (None, threading.get_ident()):
            self._finishing = True
            self._wake()
            while thread.is_alive() and not self._outside:
                thread.join(0.05)
        with self._lock:
            if thread is not None:
                self._trace.change("gone", "the program ends")
                self._say_what_is_held()
            self._welcomed = False  # nobody answers any more
            self._room_changed.notify_all()
            if self._socket is not None:
                # Left open, for the kernel to close: until then this process still has memory on the GPU.
                self._socket.detach()
                self._socket = None

    def abandon(self) -> None:
        """In a forked child: drop the parent's connection without a word."""
        self._trace.close()
        for descriptor in (self._socket.detach() if self._socket else -1, self._wake_fd):
            if descriptor >= 0:
                os.close(descriptor)
        if self._poller is not None:
            self._poller.close()
        self._socket, self._poller, self._wake_fd, self._welcomed = None, None, -1, False

    # --- the thread -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = select.epoll()
        self._poller.register(self._wake_fd, select.EPOLLIN)
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

    def _wake(self) -> None:
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

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
                self._disconnected(pause=0.25)

    def _turn(self) -> None:
        """Wait for something to happen, and deal with it."""
        if self._socket is None and not self._alone and time.monotonic() >= self._try_at:
            self._connect()
        poller = self._poller
        assert poller is not None
        while True:
            with self._lock:
                now = time.monotonic()
                wait = self._consider(now)
                if self._socket is None and not self._alone:
                    left = max(0.0, self._try_at - now)
                    wait = left if wait is None else min(wait, left)
            events = poller.poll(HEARTBEAT if wait is None else min(wait, HEARTBEAT))
            if not events and time.monotonic() >= self._say_at:
                self._say_at = time.monotonic() + HEARTBEAT
                self._say_what_is_held()
            if not events and self._socket is not None and self._reading.acquire(blocking=False):
                self._hear(self._socket)
                self._reading.release()
            for descriptor, _ in events:
                if descriptor == self._wake_fd:
                    os.eventfd_read(self._wake_fd)
                elif not self._read():
                    self._disconnected()
            if self._socket is None or self._finishing:
                return

    def _say_what_is_held(self) -> None:
        """Let the broker know, once in a while, and see what it learns from."""
        with self._lock:
            holds = Holds(self._resident(), self._sum("peak")) if self.lease and not self._evacuated else None
            if holds is not None and holds != self._said and self._welcomed:
                self._said = holds
                self._send(holds)

    def _read(self) -> bool:
        """Take one packet of the broker's, unless a thread of the program reads. False: the connection is closed."""
        if self._socket is None or not self._reading.acquire(blocking=False):
            return True
        try:
            packet = _receive(self._socket, MAX_PACKET, socket.MSG_DONTWAIT)
            if packet:
                self._take(decode(packet))
            return bool(packet)
        except BlockingIOError:
            return True  # a thread of the program was faster
        except OSError:
            return False
        finally:
            self._reading.release()

    def _hear(self, connection: socket.socket) -> None:
        """From now on the agent's thread reads."""
        if self._poller is not None:
            try:
                self._poller.register(connection, select.EPOLLIN)
            except OSError:
                pass  # it is closed, or was not deaf in the first place

    def _connect(self) -> None:
        """Try to reach the broker and say hello; start one if that is wished and none is there."""
        connection = None
        self._outside = True
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.connect(str(config.socket_path()))
        except (OSError, config.ConfigError) as error:
            if connection is not None:
                connection.close()
            self._missing(error)
            return
        finally:
            self._outside = False
        with self._lock:
            self._socket, self._lost_at = connection, None
            self._hear(connection)
            hello = Hello(
                VERSION,
                os.getpid(),
                self._name,
                memory_hint=_hint(),
                **self._place(),
                holding=self.lease,
                resident=self._resident(),
                evacuated=self._evacuated,
                peak=self._sum("peak") if self.gpu is not None else 0,
                **wishes.of_this_process()._asdict(),
            )
            self._send(hello)

    def _place(self) -> dict[str, Any]:
        """Fields of the Hello: where this process is bound, or wants to be."""
        gpu, gpus = self.gpu, self.gpus
        if gpu is None and not self._simulated:
            wish = wishes.of_this_process()
            gpus = visible.chosen(wish.gang_size or wish.count)
            if gpus and len(gpus) == (wish.gang_size or wish.count):
                gpu = gpus[wish.rank if wish.gang else 0]
        if gpu is None:
            return {"gpu": -1, "gpus": ""}
        return {"gpu": gpu, "gpus": ",".join(map(str, gpus)) if len(gpus) > 1 else ""}

    def _missing(self, error: Exception) -> None:
        """No broker answers. After a while start one, or say how; with no way at all let the program run without."""
        from acb.client.runtime import warn_once

        now = time.monotonic()
        self._patience = min(1.0, self._patience * 1.5)
        if self._lost_at is None:
            self._lost_at, self._restart_at = now, now  # there has never been one
        unheard_of = self.gpu is None
        mode = os.environ.get("ACB_BROKER", "auto")
        if mode == "auto" and now >= self._restart_at and not self._farewell and not (unheard_of and self.lease):
            self._restart_at = now + RESTART_EVERY
            self._outside = True
            problem = _start_broker(os.environ.get("ACB_PYTHON") or sys.executable)
            self._outside = False
            if not problem:
                self._patience = 0.0
            elif unheard_of:
                warn_once("no-broker", f"no GPU broker runs and none can be started; going on without one ({problem})")
                self._let_all_in("there is no broker")
        self._try_at = time.monotonic() + self._patience
        self._patience = max(0.02, self._patience)
        if now - self._lost_at > 5 and not self.lease:
            warn_once(
                "waiting-for-broker",
                f"process {os.getpid()} waits for a GPU broker ({error}); start one with: gpu_assigner start",
            )

    def _let_all_in(self, cause: str) -> None:
        """Never worse than no acb: the gate opens, as if the lease were held."""
        with self._lock:
            self.lease, self._revoked = True, False
            if self._evacuated:
                self._restore()
            else:
                self._run_on(cause)

    def _disconnected(self, pause: float = 0.0) -> None:
        """The broker is gone: keep what is held; whoever waits goes on waiting. Try another after `pause` seconds."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that listens
        with self._reading, self._lock:
            if self._socket is not None:
                self._socket.close()
            self._patience = 0.02 if self._welcomed else min(1.0, self._patience * 1.5)
            self._socket, self._welcomed, self._requested = None, False, False
            self._lost_at = time.monotonic()
            self._restart_at, self._try_at = self._lost_at + RESTART_AFTER, self._lost_at + max(pause, self._patience)
            self._evacuation_due, self._room_due = False, 0
            self._room_changed.notify_all()
            if self.lease and self._revoked:
                self._revoked = False
                self._reopen()

    # --- messages ---------------------------------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        if self._socket is not None:
            try:
                self._socket.send(encode(message))
            except OSError:
                pass  # the thread will see the closed connection, and deal with it

    def _take(self, message: Message) -> None:
        """Deal with one message of the broker's."""
        with self._lock:
            if isinstance(message, Grant):
                self._granted(message)
            elif isinstance(message, Revoke):
                self._revoke(message)
            elif isinstance(message, Evacuate):
                self._evacuation_due = True  # _consider() sees to it as soon as no thread is inside
            elif isinstance(message, Uncontended):
                if self.lease and self._revoked:
                    self._revoked = False
                    self._reopen()
            elif isinstance(message, Room):
                self._room_answered(message)
            elif isinstance(message, Welcome):
                self._welcome(message)
            elif isinstance(message, Refused):
                self._refused(message)
            elif isinstance(message, Goodbye):
                self._farewell = True
            else:
                raise ProtocolError(f"a broker may not send {message.type} messages")

    def _welcome(self, message: Welcome) -> None:
        self._welcomed, self._farewell, self._patience = True, False, 0.02
        if self.lease and not message.lease:
            # Another holds it now. Stop at the gate; what runs in a region cannot be called back.
            self.gate.close()
            self.lease = self._closing = self._revoked = self._unrestored = False
            state = "waiting" if self._wanted else "evacuated" if self._evacuated else "resident"
            self._trace.change(state, "the new broker has lent the GPU to another client")
        elif self._unrestored or (self.lease and self.gate.closed and self._evacuated):
            self._restore()
        elif self.lease and self.gate.closed:
            self._run_on("the new broker has confirmed the lease")
        self._room_changed.notify_all()
        self._request()

    def _refused(self, message: Refused) -> None:
        from acb.client.runtime import warn_once

        self._requested = False
        if not self._welcomed and os.environ.get("ACB_BROKER") != "require":
            warn_once(
                "refused", f"the GPU broker does not take this process, which goes on without it: {message.reason}"
            )
            self._alone = True
            self._let_all_in("the broker refused")
        else:
            self._refusal = message.reason
            self.gate.refuse()

    def _request(self) -> None:
        """Ask for a lease if one is wanted and has not been asked for."""
        if self._wanted and self._welcomed and not self.lease and not self._requested:
            self._requested = True
            self._send(Request(self._need))

    def _granted(self, grant: Grant) -> None:
        self.gpu, self._headroom = grant.gpu, grant.headroom
        self.gpus = tuple(map(int, grant.gpus.split(","))) if grant.gpus else (grant.gpu,)
        self.lease, self._requested, self._revoked = True, False, False
        self._need, self._restore_wait, self._stall_after = 0, 0.0, STALL
        self._say_at = time.monotonic() + HEARTBEAT
        if not self._simulated and grant.visible:
            visible.bind(grant.visible)  # without effect, and without harm, once CUDA has started
        if self._evacuated:
            self._restore()
        else:
            self._run_on()

    def _run_on(self, cause: str = "granted") -> None:
        """All memory is there: let the program's threads in."""
        self._wanted = self._closing = self._unrestored = False
        self._sum("reset_peak")
        self._trace.change("running", cause, gpu=self.gpu)
        self.gate.open(watched=self._revoked or self._trace.enabled)

    def _restore(self) -> None:
        """Bring all memory back, then let the program in; without room for it, ask for some and try again."""
        from acb.client.runtime import warn_once

        if not self._unrestored:
            self._trace.change("restoring", "granted", gpu=self.gpu, bytes=self._evacuated)
        before = self._resident()
        start = time.monotonic()
        moved = 0
        try:
            for evacuator in self._evacuators:
                try:
                    moved += int(evacuator.restore())
                except MemoryError:
                    raise
                except Exception as error:  # what it lost the program will see when it touches it; it must not hang
                    warn_once(f"restore:{evacuator.name}", f"memory of {evacuator.name} cannot be restored: {error!r}")
        except MemoryError:
            self._evacuated = max(1, self._evacuated - max(0, self._resident() - before))
            self._no_room()
            return
        seconds = time.monotonic() - start
        self._evacuated = 0
        self._swap.moved(seconds)
        self._run_on()
        self._send(Restored(self._resident(), moved, seconds))

    def _no_room(self) -> None:
        """Some memory must still come back: have the broker make room, and try again, at ever longer intervals."""
        self._unrestored = True
        self._restore_at = time.monotonic() + self._restore_wait
        self._restore_wait = min(MAX_RETRY, 2 * self._restore_wait + 0.05)
        if self._welcomed:
            self._room_due += 1
            self._send(MoreRoom(self._resident(), self._evacuated))

    def _room_answered(self, message: Room) -> None:
        self._room_due = max(0, self._room_due - 1)
        if not self._unrestored and not self._room_due:  # else the answer is to a question that nobody waits with
            self._room = (message.granted, message.reason)
            self._room_changed.notify_all()

    def _revoke(self, message: Revoke) -> None:
        if not self.lease:
            return  # it crossed our Yield
        self._revoked, self._swap_expected = True, message.swap
        self._preempt_at = time.monotonic() + message.quantum
        if not self._closing and not self.gate.closed:
            self.gate.watch()
        self._say_what_is_held()  # from which follows how long it is protected

    def _evacuate(self) -> None:
        """Move all memory to the host. No lease is held, and no thread is inside."""
        self._evacuation_due = False
        before = self._resident()
        self._trace.change("evacuating", "another client needs the room", bytes=before)
        start = time.monotonic()
        reason = ""
        moved = 0
        try:
            for evacuator in self._evacuators:
                evacuator.synchronize()
            moved = evacuate_all(self._evacuators)
        except EvacuationError as error:
            moved, reason = error.moved, str(error) or "refused"
        except Exception as error:
            reason = f"failed: {error!r}"
        seconds = time.monotonic() - start
        self._evacuated += moved
        if not reason:
            self._swap.moved(seconds)
        left = self._resident()
        self._trace.change(
            "waiting" if self._wanted else "evacuated" if moved or not left else "resident",
            reason or "evacuated", bytes=moved, left=left, seconds=round(seconds, 6),
        )  # fmt: skip
        self._send(Evacuated(left, moved, seconds, reason[:1000]))

    # --- giving the lease back --------------------------------------------------------------------------------------

    def _consider(self, now: float) -> float | None:
        """Give the lease back if it is time to; else say in how many seconds to look again (None: not by the clock)."""
        if not self.lease:
            if self._evacuation_due and not self.gate.busy():  # else idle() wakes us
                self._evacuate()
            return None
        if self._unrestored:
            return self._consider_restoring(now)
        if not self._revoked:
            return self._observe(now) if self._trace.enabled else None
        preempt = now >= self._preempt_at
        if self._closing:
            if self.gate.busy():
                return self._consider_stall(now)  # idle() wakes us before
            self._give_up("preempted after its quantum", wants=self._wanted)
            return None
        if self.gate.busy():
            if not preempt:
                return min(self._linger(), self._preempt_at - now)
            self._closing, self._closed_at = True, now
            self.gate.close()
            return 0.0
        if self.gate.expected() and now - self.gate.last_exit < MAX_LINGER:
            return MIN_LINGER  # or on a busy machine a lease could go back, time and again, before it was used
        ended = self._ended_at >= self.gate.last_exit
        said = ended or self.gate.marked()
        wait = 0.0 if said else self._linger() - (now - self.gate.last_exit)
        if wait > 0 and not preempt:
            return max(min(wait, self._preempt_at - now), 0.0)
        self.gate.close()
        if self.gate.busy():  # a thread was faster
            if preempt:
                self._closing, self._closed_at = True, now
            else:
                self._reopen()
            return MIN_LINGER
        cause = "the program said so" if ended else "CPU phase" if said else "idle" if wait <= 0 else "preempted"
        self._give_up(cause, wants=self._wanted)
        return None

    def _consider_stall(self, now: float) -> float:
        """The gate is closed and a thread inside: it may wait for one that stands outside, as a forward does that
        computes on threads of its own. After a while let them in, and try again later, with more patience each time.
        """
        left = self._closed_at + self._stall_after - now
        if left > 0 or not self.gate.waiting():
            return max(left, STALL)
        self._stall_after = min(MAX_STALL, 2 * self._stall_after)
        self._preempt_at = now + STALL
        self._reopen()
        return STALL

    def _give_up(self, cause: str, wants: bool) -> None:
        """Hand the lease back. The gate is closed and no thread is inside."""
        for evacuator in self._evacuators:
            try:
                evacuator.synchronize()
            except Exception:
                pass  # a device that fails is done with its work; the program will see the error itself
        resident = self._resident()
        phase = self.gate.last_exit - self.gate.phase_began
        self.lease = self._revoked = self._closing = self._unrestored = False
        self._swap.yielded()
        self._requested = wants
        self._trace.change("waiting" if wants else "resident" if resident else "detached", cause, bytes=resident)
        self._send(Yield(resident, self._sum("peak"), wants, cause, phase if phase > 0 else -1.0))

    def _consider_restoring(self, now: float) -> float | None:
        """The lease is held, but memory must come back first and there was no room for it."""
        if self._room_due:
            return None  # the broker makes room
        if now >= self._restore_at:
            self._restore()
            return 0.0
        if self._revoked:
            self._give_up("no room to restore", wants=True)
            return None
        return self._restore_at - now

    def _reopen(self) -> None:
        """The lease stays for now."""
        if self._unrestored:
            return
        self._closing = self._wanted = False
        self.gate.open(watched=self._revoked or self._trace.enabled)

    def _linger(self) -> float:
        swap = self._swap_expected if self._swap_expected >= 0 else self._swap.estimate(self._resident())
        linger = choose_linger(self.gate.gaps, swap)
        self.gate.long_gap = max(LONG_GAP, linger)
        return linger

    def _observe(self, now: float) -> float:
        """Without anybody waiting, only for the trace: tell running from idle."""
        idle = not self.gate.busy() and now - self.gate.last_exit > TRACE_LINGER
        if idle and self._trace.state == "running":
            self._trace.change("idle", "no region", at=self.gate.last_exit)
        elif not idle and self._trace.state == "idle":
            self._trace.change("running", "GPU entry", at=self.gate.last_entry)
        return TRACE_LINGER

    def _resident(self) -> int:
        return self._sum("resident")

    def _sum(self, what: str) -> int:
        """Bytes, over all frameworks; one that cannot say counts nothing."""
        total = 0
        for evacuator in self._evacuators:
            try:
                total += int(getattr(evacuator, what)() or 0)  # a framework's own kind of integer cannot be sent
            except Exception as error:
                from acb.client.runtime import warn_once

                warn_once(f"{what}:{evacuator.name}", f"memory of {evacuator.name} cannot be measured: {error!r}")
        return total


def _hint() -> int:
    """What ``acb-launch --gpu-memory`` said, in bytes; 0: nothing."""
    try:
        return config.parse_size(os.environ.get("ACB_GPU_MEMORY") or "0")
    except config.ConfigError:
        return 0


def _start_broker(python: str) -> str:
    """Run ``gpu_assigner start``, with the options of the broker that died, if one did.

    Returns why it failed, or ''.
    """
    import subprocess

    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LD_PRELOAD"))}
    home = os.environ.get("ACB_HOME") or os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment |= {"ACB_DISABLE": "1", "PYTHONPATH": home}
    environment.pop(visible.VARIABLE, None)  # it may be one GPU of this process's, and the broker has more
    if (setting := visible.brokers()) is not None:
        environment[visible.VARIABLE] = setting
    command = [python, "-m", "acb.cli.gpu_assigner", "start", "--recover"]
    try:
        done = subprocess.run(
            command, env=environment, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
