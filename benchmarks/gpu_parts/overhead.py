"""What acb's hooks cost a program on a GPU that nobody else wants: training steps and jitted calls, with and without.

Two processes of benchmarks.steps, one plain and one under acb-launch with a broker of its own, take turns of some
milliseconds; compared are neighbouring turns. Two processes of the very same program can differ by more than acb costs
(on an H100 by 4 % in PyTorch and by 20 % in JAX), for as long as they live: so PAIRS of them are compared, and the
figure is the median of the pairs'. Steps are made so deep that the plain one takes 5 ms on this GPU: once
of tiny tensors, so that all of it is host time, to which alone acb can add, and once of large ones, as in life.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import sys
from typing import Any

from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.stage import Stage
from benchmarks.overhead import Pair, Start

TARGET = 0.01
"""At a step of 5 ms."""

STEP_MS = 5.0
CALL_MS = 1.0
MOST_LAYERS = 400
PAIRS = 3


def run(part: Part) -> None:
    """PyTorch, then JAX."""
    for framework, measure in (("torch", torch_steps), ("jax", jax_calls)):
        if importlib.util.find_spec(framework) is None:
            part.skip(framework, f"not installed: {framework}")
        elif part.left() < 12:
            part.skip(framework, f"only {part.left():.0f} s are left")
        else:
            with Stage(part.settings) as stage:
                stage.start_broker()
                with contextlib.ExitStack() as stack:
                    count = 1 if part.settings.quick else PAIRS
                    measure(part, [stack.enter_context(_pair(stage, framework, n)) for n in range(count)])


def _pair(stage: Stage, framework: str, number: int) -> Pair:
    """Both on the same GPU. Alone, a JAX program would take most of its memory at once, and leave the other none."""
    command = [sys.executable, "-m", "benchmarks.steps", framework]
    plain = stage.command(f"plain{number}", [*command, "plain", "cuda"], acb=False)
    gated = stage.command(f"gated{number}", [*command, "gated", "cuda"])
    environment = stage.environment | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return Pair(Start(plain, environment), Start(gated, stage.environment))


def torch_steps(part: Part, pairs: list[Pair]) -> None:
    """A step of 5 ms, of host time and of the GPU's."""
    turns, count = (8, 4) if part.settings.quick else (40, 8)
    wide = (128, 128) if part.settings.simulate else (1024, 1024)
    for what, width, batch in (("of host time", 16, 8), ("of the GPU's time", *wide)):
        wish = {"do": "step", "layers": 4, "count": count, "width": width, "batch": batch}
        wish["layers"] = _calibrated(pairs[0], wish, "layers", STEP_MS, MOST_LAYERS)
        found = _compared(pairs, wish, turns)
        _tell(part, f"PyTorch training step, 5 ms {what}", found, f"{wish['layers']} layers", TARGET)


def jax_calls(part: Part, pairs: list[Pair]) -> None:
    """A call that does next to nothing, many of them in the queue, and one that is waited for."""
    turns = 8 if part.settings.quick else 40
    count = 200 if part.settings.simulate else 2000
    small = _compared(pairs, {"do": "call", "count": count}, turns, count)
    _tell(part, "jitted JAX call, a small one", small, f"{count} in the queue")
    wish = {"do": "multiply", "loops": 8, "count": 20, "width": 64 if part.settings.simulate else 1024}
    wish["loops"] = _calibrated(pairs[0], wish, "loops", CALL_MS, 1 << 20)
    _tell(
        part, "jitted JAX call of 1 ms", _compared(pairs, wish, turns), f"{wish['loops']} products of {wish['width']}"
    )


def _compared(pairs: list[Pair], wish: dict[str, Any], turns: int, divisor: int = 1) -> dict[str, Any]:
    """The median of what each pair finds; with several, the spread is theirs, which is more than a pair's own."""
    found = [pair.compare(wish, max(8, turns // len(pairs)), divisor) for pair in pairs]
    middle: dict[str, Any] = {name: statistics.median(figures[name] for figures in found) for name in found[0]}
    if len(found) > 1:
        each = [figures["overhead"] for figures in found]
        middle |= {"overhead_low": min(each), "overhead_high": max(each), "pairs": found}
    return middle


def _calibrated(pair: Pair, wish: dict[str, Any], what: str, wanted: float, most: int) -> int:
    """How many of `what` take `wanted` milliseconds, in the plain process: by two tries, since some of it is fixed."""
    for _ in range(2):
        taken = statistics.median(pair.plain.ask(wish)) / 1e6
        wish = {**wish, what: max(1, min(most, round(wish[what] * wanted / taken)))}
    return int(wish[what])


def _tell(part: Part, question: str, figures: dict[str, Any], remark: str, target: float | None = None) -> None:
    part.figures[question] = figures
    words = f"under {target:.0%}" if target else None
    met = figures["overhead"] < target if target else None
    said = f"in {len(figures['pairs'])} pairs of processes" if "pairs" in figures else "with 95 % confidence"
    spread = f"{figures['overhead_low']:+.2%} to {figures['overhead_high']:+.2%} {said}"
    part.tell(question, f"{figures['overhead']:+.2%}", words, met,
              f"{spread}; {figures['gated_us']:.5g} µs against {figures['plain_us']:.5g} µs; {remark}")  # fmt: skip
