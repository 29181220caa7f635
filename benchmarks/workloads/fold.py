#!/usr/bin/env python3
"""Fold proteins in AlphaFold2's three steps: homology search, structure model on the GPU, relaxation.

For every sequence of a FASTA file: a jackhmmer search (pyhmmer) on the CPU, ESMFold's network (transformers, seeded
random weights) on the GPU, and a restrained relaxation (OpenMM) on the CPU. The network stays on the GPU from start
to end. Random weights make the shapes meaningless; the work, the memory and the files are those of a real run, and the
same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.models.esm.modeling_esmfold import EsmForProteinFolding

if TYPE_CHECKING or __package__:
    from . import esmfold, folding
    from .fasta import Protein, read_fasta
    from .homology import Alignment
    from .program import InputError, Parser, Stopwatch, count, output_directory, run, write_summary
    from .torch_device import choose_device
else:
    import esmfold
    import folding
    from fasta import Protein, read_fasta
    from homology import Alignment
    from program import InputError, Parser, Stopwatch, count, output_directory, run, write_summary
    from torch_device import choose_device

LONGEST = 1022  # residues: what ESM-2 was made for


def parser() -> Parser:
    """Return the command line."""
    lines = Parser("fold.py", __doc__)
    folding.add_arguments(lines)
    lines.add_argument("--out", type=Path, default=Path("fold-out"), help="directory for the PDB files")
    lines.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is a GPU, otherwise cpu")
    size = esmfold.Size()
    model = lines.add_argument_group("structure model; its weights take about 48 bytes x width² x layers")
    model.add_argument("--layers", type=count(), default=size.layers, help="layers of the language model")
    model.add_argument("--width", type=count(64), default=size.width, help="its channels, a multiple of 64")
    model.add_argument("--blocks", type=count(), default=size.blocks, help="blocks of the folding trunk")
    model.add_argument("--recycles", type=count(), default=size.recycles, help="passes through the trunk")
    model.add_argument("--pair-heads", type=count(), default=size.pair_heads, metavar="HEADS",
                       help="heads of its triangle attention, of about 8 bytes x residues³ each")  # fmt: skip
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
    torch.set_num_threads(options.threads)

    with watch.step("build model", "cpu"):
        size = esmfold.Size(options.layers, options.width, options.blocks, options.recycles, options.pair_heads)
        model = esmfold.build(size, options.seed)
        weights = sum(parameter.nbytes for parameter in model.parameters())
    with watch.step("model to device", "gpu"):
        model = model.to(device)
    print(f"model on {device}: {weights / 2**20:.0f} MiB of weights", flush=True)
    results = folding.fold_proteins(
        proteins, lambda protein, alignment: predict(model, device, protein, alignment), options, watch, out
    )
    write_summary(out, "fold", watch, device=str(device), weight_bytes=weights, proteins=results)
    print(folding.closing_line(len(proteins), out, watch))


def predict(
    model: EsmForProteinFolding, device: torch.device, protein: Protein, alignment: Alignment
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Run the network; returns the backbone [residues, 4, 3] in ångström and the confidence [residues], 0 to 100."""
    with torch.no_grad():
        types = torch.tensor([protein.types()]).to(device)
        model.embedding.profile = torch.from_numpy(alignment.profile()).to(device)
        output = model(types)
        # Of 14 atoms a residue, N CA C O are the first four; of 37 confidences, CA's is the second.
        backbone = output["positions"][-1, 0, :, :4].cpu().numpy()
        confidence = output["plddt"][0, :, 1].cpu().numpy()
    return backbone - backbone.mean(axis=(0, 1)), confidence * 100.0


if __name__ == "__main__":
    sys.exit(main())
