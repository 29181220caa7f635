"""The demo's three scenes: alone, at once without acb, at once with it."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from acb.cli.acb.demo.progress import Progress
from acb.config import EX_UNAVAILABLE, ConfigError, SimulatedSpec, describe_simulated, format_size

OUT_OF_MEMORY = ("OutOfMemoryError", "RESOURCE_EXHAUSTED")
"""What PyTorch's and JAX's out-of-memory errors say."""

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENMM_CPU_THREADS"), "1")
"""One CPU thread a program, in every scene: otherwise programs would fight for cores, alone or not."""


OPTIONS = {"fold.py": ("--layers", "4"), "fold_jax.py": ("--layers", "6")}
"""Models of about 300 MiB: moving larger ones in and out of a simulated GPU is work that a real one spares the CPU."""


class Stage:
    """Where the demo plays: a runtime directory of its own, so that no other broker is touched. A context manager.

    `check` is called again and again, and raises when the play is to be broken off.
    """

    def __init__(self, out: Path, spec: SimulatedSpec, check: Callable[[], None] = lambda: None) -> None:
        self.out = out
        self.spec = spec
        self.check = check
        self.gpu_words = describe_simulated(spec.capacities)
        self._runtime = tempfile.mkdtemp(prefix="acb-demo-")
        # Without the job's names: a broker in a batch job listens elsewhere in the directory than where it is asked.
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PJM_"))}
        self.environment = {**outside, **ONE_THREAD, "ACB_RUNTIME_DIR": self._runtime}
        self.environment["ACB_STATE_DIR"] = self._runtime
        for name in ("ACB_SOCKET", "ACB_DISABLE", "ACB_BROKER", "ACB_SIMULATED", "ACB_NAME", "JAX_PLATFORMS"):
            self.environment.pop(name, None)
        self.programs: list[Program] = []

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for program in self.programs:
            program.end()
        self.stop_broker()
        shutil.rmtree(self._runtime, ignore_errors=True)

    def start_broker(self) -> None:
        """Raises ConfigError when it does not start."""
        done = self._assigner("start", "--simulate-gpus", str(self.spec))
        if done.returncode:
            raise ConfigError(done.stderr.strip() or "the broker does not start", done.returncode)

    def stop_broker(self) -> None:
        """Does nothing when none runs."""
        self._assigner("stop")

    def status(self) -> dict[str, Any]:
        """What the broker sees."""
        done = self._assigner("status", "--json")
        if done.returncode:
            raise ConfigError(f"the broker has ended before the programs: {done.stderr.strip()}", done.returncode)
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def _assigner(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "acb.cli.gpu_assigner", *arguments]
        return subprocess.run(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,  # a Ctrl-C is not for it: it is what puts things away
        )


class Program:
    """One run of a workload under acb-launch, as a child process."""

    def __init__(self, stage: Stage, name: str, script: str, out: Path, options: Sequence[str]) -> None:
        self.name = name
        self.out = out
        self.ended_t = 0.0  # of time.monotonic(), when that has been seen
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        self._log = out / "log.txt"
        launcher = shutil.which("acb-launch", path=os.path.dirname(sys.executable)) or shutil.which("acb-launch")
        launch = [launcher] if launcher else [sys.executable, "-m", "acb.launcher"]
        import acb

        path = Path(acb.__path__[0]) / "workloads" / script
        target = [sys.executable, str(path), *OPTIONS[script], "--out", str(out), "--device", "cuda"]
        command = [*launch, *options, "--name", name, "--", *target]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=stage.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        stage.programs.append(self)

    @property
    def pid(self) -> int:
        """Of the program itself: the launcher has become it."""
        return self._process.pid

    def state(self) -> str:
        """``computing``, ``finished``, ``out of memory`` or ``failed``."""
        status = self._process.poll()
        if status is None:
            return "computing"
        self.ended_t = self.ended_t or time.monotonic()
        if status == 0:
            return "finished"
        text = self._log.read_text(errors="replace")
        return "out of memory" if any(word in text for word in OUT_OF_MEMORY) else "failed"

    def problem(self) -> str:
        """The last line that a program which failed has left."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"status {self._process.returncode}"

    def end(self) -> None:
        """Kill it if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def results(self) -> dict[str, Path]:
        """What it wrote, but for times and messages."""
        return {p.name: p for p in sorted(self.out.iterdir()) if p.name not in ("summary.json", "log.txt")}


def play(stage: Stage, scripts: Sequence[str], progress: Progress, *, warm_up: bool = True) -> dict[str, Any]:
    """All three scenes; the summary. Without `warm_up` its seconds are not to be believed."""
    kinds = list(dict.fromkeys(scripts))
    without = ["--broker", "off", "--simulate-gpus", str(stage.spec)]
    alone: dict[str, Program] = {}
    alone_s: dict[str, float] = {}
    for kind in kinds:
        name = kind.removesuffix(".py")
        # The first run of all fills the disk's cache and compiles Python files: it would flatter acb to count it.
        for title in (f"0. {kind} alone, to warm up (not counted)", f"1. {kind} alone")[not warm_up :]:
            progress.begin(title)
            program = Program(stage, name, kind, stage.out / "alone" / name, without)
            alone_s[kind] = _watch(stage, [program], progress)
            if program.state() != "finished":
                raise ConfigError(f"{kind} does not run here even alone: {program.problem()}", EX_UNAVAILABLE)
        alone[kind] = program
    progress.begin(f"2. {len(scripts)} at once, without acb")
    crowd = [
        Program(stage, f"{script.removesuffix('.py')} {n}", script, stage.out / "without_acb" / str(n), without)
        for n, script in enumerate(scripts, start=1)
    ]
    without_s = _watch(stage, crowd, progress)
    progress.begin(f"3. {len(scripts)} at once, with acb")
    stage.start_broker()
    trace = stage.out / "trace.jsonl"
    trace.unlink(missing_ok=True)
    start = time.monotonic()
    brokered = [
        Program(
            stage,
            f"{script.removesuffix('.py')} {n}",
            script,
            stage.out / "with_acb" / str(n),
            ["--broker", "require", "--trace", str(trace)],
        )
        for n, script in enumerate(scripts, start=1)
    ]
    with_s = _watch(stage, brokered, progress, brokered=True)
    totals = stage.status()["totals"]
    stage.stop_broker()
    sequential = sum(alone_s[script] for script in scripts)
    summary: dict[str, Any] = {
        "gpu": stage.gpu_words,
        "programs": list(scripts),
        "cores": len(os.sched_getaffinity(0)),
        "alone_wall_s": {kind: round(seconds, 2) for kind, seconds in alone_s.items()},
        "without_acb": {**_count(crowd), "wall_s": round(without_s, 2)},
        "with_acb": {
            **_count(brokered),
            "outputs_identical": all(
                p.state() == "finished" and _same(p, alone[script]) for p, script in zip(brokered, scripts, strict=True)
            ),
            "wall_s": round(with_s, 2),
            "sequential_wall_s": round(sequential, 2),
            "speedup": round(sequential / with_s, 3),
            "evacuations": totals["evacuations"],
            "evacuated_bytes": totals["evacuated_bytes"],
        },
        "trace": {"file": trace.name, "start_t": start, "end_t": start + with_s},
        "processes": [{"pid": p.pid, "name": p.name, "state": p.state(), "end_t": p.ended_t} for p in brokered],
    }
    return summary


def _watch(stage: Stage, programs: Sequence[Program], progress: Progress, *, brokered: bool = False) -> float:
    """Show the programs, as the broker sees them if `brokered`, until all have ended; the seconds that took."""
    start = time.monotonic()
    ended: float | None = None
    while ended is None:
        states = [(program.name, program.state()) for program in programs]
        stage.check()  # only now: a Ctrl-C has ended them, too
        if all(state != "computing" for _, state in states):
            ended = time.monotonic() - start
        elif brokered:
            seen: dict[int, str] = {}
            with contextlib.suppress(ValueError, KeyError):
                seen = {client["pid"]: client["state"] for client in _ask(stage)}
            states = [
                (p.name, seen.get(p.pid, state) if state == "computing" else state)
                for p, (_, state) in zip(programs, states, strict=True)
            ]
        progress.show(states)
        if ended is None:
            _wait_a_little(programs)
    return ended


def _ask(stage: Stage) -> list[dict[str, Any]]:
    """The broker's clients, asked without another process."""
    from acb.cli.gpu_assigner import talk

    report = talk.status(Path(stage.environment["ACB_RUNTIME_DIR"]) / "broker.sock")
    clients: list[dict[str, Any]] = report["clients"] if report else []
    return clients


def _wait_a_little(programs: Sequence[Program]) -> None:
    """Until the picture is due again, or a program ends."""
    for program in programs:
        if program.state() == "computing":
            with contextlib.suppress(subprocess.TimeoutExpired):
                program._process.wait(0.2)
            return


def _count(programs: Sequence[Program]) -> dict[str, int]:
    states = [program.state() for program in programs]
    return {
        "finished": states.count("finished"),
        "out_of_memory": states.count("out of memory"),
        "failed": states.count("failed"),
    }


def _same(one: Program, other: Program) -> bool:
    """Whether both wrote the same files with the same bytes."""
    mine, theirs = one.results(), other.results()
    return bool(mine) and mine.keys() == theirs.keys() and all(
        filecmp.cmp(mine[name], theirs[name], shallow=False) for name in mine
    )  # fmt: skip


def tell(summary: dict[str, Any], stage: Stage, picture: Path, stream: TextIO) -> None:
    """The end of the story, for a person."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, title=f"{len(summary['programs'])} programs on {stage.gpu_words}")
    for column in ("", "finished", "out of memory", "same results as alone", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    without, with_acb = summary["without_acb"], summary["with_acb"]
    count = len(summary["programs"])
    sequential = f"{with_acb['sequential_wall_s']:.1f}"
    table.add_row("one after the other (from the time alone)", f"{count} of {count}", "0", "-", sequential)
    table.add_row("at once, without acb", f"{without['finished']} of {count}", str(without["out_of_memory"]), "-", "-")
    table.add_row(
        "at once, with acb",
        f"{with_acb['finished']} of {count}",
        str(with_acb["out_of_memory"]),
        "yes" if with_acb["outputs_identical"] else "NO",
        f"{with_acb['wall_s']:.1f}",
    )
    console.print(table)
    console.print(
        f"{with_acb['speedup']:.2f} times as fast as one after the other; {summary['cores']} CPU cores bound it, since "
        f"searching, relaxing and the simulated GPU itself run on them. "
        f"{with_acb['evacuations']} evacuations moved {format_size(with_acb['evacuated_bytes'] or 0)}.",
        soft_wrap=True,
    )
    console.print(f"Timeline: {picture}\nSummary:  {stage.out / 'summary.json'}", soft_wrap=True)
