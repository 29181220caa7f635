"""What PyTorch answers, and what binds the process, before the broker has chosen its GPU.

CUDA is a stand-in here: it notes when it is started.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from acb.client import runtime  # noqa: E402
from acb.client.gate import ThreadState  # noqa: E402
from acb.client.outside import Outside  # noqa: E402
from acb.hooks.torch import binding, patching, regions  # noqa: E402


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """An unbound process that is to see two GPUs: how often CUDA was started, and the warnings."""
    state = SimpleNamespace(starts=0, warnings=[], client=SimpleNamespace(count=2, bound=False, outside=Outside()))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACB_SIMULATED", raising=False)

    def start() -> None:
        state.starts += 1
        state.client.bound = True

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: state.starts > 0)
    monkeypatch.setattr(torch.cuda, "_lazy_init", start)
    monkeypatch.setattr(runtime, "client", lambda: state.client)
    patches = patching.Patches()
    patching.apply(patches, binding.STEPS, lambda *said: state.warnings.append(said))
    try:
        yield state
    finally:
        patches.undo()


def test_every_step_fits_this_pytorch(cuda: SimpleNamespace) -> None:
    assert cuda.warnings == []


def test_counting_the_gpus_binds_nothing(cuda: SimpleNamespace) -> None:
    assert torch.cuda.device_count() == 2
    assert cuda.starts == 0
    cuda.client.bound = True
    assert torch.cuda.device_count() == 0  # PyTorch's own answer on a build for the CPU


def test_working_on_the_cpu_binds_nothing(cuda: SimpleNamespace) -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    data = torch.utils.data.TensorDataset(torch.randn(8, 4))
    for (x,) in torch.utils.data.DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(1)):
        model(x).sum().backward()
        optimizer.step()
    assert not torch.zeros(2).is_pinned()
    assert cuda.starts == 0


def attempt(call: Any) -> None:
    """Do what a build for the CPU may refuse; whether CUDA was started first is the question."""
    try:
        call()
    except (RuntimeError, AssertionError, AttributeError, ValueError):
        pass


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.zeros(2).pin_memory(),
        lambda: torch.Generator(device="cuda"),
        lambda: torch.Generator("cuda:1"),
    ],
)
def test_pinned_memory_and_generators_bind_the_process_first(cuda: SimpleNamespace, call: Any) -> None:
    attempt(call)
    assert cuda.starts == 1
    attempt(call)
    assert cuda.starts == 1


@pytest.mark.parametrize("name", ["pin_memory", "is_pinned"])
def test_a_call_for_pinned_memory_that_never_returns_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = SimpleNamespace(count=2, bound=True, outside=Outside())
    pings: list[bool] = []

    def blocked(tensor: Any) -> Any:
        pings.extend(client.outside.stuck() for _ in range(3))
        return tensor

    monkeypatch.setattr(runtime, "client", lambda: client)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.Tensor, name, blocked)
    patches = patching.Patches()
    patching.apply(patches, [binding.patch_pinned_memory], lambda *said: pytest.fail(str(said)))
    try:
        getattr(torch.zeros(2), name)()
        assert pings == [False, True, True]
        getattr(torch.zeros(2), name)()
        assert pings[3:] == [False, True, True], "it is another call"
    finally:
        patches.undo()
    assert not client.outside.stuck()


def test_a_pinned_factory_that_never_returns_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    client = SimpleNamespace(outside=Outside())
    monkeypatch.setattr(runtime, "client", lambda: client)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    def blocked(*args: Any, **kwargs: Any) -> list[bool]:
        return [client.outside.stuck() for _ in range(2)]

    sentinel = regions.Sentinel(ThreadState())
    assert sentinel.__torch_function__(blocked, (), (3,), {"pin_memory": True}) == [False, True]
    assert sentinel.__torch_function__(blocked, (), (3,), {"dtype": torch.float32}) == [False, False]


def test_with_every_gpu_hidden_nothing_binds(cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    attempt(lambda: torch.zeros(2).pin_memory())
    attempt(lambda: torch.Generator(device="cuda"))
    assert torch.cuda.device_count() == 0
    assert cuda.starts == 0


def test_generators_are_still_generators(cuda: SimpleNamespace) -> None:
    generator = torch.Generator("cpu")
    assert isinstance(generator, torch.Generator)
    assert isinstance(torch.default_generator, torch.Generator)
    assert not isinstance(3, torch.Generator)
    assert issubclass(type(generator), torch.Generator)
    assert torch.randn(2, generator=generator.manual_seed(3)).shape == (2,)
    assert pickle.loads(pickle.dumps(generator.get_state())).equal(generator.get_state())
    assert cuda.starts == 0
