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
from acb.client.evacuation import EvacuationError, Evacuator, evacuate_all
from acb.client.phases import MIN_LINGER, SwapCost, choose_linger
from acb.client.trace import Trace
from acb.protocol import (
    MAX_PACKET,
    VERSION,
    Evacuate,
    Evacuated,
    Goodbye,
    Grant,
    Hello,
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

MAX_GRANT = 1024
"""Bytes: no packet with a grant is longer."""

_receive = socket.SocketType.recv
"""Not socket.socket's, which acb's own hooks replace to learn of what the program waits for."""

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
        self._preempt_at = 0.0
        self._ended_at = 0.0  # when the program last said that its phase is over
        self._closing = False  # the gate is closed although the lease is held
        self._refusal = ""
        self._room: tuple[bool, str] | None = None
        self._room_answered = threading.Condition(self._lock)
        self._unrestored = False
        self._swap = SwapCost()
        self._lost_at: float | None = None  # since when no broker answers
        self._patience = 0.02  # seconds until the next try to connect
        self._restart_at = 0.0
        self._farewell = False
        self._trace = Trace(os.environ.get("ACB_TRACE"), name)

    # --- called by the program's threads ----------------------------------------------------------------------------

    def ask(self) -> None:
        """A thread stands at the closed gate: see that a lease is asked for. Raises LeaseRefused when it cannot be
        had."""
        with self._lock:
            if self._refusal:
                from acb.client.runtime import LeaseRefused

                reason, self._refusal, self._wanted = self._refusal, "", False
                raise LeaseRefused(reason)
            if not self.gate.closed:
                return  # it was opened while this thread waited for the lock
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
        if not self._reading.acquire(blocking=False):
            return False
        connection = None
        try:
            with self._lock:
                if self._socket is None or self._poller is None or not self._requested or self._evacuated:
                    return False
                connection = self._socket
                self._poller.unregister(connection)
            message = decode(_receive(connection, MAX_GRANT, socket.MSG_PEEK))
            if isinstance(message, Grant):
                with self._lock:
                    self._take(message)
                    _receive(connection, 1)
                return True
        except (OSError, ProtocolError):
            pass  # the agent's thread will see it, too
        finally:
            if connection is not None:
                self._hear(connection)
            self._reading.release()
        return False

    def idle(self) -> None:
        """A thread left its region while the gate is watched, or said that it does something else."""
        if self._closing or self._trace.enabled or self.gate.marked():
            self._wake()

    def reserve(self, nbytes: int) -> None:
        """The next phase will need `nbytes` in all. Raises LeaseRefused when that cannot be had."""
        with self._lock:
            self._need = nbytes
            if not (self.lease and self._headroom < nbytes):
                return
            missing = nbytes - self._resident()
        if missing > 0 and not self.more_room(missing):
            from acb.client.runtime import LeaseRefused

            raise LeaseRefused((self._room or (False, "no broker answers"))[1])

    def end_phase(self) -> None:
        """The program says that its phase is over: give the lease back at once if somebody waits for it."""
        with self._lock:
            self._ended_at = time.monotonic()
            if self.lease and self._revoked:
                self._consider(time.monotonic())

    def more_room(self, nbytes: int) -> bool:
        """Ask for `nbytes` beyond what is held, and wait for the answer."""
        if threading.current_thread() is self._thread:
            return False
        with self._lock:
            if not self.lease or not self._welcomed:
                return False
            self._room = None
            self._send(MoreRoom(self._resident(), nbytes))
            while self._room is None and self._welcomed:
                self._room_answered.wait()
            if self._room is not None and self._room[0]:
                self._headroom = max(self._headroom, self._resident() + nbytes)
                return True
            return False

    def abandon(self) -> None:
        """In a forked child: drop the parent's connection without a word."""
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
        self._thread.start()

    def _wake(self) -> None:
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        while True:
            try:
                self._turn()
            except Exception as error:  # whatever it is, the program must not hang because of it
                from acb.client.runtime import warn_once

                warn_once("agent", f"something went wrong while talking to the broker, going on: {error!r}")
                self._disconnected()

    def _turn(self) -> None:
        """Wait for something to happen, and deal with it."""
        if self._socket is None:
            self._connect()
        poller = self._poller
        assert poller is not None
        while True:
            with self._lock:
                wait = self._consider(time.monotonic())
                if self._socket is None:
                    wait = self._patience
            for descriptor, _ in poller.poll(wait):
                if descriptor == self._wake_fd:
                    os.eventfd_read(self._wake_fd)
                elif not self._read():
                    self._disconnected()
            if self._socket is None:
                return

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
        with contextlib.suppress(OSError):
            if self._poller is not None:
                self._poller.register(connection, select.EPOLLIN)
        if self._trace.enabled:
            self._wake()  # a granted lease is watched

    def _connect(self) -> None:
        """Try to reach the broker and say hello; start one if that is wished and none is there."""
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.connect(str(config.socket_path()))
        except (OSError, config.ConfigError) as error:
            connection.close()
            self._missing(error)
            return
        with self._lock:
            self._socket, self._lost_at = connection, None
            self._hear(connection)
            hint = os.environ.get("ACB_GPU_MEMORY", "")
            hello = Hello(
                VERSION,
                os.getpid(),
                self._name,
                memory_hint=int(hint) if hint.isdigit() else 0,
                gpu=-1 if self.gpu is None else self.gpu,
                holding=self.lease,
                resident=self._resident(),
                evacuated=self._evacuated,
                peak=sum(e.peak() for e in self._evacuators) if self.gpu is not None else 0,
            )
            self._send(hello)

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
            problem = _start_broker(os.environ.get("ACB_PYTHON") or sys.executable)
            if not problem:
                self._patience = 0.02
            elif unheard_of:
                warn_once("no-broker", f"no GPU broker runs and none can be started; going on without one ({problem})")
                self._let_all_in()
        if now - self._lost_at > 5 and not self.lease:
            warn_once(
                "waiting-for-broker",
                f"process {os.getpid()} waits for a GPU broker at {config.socket_path()} ({error}); "
                f"start one with: gpu_assigner start",
            )

    def _let_all_in(self) -> None:
        """Never worse than no acb: the gate opens for good."""
        with self._lock:
            self.lease, self._closing = True, False
            self.gate.open()

    def _disconnected(self) -> None:
        """The broker is gone: keep what is held; whoever waits goes on waiting."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that listens
        with self._reading, self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket, self._welcomed, self._requested = None, False, False
            self._lost_at = time.monotonic()
            self._restart_at, self._patience = self._lost_at + RESTART_AFTER, 0.02
            self._room_answered.notify_all()
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
                self._evacuate()
            elif isinstance(message, Uncontended):
                if self.lease and self._revoked:
                    self._revoked = False
                    self._reopen()
            elif isinstance(message, Room):
                self._room = (message.granted, message.reason)
                self._room_answered.notify_all()
                if self._unrestored:
                    self._restore()
            elif isinstance(message, Welcome):
                self._welcome(message)
            elif isinstance(message, Refused):
                self._refused(message)
            elif isinstance(message, Goodbye):
                self._farewell = True
            else:
                raise ProtocolError(f"a broker may not send {message.type} messages")

    def _welcome(self, message: Welcome) -> None:
        self._welcomed, self._farewell = True, False
        if self.lease and not message.lease:
            # Another holds it now. Stop at the gate; what runs in a region cannot be called back.
            self.gate.close()
            self.lease = self._closing = self._revoked = False
        self._request()

    def _refused(self, message: Refused) -> None:
        from acb.client.runtime import warn_once

        self._requested = False
        if not self._welcomed and os.environ.get("ACB_BROKER") != "require":
            warn_once(
                "refused", f"the GPU broker does not take this process, which goes on without it: {message.reason}"
            )
            self._let_all_in()
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
        self.lease, self._requested, self._revoked = True, False, False
        if not self._simulated and os.environ.get("CUDA_VISIBLE_DEVICES") != (grant.visible or None):
            # Read by CUDA when it starts in this process; without effect, and without harm, after that.
            os.environ["CUDA_VISIBLE_DEVICES"] = grant.visible
        if self._evacuated:
            self._restore()
        else:
            self._run_on()

    def _run_on(self) -> None:
        """All memory is there: let the program's threads in."""
        self._wanted = self._closing = False
        for evacuator in self._evacuators:
            evacuator.reset_peak()
        self._trace.change("running", "granted", gpu=self.gpu)
        self.gate.open(watched=self._revoked or self._trace.enabled)

    def _restore(self) -> None:
        self._unrestored = False
        self._trace.change("restoring", "granted", gpu=self.gpu, bytes=self._evacuated)
        start = time.monotonic()
        try:
            moved = sum(evacuator.restore() for evacuator in self._evacuators)
        except MemoryError as error:
            if self._room is not None and not self._room[0]:
                # There is no room and there will be none: let others use the GPU and come back later.
                self._room = None
                self._give_up(f"no room to restore: {error}", wants=True)
            else:
                self._unrestored = True
                self._room = None
                self._send(MoreRoom(self._resident(), self._evacuated))
            return
        seconds = time.monotonic() - start
        self._evacuated = 0
        self._swap.moved(seconds)
        self._run_on()
        self._send(Restored(self._resident(), moved, seconds))

    def _revoke(self, message: Revoke) -> None:
        if not self.lease:
            return  # it crossed our Yield
        self._revoked = True
        self._preempt_at = time.monotonic() + message.quantum
        if not self._closing and not self.gate.closed:
            self.gate.watch()

    def _evacuate(self) -> None:
        before = self._resident()
        self._trace.change("evacuating", "another client needs the room", bytes=before)
        start = time.monotonic()
        reason = ""
        moved = 0
        try:
            if self.lease or self.gate.busy():
                raise EvacuationError("the program is using the GPU")
            for evacuator in self._evacuators:
                evacuator.synchronize()
            moved = evacuate_all(self._evacuators)
        except EvacuationError as error:
            reason = str(error) or "refused"
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
        self._send(Evacuated(left, moved, seconds, reason))

    # --- giving the lease back --------------------------------------------------------------------------------------

    def _consider(self, now: float) -> float | None:
        """Give the lease back if it is time to; else say in how many seconds to look again (None: not by the clock)."""
        if not self.lease or self._unrestored:
            return None
        if not self._revoked:
            return self._observe(now) if self._trace.enabled else None
        preempt = now >= self._preempt_at
        if self._closing:
            if self.gate.busy():
                return None  # idle() wakes us
            self._give_up("preempted after its quantum", wants=self._wanted)
            return None
        if self.gate.busy():
            if not preempt:
                return min(self._linger(), self._preempt_at - now)
            self._closing = True
            self.gate.close()
            return 0.0
        ended = self._ended_at >= self.gate.last_exit
        said = ended or self.gate.marked()
        wait = 0.0 if said else self._linger() - (now - self.gate.last_exit)
        if wait > 0 and not preempt:
            return max(min(wait, self._preempt_at - now), 0.0)
        self.gate.close()
        if self.gate.busy():  # a thread was faster
            if preempt:
                self._closing = True
            else:
                self._reopen()
            return MIN_LINGER
        cause = "the program said so" if ended else "CPU phase" if said else "idle" if wait <= 0 else "preempted"
        self._give_up(cause, wants=self._wanted)
        return None

    def _give_up(self, cause: str, wants: bool) -> None:
        """Hand the lease back. The gate is closed and no thread is inside."""
        for evacuator in self._evacuators:
            evacuator.synchronize()
        resident = self._resident()
        self.lease = self._revoked = self._closing = False
        self._swap.yielded()
        self._requested = wants
        self._trace.change("waiting" if wants else "resident" if resident else "detached", cause, bytes=resident)
        self._send(Yield(resident, sum(evacuator.peak() for evacuator in self._evacuators), wants, cause))

    def _reopen(self) -> None:
        """The lease stays for now."""
        self._closing = self._wanted = False
        self.gate.open(watched=self._revoked or self._trace.enabled)

    def _linger(self) -> float:
        return choose_linger(self.gate.gaps, self._swap.estimate(self._resident()))

    def _observe(self, now: float) -> float:
        """Without anybody waiting, only for the trace: tell running from idle."""
        idle = not self.gate.busy() and now - self.gate.last_exit > TRACE_LINGER
        if idle and self._trace.state == "running":
            self._trace.change("idle", "no region", at=self.gate.last_exit)
        elif not idle and self._trace.state == "idle":
            self._trace.change("running", "GPU entry", at=self.gate.last_entry)
        return TRACE_LINGER

    def _resident(self) -> int:
        return sum(evacuator.resident() for evacuator in self._evacuators)


def _start_broker(python: str) -> str:
    """Run ``gpu_assigner start``, with the options of the broker that died, if one did.

    Returns why it failed, or ''.
    """
    import subprocess

    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LD_PRELOAD"))}
    home = os.environ.get("ACB_HOME") or os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment |= {"ACB_DISABLE": "1", "PYTHONPATH": home}
    command = [python, "-m", "acb.cli.gpu_assigner", "start", "--recover"]
    try:
        done = subprocess.run(
            command, env=environment, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
