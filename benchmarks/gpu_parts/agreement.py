"""Whether a workload has given the same as before: bit for bit, or else within what its kind of output allows, and why.

Each function compares the files of two runs, by name: 0.0 for equal bit for bit; the tolerance, in the output's own
unit, when all numbers are within it; None when they are not.
"""

from __future__ import annotations

import json

Files = dict[str, bytes]

SPREAD = 1e-3
"""Ångström, the PDB file's own digit: what outputs may differ by, where they are not equal bit for bit. Kernels of
cuBLAS may sum in another order when the GPU's workspace differs."""

SCORE = 2e-3
"""Of a detection's probability: for the same reason, after a dozen layers."""

LOSS = 0.02
"""Of a training loss, as a fraction: attention's gradients are summed with atomic additions, in any order, and what
that changes grows with every step."""


def structures(one: Files, other: Files) -> float | None:
    """Of a folding program. A relaxation starts from the predicted structure and is chaotic: only its files' names and
    lengths are compared unless all is equal.
    """
    if one == other and one:
        return 0.0
    if not one or one.keys() != other.keys():
        return None
    for name, content in one.items():
        mine, theirs = content.splitlines(), other[name].splitlines()
        if len(mine) != len(theirs):
            return None
        for a, b in zip(mine, theirs, strict=True):
            if a != b and not (name.endswith("_unrelaxed.pdb") and _near(a, b)) and not name.endswith("_relaxed.pdb"):
                return None
    return SPREAD


def _near(one: bytes, other: bytes) -> bool:
    """Two ATOM lines of a PDB file; coordinates are in its columns 31 to 54."""
    try:
        return all(abs(float(one[i : i + 8]) - float(other[i : i + 8])) <= 2 * SPREAD for i in (30, 38, 46))
    except ValueError:
        return False


def detections(one: Files, other: Files) -> float | None:
    """Of the detector. Where the best two classes are about as likely, either may be named."""
    if one == other and one:
        return 0.0
    mine, theirs = (json.loads(files.get("detections.json", b"[]")) for files in (one, other))
    if not mine or len(mine) != len(theirs):
        return None
    for here, there in zip(mine, theirs, strict=True):
        if [detection["box"] for detection in here] != [detection["box"] for detection in there]:
            return None
        if any(abs(a["score"] - b["score"]) > SCORE for a, b in zip(here, there, strict=True)):
            return None
    return SCORE


def training(one: Files, other: Files) -> float | None:
    """Of a training run: its checkpoint, or else the losses in its ``losses.json``."""
    if one == other and one:
        return 0.0
    mine, theirs = (json.loads(files.get("losses.json", b"[]")) for files in (one, other))
    if not mine or len(mine) != len(theirs):
        return None
    return LOSS if all(abs(a - b) <= LOSS * abs(a) for a, b in zip(mine, theirs, strict=True)) else None
