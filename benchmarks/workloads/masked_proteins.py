"""Batches for a masked protein language model: cropped, mutated and masked on the CPU, each from its number alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING or __package__:
    from .fasta import AMINO_ACIDS, Protein
    from .program import InputError
else:
    from fasta import AMINO_ACIDS, Protein
    from program import InputError

# Residues that replace each other in related proteins: the positive classes of BLOSUM62.
_ALIKE = ("ILMV", "FWY", "KRQ", "DEN", "ST", "AG", "H", "C", "P")
_WINDOW = 12  # residues over which complexity is judged, as SEG does
_LOW_COMPLEXITY = 1.5  # bits; SEG's trigger is 2.2, for segments to be removed altogether


class MaskedProteins(Dataset[tuple[Tensor, Tensor]]):  # type: ignore[misc]
    """Batch number n, a pair of tokens and targets, both int64 [batch, length], is a function of seed and n.

    So it does not matter which process makes it or where a run was interrupted. Tokens: 0 to 19 amino acids,
    then UNKNOWN, MASK, PADDING; targets are residue types where one is to be guessed, IGNORED elsewhere.
    """

    UNKNOWN: ClassVar[int] = len(AMINO_ACIDS)
    MASK: ClassVar[int] = UNKNOWN + 1
    PADDING: ClassVar[int] = UNKNOWN + 2
    TOKENS: ClassVar[int] = UNKNOWN + 3
    IGNORED: ClassVar[int] = -100

    def __init__(self, proteins: list[Protein], batch: int, length: int, seed: int) -> None:
        self._types = [np.array(protein.types()) for protein in proteins if len(protein) >= _WINDOW]
        if not self._types:
            raise InputError(f"no protein has at least {_WINDOW} residues: nothing to learn from")
        self._batch = batch
        self._length = length
        self._seed = seed
        self._mutants = _mutants()

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self._seed, number])
        tokens = np.full((self._batch, self._length), self.PADDING)
        targets = np.full((self._batch, self._length), self.IGNORED)
        for row in range(self._batch):
            residues = self._mutate(self._crop(rng), rng)
            masked, wanted = self._mask(residues, rng)
            tokens[row, : len(residues)] = masked
            targets[row, : len(residues)] = wanted
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    def _crop(self, rng: np.random.Generator) -> NDArray[np.int64]:
        whole = self._types[rng.integers(len(self._types))]
        start = rng.integers(max(1, len(whole) - self._length + 1))
        return whole[start : start + self._length].copy()

    def _mutate(self, residues: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Replace one residue in twenty by one alike."""
        chosen = np.flatnonzero(rng.random(len(residues)) < 0.05)
        for position in chosen:
            residues[position] = rng.choice(self._mutants[residues[position]])
        return residues

    def _mask(
        self, residues: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Choose 15 % outside repeats to be guessed: 80 % of them masked, 10 % random, 10 % as they are (BERT)."""
        candidates = (complexity(residues) >= _LOW_COMPLEXITY) & (residues < self.UNKNOWN)
        chosen = candidates & (rng.random(len(residues)) < 0.15)
        if not chosen.any():
            chosen[rng.integers(len(residues))] = True
        chosen &= residues < self.UNKNOWN
        targets = np.where(chosen, residues, self.IGNORED)
        fate = rng.random(len(residues))
        tokens = np.where(chosen & (fate < 0.8), self.MASK, residues)
        anything = rng.integers(self.UNKNOWN, size=len(residues))
        return np.where(chosen & (fate >= 0.8) & (fate < 0.9), anything, tokens), targets


def complexity(residues: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return for each residue the Shannon entropy, in bits, of the richest window of 12 that holds it.

    Needs at least one residue; a sequence shorter than a window is one window.
    """
    width = min(_WINDOW, len(residues))
    windows = np.lib.stride_tricks.sliding_window_view(residues, width)
    shares = (windows[:, :, None] == np.arange(residues.max() + 1)).mean(axis=1)
    entropy = -(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(axis=1)
    padded = np.pad(entropy, width - 1, constant_values=-np.inf)
    richest: NDArray[np.float64] = np.lib.stride_tricks.sliding_window_view(padded, width).max(axis=1)
    return richest


def _mutants() -> list[list[int]]:
    """List for each residue type what may stand in its place, itself included; unknown stays unknown."""
    table = [[kind] for kind in range(len(AMINO_ACIDS) + 1)]
    for group in _ALIKE:
        members = [AMINO_ACIDS.index(letter) for letter in group]
        for member in members:
            table[member] = members
    return table
