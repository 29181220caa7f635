"""A structure network in JAX: Evoformer blocks over an alignment and a pair representation, then a token transformer.

The blocks follow AlphaFold2's Evoformer (Jumper et al., 2021, supplement 1.6), without dropout; the wide transformer
with pair bias that follows is AlphaFold3's token transformer (Abramson et al., 2024, algorithm 23) in plain form. It
holds most of the weights. Torsion angles come out, from which the backbone is built atom by atom.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

Weights = dict[str, Any]
Array = Any  # jax.Array, or a tracer of one
Features = NDArray[Any]

TYPES = 22  # twenty amino acids, unknown, gap
MAX_OFFSET = 32  # residues further apart look alike to the pair representation
HEADS = 4  # of every attention in the Evoformer
SINGLE_HEAD = 64  # channels a head of the token transformer


@dataclass(frozen=True)
class Size:
    """How large the network is; the token transformer's width and layers decide on the memory."""

    layers: int = 12
    width: int = 1024
    blocks: int = 2
    msa_channels: int = 64
    pair_channels: int = 32


def initialise(size: Size, seed: int) -> Weights:
    """Return seeded random weights as NumPy arrays, float32; stacks of layers have a leading axis.

    Matrices are uniform with variance 1 / inputs, norms start at 1. They can fold no protein: the structure is a
    function of the alignment, not the real fold.
    """
    rng = np.random.default_rng(seed)

    def draw(shape: Any, name: str = "") -> Any:
        if isinstance(shape, dict):
            return {inner: draw(shape[inner], inner) for inner in shape}
        if name.endswith("norm"):
            return np.ones(shape, dtype=np.float32)
        weight = rng.random(shape, dtype=np.float32)
        weight -= 0.5
        weight *= (12.0 / shape[-2]) ** 0.5
        return weight

    weights: Weights = draw(_shapes(size))
    return weights


def _shapes(size: Size) -> dict[str, Any]:
    m, z, w = size.msa_channels, size.pair_channels, size.width
    n, layers = size.blocks, size.layers

    def attention(stack: int, channels: int) -> dict[str, Any]:
        names = ("query", "key", "value", "gate", "output")
        return {"norm": (stack, channels)} | dict.fromkeys(names, (stack, channels, channels))

    def transition(stack: int, channels: int) -> dict[str, Any]:
        return {
            "norm": (stack, channels),
            "up": (stack, channels, 4 * channels),
            "down": (stack, 4 * channels, channels),
        }

    def triangle() -> dict[str, Any]:
        names = ("left", "right", "left_gate", "right_gate", "gate", "output")
        return {"norm": (n, z), "inner_norm": (n, z)} | dict.fromkeys(names, (n, z, z))

    return {
        "msa_embedding": (TYPES, m),
        "left_embedding": (TYPES, z),
        "right_embedding": (TYPES, z),
        "offset_embedding": (2 * MAX_OFFSET + 1, z),
        "evoformer": {
            "row": attention(n, m) | {"pair_norm": (n, z), "bias": (n, z, HEADS)},
            "column": attention(n, m),
            "msa_transition": transition(n, m),
            "outer": {"norm": (n, m), "left": (n, m, 16), "right": (n, m, 16), "output": (n, 256, z)},
            "outgoing": triangle(),
            "incoming": triangle(),
            "pair_transition": transition(n, z),
        },
        "single": (m, w),
        "tokens": {
            "attention": {
                "norm": (layers, w),
                "qkv": (layers, w, 3 * w),
                "output": (layers, w, w),
                "pair_norm": (layers, z),
                "bias": (layers, z, w // SINGLE_HEAD),
            },
            "transition": transition(layers, w),
        },
        "torsions": (w, 3),
        "confidence": (w, 1),
    }


def _predict(weights: Weights, msa: Array, msa_mask: Array, residue_mask: Array) -> tuple[Array, Array]:
    """Predict the backbone [residues, 4, 3] in ångström and the confidence [residues], 0 to 100.

    `msa` is [rows, residues] of residue types, the protein first; the masks, [rows] and [residues], are 1 where
    there is something and 0 in the padding, which does not change the rest.
    """
    pair = _embed_pair(weights, msa[0])
    rows = weights["msa_embedding"][msa]
    masks = (msa_mask, residue_mask)

    def block(state: tuple[Array, Array], layer: Weights) -> tuple[tuple[Array, Array], None]:
        return _evoformer_block(layer, *state, *masks), None

    (rows, pair), _ = jax.lax.scan(block, (rows, pair), weights["evoformer"])

    def token_layer(single: Array, layer: Weights) -> tuple[Array, None]:
        single = single + _token_attention(layer["attention"], single, pair, residue_mask)
        return single + _transition(layer["transition"], single), None

    single, _ = jax.lax.scan(token_layer, rows[0] @ weights["single"], weights["tokens"])
    single = _norm(single)
    backbone = _build(single @ weights["torsions"])
    return backbone, 100.0 * jax.nn.sigmoid(single @ weights["confidence"])[:, 0]


predict = jax.jit(_predict)


def _embed_pair(weights: Weights, types: Array) -> Array:
    position = jnp.arange(types.shape[0])
    offset = jnp.clip(position[:, None] - position[None, :], -MAX_OFFSET, MAX_OFFSET) + MAX_OFFSET
    left, right = weights["left_embedding"][types], weights["right_embedding"][types]
    return left[:, None] + right[None, :] + weights["offset_embedding"][offset]


def _evoformer_block(
    layer: Weights, rows: Array, pair: Array, msa_mask: Array, residue_mask: Array
) -> tuple[Array, Array]:
    bias = _norm(pair, layer["row"]["pair_norm"]) @ layer["row"]["bias"]  # [residues, residues, heads]
    rows = rows + _attention(layer["row"], rows, residue_mask, jnp.moveaxis(bias, -1, 0))
    columns = jnp.swapaxes(rows, 0, 1)
    rows = rows + jnp.swapaxes(_attention(layer["column"], columns, msa_mask, 0.0), 0, 1)
    rows = rows + _transition(layer["msa_transition"], rows)
    pair = pair + _outer_product_mean(layer["outer"], rows, msa_mask)
    pair = pair + _triangle(layer["outgoing"], pair, residue_mask, "ikc,jkc->ijc")
    pair = pair + _triangle(layer["incoming"], pair, residue_mask, "kic,kjc->ijc")
    return rows, pair + _transition(layer["pair_transition"], pair)


def _norm(x: Array, scale: Array | float = 1.0) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return scale * centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)


def _transition(layer: Weights, x: Array) -> Array:
    return jax.nn.relu(_norm(x, layer["norm"]) @ layer["up"]) @ layer["down"]


def _attention(layer: Weights, x: Array, mask: Array, bias: Array | float) -> Array:
    """Gated attention along the middle axis of [batch, positions, channels]; `mask` is [positions]."""
    x = _norm(x, layer["norm"])
    shape = (*x.shape[:-1], HEADS, x.shape[-1] // HEADS)
    query, key, value = ((x @ layer[name]).reshape(shape) for name in ("query", "key", "value"))
    scores = jnp.einsum("bqhc,bkhc->bhqk", query, key) * shape[-1] ** -0.5 + bias
    shares = jax.nn.softmax(scores + _hide(mask), axis=-1)
    mixed = jnp.einsum("bhqk,bkhc->bqhc", shares, value).reshape(x.shape)
    return (jax.nn.sigmoid(x @ layer["gate"]) * mixed) @ layer["output"]


def _token_attention(layer: Weights, single: Array, pair: Array, mask: Array) -> Array:
    x = _norm(single, layer["norm"])
    heads = x.shape[-1] // SINGLE_HEAD
    query, key, value = jnp.moveaxis((x @ layer["qkv"]).reshape(x.shape[0], 3, heads, SINGLE_HEAD), 1, 0)
    bias = jnp.moveaxis(_norm(pair, layer["pair_norm"]) @ layer["bias"], -1, 0)
    scores = jnp.einsum("qhc,khc->hqk", query, key) * SINGLE_HEAD**-0.5 + bias
    shares = jax.nn.softmax(scores + _hide(mask), axis=-1)
    return jnp.einsum("hqk,khc->qhc", shares, value).reshape(x.shape) @ layer["output"]


def _hide(mask: Array) -> Array:
    return (mask - 1.0) * 1e9


def _outer_product_mean(layer: Weights, rows: Array, msa_mask: Array) -> Array:
    x = _norm(rows, layer["norm"])
    left, right = (x @ layer[name] * msa_mask[:, None, None] for name in ("left", "right"))
    outer = jnp.einsum("sic,sjd->ijcd", left, right) / jnp.maximum(msa_mask.sum(), 1.0)
    return outer.reshape(*outer.shape[:2], -1) @ layer["output"]


def _triangle(layer: Weights, pair: Array, mask: Array, sum_over_third: str) -> Array:
    x = _norm(pair, layer["norm"])
    both = (mask[:, None] * mask[None, :])[..., None]
    left = jax.nn.sigmoid(x @ layer["left_gate"]) * (x @ layer["left"]) * both
    right = jax.nn.sigmoid(x @ layer["right_gate"]) * (x @ layer["right"]) * both
    update = _norm(jnp.einsum(sum_over_third, left, right), layer["inner_norm"])
    return jax.nn.sigmoid(x @ layer["gate"]) * (update @ layer["output"])


def _build(raw: Array) -> Array:
    """Build N CA C O of every residue from [residues, 3] raw torsions, squashed into the allowed region."""
    squashed = jnp.tanh(raw)
    phi = jnp.radians(-95.0 + 45.0 * squashed[:, 0])
    psi = jnp.radians(45.0 + 105.0 * squashed[:, 1])
    omega = jnp.radians(180.0 + 5.0 * squashed[:, 2])

    def residue(last: tuple[Array, Array, Array, Array], torsions: Array) -> tuple[Any, Array]:
        n, ca, c, last_psi = last
        own_phi, own_psi, own_omega = torsions
        next_n = _place(n, ca, c, 1.329, 117.2, last_psi)
        next_ca = _place(ca, c, next_n, 1.458, 121.7, own_omega)
        next_c = _place(c, next_n, next_ca, 1.525, 111.0, own_phi)
        next_o = _place(next_n, next_ca, next_c, 1.231, 120.1, own_psi + jnp.pi)
        return (next_n, next_ca, next_c, own_psi), jnp.stack([next_n, next_ca, next_c, next_o])

    # A residue before the first, which only fixes where the chain begins.
    corner = (jnp.array([-1.458, 0.0, 0.0]), jnp.zeros(3), jnp.array([0.55, 1.42, 0.0]), jnp.array(jnp.pi))
    _, atoms = jax.lax.scan(residue, corner, jnp.stack([phi, psi, omega], axis=-1))
    return atoms


def _place(a: Array, b: Array, c: Array, length: float, degrees: float, torsion: Array) -> Array:
    """Return the point at `length` from c, at the bond angle b-c-point and the torsion a-b-c-point."""
    axis = (c - b) / jnp.linalg.norm(c - b)
    normal = jnp.cross(b - a, axis)
    normal = normal / jnp.linalg.norm(normal)
    angle = np.radians(degrees)
    along, across = -length * np.cos(angle), length * np.sin(angle)
    sideways = jnp.cross(normal, axis) * jnp.cos(torsion) + normal * jnp.sin(torsion)
    return c + along * axis + across * sideways


def pad(rows: NDArray[np.int32], depth: int, residues: int) -> tuple[Features, Features, Features]:
    """Return the alignment cut to `depth` rows and padded to [depth, residues], with its two masks in float32.

    One shape for every protein means that XLA compiles once.
    """
    kept = rows[:depth]
    msa = np.full((depth, residues), TYPES - 1, dtype=np.int32)
    msa[: kept.shape[0], : kept.shape[1]] = kept
    msa_mask, residue_mask = np.zeros(depth, np.float32), np.zeros(residues, np.float32)
    msa_mask[: kept.shape[0]] = 1.0
    residue_mask[: kept.shape[1]] = 1.0
    return msa, msa_mask, residue_mask
