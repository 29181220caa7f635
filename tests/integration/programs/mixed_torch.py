"""An ordinary PyTorch program that uses the GPU in as many ways as there are, on three threads; prints a digest.

It knows nothing of acb. Usage: mixed_torch.py ROUNDS
"""

from __future__ import annotations

import copy
import hashlib
import io
import sys
import threading

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

DEVICE = torch.device("cuda")
ROUNDS = int(sys.argv[1])


class Square(torch.autograd.Function):
    """A custom operation with a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def train(generator: torch.Generator, digest: list[float]) -> None:
    """Modules, optimizers, a data loader, checkpoints in memory."""
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.0), nn.Linear(32, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    data = TensorDataset(torch.randn(24, 16, generator=generator), torch.randint(0, 4, (24,), generator=generator))
    for _ in range(ROUNDS):
        for inputs, labels in DataLoader(data, batch_size=8):
            optimizer.zero_grad()
            output = model(inputs.to(DEVICE, non_blocking=True))
            loss = nn.functional.cross_entropy(output, labels.cuda())
            loss = loss + 0.01 * Square.apply(output).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            digest.append(loss.item())
        stored = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stored)
        stored.seek(0)
        state = torch.load(stored, map_location=DEVICE)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    digest.append(sum(p.double().sum().item() for p in copy.deepcopy(model).cpu().parameters()))


def stray(generator: torch.Generator, digest: list[float]) -> None:
    """Operations outside of every module: arithmetic, views, indexing, factories, copies."""
    x = torch.randn(32, 32, generator=generator).cuda()
    kept = [x[i] for i in range(4)]
    for n in range(ROUNDS * 6):
        y = x @ x.t() * 0.01
        y[::2] += 1
        y.mul_(0.5).clamp_(-3, 3)
        z = torch.cat([y, torch.zeros(2, 32, device=DEVICE), torch.ones_like(y[:2])])
        z = z[torch.arange(z.shape[0] - 1, -1, -1, device="cuda")]
        parts = torch.split(z, 9)
        total = torch.stack([part.sum() for part in parts]).sum()
        torch._foreach_add_(kept, 0.001)
        x = torch.where(x > 0, x * 0.999, x) + torch.tensor([0.001], device="cuda")
        if n % 3 == 0:
            torch.cuda.synchronize()
        if bool(total > 1e9):
            raise SystemExit("impossible")
        digest.append(float(total))
        digest.append(z.cpu().numpy().astype(np.float64).sum().item())
    digest.extend(torch.stack(kept).sum(dim=1).tolist())


def compiled(generator: torch.Generator, digest: list[float]) -> None:
    """Scripted, traced and compiled code, gradients of gradients, streams, generators of the device."""
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 8, generator=generator))
        layer.bias.zero_()
    layer.cuda()
    example = torch.randn(4, 8, generator=generator).cuda()
    scripted = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Tanh()))
    traced = torch.jit.trace(lambda a: a * 2 + 1, example)
    quick = torch.compile(lambda a: a.sin() + a.cos(), backend="eager")
    own = torch.Generator(device="cuda").manual_seed(7)
    for _ in range(ROUNDS * 3):
        x = example.detach().clone().requires_grad_()
        y = quick(traced(scripted(layer(x)))).pow(2).sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        gradient.norm().backward()
        with torch.cuda.stream(torch.cuda.Stream()):
            noise = torch.rand(8, device="cuda", generator=own)
        torch.cuda.current_stream().synchronize()
        digest.append(x.grad.sum().item() + noise.mean().item())
        layer.zero_grad()


def main() -> None:
    """Each part on a thread of its own; the digest does not depend on how they interleave."""
    torch.set_num_threads(1)
    digests: list[list[float]] = [[], [], []]
    problems: list[BaseException] = []

    def guarded(part, seed: int, digest: list[float]) -> None:
        try:
            part(torch.Generator().manual_seed(seed), digest)
        except BaseException as error:
            problems.append(error)
            raise

    threads = [
        threading.Thread(target=guarded, args=(part, seed, digest))
        for seed, (part, digest) in enumerate(zip((train, stray, compiled), digests, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise SystemExit(1)
    text = ";".join(",".join(f"{value:.17g}" for value in digest) for digest in digests)
    print(hashlib.sha256(text.encode()).hexdigest())


if __name__ == "__main__":
    main()
