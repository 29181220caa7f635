"""Where the parts play: a runtime directory, a broker that can be killed, programs, and what is free on the GPU."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from acb.cli.gpu_assigner import talk
from acb.config import ConfigError
from benchmarks import report
from benchmarks.gpu_parts.part import Settings
from benchmarks.gpu_parts.playing import said

PROGRAMS = Path(__file__).parent / "programs"
WORKLOADS = report.ROOT / "benchmarks" / "workloads"
OUT_OF_MEMORY = ("OutOfMemoryError", "RESOURCE_EXHAUSTED", "out of memory")
"""What PyTorch's, JAX's and the driver's errors say."""

PATIENCE = 120.0
"""Seconds for a program to answer: the first use of a GPU, and page-locking, take long."""

T = TypeVar("T")


class StageError(Exception):
    """Something did not start, or did not come in time; one sentence says what."""


class Stage:
    """One GPU, simulated (`spec`, as in ``--simulate-gpus``) or real (None; `gpu` is its UUID).

    By its UUID everybody means the same: 0 is CUDA's fastest, NVML's first on the bus, and the first of those that a
    batch system leaves.
    """

    def __init__(self, settings: Settings) -> None:
        self.spec = settings.spec
        self.gpu = settings.gpu
        self.directory = Path(tempfile.mkdtemp(prefix="acb-gpu-"))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACB_", "SLURM_", "PJM_"))}
        path = [str(report.ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self.environment |= {
            "ACB_RUNTIME_DIR": str(self.directory),
            "ACB_STATE_DIR": str(self.directory),
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
            "OMP_NUM_THREADS": "1",
            "OPENMM_CPU_THREADS": "1",
        }
        self.environment.pop("JAX_PLATFORMS", None)
        if self.spec is None:
            self.environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        self.programs: list[Program] = []
        self.broker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        for program in self.programs:
            program.end()
        self.kill_broker()
        print(said(self.directory), end="", file=sys.stderr)  # into the part's log: this directory is gone at once
        shutil.rmtree(self.directory, ignore_errors=True)

    # --- the broker --------------------------------------------------------------------------------------------------

    def start_broker(self, *options: str) -> None:
        """In the foreground, so that it ends with us. Raises StageError."""
        which = ["--gpu-list", self.gpu] if self.spec is None else ["--simulate-gpus", self.spec]
        command = [sys.executable, "-m", "acb.cli.gpu_assigner", "start", "--foreground", *which, *options]
        log = self.directory / "broker.txt"
        with log.open("ab") as stream:
            self.broker = process = subprocess.Popen(command, env=self.environment, stderr=stream, stdout=stream)

        def answers() -> bool:
            if process.poll() is not None:
                raise StageError(f"the broker does not start: {_last_line(log)}")
            status = self.status()
            return status is not None and status["pid"] == process.pid

        wait_until("the broker's answer", answers, 30)

    def kill_broker(self, number: int = signal.SIGKILL) -> None:
        """And wait for its end; does nothing when none runs."""
        if self.broker is not None:
            self.broker.send_signal(number)
            self.broker.wait(30)
            self.broker = None

    def helper(self) -> int:
        """The process id of the broker's helper for the driver; 0 while it has none."""
        assert self.broker is not None
        children = Path(f"/proc/{self.broker.pid}/task/{self.broker.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def status(self) -> dict[str, Any] | None:
        """What the broker sees; None without one."""
        with contextlib.suppress(ConfigError):
            return talk.status(self.directory / "broker.sock")
        return None

    def client(self, program: Program) -> dict[str, Any]:
        """The broker's view of a program; {} while it does not know it."""
        clients = (self.status() or {"clients": []})["clients"]
        return next((client for client in clients if client["pid"] == program.pid), {})

    def state(self, program: Program) -> str:
        """As the broker sees it; "" while it does not know it."""
        return str(self.client(program).get("state", ""))

    # --- the GPU -----------------------------------------------------------------------------------------------------

    def free(self) -> int:
        """Bytes that nobody holds: NVML's word, or the simulated GPU's own."""
        if self.spec is None:
            from acb.devices.nvml import Nvml

            with Nvml() as nvml:
                return nvml.free(self.gpu)
        from acb.config import parse_simulated
        from acb.devices.simulated import Card

        for directory in self.directory.glob("simulated-*"):
            with Card.open(directory) as card:
                return parse_simulated(self.spec).capacities[0] - card.used()
        return parse_simulated(self.spec).capacities[0]

    # --- programs ----------------------------------------------------------------------------------------------------

    def program(
        self, name: str, script: Path, arguments: Sequence[str] = (), options: Sequence[str] = (), *, acb: bool = True
    ) -> Program:
        """Start one (see command())."""
        command = self.command(name, [sys.executable, str(script), *arguments], options, acb=acb)
        program = Program(name, command, self.environment, self.directory)
        self.programs.append(program)
        return program

    def command(self, name: str, command: Sequence[str], options: Sequence[str] = (), *, acb: bool = True) -> list[str]:
        """What runs `command` under the broker, or without acb (but for the simulated GPU, where there is no other).

        `options` are acb-launch's, under the broker.
        """
        launch = [sys.executable, "-m", "acb.launcher", "--quiet"]
        if acb:
            return [*launch, "--broker", "require", "--name", name, *options, "--", *command]
        if self.spec is not None:
            return [*launch, "--broker", "off", "--simulate-gpus", self.spec, "--", *command]
        return [*command]

    def subject(self, framework: str, name: str = "subject", *options: str, acb: bool = True) -> Program:
        """A program that obeys (see programs/subject.py), ready."""
        program = self.program(name, PROGRAMS / f"{framework}_subject.py", options=options, acb=acb)
        program.ready()
        return program


class Program:
    """A running program, and what it has said."""

    _numbers = iter(range(1, 1 << 30))

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], directory: Path) -> None:
        self.name = name
        self.log = directory / f"{next(self._numbers)}-{name.replace(' ', '_')}.txt"
        self.started = time.monotonic()
        self.ended = 0.0
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        self.pid = self.process.pid
        """Of the program itself: the launcher has become it."""
        self.lines: list[str] = []
        self._said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line = raw.decode(errors="replace")
            self.lines.append(line)
            self._said.put(line)
        self.process.wait()
        self.ended = time.monotonic()
        self._said.put(None)

    # --- of one that obeys -------------------------------------------------------------------------------------------

    def ready(self) -> None:
        """Wait until it obeys."""
        self._next(PATIENCE)

    def begin(self, *command: Any) -> None:
        """Have it do something, and do not wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def result(self, patience: float = PATIENCE) -> Any:
        """Of what was begun. Raises StageError when it failed."""
        said = self._next(patience)
        if "failed" in said:
            raise StageError(f"{self.name}: {said['failed']}: {said['kind']}: {said['message']}")
        return said["result"]

    def do(self, *command: Any) -> Any:
        """Have it do something; the result."""
        self.begin(*command)
        return self.result()

    def _next(self, patience: float) -> dict[str, Any]:
        try:
            line = self._said.get(timeout=patience)
        except queue.Empty:
            raise StageError(f"{self.name} (process {self.pid}) says nothing for {patience:.0f} s") from None
        if line is None:
            raise StageError(f"{self.name} (process {self.pid}) has ended: {self.problem()}")
        said: dict[str, Any] = json.loads(line)
        return said

    # --- of any ------------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """kill -9, and wait for its end."""
        if self.process.poll() is None:
            self.process.kill()
        self._reader.join(30)

    def end(self) -> None:
        """Let one that obeys end by itself; kill any other."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        self._reader.join(1.0 if self.process.poll() is None else 0.1)
        self.kill()

    def outcome(self) -> str:
        """``running``, ``finished``, ``out of memory`` or ``failed``."""
        status = self.process.poll()
        if status is None:
            return "running"
        if status == 0:
            return "finished"
        said = self.log.read_text(errors="replace")
        return "out of memory" if any(word in said for word in OUT_OF_MEMORY) else "failed"

    def problem(self) -> str:
        """The last line of its stderr."""
        return _last_line(self.log) or f"status {self.process.poll()}"

    def wait(self, seconds: float) -> str:
        """Until it has ended, or killed after so many seconds; the outcome."""
        self._reader.join(max(0.0, seconds))
        if self._reader.is_alive():
            self.kill()
            return "not done in time"
        return self.outcome()

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return self.ended - self.started


def wait_until(what: str, true: Callable[[], T | None], patience: float = 60.0, every: float = 0.002) -> T:
    """The first true value. Raises StageError after so many seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if value := true():
            return value
        time.sleep(every)
    raise StageError(f"waited in vain for {what}")


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:400] if lines else ""
