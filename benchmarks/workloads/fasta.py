"""FASTA files of proteins, and where the installed pyhmmer keeps its real ones."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from .program import InputError
else:
    from program import InputError

AMINO_ACIDS = "ARNDCQEGHILKMFPSTWYV"
"""The twenty amino acids in AlphaFold's order: the index of a letter is its residue type; 20 is unknown."""

_UNKNOWN = str.maketrans(dict.fromkeys("BJOUZ", "X"))  # ambiguous or rare residues: the models know them as X


@dataclass(frozen=True)
class Protein:
    """One sequence: `name` is fit for a file name, `residues` holds the twenty letters and X."""

    name: str
    residues: str

    def __len__(self) -> int:
        return len(self.residues)

    def types(self) -> list[int]:
        """Return the residue types, 0 to 20, in AlphaFold's order."""
        return [AMINO_ACIDS.find(letter) if letter != "X" else len(AMINO_ACIDS) for letter in self.residues]


def read_fasta(path: Path, longest: int | None = None) -> list[Protein]:
    """Read the proteins of a FASTA file, at least one; X stands for unknown residues, a closing * is dropped.

    Raises InputError for a file that is missing, empty, no FASTA or no protein, for a sequence above
    `longest` residues, and for two sequences whose names would give the same output file.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a FASTA file: it holds bytes that are no text") from error
    if not text.strip():
        raise InputError(f"{path} is empty: a FASTA file with at least one sequence is needed")
    if not text.lstrip().startswith(">"):
        raise InputError(f"{path} is not a FASTA file: it must begin with a line such as '>NAME'")

    proteins: list[Protein] = []
    for number, entry in enumerate(re.split(r"^>", text.lstrip(), flags=re.MULTILINE)[1:], start=1):
        header, _, body = entry.partition("\n")
        name = re.sub(r"[^A-Za-z0-9._-]", "_", header.split()[0]) if header.split() else f"sequence_{number}"
        residues = "".join(body.split()).upper().removesuffix("*").translate(_UNKNOWN)
        _check(path, name, residues, longest)
        proteins.append(Protein(name, residues))
    names = [protein.name for protein in proteins]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: two sequences are named {name!r}; names must differ, each gives a file")
    return proteins


def _check(path: Path, name: str, residues: str, longest: int | None) -> None:
    if len(residues) < 2:
        raise InputError(f"{path}: sequence {name!r} has {len(residues)} residues; at least 2 are needed")
    if longest is not None and len(residues) > longest:
        raise InputError(f"{path}: sequence {name!r} has {len(residues)} residues; at most {longest} can be folded")
    for position, letter in enumerate(residues, start=1):
        if letter != "X" and letter not in AMINO_ACIDS:
            raise InputError(f"{path}: sequence {name!r} has {letter!r} at residue {position}: no amino acid")


def bundled_proteins() -> list[Path]:
    """Return the FASTA files of real proteins that the installed pyhmmer carries; raise InputError without them.

    2,100 proteins of a bacterial genome (PRJEB85), ten polyketide synthases and twelve acyl-CoA reductases (LuxC).
    pyhmmer itself is not imported.
    """
    spec = importlib.util.find_spec("pyhmmer")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("pyhmmer is not installed, and with it its proteins: pip install pyhmmer")
    folder = Path(spec.submodule_search_locations[0]) / "tests" / "data" / "seqs"
    paths = [folder / name for name in ("938293.PRJEB85.HG003687.faa", "PKSI.faa", "LuxC.faa")]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"the installed pyhmmer carries no {', '.join(missing)}: name a FASTA file with --database")
    return paths
