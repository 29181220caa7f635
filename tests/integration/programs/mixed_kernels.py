"""A PyTorch program that starts kernels of its own outside of every module; prints what they have computed.

Triton and the C++ extension are the tests' stand-ins, whose kernels run here: on the memory itself, with the simulated
GPU's referee looking on. Usage: mixed_kernels.py ROUNDS
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
import triton

from acb.client.runtime import client
from acb.devices.simulated import Card

cards: list[Card] = []


def increase(x: Any) -> None:
    """Add one to each number of a tensor, with no operation of PyTorch."""
    if not cards:
        cards.append(Card.open(client().simulated, client().gpu or 0))
    with cards[0].operation("kernel"):
        numbers = (ctypes.c_float * x.numel()).from_address(x.data_ptr())
        for i in range(len(numbers)):
            numbers[i] += 1


def touch(what: str, *args: Any) -> None:
    """What a stand-in's launch does on the GPU."""
    if args:
        increase(args[-1])


@triton.jit
def kernel(x):
    """Only its name counts."""


def main() -> None:
    """Launch by every way in turn, with CPU work between."""
    import standin_torch  # after PyTorch, whose libraries it names

    triton.gpu.touch = touch
    tuned = triton.runtime.autotuner.Autotuner(kernel, [{"num_warps": 4}, {"num_warps": 8}])
    x = torch.zeros(256, device="cuda")
    compiled = kernel.warmup(x, grid=(1, 1, 1))
    for n in range(int(sys.argv[1])):
        kernel[(1, 1, 1)](x)
        sum(i * i for i in range(2000 + n))
        standin_torch.work(lambda: increase(x), x)
        compiled[(1, 1, 1)](x)
        tuned[(1, 1, 1)](x)
    print(x.sum().item())


if __name__ == "__main__":
    main()
