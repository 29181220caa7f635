"""A JAX program that obeys: all kinds of things that hold GPU memory, whether they are unchanged, and training."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from obey import obey

PIECES = 8
"""Of the data: to compute an array of some size takes a multiple of it for a while."""

SIZES = {"first": (64, 128), "second": (128, 8)}


@jax.jit
def _digest(array: Any) -> Any:
    """Of all bits and their places; arithmetic modulo 2**32 is exact in any order."""
    return (array * (jnp.arange(array.size, dtype=jnp.uint32) * 2 + 1)).sum(dtype=jnp.uint32)


def _loss(weights: Any, inputs: Any) -> Any:
    return jnp.mean((jnp.tanh(inputs @ weights["first"]) @ weights["second"]) ** 2)


_jitted_loss = jax.jit(_loss)


@functools.partial(jax.jit, static_argnums=1)
def _data(number: Any, count: int) -> Any:
    return (jnp.arange(count, dtype=jnp.uint32) + number) * np.uint32(2654435761)


@jax.jit
def _train_step(weights: Any, moments: Any, key: Any, inputs: Any) -> Any:
    """One step of gradient descent with momentum, on noisy inputs."""
    key, noise = jax.random.split(key)
    loss, gradients = jax.value_and_grad(_loss)(weights, inputs + 0.1 * jax.random.normal(noise, inputs.shape))
    moments = jax.tree.map(lambda m, g: 0.9 * m + g, moments, gradients)
    return jax.tree.map(lambda w, m: w - 0.1 * m, weights, moments), moments, key, loss


def _weights() -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights, and moments to begin with."""
    chance = np.random.default_rng(1)
    host = {name: chance.normal(size=size).astype(np.float32) for name, size in SIZES.items()}
    return jax.device_put(host), jax.device_put({name: np.zeros_like(array) for name, array in host.items()})


def _inputs(count: int) -> Any:
    return jax.device_put(np.random.default_rng(2).normal(size=(count, 64)).astype(np.float32))


class User:
    """What it can be told."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}

    # --- what it sees ------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What it is bound to, if it is."""
        from jax._src import xla_bridge

        return {"initialised": bool(xla_bridge._backends), "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}

    def ask(self) -> dict[str, Any]:
        """As many programs begin, without using a GPU: JAX can say nothing of GPUs before it starts them."""
        return {"version": jax.__version__, "shape": jax.ShapeDtypeStruct((2,), jnp.float32).shape}

    def devices(self) -> dict[str, Any]:
        """What there is; this starts it."""
        return {"platform": jax.default_backend(), "count": jax.device_count()}

    def touch(self) -> float:
        """The first use."""
        return float(jnp.ones(1024).sum())

    # --- what it holds -----------------------------------------------------------------------------------------------

    def load(self, nbytes: int) -> None:
        """Hold `nbytes` of data on each GPU, and besides an array committed to a GPU, one sharded over all, a random
        key, a compiled function's constant, what a backward pass is to need, weights."""
        devices = jax.devices()
        count = nbytes // 4 // PIECES
        self.data = []
        for number in range(PIECES):
            for device in devices:
                with jax.default_device(device):
                    self.data.append(_data(np.uint32(number), count))
        host = np.arange(64 * len(devices), dtype=np.float32)
        self.committed = jax.device_put(host, devices[-1])
        self.alias = jax.device_put(self.committed, devices[-1])
        self.sharded = jax.device_put(host, NamedSharding(Mesh(devices, ("x",)), PartitionSpec("x")))
        self.shardings = [self.committed.sharding, self.sharded.sharding]
        self.key = jax.random.key(7)
        constant = jax.device_put(np.linspace(0, 1, 1000, dtype=np.float32))
        self.closed = jax.jit(lambda x: (constant * x).sum())
        self.inputs = _inputs(8)
        self.weights, self.moments = _weights()
        self._step()

    def check(self) -> list[str]:
        """What is not as it was; then a step further, so that there is something new to keep."""
        wrong = [f"data {n}" for n, data in enumerate(self.data) if int(_digest(data)) != self.digests[n]]
        now = self._state()
        wrong += [name for name in self.known if not _same(now[name], self.known[name])]
        (gradients,) = self.pullback(1.0)
        wrong += ["what the backward pass needs"] if not _same(gradients, self.expected) else []
        if not self.committed.committed or [self.committed.sharding, self.sharded.sharding] != self.shardings:
            wrong.append("where arrays are")
        if self.sharded.is_deleted() or self.committed.is_deleted():
            wrong.append("whether they are deleted")
        self.weights, self.moments, self.key, _ = _train_step(self.weights, self.moments, self.key, self.inputs)
        self._step()
        return wrong

    def _step(self) -> None:
        """A forward, whose backward is to come, and what is known of everything."""
        _, self.pullback = jax.vjp(lambda weights: _jitted_loss(weights, self.inputs), self.weights)
        self.expected = jax.device_get(self.pullback(1.0)[0])
        self.digests = [int(_digest(data)) for data in self.data]
        self.known = jax.device_get(self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "moments": self.moments,
            "the committed array": [self.committed, self.alias],
            "the sharded array": self.sharded,
            "the key": jax.random.key_data(self.key),
            "the constant": self.closed(2.0),
        }

    def put(self, name: str, nbytes: int) -> int:
        """Move so much from the host to the GPU. (JAX does not say how often it was out of memory.)"""
        self.held[name] = jax.device_put(np.ones(nbytes // 4, dtype=np.uint32), jax.devices()[0])
        self.held[name].block_until_ready()
        return 0

    def make(self, name: str, nbytes: int) -> int:
        """The same, made on the GPU."""
        self.held[name] = jnp.ones((nbytes // 4096, 1024), dtype=jnp.uint32)
        self.held[name].block_until_ready()
        return 0

    def right(self, name: str) -> bool:
        """Whether what put() or make() have made is as it was."""
        return bool(self.held[name].sum() == self.held[name].size)

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self, until: str, steps: int = 0) -> dict[str, Any]:
        """So many steps, or until there is a file of this name; the steps and a digest of all losses and the model."""
        weights, moments = _weights()
        key, inputs = jax.random.key(5), _inputs(32)
        losses: list[Any] = []
        while len(losses) != steps if steps else not Path(until).exists():
            weights, moments, key, loss = _train_step(weights, moments, key, inputs)
            losses.append(loss)
        sums = [float(np.asarray(w, dtype=np.float64).sum()) for w in jax.tree.leaves((weights, moments))]
        return {"steps": len(losses), "digest": [float(loss) for loss in losses] + sums}


def _same(one: Any, other: Any) -> bool:
    """Whether two nests of arrays are equal bit for bit."""
    pairs = zip(jax.tree.leaves(jax.device_get(one)), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


if __name__ == "__main__":
    obey(User())
