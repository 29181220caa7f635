"""Random programs: the simulated GPU computes what the CPU computes, and forgets what is deleted."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch: Any = pytest.importorskip("torch")

from acb.config import SimulatedSpec  # noqa: E402
from acb.devices.simulated import Card, create_cards  # noqa: E402
from acb.hooks.torch import simulated  # noqa: E402

CAPACITY = 1 << 20
INDEX = [3, 0, 2]

STEPS: dict[str, Any] = {
    "matmul": lambda x, y, device: x @ y.T @ y,
    "add": lambda x, y, device: x + y,
    "in place": lambda x, y, device: x.clone().mul_(y).add_(1),
    "out": lambda x, y, device: torch.mul(x, y, out=torch.empty(0, device=device)),
    "view": lambda x, y, device: x.T.reshape(4, 4)[1:].flatten()[:12].view(3, 4).repeat(2, 1)[:4],
    "write to a view": lambda x, y, device: _write(x.clone(), y),
    "index": lambda x, y, device: x[torch.tensor(INDEX, device=device)].sum(0) + y,
    "index on the host": lambda x, y, device: x[torch.tensor(INDEX)].sum(0) * y,
    "mask": lambda x, y, device: torch.where(x > 0, y, 0.0),
    "assign": lambda x, y, device: _assign(x.clone(), y),
    "reduce": lambda x, y, device: (x - x.mean(0)) / (y.std() + 1),
    "sort": lambda x, y, device: x.sort(1).values + y.argsort(0),
    "cat": lambda x, y, device: torch.cat([x, y]).chunk(2)[1].contiguous(),
    "softmax": lambda x, y, device: torch.nn.functional.softmax(x, -1) * y.sigmoid(),
    "attention": lambda x, y, device: torch.nn.functional.scaled_dot_product_attention(x[None], y[None], x[None])[0],
    "one hot": lambda x, y, device: x + torch.nn.functional.one_hot((y > 0).sum(1) % 4, 4),
    "random": lambda x, y, device: torch.rand(4, 4, device=device) + torch.randn_like(x) + y,
    "dropout": lambda x, y, device: torch.nn.functional.dropout(x, 0.5) + y,
    "there and back": lambda x, y, device: x.cpu().to(device) + y,
    "other type": lambda x, y, device: x.double().cos().to(x.dtype) + y.half().float(),
    "scalar": lambda x, y, device: x * y.sum().item() / (1 + abs(float(y[0, 0]))),
    "to numpy": lambda x, y, device: torch.from_numpy(x.cpu().numpy() * 2).to(device) + y,
    "new": lambda x, y, device: x.new_tensor([1.0, 2.0, 3.0, 4.0]) + y.new_zeros(4, 4) + torch.eye(4, device=device),
    "complex": lambda x, y, device: torch.fft.fft(torch.complex(x, y)).imag + y,
    "foreach": lambda x, y, device: torch._foreach_add(torch._foreach_mul([x, y], 2.0), [y, x])[0],
    "gradient": lambda x, y, device: _gradient(x, y),
    "big": lambda x, y, device: x + torch.ones(512, 256, device=device)[:4, :4] + y,
}


def _write(x: Any, y: Any) -> Any:
    x[1:3, ::2] = y[1:3, ::2]
    x.T[0].zero_()
    return x


def _assign(x: Any, y: Any) -> Any:
    x[x > 1] = 0.5
    x[torch.tensor(INDEX)] += y[0]
    return x


def _gradient(x: Any, y: Any) -> Any:
    leaf = x.detach().clone().requires_grad_()
    (leaf.tanh() @ y).pow(2).mean().backward()
    return leaf.grad


def run(steps: list[tuple[str, int, int]], device: str) -> list[Any]:
    """Each step takes two earlier values, by number, and makes one; a step that runs out of memory makes none."""
    torch.manual_seed(0)
    values = [torch.randn(4, 4).to(device), torch.randn(4, 4).to(device)]
    for name, left, right in steps:
        made = STEPS[name](values[left % len(values)], values[right % len(values)], device)
        assert made.device.type == device
        values.append(torch.nan_to_num(made).clamp(-1e6, 1e6))
    return [value.cpu() for value in values]


programs = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 20), st.integers(0, 20)), max_size=12)


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Card]:
    directory: Path = tmp_path_factory.mktemp("cards")
    create_cards(directory, SimulatedSpec((CAPACITY,)))
    with Card.open(directory) as card:
        yield card


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(programs)
def test_the_same_as_on_the_cpu(card: Card, steps: list[tuple[str, int, int]]) -> None:
    expected = run(steps, "cpu")
    simulated.install(torch, lambda: card, lambda: card)
    try:
        ledger = simulated.current_ledger()
        found = run(steps, "cuda")
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(expected, found, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(expected, run(steps, "cpu"), strict=True))
        if ledger.entries:
            gc.collect()
        assert ledger.resident() == card.held() == 0
        assert not ledger.entries
        assert not ledger.floating
    finally:
        simulated.uninstall()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(programs, st.integers(0, 3000))
def test_running_out_of_memory_anywhere_leaks_nothing(card: Card, steps: list[tuple[str, int, int]], room: int) -> None:
    simulated.install(torch, lambda: card, lambda: card)
    try:
        filler = torch.empty(CAPACITY - room, dtype=torch.uint8, device="cuda")
        failed = ""
        try:
            run(steps, "cuda")
        except torch.OutOfMemoryError as error:
            failed = str(error)
        assert not failed or "CUDA out of memory" in failed
        assert card.held() == filler.numel()
        del filler
        assert card.held() == 0
    finally:
        simulated.uninstall()
