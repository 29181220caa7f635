"""Protein backbones as arrays, and PDB files of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BACKBONE = ("N", "CA", "C", "O")
"""The atoms of a backbone array [residues, 4, 3], in this order; coordinates are in ångström."""

_THREE = {
    "A": "ALA", "R": "ARG", "N": "ASN", "D": "ASP", "C": "CYS", "Q": "GLN", "E": "GLU", "G": "GLY", "H": "HIS",
    "I": "ILE", "L": "LEU", "K": "LYS", "M": "MET", "F": "PHE", "P": "PRO", "S": "SER", "T": "THR", "W": "TRP",
    "Y": "TYR", "V": "VAL", "X": "UNK",
}  # fmt: skip


def write_pdb(
    path: Path,
    residues: str,
    backbone: NDArray[np.floating],
    confidence: NDArray[np.floating],
    remarks: Sequence[str] = (),
) -> None:
    """Write a backbone as chain A of a PDB file (format version 3.3), whole or not at all.

    `backbone` is [residues, 4, 3] in ångström, N CA C O; `confidence` is [residues], 0 to 100, and becomes the
    B-factor as in AlphaFold's files. Raises ValueError for a coordinate that is not finite or too large for the format.
    """
    if backbone.shape != (len(residues), len(BACKBONE), 3):
        raise ValueError(f"a backbone of {len(residues)} residues is [{len(residues)}, 4, 3], not {backbone.shape}")
    if not (np.isfinite(backbone).all() and (np.abs(backbone) < 999).all()):
        raise ValueError(f"{path.name}: a coordinate is not finite or above 999 ångström: it does not fit a PDB file")
    lines = [f"REMARK   1 {remark}" for remark in remarks]
    serial = 0
    for number, (letter, atoms, score) in enumerate(zip(residues, backbone, confidence, strict=True), start=1):
        for name, (x, y, z) in zip(BACKBONE, atoms, strict=True):
            serial += 1
            lines.append(
                f"ATOM  {serial:5d}  {name:<3s} {_THREE[letter]} A{number:4d}    "
                f"{_plain(x):8.3f}{_plain(y):8.3f}{_plain(z):8.3f}{1:6.2f}{_plain(score):6.2f}          {name[0]:>2s}"
            )
    lines.append(f"TER   {serial + 1:5d}      {_THREE[residues[-1]]} A{len(residues):4d}")
    lines.append("END")
    draft = path.with_name(path.name + ".part")
    draft.write_text("".join(f"{line:<80s}\n" for line in lines))
    draft.replace(path)


def _plain(value: float) -> float:
    """Keep a rounded zero from being printed as -0.000."""
    return round(float(value), 3) + 0.0
