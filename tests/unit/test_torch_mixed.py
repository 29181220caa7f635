"""Gating of a program that uses both: the simulated GPU waits at a closed gate, the CPU never does."""

from __future__ import annotations

import gc
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from acb.client.gate import Gate  # noqa: E402
from acb.config import SimulatedSpec  # noqa: E402
from acb.devices.simulated import Card, create_cards  # noqa: E402
from acb.hooks import torch as hook  # noqa: E402
from acb.hooks.torch import memory, regions, simulated  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
asked = threading.Event()
MIB = 1 << 20


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Card]:
    """A simulated GPU with gating above it, as install() does it."""
    directory = tmp_path_factory.mktemp("cards")
    create_cards(directory, SimulatedSpec((64 * MIB,)))
    with Card.open(directory) as card:
        simulated.install(torch, lambda: card, lambda: card)
        hook.install_gating(regions._open_gate())
        yield card
        hook.uninstall_gating()
        gc.collect()
        simulated.uninstall()


@pytest.fixture
def gate(card: Card) -> Iterator[Gate]:
    """An open gate of this test's own, in a process that uses the GPU."""
    asked.clear()
    gate = Gate(asked.set, lambda: None)
    gate.open()
    regions.bind(gate)
    torch.ones(1, device="cuda")
    yield gate
    gate.open()
    regions.unbind()


class Attempt:
    """A call on a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None

        def run() -> None:
            try:
                call()
            except BaseException as error:
                self.error = error
            self.done.set()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def finish(self) -> None:
        assert self.done.wait(60)
        self.thread.join()
        if self.error is not None:
            raise self.error


def gpu_calls() -> dict[str, Callable[[], Any]]:
    """Ways onto the GPU that there are only where a GPU is beside the CPU."""
    host = torch.ones(4, 4)
    x = torch.ones(4, 4, device="cuda")
    w = torch.ones(4, 4, device="cuda", requires_grad=True)
    on_host = (w @ w).cpu().sum()
    stored = io.BytesIO()
    torch.save(x, stored)
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    late = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    late[1].cuda()

    class Moves(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return self.first(x).cuda() * 2

    moves = Moves()
    return {
        "cuda": lambda: host.cuda(),
        "to name": lambda: host.to("cuda"),
        "to device": lambda: host.to(torch.device("cuda", 0)),
        "to ordinal": lambda: host.to(0),
        "to keyword": lambda: host.to(device="cuda:0"),
        "to like": lambda: host.to(x),
        "cpu": lambda: x.cpu(),
        "factory": lambda: torch.zeros(3, device="cuda"),
        "factory ordinal": lambda: torch.zeros(3, device=0),
        "tensor": lambda: torch.tensor([1.0], device="cuda"),
        "in a list": lambda: torch.stack([x, x]),
        "in place from the GPU": lambda: host.copy_(x),
        "index by a GPU tensor": lambda: x[torch.zeros(2, dtype=torch.long)],
        "module cuda": lambda: nn.Linear(2, 2).cuda(),
        "module to": lambda: nn.Linear(2, 2).to("cuda"),
        "module on the host, argument on the GPU": lambda: nn.Identity()(x),
        "module that moves": lambda: moves(host),
        "module of which only a part is there": lambda: late[1](late[0](host).cuda()),
        "backward from the host": lambda: on_host.backward(retain_graph=True),
        "load": lambda: torch.load(io.BytesIO(stored.getvalue())),
        "load to": lambda: torch.load(io.BytesIO(stored.getvalue()), map_location="cuda"),
        "save": lambda: torch.save(x, io.BytesIO()),
        "storage": lambda: x.untyped_storage().cpu(),
        "storage to": lambda: host.untyped_storage().cuda(),
        "synchronize": lambda: torch.cuda.synchronize(),
        "empty cache": lambda: torch.cuda.empty_cache(),
        "stream": lambda: stream.synchronize(),
        "event": lambda: event.record(),
        "default device": lambda: on_default_device(lambda: torch.zeros(2)),
        "random": lambda: torch.rand(2, device="cuda"),
        "default type": lambda: host.type("torch.cuda.FloatTensor"),
    }


def on_default_device(call: Callable[[], Any]) -> Any:
    with torch.device("cuda"):
        return call()


# fmt: off
CALLS = [
    "cuda", "to name", "to device", "to ordinal", "to keyword", "to like", "cpu", "factory", "factory ordinal",
    "tensor", "in a list", "in place from the GPU", "index by a GPU tensor", "module cuda", "module to",
    "module on the host, argument on the GPU", "module that moves", "module of which only a part is there",
    "backward from the host", "load", "load to", "save", "storage", "storage to", "synchronize", "empty cache",
    "stream", "event", "default device", "random", "default type",
]
# fmt: on


@pytest.fixture(scope="module")
def calls(card: Card) -> dict[str, Callable[[], Any]]:
    return gpu_calls()


@pytest.mark.parametrize("name", CALLS)
def test_the_gpu_waits_at_a_closed_gate(gate: Gate, calls: dict[str, Callable[[], Any]], name: str) -> None:
    assert set(calls) == set(CALLS)
    calls[name]()
    gate.close()
    attempt = Attempt(calls[name])
    assert asked.wait(30), "it never came to the gate"
    assert not attempt.done.is_set()
    assert not gate.busy()
    gate.open()
    attempt.finish()


def host_calls() -> dict[str, Callable[[], Any]]:
    """What a program does on the CPU."""
    host = torch.ones(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())

    def train() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(host), host).backward()
        torch.nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
        optimizer.step()

    def store() -> None:
        stored = io.BytesIO()
        torch.save(model.state_dict(), stored)
        torch.load(io.BytesIO(stored.getvalue()), map_location="cpu")

    data = torch.utils.data.TensorDataset(torch.arange(8.0))
    return {
        "operations": lambda: (host @ host + 1).relu().sum().item(),
        "train": train,
        "store": store,
        "load data": lambda: list(torch.utils.data.DataLoader(data, batch_size=2)),
        "ask": lambda: (torch.cuda.is_available(), torch.cuda.device_count(), torch.cuda.is_initialized()),
        "seed": lambda: torch.manual_seed(0),
        "numpy": lambda: torch.from_numpy(host.numpy()),
        "storage": lambda: host.untyped_storage().clone().nbytes(),
        "module to": lambda: model.double().float().to("cpu"),
        "dlpack": lambda: torch.from_dlpack(host),
    }


@pytest.mark.parametrize(
    "name", ["operations", "train", "store", "load data", "ask", "seed", "numpy", "storage", "module to", "dlpack"]
)
def test_the_cpu_never_waits(gate: Gate, name: str) -> None:
    call = host_calls()[name]
    gate.close()
    Attempt(call).finish()
    assert not asked.is_set()


def test_nothing_is_asked_for_before_the_gpu_is_used(gate: Gate) -> None:
    unused = Gate(asked.set, lambda: None)
    regions.bind(unused)
    torch.cuda.is_available(), torch.cuda.device_count(), torch.cuda.get_device_name()
    torch.manual_seed(1)
    nn.Linear(2, 2)(torch.ones(2)).sum().backward()
    assert not asked.is_set()


def test_many_threads_stop_and_go_together(gate: Gate, card: Card) -> None:
    stop = threading.Event()

    def work() -> None:
        model, x = nn.Linear(8, 8).cuda(), torch.ones(2, 8, device="cuda")
        while not stop.is_set():
            (model(x) * 2 + x).sum().backward()
            model.zero_grad()

    attempts = [Attempt(work) for _ in range(4)]
    for _ in range(20):
        gate.close()
        while gate.busy():
            asked.wait(0.01)
        operations = card.held()
        assert not gate.busy()
        assert card.held() == operations
        gate.open()
    stop.set()
    for attempt in attempts:
        attempt.finish()


def test_room_is_asked_for_when_a_copy_does_not_fit(gate: Gate, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    taken = card.capacity - card.held() - 4 * MIB
    card.allocate(taken)  # somebody else's
    wanted: list[int] = []

    def more_room(nbytes: int) -> bool:
        wanted.append(nbytes)
        card.free(taken)
        return True

    monkeypatch.setattr(memory, "more_room", more_room)
    moved = torch.ones(2 * MIB).cuda()
    assert moved.sum().item() == 2 * MIB
    assert len(wanted) == 1
    assert wanted[0] >= 8 * MIB


def test_a_forked_childs_gate_is_its_own(gate: Gate) -> None:
    import subprocess
    import sys

    script = """
import os, sys, torch
from acb.client.gate import Gate
from acb.hooks import torch as hook
from acb.hooks.torch import devices, regions
devices.gate_device_type("cpu")
gate = Gate(lambda: None, lambda: None)
gate.open()
hook.install_gating(gate)
torch.ones(2) + 1
pid = os.fork()
if pid == 0:
    other = Gate(lambda: other.open(), lambda: None)
    regions.after_fork(other)
    torch.ones(2) + 1
    torch.nn.Linear(2, 2)(torch.ones(2))
    os._exit(0 if not other.closed and len(torch.overrides._get_current_function_mode_stack()) == 1 else 1)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
sys.exit(status)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
