"""A program with an array on the GPU that its framework cannot move, since it has handed out the address.

With PyTorch it only says so, for the simulated GPU hands out none. Usage: pinned.py torch|jax; it adds one to the array
for every line that it reads, and prints the sum.
"""

from __future__ import annotations

import sys

COUNT = 10 << 20


def main() -> None:
    """40 MiB of float32."""
    if sys.argv[1] == "torch":
        import torch

        array = torch.zeros(COUNT, device="cuda")
        from acb.hooks.torch import reach

        reach.pin(array, "was handed out")
    else:
        import jax.numpy as jnp

        array = jnp.zeros(COUNT)
        array.unsafe_buffer_pointer()
    print(float(array.sum()), flush=True)
    for _ in sys.stdin:
        array += 1
        print(float(array.sum()), flush=True)


if __name__ == "__main__":
    main()
