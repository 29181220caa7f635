"""The connection: the process's end of the broker's socket. Finds the broker again when it has died, or starts one.

The agent's thread waits here for something to happen; a thread of the program that waits for a grant may read it by
itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

from acb import config
from acb.client import visible
from acb.protocol import MAX_PACKET, Grant, Message, ProtocolError, decode, encode

RESTART_AFTER = 0.5
"""Seconds without a broker, after it died, before a client tries to start one."""

RESTART_EVERY = 10.0
"""Seconds between a client's tries to start one."""

UNANSWERED = 5.0
"""Seconds without an answer to the hello, after which a broker is taken to hang: it needs microseconds."""

OUTAGE = 30.0
"""Seconds that a program short of memory waits for the broker after one that died, before it sees its own error."""

MAX_GRANT = 1024
"""Bytes: no packet with a grant is longer."""

FIRST_PATIENCE = 0.02
"""Seconds between tries to connect, at first."""

_receive = socket.SocketType.recv
"""Not socket.socket's, which acb's own hooks replace to learn of what the program waits for."""


class Listener(Protocol):
    """Whom the connection tells, with the lock held, what happens on it."""

    def heard(self, message: Message) -> None:
        """The broker says something."""

    def lost(self) -> None:
        """The broker is gone."""


class Connection:
    """See the module. `lock` is the listener's; no method but those that say so may be called with it held."""

    def __init__(self, lock: threading.RLock, listener: Listener) -> None:
        self.welcomed = False
        """Whether the broker has answered the hello."""
        self.farewell = False
        """Whether the broker has ended on purpose."""
        self.lost_at: float | None = None
        """Since when no broker answers."""
        self.outside = False
        """The agent's thread waits for other processes, in nobody's C++ code."""
        self._lock = lock
        self._listener = listener
        self._hello_at = 0.0
        self._socket: socket.socket | None = None
        self._poller: select.epoll | None = None  # of the agent's thread: the wake-up call, and the socket
        self._reading = threading.Lock()  # held by the thread that reads the socket and deals with what it says
        self._wake_fd = -1
        self._patience = FIRST_PATIENCE
        self._try_at = 0.0  # when to try to connect next
        self._restart_at = 0.0

    @property
    def up(self) -> bool:
        """Whether there is one."""
        return self._socket is not None

    def prepare(self) -> None:
        """Before the agent's thread starts."""
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = select.epoll()
        self._poller.register(self._wake_fd, select.EPOLLIN)

    def wake(self) -> None:
        """Have wait() return. Any thread, with or without the lock."""
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    # --- talking ----------------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Say something, if anybody is there. With the lock held."""
        if self._socket is not None:
            try:
                self._socket.send(encode(message))
            except OSError:
                pass  # the thread will see the closed connection, and deal with it

    def listen(self, expecting: Callable[[], bool], granted: Callable[[Grant], None]) -> bool:
        """For a thread of the program: wait for a grant here, and deal with it. False: that cannot be, or something
        else has come, which stays for the agent's thread to take.

        A grant is taken off only when it has been dealt with, so that none is lost to a KeyboardInterrupt.
        """
        connection = None
        with self._reading:
            try:
                with self._lock:
                    if self._socket is None or self._poller is None or not expecting():
                        return False
                    connection = self._socket
                    self._poller.unregister(connection)
                message = decode(_receive(connection, MAX_GRANT, socket.MSG_PEEK))
                if isinstance(message, Grant):
                    with self._lock:
                        granted(message)
                        _receive(connection, 1)
                    return True
            except (OSError, ProtocolError):
                pass  # the agent's thread will see it, too
            finally:
                if connection is not None:
                    self._hear(connection)
        return False

    def wait(self, seconds: float) -> bool:
        """For the agent's thread: wait for something to happen, and tell the listener. False: nothing has."""
        assert self._poller is not None
        events = self._poller.poll(seconds)
        if not events and self._socket is not None and self._reading.acquire(blocking=False):
            self._hear(self._socket)
            self._reading.release()
        for descriptor, _ in events:
            if descriptor == self._wake_fd:
                os.eventfd_read(self._wake_fd)
            elif not self._read():
                self.lose()
        return bool(events)

    def _read(self) -> bool:
        """Take one packet of the broker's, unless a thread of the program reads. False: the connection is closed."""
        if self._socket is None or not self._reading.acquire(blocking=False):
            return True
        try:
            packet = _receive(self._socket, MAX_PACKET, socket.MSG_DONTWAIT)
            if packet:
                with self._lock:
                    self._listener.heard(decode(packet))
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

    # --- coming and going -------------------------------------------------------------------------------------------

    def due_in(self, now: float) -> float:
        """Seconds until connect() is to be called."""
        return max(0.0, self._try_at - now)

    def connect(self, hello: Callable[[], Message]) -> Exception | None:
        """Try to reach the broker and say hello. Returns why it did not work."""
        connection = None
        self.outside = True
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.connect(str(config.socket_path()))
        except (OSError, config.ConfigError) as error:
            if connection is not None:
                connection.close()
            return error
        finally:
            self.outside = False
        with self._lock:
            self._socket, self.lost_at = connection, None
            self._hello_at = time.monotonic()
            self._hear(connection)
            self.send(hello())
        return None

    def unanswered(self) -> bool:
        """Whether there is a broker that does not answer the hello."""
        return self.up and not self.welcomed and time.monotonic() - self._hello_at > UNANSWERED

    def welcome(self) -> None:
        """The broker has answered the hello. With the lock held."""
        self.welcomed, self.farewell, self._patience = True, False, FIRST_PATIENCE

    def missing(self, may_start: bool) -> str | None:
        """No broker answers: after a while start one, where that is wished and `may_start`.

        Returns why it could not be started, '' when it could; None: that was not tried.
        """
        now = time.monotonic()
        self._patience = min(1.0, self._patience * 1.5)
        if self.lost_at is None:
            self.lost_at, self._restart_at = now, now  # there has never been one
        mode = os.environ.get("ACB_BROKER", "auto")
        problem = None
        if mode == "auto" and now >= self._restart_at and not self.farewell and may_start:
            self._restart_at = now + RESTART_EVERY
            self.outside = True
            problem = _start_broker(os.environ.get("ACB_PYTHON") or sys.executable)
            self.outside = False
            if not problem:
                self._patience = 0.0
        self._try_at = time.monotonic() + self._patience
        self._patience = max(FIRST_PATIENCE, self._patience)
        return problem

    def lose(self, pause: float = 0.0) -> None:
        """The broker is gone. Try another after `pause` seconds."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that listens
        with self._reading, self._lock:
            if self._socket is not None:
                self._socket.close()
            self._patience = FIRST_PATIENCE if self.welcomed else min(1.0, self._patience * 1.5)
            self._socket, self.welcomed = None, False
            self.lost_at = time.monotonic()
            self._restart_at, self._try_at = self.lost_at + RESTART_AFTER, self.lost_at + max(pause, self._patience)
            self._listener.lost()

    def leave(self) -> None:
        """The process ends. With the lock held."""
        self.welcomed = False  # nobody answers any more
        if self._socket is not None:
            # Left open, for the kernel to close: until then this process still has memory on the GPU.
            self._socket.detach()
            self._socket = None

    def abandon(self) -> None:
        """In a forked child: drop the parent's connection without a word."""
        for descriptor in (self._socket.detach() if self._socket else -1, self._wake_fd):
            if descriptor >= 0:
                os.close(descriptor)
        if self._poller is not None:
            self._poller.close()
        self._socket, self._poller, self._wake_fd, self.welcomed = None, None, -1, False


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
