"""The capture of a CUDA graph under the gate, with a graph of the test's own: no machine without a GPU has another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")

from acb.client.gate import Gate  # noqa: E402
from acb.hooks.torch import gating_cuda, reach, regions  # noqa: E402
from acb.hooks.torch.patching import Patches  # noqa: E402


class Graph:
    """As torch.cuda.CUDAGraph; it notes whether the gate is busy when it is called."""

    gate: Gate
    failing = ""

    def __init__(self) -> None:
        self.busy: list[bool] = []

    def _called(self, name: str) -> None:
        self.busy.append(self.gate.busy())
        if name == self.failing:
            raise RuntimeError(name)

    def capture_begin(self) -> None:
        self._called("capture_begin")

    def capture_end(self) -> None:
        self._called("capture_end")

    def instantiate(self) -> None:
        self._called("instantiate")

    def replay(self) -> None:
        self._called("replay")

    def reset(self) -> None:
        self._called("reset")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """An open gate; the GPU is in use."""
    gate = Gate(lambda: None, lambda: None)
    gate.open()
    kind = type("Graph", (Graph,), {**vars(Graph), "gate": gate})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", kind)
    patches = Patches()
    gating_cuda.patch_graphs(patches)
    regions.bind(gate)
    monkeypatch.setattr(regions, "_used", True)
    yield gate
    regions.unbind()
    patches.undo()


def capture(graph: Any) -> None:
    graph.capture_begin()
    graph.capture_end()


def test_a_capture_is_one_region_from_its_begin_to_its_end(gate: Gate) -> None:
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    assert gate.busy()
    graph.capture_end()
    assert not gate.busy()
    graph.replay()
    assert not gate.busy()
    assert graph.busy == [True, True, True]
    assert reach.obstacle([]) is not None
    graph.reset()
    assert reach.obstacle([]) is None


def test_a_capture_inside_a_region_ends_with_itself_alone(gate: Gate) -> None:
    graph = torch.cuda.CUDAGraph()
    gate.enter()
    capture(graph)
    assert gate.busy()
    gate.exit()
    assert not gate.busy()
    graph.reset()


@pytest.mark.parametrize("failing", ["capture_begin", "capture_end"])
def test_a_capture_that_fails_leaves_no_region_open(gate: Gate, failing: str) -> None:
    graph = torch.cuda.CUDAGraph()
    graph.failing = failing
    with pytest.raises(RuntimeError, match=failing):
        capture(graph)
    assert not gate.busy()
    graph.reset()


def test_a_capture_that_is_given_up_is_ended_by_the_reset(gate: Gate) -> None:
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    graph.reset()
    assert not gate.busy()


def test_a_capture_that_never_began_pins_nothing_and_frees_nothing(gate: Gate) -> None:
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    graph.failing = "capture_begin"
    with pytest.raises(RuntimeError):
        capture(graph)
    assert reach.obstacle([]) is None
    capture(other)
    other.failing = "capture_begin"
    with pytest.raises(RuntimeError):
        capture(other)  # as on a real GPU: it owns a captured graph already
    assert reach.obstacle([]) is not None
    other.reset()
