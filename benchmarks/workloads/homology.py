"""A homology search on the CPU, as jackhmmer does it: a protein against a set, its alignment, its profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pyhmmer.easel import Alphabet, DigitalSequenceBlock, SequenceFile, TextSequence
from pyhmmer.plan7 import Pipeline

if TYPE_CHECKING or __package__:
    from .fasta import AMINO_ACIDS, Protein
    from .program import InputError
else:
    from fasta import AMINO_ACIDS, Protein
    from program import InputError

GAP = len(AMINO_ACIDS) + 1
"""The residue type of a gap in an alignment; 0 to 19 are amino acids, 20 is unknown."""

_TYPE = {letter: index for index, letter in enumerate(AMINO_ACIDS)}
_FILTERS: dict[str, dict[str, Any]] = {
    "default": {},
    "max": {"bias_filter": False, "F1": 1.0, "F2": 1.0, "F3": 1.0},  # HMMER's --max: every target is aligned in full
}
FILTERS = tuple(_FILTERS)


@dataclass(frozen=True)
class Alignment:
    """What the search found for one protein, in the columns of that protein.

    `rows` is [1 + homologs, residues] of residue types, the protein itself first; `names` its row names;
    `rounds` the number of search rounds until nothing new came, `targets` the number of proteins searched.
    """

    rows: NDArray[np.int32]
    names: tuple[str, ...]
    rounds: int
    targets: int

    def profile(self) -> NDArray[np.float32]:
        """Return [residues, 20]: how often each amino acid stands in a column; zeros where none is known."""
        counts = (self.rows[:, :, None] == np.arange(len(AMINO_ACIDS))).sum(axis=0).astype(np.float32)
        shares: NDArray[np.float32] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        return shares

    def write(self, path: Path) -> None:
        """Write the alignment as aligned FASTA, a gap as '-'."""
        letters = np.array([*AMINO_ACIDS, "X", "-"])
        lines = [f">{name}\n{''.join(letters[row])}\n" for name, row in zip(self.names, self.rows, strict=True)]
        path.write_text("".join(lines))


class Database:
    """A set of proteins held in memory for searching.

    `filters` is "default" for HMMER's speed heuristics or "max" for none of them (its --max option).
    """

    def __init__(self, paths: Sequence[Path], filters: str = "default") -> None:
        self._alphabet = Alphabet.amino()
        self._sequences = DigitalSequenceBlock(self._alphabet)
        self._options = _FILTERS[filters]
        for path in paths:
            try:
                with SequenceFile(path, format="fasta", digital=True, alphabet=self._alphabet) as file:
                    self._sequences.extend(file)
            except (OSError, ValueError) as error:
                raise InputError(f"cannot read the protein set {path}: {_one_line(error)}") from error
        if not len(self._sequences):
            raise InputError(f"the protein set {', '.join(map(str, paths))} holds no sequence")

    def __len__(self) -> int:
        return len(self._sequences)

    def search(self, protein: Protein, rounds: int = 3) -> Alignment:
        """Search for homologs in up to `rounds` rounds, each with the profile of the last, and align them.

        Single-threaded and deterministic: HMMER's random numbers are seeded afresh in every round.
        """
        name = "query:" + protein.name  # told apart from the same protein in the set
        query = TextSequence(name=name.encode(), sequence=protein.residues).digitize(self._alphabet)
        search = Pipeline(self._alphabet, **self._options).iterate_seq(query, self._sequences)
        found = next(search)
        done = 1
        while done < rounds and not found.converged:
            found = next(search)
            done += 1
        text = found.msa.textize()
        aligned = {_text(row): str(letters) for row, letters in zip(text.names, text.alignment, strict=True)}
        return _align(protein, name, aligned, done, len(self._sequences))


def _align(protein: Protein, query: str, aligned: dict[str, str], rounds: int, targets: int) -> Alignment:
    """Keep the columns in which the protein itself has a residue; the alignment may leave its ends out."""
    rows = [protein.types()]
    names = [protein.name]
    own = aligned.pop(query, "")
    letters = own.replace("-", "").replace(".", "").upper()
    start = protein.residues.find(letters)
    if letters and start >= 0:
        columns = [i for i, letter in enumerate(own) if letter not in "-."]
        for name, other in aligned.items():
            row = [GAP] * len(protein)
            for offset, column in enumerate(columns):
                letter = other[column].upper()
                row[start + offset] = GAP if letter in "-.~" else _TYPE.get(letter, len(AMINO_ACIDS))
            rows.append(row)
            names.append(name)
    return Alignment(np.asarray(rows, dtype=np.int32), tuple(names), rounds, targets)


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name  # pyhmmer 0.11 and before: bytes


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
