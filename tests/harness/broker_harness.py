"""Real brokers and real programs for tests: start them, talk to them, wait for what is to happen, leave nothing."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from acb.cli.gpu_assigner import talk
from acb.config import ConfigError
from acb.devices.simulated import Card
from acb.protocol import Holds, Message, decode, encode

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = REPOSITORY / "tests" / "integration" / "programs"
LEASER = PROGRAMS / "leaser.py"
PATIENCE = 60.0
MIB = 1 << 20
T = TypeVar("T")


def wait_until(what: str, true: Callable[[], T | None]) -> T:
    """The first true value of `true()`; fails after a while."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if value := true():
            return value
        time.sleep(0.002)
    raise AssertionError(f"waited in vain for {what}")


def one_line(text: str) -> str:
    """What gpu_assigner has said, which is one line."""
    assert text.count("\n") == 1, text
    assert text.startswith("gpu_assigner: "), text
    return text


def fill(path: Path) -> None:
    """Make a file as large as the disk allows."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


class Site:
    """A runtime directory of its own, with whatever runs in it, on simulated GPUs. (On real ones: see nvidia_site.)"""

    place = "simulated"
    unit = MIB
    """Bytes: tests take a GPU to have 64 of these, as a simulated one of 64 MiB has."""

    patience = PATIENCE
    """Seconds for a program to answer."""

    slack = 0
    """Bytes that a process may have on a GPU besides what it knows of, such as CUDA's context."""

    def __init__(self, memory: str = "card") -> None:
        """`memory` of the leasers: bytes on a simulated "card", or tensors of PyTorch's: "torch"."""
        self.memory = memory
        self.directory = Path(tempfile.mkdtemp(prefix="acb-"))
        self.socket = self.directory / "broker.sock"
        self.programs: list[Program] = []
        self.peers: list[Peer] = []
        self.brokers: list[subprocess.Popen[bytes]] = []
        self.log = Path(tempfile.mkdtemp(prefix="acb-log-"))

    def environment(self, **changes: str | None) -> dict[str, str]:
        """This process's, without what would disturb, and with this site's directory; None removes a name."""
        environ = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("ACB_", "SLURM_", "PJM_", "XDG_RUNTIME", "CUDA_VISIBLE", "JAX_PLATFORMS"))
        }
        environ |= {"ACB_RUNTIME_DIR": str(self.directory), "PYTHONPATH": str(REPOSITORY)}
        environ["ACB_STATE_DIR"] = str(self.log / "state")
        for key, value in changes.items():
            environ.pop(key, None)
            if value is not None:
                environ[key] = value
        return environ

    # --- the broker -------------------------------------------------------------------------------------------------

    def gpu_assigner(self, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "acb.cli.gpu_assigner", *arguments],
            env=self.environment(**changes),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def which(self, gpus: str) -> list[str]:
        """The broker's options for these GPUs."""
        return ["--simulate-gpus", gpus]

    def start(self, gpus: str = "1x64MiB", *options: str, **changes: str | None) -> int:
        """Start a broker in the foreground, as a child, and wait until it answers; its process id."""
        with open(self.log / f"broker{len(self.brokers)}", "wb") as stream:
            process = subprocess.Popen(
                [
                    sys.executable,
                    *("-m", "acb.cli.gpu_assigner", "start", "--foreground", *self.which(gpus), *options),
                ],
                env=self.environment(**changes),
                stderr=stream,
            )
        self.brokers.append(process)

        def answers() -> bool:
            assert process.poll() is None, self.broker_log()
            report = self.report()
            return report is not None and report["pid"] == process.pid

        wait_until("the broker to answer", answers)
        return process.pid

    @staticmethod
    def children(pid: int) -> list[int]:
        """The processes that this one has started."""
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def broker_log(self) -> str:
        """What the last broker has said, but for its start and its end."""
        lines = (self.log / f"broker{len(self.brokers) - 1}").read_text().splitlines(keepends=True)
        return "".join(
            line for line in lines if not line.startswith(("gpu_assigner: started ", "gpu_assigner: ended "))
        )

    def kill_broker(self, number: int = signal.SIGKILL) -> None:
        """Send the broker a signal, and wait for its end."""
        self.brokers[-1].send_signal(number)
        self.brokers[-1].wait(PATIENCE)

    def report(self) -> dict[str, Any] | None:
        """What the broker says, as ``status --json`` does; None without a broker."""
        with contextlib.suppress(ConfigError):
            return talk.status(self.socket)
        return None

    def client(self, program: Program) -> dict[str, Any]:
        """The broker's view of a program; {} while it does not know it."""
        report = self.report() or {"clients": []}
        return next((c for c in report["clients"] if c["pid"] == program.pid), {})

    def wait_for(self, program: Program, *states: str) -> dict[str, Any]:
        """Wait until the broker sees the program in one of these states."""
        return wait_until(
            f"process {program.pid} to be {' or '.join(states)}; the broker sees {self.report()}",
            lambda: (seen := self.client(program)).get("state") in states and seen,
        )

    def card(self, ordinal: int = 0) -> Card:
        """A simulated GPU."""
        [directory] = self.directory.glob("simulated-*")
        return Card.open(directory, ordinal)

    def processes(self, ordinal: int = 0) -> dict[int, int]:
        """Bytes on a GPU of each process that has used it, as the device says."""
        with self.card(ordinal) as card:
            return dict(card.processes())

    def used(self, ordinal: int = 0) -> int:
        """Bytes on a GPU that this site's processes hold, as the device says."""
        return sum(self.processes(ordinal).values())

    def capacity(self, ordinal: int = 0) -> int:
        """Bytes of a GPU."""
        with self.card(ordinal) as card:
            return card.capacity

    def violations(self) -> list[Any]:
        """What the referees of all GPUs have noted."""
        found: list[Any] = []
        for ordinal in range(len((self.report() or {"gpus": [{}]})["gpus"])):
            with self.card(ordinal) as card:
                found += card.violations()
        return found

    def connect(self) -> Peer:
        """A connection of the test's own to the broker."""
        self.peers.append(Peer(self.socket))
        return self.peers[-1]

    @staticmethod
    def complaints(program: Program) -> str:
        """What a program that ends well has said on stderr that it should not have."""
        return program.errors

    # --- programs ---------------------------------------------------------------------------------------------------

    def program(self, **changes: str | None) -> Program:
        """Start a leaser that finds this site's broker."""
        if self.memory == "torch":
            return self.launch(LEASER, LEASER_MEMORY="torch", **changes)
        simulated = next(iter(self.directory.glob("simulated-*")), None)
        variables: dict[str, str | None] = {
            "ACB_BROKER": "require",
            "ACB_SOCKET": str(self.socket),
            "ACB_SIMULATED": str(simulated) if simulated else None,
        }
        return self._begin([sys.executable, "-W", "error", str(LEASER)], {**variables, **changes})

    def launch(self, script: Path, *options: str, **changes: str | None) -> Program:
        """Start a program that obeys, under acb-launch with these options."""
        command = [sys.executable, "-m", "acb.launcher", *options, "--", sys.executable, "-W", "ignore", str(script)]
        return self._begin(command, {"ACB_BROKER": "require", "OMP_NUM_THREADS": "1", **changes})

    def _begin(self, command: list[str], changes: dict[str, str | None]) -> Program:
        program = Program(command, self.environment(**changes), self.patience)
        self.programs.append(program)
        return program

    def leave_nothing(self) -> None:
        """End all that still runs, and remove the directory."""
        for peer in self.peers:
            peer.close()
        for program in self.programs:
            program.kill()
        for broker in self.brokers:
            if broker.poll() is None:
                broker.kill()
            broker.wait(PATIENCE)
        with contextlib.suppress(
            FileNotFoundError, ValueError, ProcessLookupError
        ):  # one that a program or a command has started
            os.kill(int((self.directory / "broker.pid").read_text()), signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.log)


class Program:
    """A running leaser, or another program that obeys as it does."""

    def __init__(self, command: list[str], environment: dict[str, str], patience: float = PATIENCE) -> None:
        self._patience = patience
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.errors = ""
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._read), threading.Thread(target=self._read_errors)]
        for thread in self._threads:
            thread.start()
        assert self.next() == {"ready": self.pid}

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(json.loads(line))
        self._said.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.errors += line

    def next(self) -> dict[str, Any]:
        """The next thing it says."""
        try:
            said = self._said.get(timeout=self._patience)
        except queue.Empty:
            raise AssertionError(f"process {self.pid} says nothing; stderr: {self.errors}") from None
        assert said is not None, f"process {self.pid} has ended; stderr: {self.errors}"
        return said

    def begin(self, *command: Any) -> None:
        """Have it do something, and do not wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def end(self, command: str) -> Any:
        """Wait until it has done what was begun; the result. Fails when that fails."""
        said = self.next()
        assert said.get("done") == command, (said, self.errors)
        return said["result"]

    def do(self, *command: Any) -> Any:
        """Have it do something; the result."""
        self.begin(*command)
        return self.end(command[0].lstrip("!&"))

    def fails(self, *command: Any) -> tuple[str, str]:
        """Have it do something that fails: exception type and message."""
        self.begin(*command)
        said = self.next()
        assert said.get("failed") == command[0], said
        return said["kind"], said["message"]

    def holds_at(self, step: str) -> None:
        """Wait until its evacuator stands at this step."""
        said = self.next()
        assert said == {"step": step}, said

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send a signal, wait for the end; the exit status."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self.finish()

    def finish(self) -> int:
        """Let it end by itself; the exit status."""
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        status = self._process.wait(PATIENCE)
        for thread in self._threads:
            thread.join(PATIENCE)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        return status

    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None


def quiet_end(*programs: Program) -> None:
    """They end well, and have said nothing."""
    for program in programs:
        assert program.finish() == 0, program.errors
        assert program.errors == ""


class Peer:
    """The test itself, connected to a socket as a client is."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))

    def send(self, message: Message) -> None:
        self.socket.send(encode(message))

    def receive(self) -> Message | None:
        """The next message; None when the other end has closed."""
        try:
            packet = self.socket.recv(1 << 17)
        except ConnectionError:
            return None
        return decode(packet) if packet else None

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class FakeBroker:
    """A broker that does what the test says, at a site's socket: for orders of messages that are rare in life."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.settimeout(PATIENCE)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self.path = path
        self._peer: socket.socket | None = None

    def accept(self) -> None:
        """Take the next connection."""
        self.hang_up()
        self._peer, _ = self._listener.accept()
        self._peer.settimeout(PATIENCE)

    def send(self, *messages: Message) -> None:
        assert self._peer is not None
        for message in messages:
            self._peer.send(encode(message))

    def receive(self) -> Message:
        """The next message, but for what the program says now and then of its memory."""
        assert self._peer is not None
        while True:
            packet = self._peer.recv(1 << 17)
            assert packet, "the program has closed its connection"
            message = decode(packet)
            if not isinstance(message, Holds):
                return message

    def silent(self) -> bool:
        """Whether the program has said nothing more until now, but of its memory."""
        assert self._peer is not None
        while select.select([self._peer], [], [], 0)[0]:
            packet = self._peer.recv(1 << 17, socket.MSG_PEEK)
            if not packet or not isinstance(decode(packet), Holds):
                return False
            self._peer.recv(1 << 17)
        return True

    def hang_up(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    def close(self) -> None:
        self.hang_up()
        self._listener.close()
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def site(kind: type[Site] = Site, memory: str = "card") -> Iterator[Site]:
    """A site that leaves nothing behind."""
    place = kind(memory)
    try:
        yield place
    finally:
        place.leave_nothing()
