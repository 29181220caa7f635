"""What acb costs a program while nobody else wants the GPU.

- Start-up: ``acb-launch python -c pass`` over ``python -c pass``, with a broker running, as it usually is.
- An import that has nothing to do with any framework: one look of acb's finder.
- An open gate: one enter() and exit(), which is what an uncontended region costs at least.
- A PyTorch training step and a call of a jitted JAX function, with acb and without.

There need not be a GPU: the CPU's tensors are put behind the gate instead, so that every module call, optimizer step,
backward pass and stray operation does what it would do for a GPU's. The broker is real and has granted the lease. Only
the arithmetic is not a GPU's; it is kept tiny, so that a step is host time, which is all that acb can add to. (A real
step's device time hides host time, so this is the worst case.)

With and without run side by side, in two processes that take turns of some milliseconds each; what is compared are
neighbouring turns, so that a busy machine slows both alike. Figures are medians; those of the minima are in the JSON
file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report

START_UP_TARGET = 1.5
STEP_TARGET = 0.02
"""At a step of 1 ms."""

STEPS_MS = (1, 5)
TURN_MS = 20
"""How long a process has its turn."""

CALLS = 2000
"""Stray operations, or calls of a jitted function, a turn."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it all, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=(__doc__ or "").split("\n\n")[0])
    report.add_arguments(parser)
    parser.add_argument(
        "--repeats",
        type=report.positive,
        default=60,
        metavar="N",
        help="how often everything is measured (default: 60)",
    )
    options = parser.parse_args(arguments)
    n: int = options.repeats
    with report.broker() as environment:
        figures = {**start_up(n, environment), **import_miss(n), **open_gate(n)}
        figures |= torch_step(n, environment) | jax_call(n, environment)
    report.publish("What acb costs an undisturbed program", _rows(figures), figures, options.json)
    return 0


def _rows(f: dict[str, Any]) -> list[report.Row]:
    rows = [
        report.Row(
            "start-up: acb-launch python -c pass",
            f"{f['startup_ratio']:.2f} times",
            f"at most {START_UP_TARGET}",
            f["startup_ratio"] <= START_UP_TARGET,
            f"{f['startup_ms']:.1f} ms against {f['startup_plain_ms']:.1f} ms",
        ),
        report.Row("an import that is not acb's business", f"{f['import_miss_ns']:.0f} ns"),
        report.Row("an open gate, enter and exit", f"{f['open_gate_ns']:.0f} ns"),
    ]
    if f["torch_step_overhead"] is None:
        rows.append(report.Row("a PyTorch training step", "skipped", remark="PyTorch is not installed"))
    else:
        for ms in STEPS_MS:
            step = f[f"torch_step_{ms}ms"]
            rows.append(
                report.Row(
                    f"a PyTorch training step of about {ms} ms, CPU tensors gated",
                    f"{step['overhead']:+.1%}",
                    f"at most {STEP_TARGET:.0%}" if ms == 1 else None,
                    step["overhead"] <= STEP_TARGET if ms == 1 else None,
                    f"{step['gated_us']:.0f} µs against {step['plain_us']:.0f} µs",
                )
            )
        rows.append(
            report.Row(
                "a PyTorch operation outside modules",
                f"{f['torch_stray_op_ns']:+.0f} ns",
                remark=f"{f['torch_stray_op']['gated_us'] * 1000:.0f} ns against "
                f"{f['torch_stray_op']['plain_us'] * 1000:.0f} ns",
            )
        )
    if f["jax_call_overhead"] is None:
        rows.append(report.Row("a jitted JAX call", "skipped", remark="JAX is not installed"))
    else:
        call = f["jax_call"]
        rows.append(
            report.Row(
                "a jitted JAX call, CPU arrays gated",
                f"{call['overhead']:+.1%}",
                remark=f"{call['gated_us']:.2f} µs against {call['plain_us']:.2f} µs",
            )
        )
    return rows


# --- without a framework ----------------------------------------------------------------------------------------------


def start_up(repeats: int, environment: dict[str, str]) -> dict[str, Any]:
    """`startup_ratio`: of the medians of wall times from spawning to the end.

    The program's Python is that of a fresh virtual environment: in this one an editable install of acb, or whatever
    else begins with Python, may cost far more than the launcher, and hide it.
    """
    with tempfile.TemporaryDirectory(prefix="acb-bench-") as directory:
        venv.create(directory, symlinks=True)
        return _start_up(str(Path(directory, "bin", "python")), repeats, environment)


def _start_up(python: str, repeats: int, environment: dict[str, str]) -> dict[str, Any]:
    beside = Path(sys.executable).with_name("acb-launch")
    launcher = str(beside if beside.exists() else report.ROOT / "launcher" / "acb-launch")
    plain = [python, "-c", "pass"]
    environment = {k: v for k, v in environment.items() if k in ("ACB_RUNTIME_DIR", "PATH", "HOME", "LANG")}
    with_acb: list[float] = []
    without: list[float] = []
    for turn in range(repeats + 1):
        order = [(with_acb, [launcher, *plain]), (without, plain)]
        for times, command in order if turn % 2 else reversed(order):
            seconds = _run(command, environment)
            if turn:  # the first one fills caches
                times.append(seconds * 1000)
    return {
        "startup_ratio": statistics.median(with_acb) / statistics.median(without),
        "startup_ratio_of_minima": min(with_acb) / min(without),
        "startup_ms": statistics.median(with_acb),
        "startup_plain_ms": statistics.median(without),
    }


def _run(command: list[str], environment: dict[str, str]) -> float:
    """Seconds that a command takes; spawned as cheaply as can be, or that would count for both."""
    begin = time.perf_counter()
    pid = os.posix_spawn(command[0], command, environment)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(command)} has failed with status {status}")
    return seconds


def import_miss(repeats: int) -> dict[str, Any]:
    """`import_miss_ns`: one find_spec() of acb's finder for a module that it has no hooks for."""
    from acb.launcher.finder import AcbFinder

    return _nanoseconds("import_miss_ns", AcbFinder(str(report.ROOT)).find_spec, repeats, "f('some.module', None)")


def open_gate(repeats: int) -> dict[str, Any]:
    """`open_gate_ns`: one enter() and exit() of an open gate."""
    from acb.client.gate import Gate

    gate = Gate(lambda: None, lambda: None)
    gate.open()
    return _nanoseconds("open_gate_ns", gate, repeats, "enter(); exit()", "enter, exit = f.enter, f.exit")


def _nanoseconds(name: str, f: Any, repeats: int, statement: str, setup: str = "pass") -> dict[str, Any]:
    count = 10_000
    times = timeit.repeat(statement, setup, repeat=repeats, number=count, globals={"f": f})
    return {name: statistics.median(times) / count * 1e9, f"{name}_min": min(times) / count * 1e9}


# --- with and without -------------------------------------------------------------------------------------------------


def torch_step(repeats: int, environment: dict[str, str]) -> dict[str, Any]:
    """`torch_step_overhead`: of a step of about 1 ms, as a fraction; None without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        return {"torch_step_overhead": None, "torch_stray_op_ns": None}
    figures: dict[str, Any] = {}
    with Pair.on_the_cpu("torch", environment) as pair:
        one = statistics.median(pair.plain.ask({"do": "step", "layers": 8, "count": 100}))
        for ms in STEPS_MS:
            layers = max(1, round(8 * ms * 1e6 / one))
            compared = pair.compare({"do": "step", "layers": layers, "count": TURN_MS // ms}, repeats)
            figures[f"torch_step_{ms}ms"] = {**compared, "layers": layers}
        figures["torch_stray_op"] = stray = pair.compare({"do": "stray", "count": CALLS}, repeats, CALLS)
    return {
        "torch_step_overhead": figures["torch_step_1ms"]["overhead"],
        "torch_stray_op_ns": (stray["gated_us"] - stray["plain_us"]) * 1000,
        **figures,
    }


def jax_call(repeats: int, environment: dict[str, str]) -> dict[str, Any]:
    """`jax_call_overhead`: of a call on the C++ fast path, as a fraction; None without JAX."""
    if importlib.util.find_spec("jax") is None:
        return {"jax_call_overhead": None}
    with Pair.on_the_cpu("jax", environment) as pair:
        compared = pair.compare({"do": "call", "count": CALLS}, repeats, CALLS)
    return {"jax_call_overhead": compared["overhead"], "jax_call": compared}


class Start(NamedTuple):
    """How a process of benchmarks.steps is started."""

    command: Sequence[str]
    environment: Mapping[str, str]


class Pair:
    """Two processes of benchmarks.steps, the one plain, the other gated by acb."""

    def __init__(self, plain: Start, gated: Start) -> None:
        self._stack = contextlib.ExitStack()
        self.plain = self._stack.enter_context(_steps(*plain))
        self.gated = self._stack.enter_context(_steps(*gated))

    @classmethod
    def on_the_cpu(cls, framework: str, environment: dict[str, str]) -> Pair:
        """The tensors are the CPU's own, not a simulated GPU's, whose simulation costs far more than its gating."""
        from acb.launcher.environment import instrumented

        bare = {k: v for k, v in environment.items() if k not in ("ACB_SIMULATED", "PYTHONPATH")}
        command = [sys.executable, "-m", "benchmarks.steps", framework]
        gated = instrumented(bare, {}, sys.executable)
        return cls(Start([*command, "plain"], bare), Start([*command, "gated"], gated))

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def compare(self, wish: dict[str, Any], turns: int, divisor: int = 1) -> dict[str, float]:
        """Have both do the same in turn; microseconds (of one in `divisor`) and the overhead as a fraction of 1.

        `overhead_low` to `overhead_high` is where the median of such ratios lies with 95 % confidence.
        """
        plain: list[float] = []
        gated: list[float] = []
        for process in (self.plain, self.gated):
            process.ask(wish)
        for turn in range(turns):
            order = [(self.plain, plain), (self.gated, gated)]
            for process, medians in order if turn % 2 else reversed(order):
                medians.append(statistics.median(process.ask(wish)) / divisor / 1000)
        ratios = sorted(g / p for g, p in zip(gated, plain, strict=True))
        low, high = _median_within(len(ratios))
        return {
            "overhead": statistics.median(ratios) - 1,
            "overhead_low": ratios[low] - 1,
            "overhead_high": ratios[high] - 1,
            "turns": turns,
            "overhead_of_minima": min(gated) / min(plain) - 1,
            "plain_us": statistics.median(plain),
            "gated_us": statistics.median(gated),
        }


def _median_within(count: int) -> tuple[int, int]:
    """Of so many sorted samples, those between which the median lies with 95 % confidence (order statistics)."""
    reach = 0.98 * count**0.5
    return max(0, math.floor(count / 2 - reach)), min(count - 1, math.ceil(count / 2 + reach) - 1)


class Steps:
    """A running process of benchmarks.steps."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, wish: dict[str, Any]) -> list[float]:
        """Nanoseconds, as it has measured."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(wish) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SystemExit("a process of the benchmark failed; see above")
        times: list[float] = json.loads(answer)
        return times


@contextlib.contextmanager
def _steps(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Steps]:
    process = subprocess.Popen(
        command, env=environment, cwd=report.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield Steps(process)
            assert process.stdin is not None
            process.stdin.close()
            if process.wait(60):
                raise SystemExit("a process of the benchmark failed; see above")
        finally:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
