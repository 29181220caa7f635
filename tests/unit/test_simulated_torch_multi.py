"""PyTorch on several simulated GPUs: which tensor is on which, what goes together, and whose memory runs out."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")

from acb.config import SimulatedSpec  # noqa: E402
from acb.devices.simulated import Card, create_cards  # noqa: E402
from acb.hooks.torch import simulated  # noqa: E402
from acb.hooks.torch.evacuator import TorchEvacuator  # noqa: E402

MIB = 1 << 20
nn: Any = torch.nn


@pytest.fixture
def cards(tmp_path: Path) -> Iterator[list[Card]]:
    """PyTorch with GPUs of 64 MiB and 48 MiB, the third and second of a pool; afterwards both are empty."""
    create_cards(tmp_path, SimulatedSpec((MIB, 48 * MIB, 64 * MIB)))
    cards = [Card.open(tmp_path, 2), Card.open(tmp_path, 1)]
    simulated.install(torch, lambda: cards, lambda: cards)
    ledger = simulated.current_ledger()
    yield cards
    if ledger.storages():
        gc.collect()
    left = [storage.nbytes() for storage in ledger.storages()]
    simulated.uninstall()
    assert left == []
    assert [card.held() for card in cards] == [0, 0]
    for card in cards:
        card.close()


def test_questions_are_answered_for_each(cards: list[Card]) -> None:
    assert torch.cuda.device_count() == torch.accelerator.device_count() == 2
    assert [torch.cuda.get_device_properties(i).total_memory for i in (0, "cuda:1")] == [64 * MIB, 48 * MIB]
    assert torch.cuda.mem_get_info(1) == (48 * MIB, 48 * MIB)
    assert torch.cuda.current_device() == 0
    assert not torch.cuda.is_initialized()
    assert [card.processes() for card in cards] == [[], []]
    x = torch.zeros(MIB, dtype=torch.uint8, device="cuda:1")
    assert torch.cuda.mem_get_info(1) == (47 * MIB, 48 * MIB)
    assert [torch.cuda.memory_allocated(i) for i in (0, 1)] == [0, x.numel()]
    assert torch.cuda.memory_stats(1)["allocation.all.current"] == 1
    assert torch.cuda.memory_stats(0)["allocation.all.current"] == 0
    assert "uses        1.000 MB" in torch.cuda.list_gpu_processes(1)
    assert "no processes" in torch.cuda.list_gpu_processes(0)
    del x
    assert [torch.cuda.max_memory_allocated(i) for i in (0, 1)] == [0, MIB]
    torch.cuda.reset_peak_memory_stats(0)
    assert torch.cuda.max_memory_allocated(1) == MIB
    torch.cuda.reset_peak_memory_stats(1)
    assert torch.cuda.max_memory_allocated(1) == 0
    for device in (0, 1, None, "cuda:1"):
        torch.cuda.synchronize(device)
    assert len(torch.cuda.get_rng_state_all()) == len(torch.cuda.default_generators) == 2


def test_without_an_index_it_is_the_current_gpu(cards: list[Card]) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert torch.ones(1, device="cuda").device == first
    torch.cuda.set_device(1)
    assert torch.cuda.current_device() == torch.accelerator.current_device_index() == 1
    made = [
        torch.ones(1, device="cuda"), torch.ones(1).cuda(), torch.ones(1).to("cuda"), torch.tensor([1], device="cuda"),
        torch.as_tensor([1], device="cuda"), nn.Linear(1, 1).cuda().weight, torch.cuda.FloatTensor([1]),
        torch.ones(1).type(torch.cuda.DoubleTensor),
    ]  # fmt: skip
    assert {tensor.device for tensor in made} == {second}
    with torch.cuda.device(0):
        assert torch.cuda.current_device() == 0
        assert torch.empty(1, device="cuda").device == first
        assert torch.ones_like(made[0]).device == made[0].new_zeros(2).device == second
        with torch.cuda.device_of(made[0]):
            assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 1
    with torch.device("cuda"):
        assert torch.ones(1).device == second
    elsewhere: list[int] = []
    thread = threading.Thread(target=lambda: elsewhere.append(torch.cuda.current_device()))
    thread.start()
    thread.join()
    assert elsewhere == [0]
    torch.cuda.set_device(-1)
    assert torch.cuda.current_device() == 1


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("device", ["cuda:1", 1, torch.device("cuda", 1)])
def test_every_way_to_name_the_second(cards: list[Card], device: Any) -> None:
    made = [
        torch.ones(2, device=device),
        torch.tensor([1.0], device=device),
        torch.as_tensor([1.0], device=device),
        torch.asarray([1.0], device=device),
        torch.ones(2).to(device),
        torch.ones(2).cuda(device),
        torch.ones(2, device="cuda:0").to(device),
        torch.zeros_like(torch.ones(2, device="cuda:0"), device=device),
        nn.Linear(2, 2).to(device).weight,
        nn.Linear(2, 2, device=device).weight,
        torch.sparse_coo_tensor([[0], [1]], [1.0], (2, 2), device=device),
    ]
    assert all(tensor.device == torch.device("cuda:1") and tensor.get_device() == 1 for tensor in made)
    assert all(type(tensor) is torch.Tensor for tensor in made[:6])
    assert torch.Generator(device).device == torch.UntypedStorage(4, device=device).device == torch.device("cuda:1")
    assert cards[0].held() == 0


@pytest.mark.parametrize("device", ["cuda:2", 2])
def test_there_is_no_third(cards: list[Card], device: Any) -> None:
    attempts: list[Any] = [
        lambda: torch.ones(1, device=device), lambda: torch.ones(1).to(device), lambda: torch.cuda.set_device(device),
        lambda: torch.cuda.mem_get_info(device), lambda: torch.cuda.synchronize(device),
        lambda: torch.cuda.device(device).__enter__(), lambda: torch.cuda.Stream(device),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(RuntimeError, match=r"invalid device ordinal: cuda:2 .* has 2 simulated GPUs"):
            attempt()


def test_each_storage_is_charged_where_it_is(cards: list[Card]) -> None:
    x = torch.ones(1000, device="cuda:1", requires_grad=True)
    y = (x.view(10, 100)[1:] * 2).sum(0)
    assert y.device == x.device
    assert repr(y[:2].detach()) == "tensor([18., 18.], device='cuda:1')"
    y.sum().backward()
    assert x.grad.device == x.device
    assert [card.held() > 0 for card in cards] == [False, True]
    storage = x.detach().untyped_storage()
    storage.resize_(4000 + 8)
    storage.resize_(4000)
    assert cards[0].processes() == []


def test_copies_between_gpus(cards: list[Card]) -> None:
    x = torch.arange(12.0, device="cuda:0").reshape(3, 4)
    y = x.to("cuda:1", torch.float64)
    assert y.device == torch.device("cuda:1")
    assert y.to("cuda:1") is y
    assert torch.equal(y.cpu().float(), x.cpu())
    assert [card.held() for card in cards] == [48, 96]
    z = torch.empty(3, 4, device=1).copy_(x)
    assert z.device == y.device
    assert torch.equal(z, y.float())
    z[0] = x[1].to(1)
    assert z[0].tolist() == x[1].tolist()
    target = torch.UntypedStorage(48, device="cuda:1")
    target.copy_(x.untyped_storage())
    assert bytes(target.cpu().tolist()) == bytes(x.untyped_storage().cpu().tolist())


def test_gradients_come_back_to_their_gpu(cards: list[Card]) -> None:
    x = torch.ones(3, device="cuda:0", requires_grad=True)
    y = (x * 2).to("cuda:1") * 3
    y.sum().backward()
    assert y.device == torch.device("cuda:1")
    assert x.grad.device == x.device
    assert x.grad.tolist() == [6, 6, 6]
    assert torch.func.grad(lambda v: v.to("cuda:1").pow(2).sum().to("cuda:0"))(x.detach()).tolist() == [2, 2, 2]


def test_gpus_do_not_mix(cards: list[Card]) -> None:
    a, b = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
    scalar = torch.ones((), device="cuda:1")
    attempts: list[Any] = [
        lambda: a + b, lambda: b.add_(a), lambda: a * scalar, lambda: torch.cat([a, b]), lambda: torch.add(a, a, out=b),
        lambda: torch.where(a > 0, a, b), lambda: nn.functional.linear(a, b), lambda: a.index_put_((a > 0,), b),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but found at least two"):
            attempt()
    with pytest.raises(RuntimeError, match="cuda:1 and cpu!"):
        b + torch.ones(3)
    with pytest.raises(RuntimeError, match=r"same device as the indexed tensor \(cuda:0\)"):
        a[torch.zeros(1, dtype=torch.int64, device="cuda:1")]
    with pytest.raises(RuntimeError, match="Expected a 'cuda:0' generator device but found 'cuda:1'"):
        torch.randn(2, device="cuda:0", generator=torch.Generator("cuda:1"))
    a[0] = scalar + 1
    a.index_put_((torch.tensor([1]),), scalar * 5)
    assert a.tolist() == [2, 5, 1]
    assert (b + torch.tensor(2.0)).tolist() == [3, 3, 3]


def test_lists_of_tensors_may_be_spread(cards: list[Card]) -> None:
    tensors = [torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1"), torch.ones(3, device="cuda:0")]
    doubled = torch._foreach_mul(tensors, 2.0)
    assert [tensor.get_device() for tensor in doubled] == [0, 1, 0]
    torch._foreach_add_(doubled, tensors)
    assert [tensor.tolist() for tensor in doubled] == [[3, 3], [3, 3], [3, 3, 3]]
    for tensor in tensors:
        tensor.grad = tensor * 10
    assert torch.nn.utils.clip_grad_norm_(tensors, 1.0).item() == pytest.approx(700**0.5)


def test_out_of_memory_is_each_gpus_own(cards: list[Card]) -> None:
    x = torch.empty(40 * MIB, dtype=torch.uint8, device="cuda:1")
    with pytest.raises(torch.OutOfMemoryError, match=r"allocate 10\.00 MiB\. GPU 1 has a total capacity of 48\.00 MiB"):
        torch.empty(10 * MIB, dtype=torch.uint8, device="cuda:1")
    y = torch.empty(60 * MIB, dtype=torch.uint8, device="cuda:0")
    with pytest.raises(torch.OutOfMemoryError, match=r"GPU 0 has a total capacity of 64\.00 MiB of which 4\.00 MiB"):
        x.to("cuda:0")
    assert [torch.cuda.memory_stats(i)["num_ooms"] for i in (0, 1)] == [1, 1]
    del y
    torch.cuda.set_per_process_memory_fraction(0.5, 0)
    z = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda:1")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(33 * MIB, dtype=torch.uint8, device="cuda:0")
    assert z.numel() == 8 * MIB


def test_the_referee_of_each_card_sees_what_touches_it(cards: list[Card]) -> None:
    a, b = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")

    def seen() -> list[list[str]]:
        found = [[violation.operation for violation in card.violations()] for card in cards]
        for card in cards:
            card.clear_violations()
        return found

    for card in cards:
        card.set_holders([1])
    torch.sin(a)
    assert seen() == [["aten.sin"], []]
    torch.sin(b)
    assert seen() == [[], ["aten.sin"]]
    b.copy_(a)
    assert seen() == [["aten.copy_"], ["aten.copy_"]]
    a.to("cuda:1")
    assert seen() == [["aten._to_copy"], ["aten._to_copy"]]
    b.untyped_storage().copy_(a.untyped_storage())
    assert seen() == [["storage.copy_"], ["storage.copy_"]]
    torch._foreach_neg_([a, b])
    assert seen() == [["aten._foreach_neg_"], ["aten._foreach_neg_"]]
    torch.ones(1, device="cuda:1")
    assert seen()[0] == []


def train_in_two_stages(first: str, second: str) -> Any:
    torch.manual_seed(0)
    bottom = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.2)).to(first)
    top = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 3)).to(second)
    optimizer = torch.optim.AdamW([*bottom.parameters(), *top.parameters()], 1e-2, foreach=True)
    x, y = torch.randn(12, 6).to(first), torch.arange(12).remainder(3).to(second)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(top(bottom(x).to(second)), y)
        loss.backward()
        nn.utils.clip_grad_norm_([*bottom.parameters(), *top.parameters()], 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, [parameter.detach().cpu().tolist() for parameter in [*bottom.parameters(), *top.parameters()]]


def test_a_model_on_two_gpus_trains_as_on_the_cpu(cards: list[Card]) -> None:
    expected = train_in_two_stages("cpu", "cpu")
    assert train_in_two_stages("cuda:0", "cuda:1") == expected
    assert train_in_two_stages("cuda:1", "cuda:1") == expected


@pytest.mark.filterwarnings("ignore:Using -1 to represent CPU:FutureWarning")
@pytest.mark.parametrize("here", ["cpu", "cuda:0", "cuda:1"])
def test_data_parallel(cards: list[Card], here: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 4, requires_grad=True)
    halves = torch.cat([model(x[:3]), model(x[3:])])
    halves.pow(2).sum().backward()
    expected = [x.grad.clone(), *(parameter.grad.clone() for parameter in model.parameters())]
    x.grad = None
    model.zero_grad()
    devices: list[int] = []

    def note(module: Any, inputs: Any) -> None:
        devices.append(inputs[0].get_device())

    parallel = nn.DataParallel(model.cuda())
    parallel.module[0].register_forward_pre_hook(note)
    out = parallel(x.to(here))
    assert sorted(devices) == [0, 1]
    assert out.get_device() == 0
    assert torch.equal(out.cpu(), halves)
    out.pow(2).sum().backward()
    found = [x.grad, *(parameter.grad for parameter in model.parameters())]
    assert [tensor.get_device() for tensor in found] == [-1, 0, 0, 0, 0]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other)


def test_copying_collections_of_tensors(cards: list[Card]) -> None:
    comm: Any = nn.parallel.comm
    x = torch.arange(10.0)
    assert [part.get_device() for part in comm.broadcast(x, (0, 1))] == [0, 1]
    parts = comm.scatter(x, (1, 0), chunk_sizes=[7, 3])
    assert [(part.get_device(), len(part)) for part in parts] == [(1, 7), (0, 3)]
    assert torch.equal(comm.gather(parts, destination="cpu"), x)
    assert comm.gather(parts, destination=1).get_device() == 1
    added = comm.reduce_add([x.to(0), x.to(1)], destination=1)
    assert added.get_device() == 1
    assert torch.equal(added.cpu(), 2 * x)


def test_streams_belong_to_a_gpu(cards: list[Card]) -> None:
    stream = torch.cuda.Stream("cuda:1")
    assert stream.device == torch.device("cuda:1")
    assert torch.cuda.current_stream(1) == torch.cuda.default_stream(1) != torch.cuda.default_stream(0)
    with torch.cuda.stream(stream):
        assert torch.cuda.current_device() == 1
        assert torch.cuda.current_stream() == torch.cuda.current_stream(1) == stream
        assert torch.cuda.current_stream(0) == torch.cuda.default_stream(0)
        assert stream.record_event().device == stream.device
    assert torch.cuda.current_device() == 0
    assert torch.cuda.current_stream(1) == torch.cuda.default_stream(1)
    torch.cuda.set_stream(stream)
    assert (torch.cuda.current_device(), torch.cuda.current_stream()) == (1, stream)
    torch.cuda.set_stream(torch.cuda.default_stream(1))


def test_saved_tensors_come_back_where_they_are_mapped(cards: list[Card]) -> None:
    file = io.BytesIO()
    torch.save([torch.ones(2, device="cuda:0"), torch.ones(3, device="cuda:1")], file)

    def devices(**mapping: Any) -> list[int]:
        file.seek(0)
        return [tensor.get_device() for tensor in torch.load(file, **mapping)]

    assert devices() == [0, 1]
    assert devices(map_location="cuda:1") == [1, 1]
    assert devices(map_location={"cuda:1": "cuda:0"}) == [0, 0]
    assert devices(map_location="cpu") == [-1, -1]


def test_evacuated_memory_comes_back_to_its_own_gpu(cards: list[Card]) -> None:
    evacuator = TorchEvacuator()
    assert (evacuator.resident(), evacuator.peak(), evacuator.evacuate(), evacuator.restore()) == (0, 0, 0, 0)
    tensors = [torch.rand(size, device=f"cuda:{index}") for size, index in [(1000, 0), (500, 1), (2000, 1), (100, 0)]]
    view = tensors[2][5:]
    values = [tensor.tolist() for tensor in tensors]
    assert [card.held() for card in cards] == [4400, 10000]
    assert evacuator.resident() == evacuator.peak() == 10000
    assert evacuator.evacuate() == 10000
    assert [card.held() for card in cards] == [0, 0]
    assert evacuator.resident() == 0
    with pytest.raises(RuntimeError, match="has been evacuated"):
        view.sum()
    filler = torch.empty(48 * MIB - 3000, dtype=torch.uint8, device="cuda:1")
    with pytest.raises(MemoryError, match="GPU 1 has a total capacity"):
        evacuator.restore()
    assert torch.cuda.memory_allocated(1) == filler.numel() + 2000
    del filler
    evacuator.restore()
    assert [card.held() for card in cards] == [4400, 10000]
    assert [tensor.get_device() for tensor in tensors] == [0, 1, 1, 0]
    assert [tensor.tolist() for tensor in tensors] == values
    assert view.tolist() == values[2][5:]
    evacuator.reset_peak()
    assert evacuator.peak() == 10000
    del tensors[2], view
    assert evacuator.resident() == 4400
    assert evacuator.evacuate() == evacuator.restore() == 4400


BOUND = """
import json
import torch
from acb.client import runtime
from acb.hooks import torch as hook
client = runtime.client()
client.gate._ask = client.gate._idle = lambda: None
hook.install(torch)
before = [torch.cuda.device_count(), [torch.cuda.mem_get_info(i)[1] for i in range(2)]]
client.agent.gpus = (2, 0)  # as a lease does
client.gate.open()
x = torch.ones(10, device="cuda:1")
print(json.dumps([before, torch.cuda.device_count(), [torch.cuda.mem_get_info(i)[1] for i in range(2)]]))
"""


def test_a_lease_says_which_cards_the_gpus_are(tmp_path: Path) -> None:
    create_cards(tmp_path, SimulatedSpec((MIB, 2 * MIB, 3 * MIB)))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ACB_")}
    environ |= {"ACB_SIMULATED": str(tmp_path), "ACB_GPUS": "2"}
    done = subprocess.run([sys.executable, "-c", BOUND], env=environ, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[2, [MIB, 2 * MIB]], 2, [3 * MIB, MIB]]


def test_without_a_broker_a_program_sees_no_more_gpus_than_there_are(tmp_path: Path) -> None:
    create_cards(tmp_path, SimulatedSpec((MIB, 2 * MIB)))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ACB_")}
    environ |= {"ACB_SIMULATED": str(tmp_path), "ACB_GPUS": "4", "ACB_BROKER": "off"}
    program = "import torch\nfrom acb.hooks.torch import install\ninstall(torch)\nprint(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=100)
    assert done.stdout == "2\n", done.stderr
