"""The broker's process: one Unix socket, one loop, the core between what comes in and what goes out."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from acb import processes
from acb._version import __version__
from acb.broker import report
from acb.broker.connection import Connection
from acb.broker.core import Broker, Client, Gpu, Send
from acb.broker.drivertier import Done, DriverTier
from acb.broker.history import History
from acb.broker.journal import Journal, as_typed
from acb.broker.liveness import Liveness
from acb.broker.log import log, log_event
from acb.broker.meter import Meter
from acb.broker.metrics import Metrics
from acb.broker.policies import POLICIES
from acb.broker.recovery import Recovery
from acb.broker.referees import Referee, Referees
from acb.broker.state import Found, Resume, Suspend
from acb.broker.stopped import Stopped
from acb.devices.rooms import CONTEXT
from acb.protocol import (
    MAX_PACKET,
    AskStatus,
    AskStop,
    Goodbye,
    Grant,
    Hello,
    Holds,
    Message,
    MoreRoom,
    Ping,
    Pong,
    ProtocolError,
    Refused,
    Yield,
    decode,
)

NAME_LENGTH = 64
"""Characters of a program's name."""

PROGRAM_LENGTH = 500
"""Characters, the last ones, of the path by which a program is remembered."""

ARGUMENTS_LENGTH = 16
"""Characters of what tells its command lines apart."""

LAST_WORDS = 16
"""Packets that the broker still takes from each client when it ends."""


class Server:
    """Listens at `path` for the GPUs given. serve() returns when it is told to stop."""

    def __init__(
        self,
        path: Path,
        gpus: Sequence[Gpu],
        journal: Journal,
        cards: Sequence[Referee] = (),
        scheduler: str = "fifo",
        quantum: float | None = None,
        description: str = "",
        history: History | None = None,
        driver: DriverTier | None = None,
        meter: Meter | None = None,
        pool: str = "",
    ) -> None:
        """`pool`: the folder of the GPUs, if they are simulated."""
        pool = pool and report.printable(os.path.realpath(pool))
        self._path = path
        self._history = history or History(None)
        context = 0 if meter is None else CONTEXT
        self._core = Broker(gpus, POLICIES[scheduler](quantum), self._history.programs, context, pool)
        self._journal = journal
        self._driver = driver
        self._meter = meter
        self._referees = Referees(self._core, cards, meter, journal, pool)
        self._liveness = Liveness()
        self._stopped = Stopped()
        self._metrics = Metrics()
        self._description = description
        self._started = time.monotonic()
        self._connections: dict[int, Connection] = {}
        self._ids = itertools.count(1)
        self._poller = select.epoll()
        self._by_descriptor: dict[int, Connection] = {}
        self._buffer = memoryview(bytearray(MAX_PACKET + 1))
        self._stopping = ""  # by what
        self._recovery = Recovery(
            self._core, journal, pool, self._referees.holds, lambda: next(self._ids), driver=driver is not None
        )
        self._ending: dict[int, Connection] = {}  # by a descriptor that tells of the end of a client's process
        self._driver_off = False
        self._failures: dict[int, str] = {}  # of clients, by id: why the driver could not do what was last asked of it
        self._full = False  # no further connection can be accepted
        self._listener = self._listen()

    # --- life ------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Run until a signal to end or a client's AskStop. Leaves nothing behind but, to clients, the journal."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._signalled)
        self._poller.register(wake_read, select.EPOLLIN)
        if self._driver is not None:
            self._poller.register(self._driver, select.EPOLLIN)
            self._core.driver_tier(True, time.monotonic(), migrates=self._driver.migrates)
        self._recovery.begin(time.monotonic())
        self._referees.tell(self._recovery.silent_holders())
        what = f"{self._description}, {as_typed(self._journal.options)}"
        log_event("started", f"version {__version__}, process {os.getpid()}, {what}, at {self._path}")
        self._history.check()
        try:
            while not self._stopping:
                for descriptor, events in self._poller.poll(self._timeout()):
                    connection = self._by_descriptor.get(descriptor)
                    if connection is not None:
                        if events & select.EPOLLOUT:
                            connection.flush()
                        self._readable(connection)
                    elif descriptor == self._listener.fileno():
                        self._accept()
                    elif descriptor in self._ending:
                        self._ended(descriptor)
                    elif descriptor == wake_read:
                        os.read(wake_read, 4096)
                    # Else it was closed on behalf of an earlier one of these.
                self._check_recovery()
                if self._driver is not None:
                    self._check_driver(self._driver)
                if self._meter is not None:
                    self._check_meter(self._meter)
                self._check_liveness()
                for news in self._stopped.look(self._core.gpus, self._core.clients, time.monotonic()):
                    log(news)
                if self._core.wake_at is not None and self._core.wake_at <= time.monotonic():
                    self._deliver(self._core.tick(time.monotonic()))
        finally:
            signal.set_wakeup_fd(-1)
            self._close()

    def _signalled(self, number: int, frame: object) -> None:
        self._stopping = self._stopping or f"by {signal.Signals(number).name}"

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._path.unlink(missing_ok=True)  # the caller holds the lock that says there is no other broker
        before = os.umask(0o177)
        try:
            listener.bind(str(self._path))
        finally:
            os.umask(before)
        listener.listen(512)
        listener.setblocking(False)
        self._poller.register(listener, select.EPOLLIN)
        return listener

    def _close(self) -> None:
        self._accept()  # who is just coming is to hear it too, or would start another broker
        for connection in list(self._connections.values()):
            for _ in range(LAST_WORDS):  # it may have ended, too
                if not self._readable(connection):
                    break
        for connection in list(self._connections.values()):
            connection.send(Goodbye(os.getpid()))
            connection.socket.close()
        self._referees.dismiss()
        self._history.save()
        if self._driver is not None:
            self._driver.close()
        self._listener.close()
        self._path.unlink(missing_ok=True)
        if not self._journal.survivors():  # else they keep what they hold, and the next broker must know of them
            self._journal.remove()
        left = len(self._core.clients)
        programs = f"{left} program{'' if left == 1 else 's'} that it knew still run{'s' if left == 1 else ''}"
        log_event("ended", f"{self._stopping or 'by an error'}; {programs if left else 'no program is left'}")

    def _timeout(self) -> float | None:
        """Seconds until something must be looked at, at the latest; None: not before a packet comes."""
        wake_at = self._core.wake_at
        due = self._driver.due() if self._driver is not None else None
        look_at = self._meter.due(self._core.gpus, self._core.clients) if self._meter is not None else None
        ask_at = self._liveness.due(self._core.suspended_clients)
        stopped = self._stopped.due(self._core.gpus, time.monotonic())
        recovers = self._recovery.due()
        wakes = [moment for moment in (wake_at, due, look_at, ask_at, stopped, recovers) if moment is not None]
        return max(0.0, min(wakes) - time.monotonic()) if wakes else None

    def _check_driver(self, driver: DriverTier) -> None:
        """Tell the core what the driver has done; does not wait."""
        for done in driver.done():
            client, now = self._core.clients.get(done.client), time.monotonic()
            if done.unclear:
                self._deliver(self._core.unclear(done.client, now))
                continue
            if client is not None and (done.op != "find" or done.lost):
                self._say_what_fails(client, done)
            if done.op != "resume":
                self._deliver(self._core.suspended(done.client, done.problem, done.seconds, now, lost=done.lost))
            else:
                self._deliver(self._core.resumed(done.client, done.problem, now, lost=done.lost, kept=done.kept))
                if client is not None and self._core.in_doubt(done.client):
                    driver.find(done.client, client.pid, moved=True)
        if driver.unavailable and not self._driver_off:
            self._driver_off = True
            log(f"the driver cannot move memory here: {driver.unavailable}")
            self._deliver(self._core.driver_tier(False, time.monotonic()))

    def _say_what_fails(self, client: Client, done: Done) -> None:
        """Once, however often the same is tried again."""
        what = f"{'suspend' if done.op == 'suspend' else 'resum'}ed: {done.problem}" if done.problem else ""
        if what and what != self._failures.get(client.id):
            log(f"process {client.pid} cannot be {what}")
        self._failures[client.id] = what

    def _check_meter(self, meter: Meter) -> None:
        """Let the core know what really lies on the GPUs."""
        now = time.monotonic()
        due = meter.due(self._core.gpus, self._core.clients)
        if due is None or now < due:
            return
        for client, nbytes in list(meter.look(self._core.gpus, self._core.clients, now)):
            self._deliver(self._core.observed(client, nbytes, now))
        for line in meter.news():
            log(line)

    def _check_liveness(self) -> None:
        """See that a suspended client that cannot ask for its lease gets it all the same."""
        now = time.monotonic()
        due = self._liveness.due(self._core.suspended_clients)
        if due is None or now < due:
            return
        found = self._liveness.look(self._core.suspended_clients, now)
        self._deliver([Send(client, Ping()) for client in found.ping])
        for number in found.blocked:
            client = self._core.clients.get(number)
            if client is not None:
                log(f"process {client.pid} is blocked in the driver, which counts as asking for its lease")
                self._deliver(self._core.blocked(number, now))

    def _check_recovery(self) -> None:
        """The clients of the broker before, that have not spoken."""
        now, due = time.monotonic(), self._recovery.due()
        if due is not None and due <= now:
            self._recovery.look(now, self._deliver, self._find)

    def _find(self, client: int, pid: int) -> None:
        if self._driver is not None:
            self._driver.find(client, pid)

    # --- connections -----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    accepted, _ = self._listener.accept()
                except OSError as error:
                    if isinstance(error, BlockingIOError):
                        raise
                    if error.errno not in (errno.EMFILE, errno.ENFILE):
                        return  # of this connection only: the peer has gone away
                    if not _is_readable(self._listener):
                        return  # at the limit, this error comes also when nobody wants to be accepted
                    if self._drop_silent():
                        continue
                    log(f"cannot accept a connection: {error.strerror}")
                    self._full = True
                    self._poller.unregister(self._listener)
                    return
                pid, uid = _peer(accepted)
                if uid not in (os.getuid(), 0):
                    log(f"refused a connection of process {pid}: it belongs to user id {uid}")
                    accepted.close()
                    continue
                accepted.setblocking(False)
                connection = Connection(next(self._ids), accepted, pid, self._poller)
                self._connections[connection.id] = connection
                self._by_descriptor[accepted.fileno()] = connection

    def _drop_silent(self) -> bool:
        """Make place by dropping the oldest connection that has not said hello; False when there is none."""
        for connection in [c for c in self._connections.values() if c.id not in self._core.clients]:
            while connection.id in self._connections and self._readable(connection):
                pass  # what it has said already counts
            if connection.id not in self._core.clients:
                self._drop(connection)
                return True
        return False

    def _readable(self, connection: Connection) -> bool:
        """Take one packet, the rest in the next turn, after everybody else's. False: there is none."""
        try:
            size = connection.socket.recv_into(self._buffer)
        except BlockingIOError:
            return False
        except OSError:
            size = 0
        if not size:
            self._drop(connection)
            return False
        try:
            message = decode(bytes(self._buffer[:size]))
        except ProtocolError as error:
            log(f"process {connection.pid} sent nonsense and is disconnected: {error}")
            connection.send(Refused(str(error)))
            self._drop(connection)
            return False
        self._take(connection, message)
        return True

    def _drop(self, connection: Connection, *, runs_on: bool = False) -> None:
        """End a connection. `runs_on`: its process may, and keeps what it has until it ends or says hello again."""
        if self._connections.pop(connection.id, None) is None:
            return
        self._poller.unregister(connection.socket)
        del self._by_descriptor[connection.socket.fileno()]
        connection.socket.close()
        if self._full:
            self._full = False
            self._poller.register(self._listener, select.EPOLLIN)
        if connection.id in self._core.clients:
            descriptor = (processes.running if runs_on else processes.ending)(connection.pid)
            if descriptor is None:
                self._forget(connection)
            else:  # what it has on the GPU is only free when it has ended altogether
                self._ending[descriptor] = connection
                self._poller.register(descriptor, select.EPOLLIN)

    def _ended(self, descriptor: int) -> None:
        connection = self._ending.pop(descriptor)
        self._poller.unregister(descriptor)
        os.close(descriptor)
        self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        self._journal.went(connection.pid)
        self._failures.pop(connection.id, None)
        self._history.client_ended()
        self._deliver(self._core.gone(connection.id, time.monotonic()))

    # --- messages --------------------------------------------------------------------------------------------------

    def _take(self, connection: Connection, message: Message) -> None:
        if isinstance(message, AskStatus):
            head = {
                "pid": os.getpid(),
                "socket": str(self._path),
                "uptime_s": round(time.monotonic() - self._started, 3),
                "devices": self._description,
                "options": self._journal.options,
                "totals": self._metrics.report(),
            }
            connection.send(report.status(self._core, head, message.after, time.monotonic(), self._referees.held()))
        elif isinstance(message, AskStop):
            connection.send(Goodbye(os.getpid()))
            self._stopping = "by gpu_assigner stop"
        elif isinstance(message, Pong):
            self._liveness.answered(connection.id)
        else:
            kept = None
            if isinstance(message, Hello):
                self._finish_former(connection)
                # What the kernel says counts, also where the peer lives in another pid namespace.
                name, program = report.printable(message.name[:NAME_LENGTH]), message.program[-PROGRAM_LENGTH:]
                message = replace(
                    message,
                    pid=connection.pid,
                    name=name,
                    program=program,
                    arguments=message.arguments[:ARGUMENTS_LENGTH],
                    pool=report.printable(message.pool),
                )
                kept = self._journal.suspended(connection.pid) if self._driver is not None else None
            else:
                client = self._core.clients.get(connection.id)
                self._learn_context(client, message)
                message = self._referees.corrected(client, message)
            found = Found(kept.nbytes, kept.target) if kept is not None else None
            self._deliver(self._core.handle(connection.id, message, time.monotonic(), found))
            self._metrics.received(message)
            if isinstance(message, Hello) and connection.id in self._core.clients:
                self._journal.came(connection.pid)
                self._recovery.spoke(connection.pid)
                self._referees.note_place(self._core.clients[connection.id])
                if stranded := self._core.clients[connection.id].stranded:
                    log(stranded)
                if kept is not None and self._driver is not None and self._core.in_doubt(connection.id):
                    self._driver.find(connection.id, connection.pid)
                elif self._core.clients[connection.id].lease:
                    self._journal.resumed(connection.pid)  # it runs

    def _learn_context(self, client: Client | None, message: Message) -> None:
        """Before the client's first word of its memory, ask a real GPU what it has there: for its context."""
        if isinstance(message, (Yield, Holds, MoreRoom)) and client is not None and not client.measured and self._meter:
            held = self._meter.held(client.gpus, {client.id: client})
            if client.id in held:
                self._core.context(client.id, message.resident, held[client.id])

    def _finish_former(self, connection: Connection) -> None:
        """A process says hello again: what its former connection still has, its end above all, came before that."""
        if not connection.pid:
            return  # of a pid namespace that is not ours: it might be anybody's
        for former in [c for c in self._connections.values() if c.pid == connection.pid and c.id < connection.id]:
            while former.id in self._connections and self._readable(former):
                pass
        for descriptor, former in list(self._ending.items()):
            if former.pid == connection.pid and processes.start_time(former.pid) is not None:
                self._ended(descriptor)  # it was dropped, and runs on

    def _deliver(self, sends: list[Send]) -> None:
        """Tell the devices who may use them, then the clients what they are to do."""
        self._referees.tell(self._recovery.silent_holders())
        leaving: list[tuple[Connection, bool]] = []
        for send in sends:
            client = self._core.clients.get(send.client)
            connection = self._connections.get(send.client)
            if connection is None and (client is None or not client.absent):
                continue
            if self._driver is not None and client is not None and isinstance(send.message, (Suspend, Resume)):
                self._drive(self._driver, client, send.message)
                continue
            if client is not None and isinstance(send.message, Grant):
                self._journal.resumed(client.pid)  # whatever was noted is over
                self._referees.note_place(client)
            if connection is None:
                continue
            sent = connection.send(send.message)
            self._metrics.sent(send.message, client.granted_at - client.asked_at if client else 0.0)
            if not sent:
                log(f"process {connection.pid} does not read what it is sent and is disconnected")
                leaving.append((connection, True))
            elif client is None and isinstance(send.message, Refused):
                leaving.append((connection, False))
        for connection, deaf in leaving:  # only now: what follows from it is said after all that was decided before
            self._drop(connection, runs_on=deaf)

    @staticmethod
    def _drive(driver: DriverTier, client: Client, message: Suspend | Resume) -> None:
        if isinstance(message, Resume):
            driver.resume(client.id, client.pid, message.source, message.target)
        else:
            needs = {gpu.visible: client.resident for gpu in client.gpus}
            driver.suspend(client.id, client.pid, client.resident, needs)


def _is_readable(listener: socket.socket) -> bool:
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    return bool(poller.poll(0))


def _peer(accepted: socket.socket) -> tuple[int, int]:
    """Process and user id of the other end, from the kernel."""
    credentials = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid
