"""Gating of PyTorch: with the gate closed nothing that touches a gated device starts, whatever route it takes.

The gated device here is the CPU itself, so that every operation can be tried on any machine.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from acb.client.gate import Gate  # noqa: E402
from acb.hooks import torch as hook  # noqa: E402
from acb.hooks.torch import devices, regions  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
asked = threading.Event()


@pytest.fixture(scope="module")
def _gated_cpu() -> Iterator[None]:
    """PyTorch with CPU tensors behind a gate."""
    devices.gate_device_type("cpu")
    hook.install_gating(regions._open_gate())
    yield
    hook.uninstall_gating()
    devices.ungate_device_type("cpu")


@pytest.fixture
def gate(_gated_cpu: None) -> Iterator[Gate]:
    """An open gate in front of PyTorch, of this test's own."""
    asked.clear()
    gate = Gate(asked.set, lambda: None)
    gate.open()
    regions.bind(gate)
    yield gate
    gate.open()
    regions.unbind()


@pytest.fixture(scope="module")
def routes(_gated_cpu: None) -> dict[str, Callable[[], Any]]:
    """Every way that is known to start an operation."""
    return _routes()


class Double(torch.autograd.Function):
    """A custom autograd function."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient * 2


def _routes() -> dict[str, Callable[[], Any]]:
    x = torch.randn(4, 4)
    w = torch.randn(4, 4, requires_grad=True)
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(x).sum().backward()
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    traced = torch.jit.trace(lambda a: a * 2 + 1, x)
    compiled = torch.compile(lambda a: a * 2 + 1, backend="eager")
    compiled_module = torch.compile(nn.Linear(4, 4), backend="eager")
    compiled(x)
    compiled_module(x)
    saved = io.BytesIO()
    torch.save(x, saved)
    loss = (torch.ones(4, 4) @ w).sum()
    root = [loss]
    storage = x.untyped_storage()
    generator = torch.Generator()
    return {
        "add": lambda: x + x,
        "in place": lambda: x.add_(1),
        "index": lambda: x[0],
        "set index": lambda: x.__setitem__(0, 1.0),
        "matmul": lambda: torch.mm(x, x),
        "functional": lambda: F.relu(x),
        "loss": lambda: F.mse_loss(x, x),
        "item": lambda: x[0, 0].item(),
        "numpy": lambda: x.numpy(),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "to": lambda: x.to("cpu"),
        "address": lambda: x.data_ptr(),
        "storage": lambda: x.untyped_storage(),
        "ops": lambda: torch.ops.aten.add(x, x),
        "op overload": lambda: torch.ops.aten.add.Tensor(x, x),
        "nn builtin": lambda: torch._C._nn.gelu(x),
        "foreach": lambda: torch._foreach_add([x], 1.0),
        "nested list": lambda: torch.block_diag(*[x, x]),
        "backward": lambda: (root[0]).backward(retain_graph=True),
        "autograd.backward": lambda: torch.autograd.backward(root, retain_graph=True),
        "autograd.grad": lambda: torch.autograd.grad(root[0], w, retain_graph=True),
        "step": lambda: optimizer.step(),
        "zero_grad": lambda: optimizer.zero_grad(),
        "module zero_grad": lambda: layer.zero_grad(),
        "clip": lambda: torch.nn.utils.clip_grad_norm_([w], 1.0),
        "module": lambda: layer(x),
        "module forward": lambda: layer.forward(x),
        "module to": lambda: layer.to("cpu"),
        "module double": lambda: layer.float(),
        "state_dict": lambda: layer.state_dict(),
        "script": lambda: scripted(x),
        "script forward": lambda: scripted.forward(x),
        "trace": lambda: traced(x),
        "compiled": lambda: compiled(x),
        "compiled module": lambda: compiled_module(x),
        "custom function": lambda: Double.apply(x),
        "zeros": lambda: torch.zeros(3),
        "zeros on": lambda: torch.zeros(3, device="cpu"),
        "new": lambda: x.new_zeros(3),
        "like": lambda: torch.empty_like(x),
        "tensor": lambda: torch.tensor([1.0]),
        "random": lambda: torch.randn(3, generator=generator),
        "save": lambda: torch.save(x, io.BytesIO()),
        "load": lambda: torch.load(io.BytesIO(saved.getvalue())),
        "dlpack": lambda: torch.utils.dlpack.to_dlpack(x),
        "from_dlpack": lambda: torch.from_dlpack(x),
        "repr": lambda: repr(x),
        "bool": lambda: bool(x[0, 0] > 0),
        "iterate": lambda: list(x),
        "copy_": lambda: x.copy_(torch.ones(4, 4)),
        "deepcopy": lambda: copy.deepcopy(x),
        "pickle": lambda: pickle.dumps(x),
        "cat": lambda: torch.cat([x, x]),
        "storage clone": lambda: storage.clone(),
        "storage item": lambda: storage[0],
        "storage fill": lambda: storage.fill_(0),
        "storage size": lambda: storage.nbytes(),
        "new storage": lambda: torch.UntypedStorage(8, device="cpu"),
        "einsum": lambda: torch.einsum("ij,jk->ik", x, x),
        "init": lambda: nn.init.normal_(tensor=w.detach()),
        "modes off": lambda: _without_modes(lambda: x + x),
        "synchronize": lambda: torch.cuda.empty_cache(),
        "vmap": lambda: torch.func.vmap(lambda a: a * 2)(x),
    }


def _without_modes(operation: Callable[[], Any]) -> Any:
    with torch._C.DisableTorchFunction():
        return operation()


# fmt: off
ROUTES = [
    "add", "in place", "index", "set index", "matmul", "functional", "loss", "item", "numpy", "tolist", "cpu", "to",
    "address", "storage", "ops", "op overload", "nn builtin", "foreach", "nested list", "backward",
    "autograd.backward", "autograd.grad", "step", "zero_grad", "module zero_grad", "clip", "module", "module forward",
    "module to", "module double", "state_dict", "script", "script forward", "trace", "compiled", "compiled module",
    "custom function", "zeros", "zeros on", "new", "like", "tensor", "random", "save", "load", "dlpack",
    "from_dlpack", "repr", "bool", "iterate", "copy_", "deepcopy", "pickle", "cat", "storage clone", "storage item",
    "storage fill", "storage size", "new storage", "einsum", "init", "modes off", "synchronize", "vmap",
]
# fmt: on


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


def test_every_route_is_tested(routes: dict[str, Callable[[], Any]]) -> None:
    assert set(routes) == set(ROUTES)


@pytest.mark.parametrize("route", ROUTES)
def test_closed_gate_stops_the_route_until_it_opens(
    gate: Gate, routes: dict[str, Callable[[], Any]], route: str
) -> None:
    call = routes[route]
    torch.ones(1)  # the device is in use
    call()
    gate.close()
    attempt = Attempt(call)
    assert asked.wait(30), "it never came to the gate"
    assert not attempt.done.is_set()
    assert not gate.busy()
    gate.open()
    attempt.finish()
    assert not gate.busy()
