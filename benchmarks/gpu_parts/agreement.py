"""Whether a workload has given the same as before: bit for bit, or else within what its kind of output allows, and why.

Each function compares the files of two runs, by name: 0.0 for equal bit for bit; the tolerance, in the output's own
unit, when all numbers are within it; None when they are not.
"""

from __future__ import annotations

import json
from typing import Any

Files = dict[str, bytes]

SPREAD = 2e-3
"""Ångström, two of the PDB file's last digit: what outputs may differ by, where they are not equal bit for bit.
Kernels of cuBLAS may sum in another order when the GPU's workspace differs."""

CONFIDENCE = 2e-2
"""Of 100, two of that file's last digit: for the same reason."""

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
    """Two ATOM lines of a PDB file, equal but for last digits.

    These are of the coordinates, in columns 31 to 54, and of the confidence, 61 to 66. Whole numbers are compared, for
    2.002 less 2.000 need not be 0.002 in binary.
    """
    if (one[:30], one[54:60], one[66:]) != (other[:30], other[54:60], other[66:]):
        return False
    places = [(slice(i, i + 8), 1000, SPREAD) for i in (30, 38, 46)] + [(slice(60, 66), 100, CONFIDENCE)]
    try:
        return all(
            abs(round(float(one[place]) * digits) - round(float(other[place]) * digits)) <= round(most * digits)
            for place, digits, most in places
        )
    except (ValueError, OverflowError):
        return False


def detections(one: Files, other: Files) -> float | None:
    """Of the detector. Where the best two classes are about as likely, in both, either may be named."""
    if one == other and one:
        return 0.0
    mine, theirs = (json.loads(files.get("detections.json", b"[]")) for files in (one, other))
    if not mine or len(mine) != len(theirs):
        return None
    for here, there in zip(mine, theirs, strict=True):
        if len(here) != len(there) or not all(_same(a, b) for a, b in zip(here, there, strict=True)):
            return None
    return SCORE


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """`margin` is how much likelier the class is than the next."""
    if one["box"] != other["box"] or not abs(one["score"] - other["score"]) <= SCORE:
        return False
    return bool(one["class"] == other["class"]) or bool(max(one["margin"], other["margin"]) <= SCORE)


def training(one: Files, other: Files) -> float | None:
    """Of a training run: its checkpoint, or else the losses in its ``losses.json``."""
    if one == other and one:
        return 0.0
    mine, theirs = (json.loads(files.get("losses.json", b"[]")) for files in (one, other))
    if not mine or len(mine) != len(theirs):
        return None
    return LOSS if all(abs(a - b) <= LOSS * abs(a) for a, b in zip(mine, theirs, strict=True)) else None
