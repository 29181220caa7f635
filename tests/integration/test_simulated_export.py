"""torch.export and other tracing with tensors that have no memory, under acb-launch on the simulated GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from broker_harness import Site

pytest.importorskip("torch")

TRACING = """
import io, json
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.lstm = nn.Conv1d(3, 4, 3), nn.LSTM(4, 4, batch_first=True)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        hidden, _ = self.lstm(self.convolution(x).transpose(1, 2))
        places = torch.arange(hidden.shape[1], device=x.device)
        return hidden * self.scale + nn.functional.one_hot(places % 4, 4) + torch.zeros(4, device="cuda")

said = {}
on_host = nn.Linear(8, 8)
y = torch.randn(2, 8)
elsewhere = torch.ones(3, device="cuda")
said["on the host"] = torch.equal(torch.export.export(on_host, (y,)).module()(y), on_host(y))

model, x = Model().cuda(), torch.randn(2, 3, 9, device="cuda")
expected = model(x)
for strict in (False, True):
    exported = torch.export.export(model, (x,), strict=strict)
    places = [node.kwargs["device"] for node in exported.graph.nodes if node.kwargs.get("device") is not None]
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for name, program in (("exported", exported), ("loaded", torch.export.load(file))):
        out = program.module()(x)
        said[f"{name}, strict {strict}"] = torch.equal(out, expected) and out.is_cuda
    said[f"traced on the GPU, strict {strict}"] = len(places) >= 2 and {str(p)[:4] for p in places} == {"cuda"}

before = torch.cuda.memory_allocated()
with FakeTensorMode():
    huge = torch.empty(1 << 30, 1 << 10, device="cuda", requires_grad=True)
    (huge * 2).sum().backward()
    said["a fake"] = huge.is_cuda and huge.grad.is_cuda
said["nothing is charged"] = torch.cuda.memory_allocated() == before
for mode in ("fake", "real", "symbolic"):
    said[f"make_fx {mode}"] = torch.equal(make_fx(lambda x: x.sin() + 1, tracing_mode=mode)(x)(x), x.sin() + 1)
said["as before"] = torch.equal(model(x), expected)
print(json.dumps(said))
"""


def test_programs_are_exported_as_on_a_gpu(site: Site) -> None:
    site.start("1x64MiB")
    done = subprocess.run(
        [sys.executable, "-m", "acb.launcher", "--", sys.executable, "-W", "ignore", "-c", TRACING],
        env=site.environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [what for what, well in said.items() if not well] == []
    assert len(said) == 13
    assert site.violations() == []
