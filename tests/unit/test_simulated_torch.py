"""PyTorch on the simulated GPU: devices, copies, memory, what fails and how."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")

from acb.config import SimulatedSpec  # noqa: E402
from acb.devices.simulated import Card, create_cards  # noqa: E402
from acb.hooks.torch import simulated  # noqa: E402

CAPACITY = 64 << 20
F: Any = torch.nn.functional


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Card]:
    """PyTorch with a simulated GPU of 64 MiB; afterwards nothing is left on it."""
    create_cards(tmp_path, SimulatedSpec((CAPACITY,)))
    card = Card.open(tmp_path)
    simulated.install(torch, lambda: card, lambda: card)
    ledger = simulated.current_ledger()
    yield card
    if ledger.storages():
        gc.collect()
    left = [storage.nbytes() for storage in ledger.storages()]
    simulated.uninstall()
    assert left == []
    assert card.held() == 0
    card.close()


def test_without_it_there_is_no_gpu() -> None:
    assert not torch.cuda.is_available()
    assert "device" not in vars(torch.Tensor)


def test_questions_are_answered_before_anything_is_used(card: Card) -> None:
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    assert torch.cuda.current_device() == 0
    assert torch.cuda.get_device_name() == torch.cuda.get_device_properties(0).name == "Simulated GPU"
    assert torch.cuda.get_device_properties("cuda").total_memory == CAPACITY
    assert torch.cuda.get_device_capability() == (8, 0)
    assert torch.cuda.is_bf16_supported()
    assert torch.cuda.mem_get_info() == (CAPACITY, CAPACITY)
    assert torch.cuda.memory_allocated() == 0
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert not torch.cuda.is_initialized()
    assert card.processes() == []
    torch.zeros(1, device="cuda")
    assert torch.cuda.is_initialized()


def test_results_are_where_the_arguments_are(card: Card) -> None:
    x = torch.arange(12.0).reshape(3, 4).cuda()
    assert type(x) is torch.Tensor
    assert x.device == torch.device("cuda:0")
    assert x.is_cuda
    assert not x.is_cpu
    assert x.get_device() == 0
    assert x.type() == "torch.cuda.FloatTensor"
    y = (x @ x.T).softmax(-1)[1:]
    assert y.device == x.device
    assert repr(x[0]) == "tensor([0., 1., 2., 3.], device='cuda:0')"
    host = y.cpu()
    assert host.device == torch.device("cpu")
    assert host.type() == "torch.FloatTensor"
    assert x.to("cuda") is x
    assert x.to("cpu", torch.float64).dtype == torch.float64
    assert x.to(host).device == host.device
    assert host.type_as(x).is_cuda
    assert x.type("torch.FloatTensor").device == torch.device("cpu")
    assert torch.zeros_like(x).is_cuda
    assert x.new_ones(2).is_cuda
    assert torch.zeros_like(x, device="cpu").is_cpu
    assert x.new_ones(2, device="cpu").is_cpu
    assert x.cpu().tolist() == x.tolist()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda")])
def test_every_way_to_name_the_gpu(card: Card, device: Any) -> None:
    made = [
        torch.ones(2, device=device),
        torch.tensor([1.0], device=device),
        torch.as_tensor([1.0], device=device),
        torch.asarray([1.0], device=device),
        torch.arange(3, device=device),
        torch.ones(2).to(device),
        torch.ones(2).cuda(device),
        torch.nn.Linear(2, 2).to(device).weight,
        torch.nn.Linear(2, 2).to(torch.ones(1, device=device)).weight,
        torch.nn.Linear(2, 2, device=device).weight,
    ]
    assert all(tensor.device == torch.device("cuda:0") for tensor in made)
    missing: list[Any] = [lambda: torch.ones(2).cuda(1), lambda: torch.ones(2, device="cuda:1")]
    for bad in missing:
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            bad()


def test_default_device(card: Card) -> None:
    with torch.device("cuda"):
        assert torch.tensor([1]).is_cuda
        assert torch.ones(1).is_cuda
        assert torch.nn.Linear(2, 2).weight.is_cuda
        assert torch.ones(1, device="cpu").is_cpu
    torch.set_default_device("cuda")
    try:
        assert torch.empty(1).is_cuda
        assert torch.as_tensor([1.0]).is_cuda
    finally:
        torch.set_default_device(None)
    assert torch.empty(1).is_cpu


def test_legacy_constructors(card: Card) -> None:
    x = torch.cuda.FloatTensor([1, 2])
    assert x.is_cuda
    assert isinstance(x, torch.cuda.FloatTensor)
    assert not isinstance(x.cpu(), torch.cuda.FloatTensor)
    assert torch.cuda.LongTensor(2, 3).shape == (2, 3)
    assert x.cpu().type(torch.cuda.DoubleTensor).dtype == torch.float64
    assert x.new(3).is_cuda


def test_devices_do_not_mix(card: Card) -> None:
    x, host = torch.ones(3, device="cuda"), torch.ones(3)
    scalar = torch.tensor(2.0)
    mixtures: list[Any] = [
        lambda: x + host,
        lambda: torch.cat([x, host]),
        lambda: F.linear(x, host[None]),
        lambda: host.add_(x),
        lambda: scalar.add_(x.sum()),
        lambda: torch.nn.Embedding(3, 2).cuda()(torch.tensor([1])),
        lambda: host + torch.tensor(2.0, device="cuda"),
    ]
    for mixed in mixtures:
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            mixed()
    assert (x * scalar).is_cuda
    assert x[torch.tensor([0, 2])].is_cuda
    assert host.copy_(x * 2).tolist() == [2, 2, 2]
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()


def test_what_c_plus_plus_makes_on_the_way_joins_its_arguments(card: Card) -> None:
    x = torch.randn(4, 6).cuda()
    index = torch.tensor([0, 2], device="cuda")
    made = [
        F.one_hot(index),
        torch.nn.utils.rnn.pad_sequence([x[0], x[1, :2]]),
        F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
        torch.combinations(index),
        x.quantile(0.5),
        F.dropout2d(x[None, None]),
    ]
    assert all(tensor.is_cuda for tensor in made)
    assert F.one_hot(torch.tensor([0, 2])).is_cpu


def test_gradients_cross_between_devices(card: Card) -> None:
    w = torch.ones(3, requires_grad=True)
    (w.cuda() * 2).sum().cpu().backward()
    assert w.grad.is_cpu
    assert w.grad.tolist() == [2, 2, 2]
    x = torch.ones(3, device="cuda", requires_grad=True)
    (x.cpu() ** 2).sum().backward()
    assert x.grad.is_cuda
    (first,) = torch.autograd.grad((w.cuda() ** 3).sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), w)
    assert second.tolist() == [6, 6, 6]


def test_out_of_memory_says_so_and_leaves_nothing_behind(card: Card) -> None:
    x = torch.zeros(6 << 20, device="cuda")
    held = card.held()
    assert held == 24 << 20
    with pytest.raises(
        torch.cuda.OutOfMemoryError, match=r"Tried to allocate 48.00 MiB. GPU 0 has a total capacity of 64"
    ) as caught:
        torch.cat([x, x])
    assert "24.00 MiB memory in use" in str(caught.value)
    assert "40.00 MiB is free" in str(caught.value)
    assert card.held() == held  # even while the error, with its traceback, still lives
    with pytest.raises(torch.OutOfMemoryError):
        torch.split_with_sizes_copy(torch.cat([x, x[: 4 << 20]]), [6 << 20, 4 << 20])
    assert card.held() == held
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 4096.00 GiB|4.00 TiB"):
        torch.empty(1 << 40, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        x.resize_(1 << 28)
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(12 << 20).cuda()
    assert card.held() == held
    assert torch.cuda.memory_stats()["num_ooms"] >= 5
    del caught


def test_memory_is_counted_by_storage(card: Card) -> None:
    x = torch.zeros(1000, device="cuda")
    views = [x[:10], x.view(10, 100).T, x.detach()]
    assert torch.cuda.memory_allocated() == torch.cuda.memory_reserved() == 4000
    del x
    assert torch.cuda.memory_allocated() == 4000
    views.clear()
    assert torch.cuda.memory_allocated() == 0
    assert torch.cuda.max_memory_allocated() == 4000
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 0
    out = torch.empty(0, device="cuda")
    torch.add(torch.ones(5, device="cuda"), 1, out=out)
    assert torch.cuda.memory_allocated() == 20
    assert "simulated" not in torch.cuda.memory_summary()
    assert str(os.getpid()) in torch.cuda.list_gpu_processes()


def evacuate(storage: Any) -> Any:
    host = torch.UntypedStorage(storage.nbytes())
    host.copy_(storage)
    storage.resize_(0)
    return host


def test_evacuated_memory_is_gone_until_it_is_restored(card: Card) -> None:
    x = torch.arange(6.0, device="cuda", requires_grad=True)
    view = x.detach()[2:4]
    y = (x * x).sum()
    storage = x.untyped_storage()
    assert storage.is_cuda
    version, held = x._version, card.held()
    host = evacuate(storage)
    assert host.device.type == "cpu"
    assert card.held() == held - 24
    for touch in (
        lambda: x + 1,
        lambda: view.sum(),
        lambda: repr(x),
        lambda: x.tolist(),
        lambda: y.backward(),
        lambda: view.fill_(0),
        lambda: torch.save(x, io.BytesIO()),
        lambda: copy.deepcopy(storage),
        lambda: storage[0],
        lambda: torch.zeros(6).copy_(x.detach()),
    ):
        with pytest.raises(RuntimeError, match="evacuated"):
            touch()
    filler = torch.empty(CAPACITY - card.held(), dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        storage.resize_(24)
    with pytest.raises(RuntimeError, match="evacuated"):
        view.clone()
    del filler
    storage.resize_(host.nbytes())
    storage.copy_(host)
    assert (x.detach().tolist(), view.tolist(), x._version) == ([0, 1, 2, 3, 4, 5], [2, 3], version)
    (x * x).sum().backward()
    assert x.grad.tolist() == [0, 2, 4, 6, 8, 10]


def test_the_evacuator_moves_everything_and_back(card: Card) -> None:
    from acb.hooks.torch.evacuator import TorchEvacuator

    evacuator = TorchEvacuator()
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(2, 5, 16).cuda()
    for _ in range(2):
        model(x).pow(2).mean().backward()
        optimizer.step()
    before = [tensor.cpu() for tensor in model.state_dict().values()]
    loss = model(x).pow(2).mean()
    held = card.held()
    moved: list[int] = []
    agent = threading.Thread(name="acb-agent", target=lambda: moved.append(evacuator.evacuate()))
    card.set_holders([])
    agent.start()
    agent.join()
    assert moved == [held]
    assert card.held() == 0
    agent = threading.Thread(name="acb-agent", target=lambda: moved.append(evacuator.restore()))
    agent.start()
    agent.join()
    assert moved == [held, held]
    assert card.violations() == []
    card.set_holders(None)
    assert all(
        torch.equal(tensor.cpu(), kept) for tensor, kept in zip(model.state_dict().values(), before, strict=True)
    )
    loss.backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_referee_sees_operations_and_no_more(card: Card) -> None:
    x, host = torch.ones(3, device="cuda"), torch.ones(3)
    traced = torch.jit.trace(lambda y: y * 2, (host,), check_trace=False)
    card.set_holders([])
    views = [x[1:], x.view(3, 1), x.detach(), x.T if x.dim() == 2 else x]
    assert views[0].shape == (2,)
    assert x.device.type == "cuda"
    torch.cuda.mem_get_info()
    del host, views
    torch.ones(3) + 1
    assert card.violations() == []
    for operate in (
        lambda: x + 1,
        lambda: torch.empty(1, device="cuda"),
        lambda: x.cpu(),
        lambda: torch.ones(1).cuda(),
        lambda: x.tolist(),
        lambda: x.untyped_storage().cpu(),
        lambda: repr(x),
        lambda: x.sum().item(),
        lambda: torch.save(x, io.BytesIO()),
        lambda: traced(x),
    ):
        before = len(card.violations())
        operate()
        assert len(card.violations()) > before
    assert {violation.pid for violation in card.violations()} == {os.getpid()}
    card.set_holders([os.getpid()])
    before = len(card.violations())
    _ = x + 1
    assert len(card.violations()) == before
    card.set_holders(None)


def test_saving_and_loading(card: Card, tmp_path: Path) -> None:
    x = {"gpu": torch.arange(3.0).cuda(), "host": torch.arange(3.0)}
    file = tmp_path / "saved.pt"
    torch.save(x, file)
    loaded = torch.load(file)
    assert (loaded["gpu"].device.type, loaded["host"].device.type) == ("cuda", "cpu")
    assert torch.load(file, map_location="cpu")["gpu"].is_cpu
    assert torch.load(file, map_location="cuda:0")["host"].is_cuda
    assert torch.load(file, map_location={"cuda:0": "cpu"})["gpu"].is_cpu
    assert torch.load(file, map_location=lambda storage, _: storage.cuda())["host"].is_cuda
    for again in (copy.deepcopy(x["gpu"]), pickle.loads(pickle.dumps(x["gpu"])), loaded["gpu"]):
        assert again.is_cuda
        assert again.tolist() == [0, 1, 2]
        assert again.data_ptr() != x["gpu"].data_ptr()
    module = copy.deepcopy(torch.nn.Linear(2, 2).cuda())
    assert module.weight.is_cuda


def test_a_file_saved_on_the_simulated_gpu_names_it(tmp_path: Path, card: Card) -> None:
    file = tmp_path / "saved.pt"
    torch.save(torch.ones(2, device="cuda"), file)
    simulated.uninstall()
    with pytest.raises(RuntimeError, match="Attempting to deserialize object on a CUDA device"):
        torch.load(file)
    assert torch.load(file, map_location="cpu").tolist() == [1, 1]


def test_random_numbers_are_the_cpus(card: Card) -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    assert torch.randn(3, device="cuda").tolist() == expected.tolist()
    generator = torch.Generator(device="cuda").manual_seed(5)
    assert generator.device == torch.device("cuda:0")
    assert isinstance(generator, torch.Generator)
    assert isinstance(torch.default_generator, torch.Generator)
    assert torch.randn(3, device="cuda", generator=generator).tolist() == expected.tolist()
    state = torch.cuda.get_rng_state()
    first = torch.rand(2, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.rand(2, device="cuda").tolist() == first.tolist()
    torch.cuda.manual_seed_all(5)
    assert torch.randn(3, device="cuda").tolist() == expected.tolist()
    assert torch.cuda.initial_seed() == 5
    with torch.random.fork_rng(devices=[0]):
        torch.rand(1, device="cuda")


def test_streams_events_and_graphs(card: Card) -> None:
    stream = torch.cuda.Stream()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        x = torch.ones(2, device="cuda")
        x.record_stream(stream)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    end.record(stream)
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert begin.elapsed_time(end) >= 0
    with torch.cuda.device(0):
        torch.cuda.set_device("cuda:0")
    with pytest.raises(RuntimeError, match="CUDA graphs are not simulated"):
        torch.cuda.CUDAGraph()


def test_compiled_scripted_and_autocast_calls(card: Card) -> None:
    x = torch.arange(3.0, device="cuda")
    compiled = torch.compile(lambda y: y * 2 + 1, fullgraph=True)
    assert compiled(x).tolist() == [1, 3, 5]
    assert compiled(x).is_cuda
    with torch.autocast("cuda"):
        assert (x @ x).is_cuda
    with torch.inference_mode():
        assert F.one_hot(torch.tensor([0, 2], device="cuda")).is_cuda
        assert x.reshape(3, 1).cpu().is_cpu


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(card: Card) -> None:
    def function(y: torch.Tensor) -> torch.Tensor:
        return y * torch.zeros([3], device=y.device) + torch.ones([2, 3])

    scripted = torch.jit.script(function)
    x = torch.ones(3, device="cuda")
    assert scripted(x).is_cuda
    assert scripted(torch.ones(3)).is_cpu
    traced = torch.jit.trace(lambda y: y.to("cuda") * 2, (torch.ones(3),))
    assert traced(x).is_cuda


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_cannot_use_the_gpu_and_frees_nothing(card: Card) -> None:
    x = torch.ones(1000, device="cuda")
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = [str(torch.ones(2).sum().item()), str(x.is_cuda), str(torch.cuda._is_in_bad_fork())]
            uses: list[Any] = [lambda: x + 1, lambda: torch.ones(1).cuda()]
            for use in uses:
                try:
                    use()
                except RuntimeError as error:
                    said.append(str(error))
            del x
            gc.collect()
            os.write(writes, "|".join(said).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with open(reads) as file:
        computed, is_cuda, bad_fork, touch, new = file.read().split("|")
    os.waitpid(pid, 0)
    assert (computed, is_cuda, bad_fork) == ("2.0", "True", "True")
    assert "forked subprocess" in touch
    assert "Cannot re-initialize CUDA in forked subprocess" in new
    assert card.held() == card.used() == 4000


def test_every_thread_is_simulated(card: Card) -> None:
    results: list[Any] = []

    def work() -> None:
        x = torch.randn(4, 4).cuda().requires_grad_()
        (x @ x).sum().backward()
        results.append((x.grad.device.type, torch.cuda.current_stream().stream_id))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [("cuda", 0)] * 4


def test_modes_of_the_program_come_and_go(card: Card) -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    class Functions(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    with Seen() as mode, Functions():
        x = torch.ones(3).to("cuda") * 2
    assert mode.count >= 3
    assert torch.Tensor.to in seen
    assert (x + 1).is_cuda


def test_pinned_memory(card: Card) -> None:
    x = torch.arange(3.0)
    assert not x.is_pinned()
    pinned = x.pin_memory()
    assert pinned.is_pinned()
    assert pinned.pin_memory() is pinned
    assert torch.empty(3, pin_memory=True).is_pinned()
    assert torch.tensor([1.0], pin_memory=True).is_pinned()
    assert pinned.cuda(non_blocking=True).tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match=r"cannot pin 'torch.cuda.FloatTensor'"):
        x.cuda().pin_memory()


def test_sparse_tensors(card: Card) -> None:
    index, values = torch.tensor([[0, 1], [2, 0]]), torch.tensor([3.0, 4.0])
    sparse = torch.sparse_coo_tensor(index, values, (2, 3), check_invariants=True).to("cuda")
    assert sparse.is_cuda
    assert torch.sparse.mm(sparse, torch.ones(3, 1, device="cuda")).tolist() == [[3], [4]]
    assert sparse.t().to_dense().is_cuda
    assert sparse.cpu().is_cpu
