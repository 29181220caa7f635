"""A JAX program that obeys: memory with known contents, work, evacuation from inside."""

from __future__ import annotations

import functools
import os
import time
from typing import Any

from subject import Moving, serve

if not (os.environ.get("ACB_SOCKET") or os.environ.get("ACB_SIMULATED")):  # else acb's hooks have seen to it
    from acb.hooks.jax import environment

    environment.prepare()

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnums=0)
def _contents(count: int, seed: Any) -> Any:
    """Numbers that look random, made without any memory besides their own (the mixing is that of splitmix32)."""
    x = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9) + seed
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)


@jax.jit
def _checksum(array: Any) -> Any:
    """Of all bits and their places; arithmetic modulo 2**32 is exact in any order."""
    return (array * (jnp.arange(array.size, dtype=jnp.uint32) * 2 + 1)).sum(dtype=jnp.uint32)


@jax.jit
def _step(x: Any, weight: Any) -> Any:
    return x @ weight


class Subject(Moving):
    """What it can be told."""

    def __init__(self) -> None:
        super().__init__(_evacuator)
        self.held: dict[str, list[tuple[Any, int]]] = {}

    def facts(self) -> dict[str, Any]:
        """What it runs on."""
        return {"platform": jax.default_backend(), "jax": jax.__version__, "pid": os.getpid()}

    def load(self, name: str, nbytes: int, pieces: int = 1) -> int:
        """Hold what looks random in so many arrays of equal size; the bytes held."""
        count = max(1024, nbytes // pieces // 4)
        arrays = []
        for number in range(pieces):
            array = _contents(count, jnp.uint32(len(self.held) * 1000 + number))
            arrays.append((array, int(_checksum(array))))
        self.held[name] = arrays
        return count * 4 * pieces

    def drop(self, name: str) -> None:
        """Hold it no longer."""
        for array, _ in self.held.pop(name):
            array.delete()

    def grab(self, nbytes: int) -> int:
        """One array of so many bytes, dropped again."""
        return int(jnp.zeros((nbytes >> 20, 1 << 20), jnp.uint8).block_until_ready().nbytes)

    def check(self) -> dict[str, bool]:
        """Whether all contents are as they were."""
        return {"same": all(int(_checksum(a)) == known for arrays in self.held.values() for a, known in arrays)}

    def work(self, seconds: float = 0.0) -> bool:
        """Calls for so many seconds; whether the result is right."""
        x, weight = jnp.ones((256, 256)), jnp.eye(256)
        end = time.monotonic() + seconds
        while True:
            x = _step(x, weight)
            x.block_until_ready()
            if time.monotonic() >= end:
                return bool((x == 1).all())


def _evacuator() -> Any:
    from acb.hooks.jax.evacuator import JaxEvacuator
    from acb.hooks.jax.internals import Internals

    return JaxEvacuator(Internals())


if __name__ == "__main__":
    serve(Subject())
