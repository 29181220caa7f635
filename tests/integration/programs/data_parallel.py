"""An ordinary program for torchrun: trains one model on a share of the data a process, and writes down what it saw.

Usage: torchrun … data_parallel.py cpu|cuda DIRECTORY
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torch.distributed as dist  # isort: skip

kind, directory = sys.argv[1], Path(sys.argv[2])
rank = int(os.environ["LOCAL_RANK"])
if kind == "cuda":
    torch.cuda.set_device(rank)
dist.init_process_group("gloo")
device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
torch.manual_seed(rank)  # DistributedDataParallel starts all with the first one's parameters
layers = [nn.Linear(6, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 3)]
model = nn.parallel.DistributedDataParallel(
    nn.Sequential(*layers).to(device), device_ids=[rank] if kind == "cuda" else None
)
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(7))
dataset = torch.utils.data.TensorDataset(inputs, torch.arange(40) % 3)
sampler: Any = torch.utils.data.DistributedSampler(dataset)
losses = []
for epoch in range(2):
    sampler.set_epoch(epoch)
    for x, y in torch.utils.data.DataLoader(dataset, 5, sampler=sampler):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
total = torch.tensor(losses, device=device)
dist.all_reduce(total)
everybodys = [torch.empty_like(total) for _ in range(2)]
dist.all_gather(everybodys, total)
ranks: list[Any] = [None, None]
dist.all_gather_object(ranks, rank)
dist.barrier()
seen = {
    "losses": losses,
    "total": [tensor.tolist() for tensor in everybodys],
    "ranks": ranks,
    "parameters": [parameter.tolist() for parameter in model.parameters()],
}
if kind == "cuda":
    seen["devices"] = sorted({str(tensor.device) for tensor in (*model.parameters(), *everybodys, total)})
    seen["count"] = torch.cuda.device_count()
    seen["allocated"] = [torch.cuda.memory_allocated(index) > 0 for index in range(2)]
(directory / f"{kind}{rank}.json").write_text(json.dumps(seen))
dist.destroy_process_group()
# PyTorch's own threads may outlive the interpreter and abort it, on the CPU and without acb as well: one run in twenty.
os._exit(0)
