"""Launches one kernel, when told so on its standard input, by the way that it is given: triton, torch or extension."""

from __future__ import annotations

import sys
from typing import Any

from acb.client.runtime import client
from acb.devices.simulated import Card


def touch(*what: Any) -> None:
    """What the kernel does: the referee looks whether this process may."""
    with Card.open(client().simulated, client().gpu or 0).operation("kernel"):
        pass


def main() -> None:
    """Get ready, wait, launch."""
    way = sys.argv[1]
    x: Any = None
    if way != "triton":
        import torch

        x = torch.zeros(8, device="cuda")
    if way == "extension":
        import standin_torch
    else:
        import triton

        triton.gpu.touch = touch
    print("ready", flush=True)
    sys.stdin.readline()
    if way == "extension":
        standin_torch.work(touch, x)
    else:
        triton.jit(main)[(1, 1, 1)](x)
    print("done", flush=True)


if __name__ == "__main__":
    main()
