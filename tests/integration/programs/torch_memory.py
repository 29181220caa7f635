"""The leaser's memory as tensors of PyTorch's, moved by acb's own evacuator, whose steps the test can hold and fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from acb.client import runtime


class TorchMemory:
    """Blocks of memory on the GPU, each with a view, and perhaps a captured graph that works on one of its own."""

    def __init__(self, steps: Any) -> None:
        """`steps`: a leaser's Steps. PyTorch's evacuator is there already: the hook has made it."""
        self._steps = steps
        self._blocks: dict[str, tuple[Any, Any, int]] = {}
        self._graph: Any = None
        self._replays = 0
        evacuators: list[Any] = runtime.client().evacuators
        [place] = [index for index, evacuator in enumerate(evacuators) if evacuator.name == "torch"]
        evacuators[place] = SteppingEvacuator(evacuators[place], steps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._steps, name)

    def add(self, key: str, nbytes: int) -> None:
        """A block, if it is to have any bytes."""
        if nbytes:
            block = torch.full((nbytes // 4,), len(self._blocks) + 7, dtype=torch.int32, device="cuda")
            self._blocks[key] = (block, block[1::2], len(self._blocks) + 7)

    def operate(self) -> None:
        """Every block must be there, unchanged, and the graph do what it did."""
        for block, view, value in self._blocks.values():
            assert int(block.sum()) == value * block.numel(), "memory was changed"
            assert int(view.sum()) == value * view.numel(), "a view was changed"
        if self._graph is not None:
            self._graph.replay()
            self._replays += 1
            torch.cuda.synchronize()
            assert int(self._counted[0]) == self._replays, "the graph does something else"

    def make_immovable(self) -> None:
        """Capture a graph, or, on a simulated GPU, where there are none, hand a block out through DLPack."""
        if runtime.client().simulated is not None:
            self._handed_out = torch.utils.dlpack.to_dlpack(next(iter(self._blocks.values()))[0])
            return
        self._counted = torch.zeros(1024, dtype=torch.int32, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._counted.add_(1)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._counted.add_(1)
        torch.cuda.synchronize()
        self._replays = int(self._counted[0])


class SteppingEvacuator:
    """Another evacuator, each of whose methods is a step."""

    def __init__(self, evacuator: Any, steps: Any) -> None:
        self._evacuator, self._steps = evacuator, steps
        self.name = evacuator.name

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._evacuator, name)

        def stepped(*arguments: Any) -> Any:
            self._steps.step(name)
            return method(*arguments)

        return stepped

    def evacuation(self, piece: int = 0) -> Iterator[int]:
        """As the other one's; "evacuate" is the step before it."""
        self._steps.step("evacuate")
        yield from self._evacuator.evacuation(piece)
