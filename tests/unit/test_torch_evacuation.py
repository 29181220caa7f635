"""Evacuation of PyTorch's memory, on a simulated GPU: everything leaves, everything comes back bit for bit."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch: Any = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch_card import torch_card  # noqa: E402

from acb.client.evacuation import EvacuationError  # noqa: E402
from acb.devices.simulated import Card  # noqa: E402
from acb.hooks.torch import reach  # noqa: E402
from acb.hooks.torch.evacuator import TorchEvacuator  # noqa: E402
from acb.hooks.torch.hostpool import RESERVE, HostPool  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
MIB = 1 << 20


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Card]:
    """A simulated GPU of 64 MiB."""
    with torch_card(tmp_path_factory.mktemp("cards"), 64 * MIB) as card:
        yield card


@pytest.fixture(scope="module")
def evacuator(card: Card) -> TorchEvacuator:
    """One evacuator for all tests: its pool is used again and again."""
    return TorchEvacuator()


@pytest.fixture(autouse=True)
def _empty_card(card: Card) -> None:
    """Nothing of the test before is left."""
    if card.held():
        gc.collect()


def on_own_thread(work: Callable[[], Any]) -> Any:
    """Do what the agent does, where the agent does it: on a thread of acb's own. Passes on what it raises."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run, name="acb-test")
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def there_and_back(evacuator: TorchEvacuator, card: Card) -> int:
    """Evacuate everything, see that the card is empty, and restore."""
    held = card.held()
    moved = on_own_thread(evacuator.evacuate)
    assert card.held() == 0
    assert moved == held
    assert on_own_thread(evacuator.restore) == moved
    assert card.held() == held
    return int(moved)


# --- any program ----------------------------------------------------------------------------------------------------

STEPS: dict[str, Callable[[list[Any], int], Any]] = {
    "make": lambda ts, n: ts.append(torch.arange(float(n + 2), device="cuda") * 0.5),
    "zeros": lambda ts, n: ts.append(torch.zeros(n % 7, n % 3 + 1, device="cuda")),
    "empty": lambda ts, n: ts.append(torch.empty(0, device="cuda")),
    "parameter": lambda ts, n: ts.append(nn.Parameter(torch.full((n % 5 + 1,), n / 7, device="cuda"))),
    "half": lambda ts, n: ts.append(pick(ts, n).detach().half()),
    "view": lambda ts, n: ts.append(pick(ts, n).detach().unsqueeze(0)),
    "slice": lambda ts, n: ts.append(pick(ts, n).detach().reshape(-1)[n % 3 :: 2]),
    "alias": lambda ts, n: ts.append(pick(ts, n).detach()),
    "same": lambda ts, n: ts.append(pick(ts, n)),
    "expand": lambda ts, n: ts.append(pick(ts, n).detach().reshape(1, -1).expand(3, -1)),
    "in place": lambda ts, n: pick(ts, n).detach().add_(1),
    "compute": lambda ts, n: ts.append((pick(ts, n) * 3 + 1).float()),
    "graph": lambda ts, n: ts.append((pick(ts, n).float() * 2).exp().clamp(max=99.0).sin()),
    "backward": lambda ts, n: pick(ts, n).sum().backward() if pick(ts, n).requires_grad else None,
    "sparse": lambda ts, n: ts.append(torch.eye(n % 4 + 1, device="cuda").to_sparse()),
    "host": lambda ts, n: ts.append(torch.ones(n % 9)),
    "drop": lambda ts, n: ts.pop(n % len(ts)) if ts else None,
}


def pick(tensors: list[Any], n: int) -> Any:
    """The n-th dense tensor, counted around."""
    dense = [tensor for tensor in tensors if tensor.layout is torch.strided]
    return dense[n % len(dense)] if dense else torch.ones(2, device="cuda", requires_grad=True)


def described(tensors: list[Any]) -> list[Any]:
    """All that a program can tell about its tensors: values, versions, gradients, and which share memory."""
    first: dict[int, int] = {}
    lines = []
    for number, tensor in enumerate(tensors):
        if tensor.layout is not torch.strided:
            lines.append((tensor.layout, tensor.shape, tensor.to_dense().cpu().tolist()))
            continue
        storage = tensor.untyped_storage()
        lines.append(
            (
                type(tensor),
                tensor.device,
                tensor.dtype,
                tensor.stride(),
                tensor.storage_offset(),
                tensor.requires_grad,
                tensor._version,
                storage.nbytes(),
                first.setdefault(storage._cdata, number),
                tensor.detach().cpu().numpy().tobytes(),
                None if not tensor.is_leaf or tensor.grad is None else tensor.grad.cpu().numpy().tobytes(),
                str(tensor.grad_fn).partition(" ")[0],
            )
        )
    return lines


programs = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 50)), max_size=25)


@settings(max_examples=40, deadline=None)
@given(steps=programs, stops=st.sets(st.integers(0, 25), max_size=3))
def test_any_program_goes_on_as_if_nothing_had_happened(
    card: Card, evacuator: TorchEvacuator, steps: list[tuple[str, int]], stops: set[int]
) -> None:
    def run(stops: set[int]) -> list[Any]:
        tensors: list[Any] = []
        for number, (name, n) in enumerate(steps):
            if number in stops:
                there_and_back(evacuator, card)
            try:
                STEPS[name](tensors, n)
            except RuntimeError:
                pass  # not every step is possible for every tensor
        if len(steps) in stops:
            there_and_back(evacuator, card)
        return described(tensors)

    assert run(stops) == run(set())


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    optimizer=st.sampled_from(["SGD", "AdamW", "Adagrad"]),
    stops=st.sets(
        st.tuples(st.integers(0, 2), st.sampled_from(["forward", "backward", "step"])), min_size=1, max_size=4
    ),
)
def test_a_training_run_computes_the_same_losses(
    card: Card, evacuator: TorchEvacuator, seed: int, optimizer: str, stops: set[tuple[int, str]]
) -> None:
    def train(stops: set[tuple[int, str]]) -> list[Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 2)).cuda()
        steps = getattr(torch.optim, optimizer)(model.parameters(), 0.1)
        x = torch.randn(5, 8).cuda()
        losses = []

        def at(step: int, where: str) -> None:
            if (step, where) in stops:
                there_and_back(evacuator, card)

        for step in range(3):
            steps.zero_grad()
            at(step, "forward")
            loss = model(x).pow(2).mean()
            at(step, "backward")  # what autograd has saved is on the card now
            loss.backward()
            at(step, "step")
            steps.step()
            losses.append(loss.item())
        return losses + [p.detach().cpu().numpy().tobytes() for p in model.parameters()]

    assert train(stops) == train(set())


# --- what is found --------------------------------------------------------------------------------------------------


def test_what_only_autograd_holds_is_found(card: Card, evacuator: TorchEvacuator) -> None:
    x = torch.ones(1000, device="cuda", requires_grad=True)
    y = torch.nn.functional.dropout(x * 2, 0.5).exp().sum()
    there_and_back(evacuator, card)
    y.backward()
    assert x.grad is not None


def test_a_custom_functions_saved_tensors_are_found(card: Card, evacuator: TorchEvacuator) -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x * x)
            ctx.attribute = x + 1
            return x * x * x

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return 3 * ctx.saved_tensors[0] * gradient + 0 * ctx.attribute

    x = torch.full((10,), 2.0, device="cuda", requires_grad=True)
    y = Cube.apply(x).sum()
    there_and_back(evacuator, card)
    y.backward()
    assert x.grad.tolist() == [12.0] * 10


def test_hooks_on_saved_tensors_are_not_run(
    card: Card, evacuator: TorchEvacuator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "_hooks_used", True)  # as the gating notes it
    unpacked: list[str] = []

    def unpack(packed: Any) -> Any:
        unpacked.append(threading.current_thread().name)
        return packed

    x = torch.ones(10, device="cuda", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor * 1, unpack):
        y = (x * x).sum()
    there_and_back(evacuator, card)
    assert unpacked == []
    y.backward()
    assert x.grad.tolist() == [2.0] * 10


def test_checkpointed_activations_are_not_recomputed_by_evacuation(
    card: Card, evacuator: TorchEvacuator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.utils.checkpoint

    monkeypatch.setattr(reach, "_hooks_used", True)
    runs: list[str] = []

    def block(x: Any) -> Any:
        runs.append(threading.current_thread().name)
        return (x * x).exp()

    x = torch.ones(10, device="cuda", requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum()
    there_and_back(evacuator, card)
    assert len(runs) == 1
    y.backward()
    assert len(runs) == 2


def test_scripted_modules_are_found(card: Card, evacuator: TorchEvacuator) -> None:
    module = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))).cuda()
    x = torch.ones(3, 4, device="cuda")
    before = module.eval()(x).tolist()
    gc.collect()
    there_and_back(evacuator, card)
    assert module(x).tolist() == before


def test_proxies_are_left_alone(card: Card, evacuator: TorchEvacuator) -> None:
    class Proxy:
        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            raise AssertionError("asked what it is")

    proxy = Proxy()
    there_and_back(evacuator, card)
    assert type(proxy) is Proxy


def test_a_tuple_in_the_making_can_be_finished(card: Card, evacuator: TorchEvacuator) -> None:
    """The collector knows a tuple that is still being filled; whoever keeps it makes its maker fail."""
    half_way, go_on = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        for n in range(40):
            if n == 5:
                half_way.set()
                assert go_on.wait(30)
            yield n

    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(tuple(items())))
    thread.start()
    assert half_way.wait(30)
    kept = torch.ones(5, device="cuda")
    there_and_back(evacuator, card)
    go_on.set()
    thread.join()
    assert made == [tuple(range(40))]
    assert kept.sum().item() == 5


def test_frozen_tensors_are_found(card: Card, evacuator: TorchEvacuator) -> None:
    """gc.freeze() takes what exists out of the collector's lists."""
    kept = torch.ones(10, device="cuda")
    reach.remember()
    gc.freeze()
    try:
        there_and_back(evacuator, card)
    finally:
        gc.unfreeze()
    assert kept.sum().item() == 10


def test_nothing_there_is_nothing_moved(card: Card, evacuator: TorchEvacuator) -> None:
    gc.collect()
    assert there_and_back(evacuator, card) == 0
    assert on_own_thread(evacuator.restore) == 0


# --- what may not be moved ------------------------------------------------------------------------------------------


def test_memory_handed_out_by_address_stays(card: Card, evacuator: TorchEvacuator) -> None:
    kept = torch.ones(100, device="cuda")
    reach.pin(kept, "was handed out through DLPack")
    with pytest.raises(EvacuationError, match="DLPack"):
        on_own_thread(evacuator.evacuate)
    assert kept.sum().item() == 100
    del kept
    gc.collect()
    there_and_back(evacuator, card)


def test_a_captured_graph_keeps_everything_until_it_is_gone(card: Card, evacuator: TorchEvacuator) -> None:
    class Graph:
        pass

    kept = torch.ones(100, device="cuda")
    graph = Graph()
    reach.captured(graph)
    with pytest.raises(EvacuationError, match="graph"):
        on_own_thread(evacuator.evacuate)
    assert kept.sum().item() == 100
    del graph
    there_and_back(evacuator, card)


# --- no room --------------------------------------------------------------------------------------------------------


def test_no_host_memory_leaves_everything_resident(card: Card) -> None:
    small = TorchEvacuator(HostPool(available=lambda: RESERVE + MIB))
    kept = [torch.full((MIB // 4,), float(n), device="cuda") for n in range(3)]
    held = card.held()
    with pytest.raises(EvacuationError, match="host"):
        on_own_thread(small.evacuate)
    assert card.held() == held
    assert [int(tensor.sum().item()) for tensor in kept] == [n * MIB // 4 for n in range(3)]
    assert small._pool.held() == 0
    assert on_own_thread(small.restore) == 0


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_a_copy_that_fails_half_way_leaves_everything_resident(
    card: Card, refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = TorchEvacuator()
    kept = [torch.full((MIB // 4,), float(n), device="cuda") for n in range(3)]
    held = card.held()
    copies: list[None] = []
    copy = failing._copy

    def refuse(*args: Any) -> Any:
        copies.append(None)
        if len(copies) > refused:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return copy(*args)

    monkeypatch.setattr(failing, "_copy", refuse)
    with pytest.raises(EvacuationError, match="illegal memory access"):
        on_own_thread(failing.evacuate)
    assert card.held() == held
    assert [int(tensor.sum().item()) for tensor in kept] == [n * MIB // 4 for n in range(3)]
    monkeypatch.undo()
    there_and_back(failing, card)


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_freeing_that_fails_half_way_leaves_everything_resident(
    card: Card, refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = TorchEvacuator()
    kept = [torch.full((MIB // 4,), float(n), device="cuda") for n in range(3)]
    held = card.held()
    resize = failing._resize
    freed: list[None] = []

    def refuse(storage: Any, nbytes: int) -> Any:
        if nbytes == 0:
            freed.append(None)
            if len(freed) > refused:
                raise RuntimeError("Trying to resize storage that is not resizable")
        return resize(storage, nbytes)

    monkeypatch.setattr(failing, "_resize", refuse)
    with pytest.raises(EvacuationError, match="resizable"):
        on_own_thread(failing.evacuate)
    assert card.held() == held
    assert [int(tensor.sum().item()) for tensor in kept] == [n * MIB // 4 for n in range(3)]


def test_a_full_gpu_delays_what_it_has_no_room_for(card: Card, evacuator: TorchEvacuator) -> None:
    kept = [torch.full((8 * MIB // 4,), float(n), device="cuda") for n in range(4)]
    moved = on_own_thread(evacuator.evacuate)
    card.allocate(card.capacity - 20 * MIB)  # another client is there
    with pytest.raises(MemoryError, match="no room"):
        on_own_thread(evacuator.restore)
    here = card.held() - (card.capacity - 20 * MIB)
    assert 0 < here < moved
    with pytest.raises(MemoryError):
        on_own_thread(evacuator.restore)
    card.free(card.capacity - 20 * MIB)
    assert on_own_thread(evacuator.restore) == moved - here
    assert [int(tensor.sum().item()) for tensor in kept] == [n * 8 * MIB // 4 for n in range(4)]


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_a_copy_back_that_fails_loses_nothing(card: Card, refused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = TorchEvacuator()
    kept = [torch.full((MIB // 4,), float(n), device="cuda") for n in range(3)]
    moved = on_own_thread(failing.evacuate)
    copies: list[None] = []
    copy = failing._copy

    def refuse(*args: Any) -> Any:
        copies.append(None)
        if len(copies) > refused:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return copy(*args)

    monkeypatch.setattr(failing, "_copy", refuse)
    with pytest.raises(RuntimeError, match="launch failure"):
        on_own_thread(failing.restore)
    assert card.held() == 0, "what was not filled passes for restored"
    monkeypatch.undo()
    assert on_own_thread(failing.restore) == moved
    assert [int(tensor.sum().item()) for tensor in kept] == [n * MIB // 4 for n in range(3)]


# --- in pieces -------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 4 << 10), min_size=1, max_size=8),
    piece=st.integers(1, 40 << 10),
    limits=st.lists(st.integers(0, 40 << 10), max_size=6),
)
@settings(max_examples=30, deadline=None)
def test_memory_leaves_and_comes_back_in_pieces(
    card: Card, evacuator: TorchEvacuator, sizes: list[int], piece: int, limits: list[int]
) -> None:
    kept = [torch.arange(size, dtype=torch.float32, device="cuda") for size in sizes]
    views = [tensor[::2] for tensor in kept]
    held = card.held()

    def leave() -> None:
        steps = evacuator.evacuation(piece)
        assert (next(steps), card.held()) == (0, held)
        left = held
        for moved in steps:
            left -= moved
            assert card.held() == left, "what is said to be gone is gone"
        assert left == 0

    def come_back() -> None:
        here = 0
        for limit in [*limits, None]:
            moved = evacuator.restore(limit)
            here += moved
            assert limit is None or moved <= limit
            assert card.held() == here
        assert here == held

    on_own_thread(leave)
    on_own_thread(come_back)
    for size, tensor, view in zip(sizes, kept, views, strict=True):
        assert torch.equal(tensor, torch.arange(size, dtype=torch.float32, device="cuda"))
        assert view._base is tensor


def test_an_evacuation_that_is_called_off_changes_nothing(card: Card, evacuator: TorchEvacuator) -> None:
    kept = torch.ones(MIB // 4, device="cuda")
    held = card.held()

    def begin() -> None:
        steps = evacuator.evacuation()
        next(steps)
        steps.close()

    on_own_thread(begin)
    assert card.held() == held
    there_and_back(evacuator, card)
    assert kept.sum().item() == MIB // 4


@pytest.mark.parametrize("method", ["_copy", "_resize"])
def test_pieces_that_are_gone_stay_gone_when_a_later_one_fails(
    card: Card, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their room is somebody else's already."""
    failing = TorchEvacuator()
    kept = [torch.full((MIB // 4,), float(n), device="cuda") for n in range(3)]
    held = card.held()
    original = getattr(failing, method)
    calls = itertools.count(1)

    def refuse(*args: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return original(*args)

    monkeypatch.setattr(failing, method, refuse)
    gone: list[int] = []
    with pytest.raises(EvacuationError, match="illegal memory access"):
        on_own_thread(lambda: gone.extend(failing.evacuation(MIB // 2)))
    on_own_thread(lambda: None)
    assert 0 < card.held() < held
    assert on_own_thread(failing.restore) == held - card.held() or card.held() == held
    assert card.held() == held
    assert [int(tensor.sum().item()) for tensor in kept] == [n * MIB // 4 for n in range(3)]


# --- host memory ----------------------------------------------------------------------------------------------------


def test_copies_begun_ahead_are_called_off_when_something_has_to_stay(card: Card) -> None:
    evacuator = TorchEvacuator()
    kept = [torch.full((MIB // 4,), float(n), device="cuda") for n in range(3)]
    there_and_back(evacuator, card)
    reach.pin(kept[1], "is known to a library")
    for _ in range(2):  # the second time nothing is known of what came back
        with pytest.raises(EvacuationError, match="has to stay"):
            on_own_thread(evacuator.evacuate)
        assert not any(slab.tenants for slab in evacuator._pool._slabs)
    kept[1] = kept[0] * 2
    gc.collect()  # the errors' frames still know the one before
    there_and_back(evacuator, card)
    assert [int(tensor.sum().item()) for tensor in kept] == [0, 0, 2 * MIB // 4]


def test_what_is_copied_ahead_is_what_is_there_now(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    evacuator = TorchEvacuator()
    kept = [torch.full((MIB // 4,), float(n), device="cuda") for n in range(4)]
    there_and_back(evacuator, card)
    kept[0] += 7
    del kept[2]
    kept.append(torch.full((MIB // 4,), 9.0, device="cuda"))
    began: list[int] = []
    find = reach.find_storages
    copied: list[Any] = []
    copy = evacuator._copy

    def count(*args: Any) -> Any:
        copied.append(args)
        return copy(*args)

    monkeypatch.setattr(evacuator, "_copy", count)
    monkeypatch.setattr(reach, "find_storages", lambda: (began.append(len(copied)), find())[1])
    moved = on_own_thread(evacuator.evacuate)
    assert began == [3]
    assert len(copied) == 4
    assert card.held() == 0
    assert on_own_thread(evacuator.restore) == moved
    assert [int(tensor[0].item()) for tensor in kept] == [7, 1, 3, 9]


@pytest.mark.parametrize("next_move", ["restore", "evacuate"])
def test_what_is_dropped_while_evacuated_frees_its_host_memory_at_the_next_move(card: Card, next_move: str) -> None:
    """Not at once: without a lease the driver may have suspended the program, and page-locking is undone by a call."""
    undone: list[str] = []

    def unregister(address: int) -> int:
        undone.append(threading.current_thread().name)
        return 0

    evacuator = TorchEvacuator(HostPool(lambda address, nbytes: 0, unregister))
    kept = torch.arange(10.0, device="cuda")
    model = nn.Linear(512, 512).cuda()
    gone = weakref.ref(model.weight)
    on_own_thread(evacuator.evacuate)
    assert evacuator._pool.held() >= MIB
    del kept, model
    gc.collect()
    assert gone() is None
    assert undone == []
    assert on_own_thread(getattr(evacuator, next_move)) == 0
    assert evacuator._pool.held() == 0
    assert set(undone) == {"acb-test"}
    assert on_own_thread(evacuator.restore) == 0
    assert card.held() == 0


def test_what_is_dropped_after_its_return_does_not_touch_what_is_in_its_place(card: Card) -> None:
    evacuator = TorchEvacuator()
    first = torch.ones(1000, device="cuda")
    there_and_back(evacuator, card)
    second = torch.full((1000,), 2.0, device="cuda")
    on_own_thread(evacuator.evacuate)
    del first
    on_own_thread(evacuator.restore)
    assert second.sum().item() == 2000
    assert evacuator._pool.held() > 0


def test_host_memory_is_used_again(card: Card) -> None:
    evacuator = TorchEvacuator()
    kept = torch.ones(MIB, device="cuda")
    there_and_back(evacuator, card)
    held = evacuator._pool.held()
    assert held >= 4 * MIB
    there_and_back(evacuator, card)
    assert evacuator._pool.held() == held
    assert kept.sum().item() == MIB


def test_host_memory_is_given_back_when_the_host_runs_short(card: Card) -> None:
    left = [1 << 40]
    evacuator = TorchEvacuator(HostPool(available=lambda: left[0]))
    kept = torch.ones(MIB, device="cuda")
    on_own_thread(evacuator.evacuate)
    left[0] = RESERVE
    on_own_thread(evacuator.restore)
    assert evacuator._pool.held() == 0
    assert kept.sum().item() == MIB


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_the_programs_peak_is_its_own(card: Card) -> None:
    from acb.hooks.torch.patching import Patches
    from acb.hooks.torch.peaks import Peaks

    torch.ones(1, device="cuda")
    peaks, patches = Peaks(), Patches()
    peaks.patch(patches)
    try:
        torch.cuda.reset_peak_memory_stats()
        high = torch.ones(2 * MIB, device="cuda")
        del high
        peaks.reset(0)
        assert peaks.peak(0) < 8 * MIB <= torch.cuda.max_memory_allocated()
        high = torch.ones(MIB, device="cuda")
        del high
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() < 4 * MIB <= peaks.peak(0) < 8 * MIB
        assert torch.cuda.memory_stats()["reserved_bytes.all.peak"] == torch.cuda.max_memory_reserved()
    finally:
        patches.undo()


def test_resident_and_peak_are_the_devices_own(card: Card, evacuator: TorchEvacuator) -> None:
    gc.collect()
    evacuator.reset_peak()
    kept = torch.ones(MIB, device="cuda")
    assert evacuator.resident() == card.held() >= 4 * MIB
    more = torch.ones(MIB, device="cuda")
    del more
    assert evacuator.peak() >= 8 * MIB
    evacuator.reset_peak()
    assert evacuator.peak() == evacuator.resident()
    evacuator.synchronize()
    assert kept.sum().item() == MIB
