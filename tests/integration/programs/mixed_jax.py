"""An ordinary JAX program that uses the GPU in many ways, on two threads; prints a digest.

It knows nothing of acb. Usage: mixed_jax.py ROUNDS
"""

from __future__ import annotations

import hashlib
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np

ROUNDS = int(sys.argv[1])


@jax.jit
def step(weights, batch):
    """One step of gradient descent."""
    loss, gradient = jax.value_and_grad(lambda w: jnp.mean((jnp.tanh(batch @ w) - 0.5) ** 2))(weights)
    return weights - 0.1 * gradient, loss


def train(digest: list[float]) -> None:
    """Compiled steps over transferred batches."""
    random = np.random.default_rng(1)
    weights = jax.device_put(random.normal(size=(16, 8)).astype(np.float32))
    for _ in range(ROUNDS * 4):
        batch = jax.device_put(random.normal(size=(32, 16)).astype(np.float32), jax.devices("gpu")[0])
        weights, loss = step(weights, batch)
        digest.append(float(loss))
    digest.append(float(np.asarray(weights).astype(np.float64).sum()))


def eager(digest: list[float]) -> None:
    """Operations outside of jit, random keys, scans, donated arguments."""
    key = jax.random.key(3)
    state = jnp.zeros((12, 12))
    add = jax.jit(lambda a, b: a + b, donate_argnums=0)
    for _ in range(ROUNDS * 4):
        key, sub = jax.random.split(key)
        noise = jax.random.normal(sub, (12, 12))
        state = add(state, noise)
        state = state.at[0].set(state[1] * 0.5)
        _, sums = jax.lax.scan(lambda carry, row: (carry + row.sum(), carry), 0.0, state)
        digest.append(sums.block_until_ready()[-1].item())
        digest.extend(jax.device_get(jnp.sort(state, axis=1)[:, 0]).tolist())


def main() -> None:
    """Each part on a thread of its own; the digest does not depend on how they interleave."""
    digests: list[list[float]] = [[], []]
    problems: list[BaseException] = []

    def guarded(part, digest: list[float]) -> None:
        try:
            part(digest)
        except BaseException as error:
            problems.append(error)
            raise

    threads = [
        threading.Thread(target=guarded, args=(part, digest))
        for part, digest in zip((train, eager), digests, strict=True)
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
