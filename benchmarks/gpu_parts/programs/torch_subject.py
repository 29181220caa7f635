"""A PyTorch program that obeys: memory with known contents, work, evacuation from inside, training, captured graphs."""

from __future__ import annotations

import os
import time
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for bitwise equal sums, see torch's notes on randomness

import torch
from subject import Moving, make, pause, serve, stand

PIECE = 2 << 30
"""Bytes of the pinned buffer of the plain copy: one as large as the data would measure page-locking, and cost more."""


class Busy(torch.nn.Module):
    """Keeps the GPU busy for as long as it is told: one forward, and so one region."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(256))

    def forward(self, x: Any, seconds: float, mark: str = "") -> Any:
        """`x` times the identity, again and again; with a mark, until that is gone."""
        if mark:
            make(mark)
        end = time.monotonic() + seconds
        while True:
            x = x @ self.weight
            torch.cuda.synchronize()
            if mark:
                pause()
            if time.monotonic() >= end and not (mark and os.path.exists(mark)):
                return x


class Pretended:
    """Stands for a captured graph."""


class Subject(Moving):
    """What it can be told."""

    def __init__(self) -> None:
        super().__init__(_evacuator)
        self.held: dict[str, list[tuple[Any, int, int]]] = {}
        self.busy: Any = None
        self.graph: Any = None

    def facts(self) -> dict[str, Any]:
        """What it sees before and after its first use of the GPU."""
        return {
            "available": torch.cuda.is_available(),
            "initialised": torch.cuda.is_initialized(),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "simulated": bool(os.environ.get("ACB_SIMULATED")),
            "torch": torch.__version__,
            "pid": os.getpid(),
        }

    def look(self) -> dict[str, Any]:
        """As many programs begin: count the GPUs, read the first one's properties; then use it."""
        count = torch.cuda.device_count()
        properties = torch.cuda.get_device_properties(0)
        total = float(torch.ones(1024, device="cuda").sum())
        current = torch.cuda.current_device()
        return {"count": count, "bytes": properties.total_memory, "name": properties.name,
                "sum": total, "current": current}  # fmt: skip

    def load(self, name: str, nbytes: int, pieces: int = 1) -> int:
        """Hold random contents in so many tensors of equal size; the bytes held."""
        each = max(4096, nbytes // pieces // 4096 * 4096)
        torch.manual_seed(len(self.held))
        tensors = []
        for _ in range(pieces):
            tensor = torch.empty(each // 4, dtype=torch.int32, device="cuda").random_()
            tensors.append((tensor, _checksum(tensor), tensor.data_ptr()))
        self.held[name] = tensors
        return each * pieces

    def reserve(self, nbytes: int) -> None:
        """Hold so many bytes more, with whatever is in them."""
        self.reserved = torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def drop(self, name: str) -> None:
        """Hold it no longer."""
        del self.held[name]
        torch.cuda.empty_cache()

    def check(self) -> dict[str, bool]:
        """Whether all contents, and all addresses, are as they were."""
        all_of_it = [entry for tensors in self.held.values() for entry in tensors]
        return {
            "same": all(_checksum(tensor) == known for tensor, known, _ in all_of_it),
            "addresses": all(tensor.data_ptr() == address for tensor, _, address in all_of_it),
        }

    def work(self, seconds: float = 0.0, mark: str = "") -> bool:
        """One region of so many seconds, or until the mark that it makes is gone; whether the result is right."""
        if self.busy is None:
            self.busy = Busy().cuda()
            self.x = torch.ones(256, 256, device="cuda")
        with torch.no_grad():
            return bool((self.busy(self.x, seconds, mark) == 1).all())

    def halt(self, mark: str) -> None:
        """Stand at the mark in the midst of the next move of memory, evacuation or restoring: one piece has moved."""
        evacuator = next(evacuator for evacuator in self.evacuators() if evacuator.name == "torch")
        original, moved = evacuator._copy, []

        def copy(*arguments: Any) -> None:
            if len(moved) == 1:
                evacuator._copy = original
                stand(mark)
            moved.append(original(*arguments))

        evacuator._copy = copy

    def grab(self, nbytes: int) -> int:
        """One tensor of so many bytes, dropped again."""
        return int(torch.empty(nbytes, dtype=torch.uint8, device="cuda").nbytes)

    def ooms(self) -> int:
        """How often PyTorch has run out of GPU memory in this process."""
        return int(torch.cuda.memory_stats().get("num_ooms", 0))

    def copy(self, nbytes: int) -> dict[str, float]:
        """Bytes a second of plain copies between GPU and pinned memory, `nbytes` each way, in PIECEs."""
        piece = min(nbytes, PIECE)
        on_gpu = torch.zeros(piece, dtype=torch.uint8, device="cuda")
        pinned = torch.empty(piece, dtype=torch.uint8, pin_memory=torch.version.cuda is not None)
        rounds = -(-nbytes // piece)
        found = {}
        for name, target, source in (("out", pinned, on_gpu), ("back", on_gpu, pinned)):
            target.copy_(source)
            best = 0.0
            for _ in range(3):
                torch.cuda.synchronize()
                begun = time.perf_counter()
                for _ in range(rounds):
                    target.copy_(source, non_blocking=True)
                torch.cuda.synchronize()
                best = max(best, rounds * piece / (time.perf_counter() - begun))
            found[name] = best
        del on_gpu, pinned
        torch.cuda.empty_cache()
        return found

    # --- graphs ------------------------------------------------------------------------------------------------------

    def capture(self, mark: str) -> None:
        """Capture a graph that adds one to what it holds; stand at the mark, if there is one, in the midst of it."""
        self.counter = torch.zeros(1024, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.counter.add_(1)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            if mark:
                stand(mark)
            self.counter.add_(1)
        torch.cuda.synchronize()

    def pretend(self) -> None:
        """Where graphs are not simulated: have acb believe that one has been captured."""
        from acb.hooks.torch import reach

        self.graph = Pretended()
        reach.captured(self.graph)

    def replay(self) -> bool:
        """Whether the graph still does what it did."""
        if isinstance(self.graph, Pretended):
            return True
        before = float(self.counter[0])
        self.graph.replay()
        torch.cuda.synchronize()
        return bool((self.counter == before + 1).all())

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self, steps: int, evacuations: int) -> dict[str, Any]:
        """The same run three times: undisturbed, again, and evacuated and restored so many times.

        `steady`: the first two are equal bit for bit, in every loss and in all that the run leaves; `equal`: the third
        is, too.
        """
        torch.use_deterministic_algorithms(True)
        plain, losses, _ = self._train(steps, 0)
        again, _, _ = self._train(steps, 0)
        moved, _, count = self._train(steps, evacuations)
        return {"steady": _equal(plain, again), "equal": _equal(plain, moved), "evacuations": count,
                "first": losses[0], "last": losses[-1], "steps": steps}  # fmt: skip

    def _train(self, steps: int, evacuations: int) -> tuple[list[Any], list[float], int]:
        """All losses, weights and the optimizer's state, on the host; the losses as numbers; how often evacuated."""
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(256, 4, 512, dropout=0.1, batch_first=True)
        model = torch.nn.Sequential(layer, torch.nn.Flatten(), torch.nn.Linear(256 * 16, 10)).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        data, labels = torch.randn(64, 16, 256, device="cuda"), torch.randint(0, 10, (64,), device="cuda")
        view = data[::2, :, 1:]  # an alias, which must move along
        losses, done = [], 0
        for step in range(steps):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(data), labels) + view.mean() * 0.01
            done += self._disturb(evacuations, 2 * step, 2 * steps)  # what backward needs is on the GPU now
            loss.backward()
            optimizer.step()
            done += self._disturb(evacuations, 2 * step + 1, 2 * steps)
            losses.append(loss.detach())
        states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        everything = [tensor.detach().cpu() for tensor in (*losses, *model.parameters(), *states)]
        return everything, [float(loss) for loss in losses], done

    def _disturb(self, evacuations: int, moment: int, moments: int) -> bool:
        """Evacuate and restore at `evacuations` of so many moments, evenly spread."""
        if evacuations * (moment + 1) // moments == evacuations * moment // moments:
            return False
        moved = self.evacuate()
        if "refused" in moved:
            raise RuntimeError(moved["refused"])
        if not moved["moved"] or self.restore()["moved"] != moved["moved"]:
            raise RuntimeError(f"not all came back of {moved}")
        return True


def _checksum(tensor: Any) -> int:
    """Of all bits and their places; a sum of integers is exact in any order."""
    rows = tensor.view(-1, 1024).sum(0, dtype=torch.int64)
    return int((rows * torch.arange(1, 1025, device=tensor.device)).sum()) ^ int(tensor[::4099].sum(dtype=torch.int64))


def _equal(some: list[Any], others: list[Any]) -> bool:
    """Bit for bit."""
    pairs = list(zip(some, others, strict=True))
    return all(a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes() for a, b in pairs)


def _evacuator() -> Any:
    from acb.hooks.torch.evacuator import TorchEvacuator

    return TorchEvacuator()


if __name__ == "__main__":
    serve(Subject())
