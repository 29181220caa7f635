"""PyTorch's evacuator and the streams of a GPU, which are a stand-in's here: copies are done when somebody waits.

The memory is a simulated GPU's.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")

from torch_card import torch_card  # noqa: E402

from acb.client.evacuation import EvacuationError  # noqa: E402
from acb.devices.simulated import Card  # noqa: E402
from acb.hooks.torch import evacuator as module  # noqa: E402
from acb.hooks.torch import reach, streams  # noqa: E402
from acb.hooks.torch.evacuator import TorchEvacuator  # noqa: E402
from acb.hooks.torch.hostpool import HostPool, Place  # noqa: E402

MIB = 1 << 20


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Card]:
    """A simulated GPU of 64 MiB."""
    with torch_card(tmp_path_factory.mktemp("cards"), 64 * MIB) as card:
        yield card


class Stream:
    """What was begun on it is done at the next synchronize(), like a real one's work at the latest."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.begun: list[Callable[[], Any]] = []

    def synchronize(self) -> None:
        while self.begun:
            self.begun.pop(0)()


class Cuda:
    """torch.cuda, with streams. `owner` says whose the memory at an address is."""

    def __init__(self) -> None:
        self.current: list[Stream] = []
        self.made: list[Stream] = []
        self.owner: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def Stream(self, device: int) -> Stream:
        self.made.append(Stream(1000 + device))
        return self.made[-1]

    def ExternalStream(self, handle: int, device: int) -> Stream:
        return Stream(handle)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()

    def memory_snapshot(self, include_traces: bool = True) -> list[dict[str, int]]:
        return [{"address": at, "total_size": 1, "stream": stream} for at, stream in self.owner.items()]

    def under_way(self) -> int:
        """Copies begun and not done."""
        return sum(len(stream.begun) for stream in self.made)


class Pool(HostPool):
    """Notes how many copies were still under way when places were given back."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__()
        self._cuda = cuda
        self.given_back: list[int] = []

    def give_back(self, places: list[Place]) -> None:
        if places:
            self.given_back.append(self._cuda.under_way())
        super().give_back(places)


@pytest.fixture
def cuda(card: Card, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    gc.collect()  # nothing of the test before is left
    cuda = Cuda()
    monkeypatch.setattr(module, "cuda", cuda)
    monkeypatch.setattr(streams, "cuda", cuda)
    return cuda


@pytest.fixture
def evacuator(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> TorchEvacuator:
    """One that takes the GPU for a real one; its copies are begun on the current stream."""
    evacuator = TorchEvacuator(Pool(cuda))
    copy = evacuator._copy
    monkeypatch.setattr(evacuator, "_real", True)
    monkeypatch.setattr(evacuator, "_ordinals", lambda: [0])
    monkeypatch.setattr(evacuator, "_copy", lambda *args: cuda.current[-1].begun.append(lambda: copy(*args)))
    return evacuator


@pytest.fixture
def do() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Does what the agent does on a thread of acb's own."""
    with ThreadPoolExecutor(1, thread_name_prefix="acb-test") as executor:
        yield lambda work: executor.submit(work).result()


def filled(*values: float) -> list[Any]:
    return [torch.full((MIB // 4,), float(value), device="cuda") for value in values]


def sums(tensors: list[Any]) -> list[float]:
    return [float(tensor.mean().item()) for tensor in tensors]


def refused(evacuator: TorchEvacuator, kept: list[Any], patch: pytest.MonkeyPatch) -> None:
    """Something has to stay on the GPU."""
    patch.setattr(reach, "obstacle", lambda storages: "a tensor's memory is known to a library")
    with pytest.raises(EvacuationError, match="has to stay"):
        evacuator.evacuate()


def stopped(evacuator: TorchEvacuator, kept: list[Any], patch: pytest.MonkeyPatch) -> None:
    """Another framework refuses."""
    steps = evacuator.evacuation()
    assert next(steps) == 0
    steps.close()


def lost(evacuator: TorchEvacuator, kept: list[Any], patch: pytest.MonkeyPatch) -> None:
    """What was begun with turns out not to be the program's any more."""
    find, gone = reach.find_storages, kept[1].untyped_storage()._cdata
    patch.setattr(reach, "find_storages", lambda: [storage for storage in find() if storage._cdata != gone])
    steps = evacuator.evacuation()
    assert next(steps) == 0
    assert evacuator._pool.given_back, "its place is free before the others leave"  # type: ignore[attr-defined]
    steps.close()


@pytest.mark.parametrize("why", [refused, stopped, lost], ids=lambda why: why.__name__)
def test_places_are_free_only_when_nothing_is_being_copied_into_them(
    cuda: Cuda,
    evacuator: TorchEvacuator,
    do: Callable[[Callable[[], Any]], Any],
    why: Callable[[TorchEvacuator, list[Any], pytest.MonkeyPatch], None],
) -> None:
    kept = filled(1, 2, 3)
    do(evacuator.evacuate)
    do(evacuator.restore)
    pool: Any = evacuator._pool
    pool.given_back.clear()
    begun: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        find = reach.find_storages
        patch.setattr(reach, "find_storages", lambda: (begun.append(cuda.under_way()), find())[1])
        do(lambda: why(evacuator, kept, patch))
    assert begun == [3], "what came back last time is copied while the rest is looked for"
    assert pool.given_back
    assert set(pool.given_back) == {0}
    assert sums(kept) == [1, 2, 3]


def test_each_storage_comes_back_as_memory_of_its_own_stream(
    card: Card,
    cuda: Cuda,
    evacuator: TorchEvacuator,
    do: Callable[[Callable[[], Any]], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Freed memory is handed out again at once, to the stream for which it was allocated."""
    kept = filled(1, 2, 3, 4)
    own = {tensor.untyped_storage()._cdata: stream for tensor, stream in zip(kept, [0, 7, 9, 7], strict=True)}
    resize = evacuator._resize
    allocated: dict[int, int] = {}

    def note(storage: Any, nbytes: int) -> Any:
        if nbytes:
            allocated[storage._cdata] = cuda.current[-1].handle if cuda.current else streams.DEFAULT
        return resize(storage, nbytes)

    monkeypatch.setattr(evacuator, "_resize", note)
    for _ in range(2):  # and the second time, too
        cuda.owner = {tensor.untyped_storage().data_ptr(): own[tensor.untyped_storage()._cdata] for tensor in kept}
        allocated.clear()
        do(evacuator.evacuate)
        assert card.held() == 0
        do(evacuator.restore)
        assert allocated == own
        assert cuda.under_way() == 0
        assert sums(kept) == [1, 2, 3, 4]
