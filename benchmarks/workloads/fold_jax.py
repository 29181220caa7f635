#!/usr/bin/env python3
"""Fold proteins with a JAX network: homology search, Evoformer-like model on the GPU, relaxation.

The same three steps as fold.py's, with a jitted attention trunk over the alignment and a pair representation (seeded
random weights, so the shapes are meaningless). The weights stay on the device from start to end. The same seed gives
the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# One thread, so that sums are always taken in one order; XLA reads this when JAX first computes.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()

import jax
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING or __package__:
    from . import evoformer, folding
    from .fasta import Protein, read_fasta
    from .homology import Alignment
    from .program import InputError, Parser, Stopwatch, count, output_directory, run, write_summary
else:
    import evoformer
    import folding
    from fasta import Protein, read_fasta
    from homology import Alignment
    from program import InputError, Parser, Stopwatch, count, output_directory, run, write_summary

LONGEST = 1024  # residues
BUCKET = 16  # sequences are padded to a multiple of this


def parser() -> Parser:
    """Return the command line."""
    lines = Parser("fold_jax.py", __doc__)
    folding.add_arguments(lines)
    lines.add_argument("--out", type=Path, default=Path("fold-jax-out"), help="directory for the PDB files")
    lines.add_argument("--device", choices=("cuda", "cpu"), help="by default JAX's own choice: cuda where it can")
    size = evoformer.Size()
    model = lines.add_argument_group("structure model; its weights take about 48 bytes x width² x layers")
    model.add_argument("--layers", type=count(), default=size.layers, help="layers of the token transformer")
    model.add_argument("--width", type=count(64), default=size.width, help="its channels, a multiple of 64")
    model.add_argument("--blocks", type=count(), default=size.blocks, help="Evoformer blocks")
    model.add_argument("--msa-depth", type=count(), default=16, help="rows of the alignment that the network sees")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    lines = parser()
    options = lines.parse_args(arguments)
    return run(lambda: fold(options), lines)


def fold(options: argparse.Namespace) -> None:
    """Fold every protein of the input and write its files."""
    watch = Stopwatch()
    if options.width % 64:
        raise InputError(f"--width {options.width} is not a multiple of 64")
    proteins = read_fasta(options.fasta, longest=LONGEST)
    device = choose_device(options.device)
    out = output_directory(options.out)
    residues = -(-max(map(len, proteins)) // BUCKET) * BUCKET

    with watch.step("build model", "cpu"):
        size = evoformer.Size(layers=options.layers, width=options.width, blocks=options.blocks)
        weights = evoformer.initialise(size, options.seed)
    with watch.step("model to device", "gpu"):
        weights = jax.device_put(weights, device)
        jax.block_until_ready(weights)
    taken = sum(array.nbytes for array in jax.tree.leaves(weights))
    place = next(iter(jax.tree.leaves(weights)[0].devices())).platform
    print(f"model on {place}: {taken / 2**20:.0f} MiB of weights", flush=True)

    def predict(protein: Protein, alignment: Alignment) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        features = jax.device_put(evoformer.pad(alignment.rows, options.msa_depth, residues), device)
        outputs = evoformer.predict(weights, *features)
        backbone, confidence = (np.asarray(output)[: len(protein)] for output in outputs)
        return backbone - backbone.mean(axis=(0, 1)), confidence

    results = folding.fold_proteins(proteins, predict, options, watch, out)
    write_summary(out, "fold_jax", watch, device=place, weight_bytes=taken, proteins=results)
    print(folding.closing_line(len(proteins), out, watch))


def choose_device(wanted: str | None) -> Any:
    """Return the JAX device asked for, None for JAX's own choice; raise InputError where it is missing."""
    if wanted is None:
        return None
    try:
        return jax.devices("gpu" if wanted == "cuda" else "cpu")[0]
    except RuntimeError as error:
        raise InputError(f"--device {wanted}: JAX has no such device here; --device cpu works without one") from error


if __name__ == "__main__":
    sys.exit(main())
