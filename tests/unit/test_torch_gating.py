"""Gating of PyTorch: with the gate closed nothing that touches a gated device starts, whatever route it takes.

The gated device here is the CPU itself, so that every operation can be tried on any machine.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

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


# --- what regions leave as it was -----------------------------------------------------------------------------------


def _stack() -> list[Any]:
    return list(torch.overrides._get_current_function_mode_stack())


class Counting(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
    """A function mode of the program's own."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Calling(nn.Module):  # type: ignore[misc]
    """A module that does what it is told."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.body = body

    def forward(self, *args: Any) -> Any:
        return self.body(*args)


def test_the_sentinel_is_off_in_a_region_and_back_after_it(gate: Gate) -> None:
    before = _stack()
    assert [type(mode) for mode in before] == [regions.Sentinel]
    assert Calling(lambda: (_stack(), gate.inside()))() == ([], True)
    assert _stack() == before
    assert not gate.inside()


def test_an_exception_leaves_no_region_behind(gate: Gate) -> None:
    before = _stack()

    def fail() -> None:
        raise KeyError("the program's own")

    for call in (
        lambda: Calling(fail)(),
        lambda: torch.mm(torch.ones(2, 3), torch.ones(2, 3)),
        lambda: torch.ones(2).backward(),
        lambda: nn.Linear(2, 2).to("nowhere"),
    ):
        with pytest.raises((KeyError, RuntimeError)):
            call()
        assert not gate.busy()
        assert _stack() == before


def test_modes_of_the_program_see_what_they_would(gate: Gate) -> None:
    module = Calling(lambda: torch.ones(2) + 1)
    with Counting() as mode:
        module()
    assert mode.seen == ["ones", "add"]
    assert [type(mode) for mode in _stack()] == [regions.Sentinel]


def test_a_mode_that_outlives_the_region_in_which_it_began(gate: Gate) -> None:
    mode = Counting()
    Calling(mode.__enter__)()
    torch.ones(2) + 1
    mode.__exit__(None, None, None)
    assert mode.seen[-2:] == ["ones", "add"]
    assert [type(mode) for mode in _stack()] == [regions.Sentinel]


def test_default_devices_work_across_regions(gate: Gate) -> None:
    try:
        Calling(lambda: torch.set_default_device("cpu"))()
        with torch.device("meta"):
            assert Calling(lambda: torch.ones(2))().is_meta
            assert torch.ones(2).is_meta
        assert not torch.ones(2).is_meta
    finally:
        torch.set_default_device(None)
    assert [type(mode) for mode in _stack()] == [regions.Sentinel]


def test_a_region_stops_nothing_inside_it(gate: Gate) -> None:
    """The gate closes while a thread is inside: everything nested goes on, and only the end of it is the end."""
    begun, go_on = threading.Event(), threading.Event()

    def body() -> Any:
        begun.set()
        assert go_on.wait(30)
        x = torch.ones(2, requires_grad=True)
        torch.utils.checkpoint.checkpoint(Calling(lambda x: x * 2), x, use_reentrant=False).sum().backward()
        return x.grad

    outer = Calling(body)
    attempt = Attempt(outer)
    assert begun.wait(30)
    gate.close()
    assert gate.busy()
    go_on.set()
    attempt.finish()
    assert not gate.busy()


def test_hooks_and_recomputation_in_backward_do_not_wait_at_the_gate(gate: Gate) -> None:
    x = torch.ones(2, requires_grad=True)
    inner = Calling(lambda x: x * 2)
    y = torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False).sum()
    begun, go_on = threading.Event(), threading.Event()

    def hook_of_the_program(gradient: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return inner(gradient) / 2

    y.register_hook(hook_of_the_program)
    attempt = Attempt(y.backward)
    assert begun.wait(30)
    gate.close()
    go_on.set()
    attempt.finish()
    gate.open()
    assert x.grad.tolist() == [2.0, 2.0]


def test_host_side_questions_do_not_wait(gate: Gate) -> None:
    x = torch.ones(2, 3)
    gate.close()
    assert (x.shape, x.dtype, x.device.type, x.is_cuda) == ((2, 3), torch.float32, "cpu", False)
    assert (x.requires_grad, x.grad, x.dim(), len(x), x.numel()) == (False, None, 2, 2, 6)
    assert (x.size(0), x.stride(), x.is_contiguous()) == (2, (3, 1), True)
    with torch.no_grad():
        assert not torch.is_grad_enabled()
    assert not asked.is_set()


def test_threads_of_acbs_own_never_wait(gate: Gate) -> None:
    model = nn.Linear(2, 2)
    x = torch.ones(2, 2)
    gate.close()
    done = threading.Event()

    def work() -> None:
        (model(x) + 1).sum().backward()
        done.set()

    thread = threading.Thread(target=work, name="acb-test", daemon=True)
    thread.start()
    assert done.wait(30)
    thread.join()
    assert not asked.is_set()


def test_every_stray_operation_updates_what_the_agent_reads(gate: Gate) -> None:
    before = gate.last_exit
    torch.ones(2) + 1
    assert gate.last_exit > before


def test_who_watches_hears_of_the_end_of_each_operation(gate: Gate) -> None:
    ends: list[None] = []
    watched = Gate(lambda: None, lambda: ends.append(None))
    watched.open(watched=True)
    regions.bind(watched)
    x = torch.ones(2)
    y = x + 1
    nn.Identity()(y)
    assert len(ends) == 3


def test_a_refused_lease_reaches_the_program(gate: Gate) -> None:
    def refuse() -> None:
        raise PermissionError("there is no such GPU")

    refusing = Gate(refuse, lambda: None)
    regions.bind(refusing)
    x_before = _stack()
    with pytest.raises(PermissionError):
        torch.ones(2)
    with pytest.raises(PermissionError):
        nn.Linear(2, 2)
    assert _stack() == x_before
    assert not refusing.busy()


# --- compiled and scripted code -------------------------------------------------------------------------------------


def test_compiled_code_is_compiled_once(gate: Gate) -> None:
    import torch._dynamo as dynamo
    import torch._dynamo.testing

    dynamo.reset()
    counted = dynamo.testing.CompileCounter()
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    whole = torch.compile(model, backend=counted, fullgraph=True)
    function = torch.compile(lambda x: F.mse_loss(model(x), x[:, :1]) * 2, backend=counted, fullgraph=True)
    x = torch.randn(3, 4)
    for _ in range(3):
        whole(x)
        function(x)
        Calling(lambda: function(x))()
        with torch.no_grad():
            pass
    assert counted.frame_count == 2
    assert torch.equal(whole(x), model(x))


def test_a_compiled_training_step(gate: Gate) -> None:
    import torch._dynamo as dynamo

    dynamo.reset()
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    @torch.compile(backend="eager")
    def step(x: Any) -> Any:
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    x = torch.randn(8, 4)
    losses = [step(x).item() for _ in range(4)]
    assert losses == sorted(losses, reverse=True)


def test_functions_that_use_gated_ones_can_be_scripted(gate: Gate) -> None:
    scripted = torch.jit.script(scriptable)
    x = torch.ones(2)
    assert scripted(x).item() == 1.0
    assert torch.equal(torch.jit.trace(nn.Linear(2, 2), x)(x).detach() * 0, torch.zeros(2))


def test_a_recording_shows_the_program_and_not_acb(gate: Gate) -> None:
    traced = torch.jit.trace(lambda x: x * 2 + 1, torch.ones(2))
    assert "test_torch_gating.py" in str(traced.graph)
    assert "regions.py" not in str(traced.graph)


def scriptable(x: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(x, x * 2)


# --- what the program can see ---------------------------------------------------------------------------------------


def test_patched_functions_look_like_what_they_were(gate: Gate) -> None:
    import inspect

    assert torch.Tensor.backward.__name__ == "backward"
    assert list(inspect.signature(torch.Tensor.backward).parameters)[:2] == ["self", "gradient"]
    assert inspect.signature(nn.Module.to) == inspect.signature(nn.Module.to.__wrapped__)
    assert nn.Module.__call__.__doc__ == nn.Module._call_impl.__doc__
    assert inspect.getsource(F.mse_loss).startswith("def mse_loss")
    assert type(torch.ones(2)) is torch.Tensor
    assert pickle.loads(pickle.dumps(F.mse_loss)) is F.mse_loss
    assert pickle.loads(pickle.dumps(torch.compile)) is torch.compile
    model = nn.Linear(2, 2)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin.weight, model.weight)
    assert torch.optim.SGD(model.parameters(), 0.1).step.__name__ == "step"


def test_undoing_puts_everything_back() -> None:
    script = """
import torch
from acb.hooks import torch as hook
from acb.hooks.torch import regions

def everything():
    owners = (torch, torch._C, torch.Tensor, torch.nn.Module, torch.UntypedStorage, torch.cuda, torch.cuda.memory,
              torch.autograd, torch.autograd.graph, torch.nn.functional, torch.optim.Optimizer, torch.cuda.Stream)
    return [dict(vars(owner)) for owner in owners]

torch.compile, torch.jit.script, torch.utils.dlpack, torch.distributed
import torch.nn.utils.clip_grad, torch.serialization
before = everything()
hook.install_gating(regions._open_gate())
assert everything() != before
hook.uninstall_gating()
for owner, was in zip(everything(), before):
    assert {name for name in owner if owner[name] is not was.get(name)} <= {"__doc__"}
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


def test_a_hook_that_fails_is_reported_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    from acb.hooks.torch.patching import Patches, apply

    applied: list[str] = []
    warned: list[tuple[str, str]] = []

    def patch_what_is_missing(patches: Patches) -> None:
        patches.replace(torch, "there_is_no_such_function", lambda original: original)

    def patch_after(patches: Patches) -> None:
        applied.append("after")

    apply(Patches(), (patch_what_is_missing, patch_after), lambda key, message: warned.append((key, message)))
    assert applied == ["after"]
    assert len(warned) == 1
    assert "patch what is missing" in warned[0][1]


@pytest.mark.parametrize("hand_out", ["_to_dlpack", "_to_dlpack_versioned"])
def test_an_address_is_handed_out_and_pinned_in_one_region(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, hand_out: str
) -> None:
    from acb.hooks.torch import reach

    busy: list[bool] = []
    monkeypatch.setattr(reach, "pin", lambda *_: busy.append(gate.busy()))
    getattr(torch._C, hand_out)(torch.ones(3))
    assert busy == [True]


# --- out of memory --------------------------------------------------------------------------------------------------


def test_a_repeatable_call_is_tried_again_when_there_is_room(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    from acb.hooks.torch import memory

    wanted: list[int] = []
    monkeypatch.setattr(memory, "more_room", lambda nbytes: wanted.append(nbytes) is None)
    failures = 2

    def tight(tensor: Any) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a capacity of")
        return tensor

    assert nn.Linear(2, 2)._apply(tight) is not None
    assert wanted == [(3 << 29) + 1] * 2
    assert not gate.busy()


@pytest.mark.parametrize(
    ("operation", "safe"),
    [
        (lambda x: x.sum(0, dtype=torch.int64), True),
        (lambda x: x @ x, True),
        (lambda x: x[::2], True),
        (lambda x: torch.einsum("ij,jk", x, x), True),
        (lambda x: nn.functional.linear(x, x), True),
        (lambda x: torch.add(x, 1, out=torch.empty_like(x)), False),
        (lambda x: x.add_(1), False),
        (lambda x: nn.functional.relu(x, inplace=True), False),
        (lambda x: nn.functional.dropout(x), False),
        (lambda x: nn.functional.batch_norm(x, torch.zeros(4), torch.ones(4), training=True), False),
        (lambda x: x.exponential_(), False),
        (lambda x: x.__setitem__(0, 1.0), False),
    ],
)
def test_only_what_changes_nothing_is_repeated(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, operation: Callable[[Any], Any], safe: bool
) -> None:
    from acb.hooks.torch import memory

    seen: list[tuple[Any, Any]] = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((func, kwargs))
            return func(*args, **(kwargs or {}))

    x = torch.ones(4, 4)
    with Spy():
        operation(x)
    assert memory.repeatable(*seen[-1]) is safe


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_layer_in_the_midst_of_a_forward_is_called_again_when_everybody_has_made_way(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    from acb.hooks.torch import memory

    wanted: list[int] = []
    monkeypatch.setattr(memory, "more_room", lambda nbytes: wanted.append(nbytes) is None)
    monkeypatch.setattr(memory, "beside", lambda: 1 << 30)
    layer = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(nn.Identity(), layer), nn.ReLU()) if wrapped else layer
    x = torch.ones(2, 4)
    expected = model(x)
    _run_out(monkeypatch, 2)
    assert torch.equal(model(x), expected)
    assert wanted == ([1 << 30] if wrapped else [(2 << 20) + 1])
    assert not gate.busy()


def _run_out(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Have linear layers run out of memory so many times; what is left of them."""
    original, left = F.linear, [times]

    def linear(*args: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0")
        return original(*args)

    monkeypatch.setattr(F, "linear", linear)
    return left


def _hooked(layer: Any) -> Any:
    layer.register_forward_hook(lambda *_: None)
    return layer


class OwnLinear(nn.Linear):  # type: ignore[misc]
    """Who knows what its forward does."""


@pytest.mark.parametrize("make", [lambda: _hooked(nn.Linear(4, 4)), lambda: OwnLinear(4, 4)], ids=["hook", "own"])
def test_a_layer_that_might_have_changed_something_is_not_called_again(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    from acb.hooks.torch import memory

    monkeypatch.setattr(memory, "more_room", lambda nbytes: pytest.fail("asked for room"))
    left = _run_out(monkeypatch, 2)
    with pytest.raises(torch.OutOfMemoryError):
        nn.Sequential(make())(torch.ones(2, 4))
    assert left == [1]
    assert not gate.busy()


@pytest.mark.parametrize(
    ("module", "safe"),
    [
        (lambda: nn.Conv2d(1, 1, 3), True),
        (lambda: nn.LayerNorm(4), True),
        (lambda: nn.ReLU(), True),
        (lambda: nn.ReLU(inplace=True), False),
        (lambda: nn.Embedding(4, 4), True),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), False),
        (lambda: nn.BatchNorm2d(4), False),
        (lambda: nn.BatchNorm2d(4).eval(), True),
        (lambda: nn.Dropout(0.5), False),
        (lambda: nn.Dropout(0.5).eval(), True),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), False),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), False),
        (lambda: nn.LSTM(4, 4), False),
        (lambda: nn.MultiheadAttention(4, 2), False),
        (lambda: nn.Sequential(), False),
    ],
)
def test_which_layers_can_be_called_again(module: Callable[[], Any], safe: bool) -> None:
    from acb.hooks.torch import layers

    assert layers.repeatable(module()) is safe


def test_the_program_sees_its_own_error_when_there_is_no_room(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    from acb.hooks.torch import memory

    monkeypatch.setattr(memory, "more_room", lambda nbytes: False)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 bytes.")

    def full(tensor: Any) -> Any:
        raise error

    with pytest.raises(torch.OutOfMemoryError) as caught:
        nn.Linear(2, 2)._apply(full)
    assert caught.value is error
    assert not gate.busy()


def test_calls_that_are_not_safe_to_repeat_are_not_repeated(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    from acb.hooks.torch import memory

    monkeypatch.setattr(memory, "more_room", lambda nbytes: pytest.fail("asked for room"))
    calls: list[None] = []

    def body() -> None:
        calls.append(None)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 bytes.")

    with pytest.raises(torch.OutOfMemoryError):
        Calling(body)()
    assert len(calls) == 1
