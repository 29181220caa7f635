"""The program that benchmarks.overhead runs with and without acb: PyTorch training steps and JAX calls, on request.

It reads one JSON object a line from stdin and answers each with one on stdout. It knows of acb only what it takes to
gate the CPU, where there is no GPU (benchmarks.gpu has it use one, which is gated as it is).
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any


class TorchSteps:
    """An ordinary training loop's step: a multi-layer perceptron, cross entropy, AdamW, the loss read every step.

    By default the tensors are tiny, so that a step is what a GPU's host side is: calls. More layers make it longer.
    """

    def __init__(self, gated: bool, device: str) -> None:
        import torch

        if gated and device == "cpu":
            from acb.hooks import torch as hook

            hook.gate_device_type("cpu")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._torch: Any = torch
        self._device = device
        self._made: dict[tuple[int, int, int], Callable[[], float]] = {}
        self._stray = torch.ones(8, device=device)

    def step(self, layers: int, count: int, width: int = 16, batch: int = 8) -> list[int]:
        """Nanoseconds of each of `count` steps."""
        train = self._made.get((layers, width, batch))
        if train is None:
            train = self._made[layers, width, batch] = self._make(layers, width, batch)
            _times(train, 5)
        return _times(train, count)

    def stray(self, count: int) -> list[int]:
        """Nanoseconds of `count` small operations outside every module, as one figure."""
        x = self._stray
        begin = perf_counter_ns()
        for _ in range(count):
            x * 2
        return [perf_counter_ns() - begin]

    def _make(self, layers: int, width: int, batch: int) -> Callable[[], float]:
        torch = self._torch
        blocks = [module for _ in range(layers) for module in (torch.nn.Linear(width, width), torch.nn.ReLU())]
        model = torch.nn.Sequential(*blocks).to(self._device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        inputs = torch.randn(64, batch, width).to(self._device)
        targets = torch.randint(0, width, (64, batch)).to(self._device)
        turn = 0

        def train() -> float:
            nonlocal turn
            turn = (turn + 1) % 64
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs[turn]), targets[turn])
            loss.backward()
            optimizer.step()
            return float(loss.item())

        return train


class JaxCalls:
    """Calls of a small jitted function, by the fast path in C++, and of one that works for a while."""

    def __init__(self, gated: bool, device: str) -> None:
        import jax

        if gated and device == "cpu":
            from acb.hooks.jax.internals import gate_platform

            gate_platform("cpu")
        self._f = jax.jit(lambda x: x * 2 + 1)
        self._x = jax.numpy.ones(8)
        self._multiply = jax.jit(lambda x, w, loops: jax.lax.fori_loop(0, loops, lambda _, y: y @ w, x))
        self._numpy = jax.numpy
        self._matrices: dict[int, tuple[Any, Any]] = {}
        self.call(100)

    def call(self, count: int) -> list[int]:
        """Nanoseconds of `count` calls, as one figure."""
        f, y = self._f, self._x
        begin = perf_counter_ns()
        for _ in range(count):
            y = f(y)
        y.block_until_ready()
        return [perf_counter_ns() - begin]

    def multiply(self, loops: int, count: int, width: int) -> list[int]:
        """Nanoseconds of each of `count` calls that multiply matrices `loops` times, and are waited for."""
        if width not in self._matrices:
            self._matrices[width] = self._numpy.ones((width, width)), self._numpy.eye(width)
            self.multiply(1, 5, width)
        x, w = self._matrices[width]
        return _times(lambda: self._multiply(x, w, loops).block_until_ready(), count)


def _times(function: Callable[[], object], count: int) -> list[int]:
    stamps = [perf_counter_ns()]
    for _ in range(count):
        function()
        stamps.append(perf_counter_ns())
    return [after - before for before, after in itertools.pairwise(stamps)]


def main() -> None:
    """``python -m benchmarks.steps torch|jax plain|gated [DEVICE]``: by default the CPU; JAX goes by its own choice."""
    framework, gated = sys.argv[1], sys.argv[2] == "gated"
    make: Any = TorchSteps if framework == "torch" else JaxCalls
    subject = make(gated, sys.argv[3] if len(sys.argv) > 3 else "cpu")
    stdout, sys.stdout = sys.stdout, sys.stderr
    if gated:
        _check(framework)
    for line in sys.stdin:
        wish = json.loads(line)
        print(json.dumps(getattr(subject, wish.pop("do"))(**wish)), file=stdout, flush=True)
    if gated:
        from acb.client import runtime

        if runtime.client().agent.gpu is None:
            raise SystemExit("the program has never passed the gate: the figures would be worth nothing")


def _check(framework: str) -> None:
    """Without the hooks in place there is nothing to measure."""
    if not any(type(finder).__name__ == "AcbFinder" for finder in sys.meta_path):
        raise SystemExit(f"acb is not in this {framework} process")


if __name__ == "__main__":
    main()
