"""A PyTorch program that obeys: all kinds of things that hold GPU memory, whether they are unchanged, and training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for equal sums, see torch's notes on reproducibility

import torch
from obey import obey
from torch import nn

PIECES = 8
"""Tensors that what it holds is made of, on each GPU."""


class User:
    """What it can be told."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}
        self.graph: Any = None

    # --- what it sees ------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What it is bound to, if it is."""
        return {"initialised": torch.cuda.is_initialized(), "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}

    def ask(self) -> dict[str, Any]:
        """As many programs begin, without using a GPU."""
        found = {"available": torch.cuda.is_available(), "count": torch.cuda.device_count()}
        nn.Linear(4, 4)(torch.ones(2, 4)).sum().backward()  # on the CPU
        return found

    def describe(self) -> dict[str, Any]:
        """What only the GPU itself can say."""
        properties = torch.cuda.get_device_properties(0)
        return {"name": properties.name, "bytes": properties.total_memory, "uuid": str(properties.uuid)}

    def touch(self) -> float:
        """The first use."""
        return float(torch.ones(1024, device="cuda").sum())

    # --- what it holds -----------------------------------------------------------------------------------------------

    def load(self, nbytes: int) -> None:
        """Hold `nbytes` of data on each GPU, and on the first a model, its optimizer's state, gradients, a graph whose
        backward is still to come, a view."""
        torch.manual_seed(len(self.held))
        self.data = [
            torch.randint(1 << 30, (nbytes // 4 // PIECES,), dtype=torch.int32, device=f"cuda:{n}")
            for n in range(torch.cuda.device_count())
            for _ in range(PIECES)
        ]
        self.view = self.data[0][1::2]
        self.model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.LSTM(128, 16)).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.inputs = torch.randn(8, 64, device="cuda")
        self._step()

    def check(self) -> list[str]:
        """What is not as it was; then a step further, so that there is something new to keep."""
        wrong = [f"data on {data.device}" for n, data in enumerate(self.data) if _digest(data) != self.digests[n]]
        wrong += ["a version counter"] if self.view._version != self.version else []
        first = self.view[0].item()
        self.data[0][1] += 1
        wrong += ["a view"] if self.view[0].item() != first + 1 else []
        now = self._state()
        wrong += [name for name in self.known if not _same(now[name], self.known[name])]
        self.loss.backward()
        gradients = [p.grad.cpu() for p in self.model.parameters()]
        wrong += ["what autograd has saved"] if not _same(gradients, self.expected) else []
        self.optimizer.step()
        self._step()
        return wrong

    def _step(self) -> None:
        """A forward, whose backward is to come, and what is known of everything."""
        self.optimizer.zero_grad()
        self.loss = self.model(self.inputs)[0].pow(2).mean()
        found = torch.autograd.grad(self.loss, list(self.model.parameters()), retain_graph=True)
        self.expected = [gradient.cpu() for gradient in found]
        self.digests = [_digest(data) for data in self.data]
        self.known, self.version = self._state(), self.view._version

    def _state(self) -> dict[str, list[Any]]:
        states = self.optimizer.state_dict()["state"].values()
        return {
            "parameters": [p.detach().cpu() for p in self.model.parameters()],
            "the optimizer's state": [value.cpu() for state in states for value in state.values()],
            "inputs": [self.inputs.cpu()],
        }

    def put(self, name: str, nbytes: int) -> int:
        """Move so much from the host to the GPU; how often PyTorch has been out of memory until now."""
        self.held[name] = torch.ones(nbytes, dtype=torch.uint8).to("cuda")
        return self._ooms()

    def forward(self, name: str, nbytes: int) -> int:
        """The same, made by a layer in the midst of a module's forward."""
        layer = nn.Linear(1, 256, bias=False).cuda()
        with torch.no_grad():
            layer.weight.fill_(1.0)
            self.held[name] = nn.Sequential(layer)(torch.ones(nbytes // 1024, 1, device="cuda"))
        return self._ooms()

    def make(self, name: str, nbytes: int) -> int:
        """The same, made on the GPU."""
        self.held[name] = torch.ones(nbytes, dtype=torch.uint8, device="cuda")
        return self._ooms()

    def fill(self, leave: int) -> int:
        """Hold so much that `leave` bytes are free, and have it stay; the bytes held."""
        nbytes = torch.cuda.mem_get_info()[0] - leave
        self.held["filling"] = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        self.hand_out("filling")
        return nbytes

    def _ooms(self) -> int:
        return int(torch.cuda.memory_stats()["num_ooms"])

    def right(self, name: str) -> bool:
        """Whether what put() or make() have made is as it was."""
        return bool(self.held[name].sum(dtype=torch.int64) == self.held[name].numel())

    def drop(self, name: str) -> None:
        """Hold it no longer."""
        del self.held[name]

    # --- what may not be moved ---------------------------------------------------------------------------------------

    def hand_out(self, name: str) -> None:
        """Give its address away."""
        self.held[f"{name} out"] = torch.utils.dlpack.to_dlpack(self.held[name])

    def take_back(self, name: str) -> None:
        """Nobody has it any more, nor this program."""
        del self.held[f"{name} out"], self.held[name]

    def capture(self, name: str) -> None:
        """Capture a graph that adds one to what it holds."""
        counter = self.held[name]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            counter.add_(1)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            counter.add_(1)
        torch.cuda.synchronize()

    def replay(self, name: str) -> bool:
        """Whether the graph still does what it did."""
        before = int(self.held[name][0])
        self.graph.replay()
        torch.cuda.synchronize()
        return bool(self.held[name][0] == (before + 1) % 256)

    def reset(self) -> None:
        """Give the graph up."""
        self.graph.reset()
        self.graph = None

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self, until: str, steps: int = 0) -> dict[str, Any]:
        """So many steps, or until there is a file of this name; the steps and a digest of all losses and the model."""
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(0)
        layers = [nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 10)]
        model = nn.Sequential(*layers).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        data, labels = torch.randn(32, 64, device="cuda"), torch.randint(0, 10, (32,), device="cuda")
        view = data[::2, 1:]  # an alias, which must move along
        losses: list[Any] = []
        while len(losses) != steps if steps else not Path(until).exists():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data), labels) + view.mean() * 0.01
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        digest = [float(loss) for loss in losses]
        digest += [float(p.detach().double().sum()) for p in model.parameters()]
        return {"steps": len(losses), "digest": digest}


def _digest(tensor: Any) -> int:
    """Of all bits and, roughly, their places; a sum of integers is exact in any order."""
    return int(tensor.sum(dtype=torch.int64)) ^ int(tensor[::4099].sum(dtype=torch.int64))


def _same(ones: list[Any], others: list[Any]) -> bool:
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


if __name__ == "__main__":
    obey(User())
