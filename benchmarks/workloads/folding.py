"""The three steps that a folding program takes with every protein, whatever its network is written in."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING or __package__:
    from .fasta import Protein, bundled_proteins
    from .homology import FILTERS, Alignment, Database
    from .program import Parser, Stopwatch, count
    from .relax import relax
    from .structure import write_pdb
else:
    from fasta import Protein, bundled_proteins
    from homology import FILTERS, Alignment, Database
    from program import Parser, Stopwatch, count
    from relax import relax
    from structure import write_pdb

Predict = Callable[[Protein, Alignment], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""The network: returns a backbone [residues, 4, 3] in ångström and a confidence [residues], 0 to 100."""


def add_arguments(lines: Parser) -> None:
    """Add the arguments that do not depend on the network."""
    lines.add_argument(
        "fasta",
        nargs="?",
        type=Path,
        default=Path(__file__).with_name("proteins.fasta"),
        help="the proteins to fold",
    )
    lines.add_argument("--seed", type=count(0), default=0, help="of the weights and of the relaxation")
    lines.add_argument("--threads", type=count(), default=1, help="CPU threads; more may change the last digits")
    search = lines.add_argument_group("homology search")
    search.add_argument("--database", type=Path, help="FASTA file to search, instead of pyhmmer's 2,122 proteins")
    search.add_argument("--search-rounds", type=count(), default=2, help="rounds of jackhmmer, at most")
    search.add_argument("--search-filters", choices=FILTERS, default="max", help="max: align every protein in full")
    relaxation = lines.add_argument_group("relaxation")
    relaxation.add_argument("--relax-steps", type=count(0), default=1500, help="steps of dynamics in a round")
    relaxation.add_argument("--relax-rounds", type=count(), default=3, help="rounds while bonds are violated, at most")


def fold_proteins(
    proteins: list[Protein], predict: Predict, options: argparse.Namespace, watch: Stopwatch, out: Path
) -> list[dict[str, Any]]:
    """Search, predict and relax each protein in turn; writes NAME.afa, NAME_unrelaxed.pdb and NAME_relaxed.pdb.

    Returns one entry a protein for the summary.
    """
    with watch.step("load database", "cpu"):
        paths = [options.database] if options.database else bundled_proteins()
        database = Database(paths, options.search_filters)
    results = []
    for protein in proteins:
        with watch.step("search", "cpu", protein.name):
            alignment = database.search(protein, options.search_rounds)
            alignment.write(out / f"{protein.name}.afa")
        with watch.step("predict", "gpu", protein.name):
            backbone, confidence = predict(protein, alignment)
        with watch.step("relax", "cpu", protein.name):
            write_pdb(out / f"{protein.name}_unrelaxed.pdb", protein.residues, backbone, confidence)
            relaxed = relax(
                backbone,
                confidence,
                seed=options.seed,
                steps=options.relax_steps,
                max_rounds=options.relax_rounds,
                threads=options.threads,
            )
            write_pdb(out / f"{protein.name}_relaxed.pdb", protein.residues, relaxed.backbone, confidence)
        homologs = len(alignment.rows) - 1
        results.append(
            {
                "name": protein.name,
                "residues": len(protein),
                "homologs": homologs,
                "search_rounds": alignment.rounds,
                "mean_confidence": round(float(confidence.mean()), 2),
                "relax_rounds": relaxed.rounds,
                "violations": relaxed.violations,
                "moved_angstrom": round(relaxed.moved, 3),
                "energy_before_kj_mol": round(relaxed.energy_before, 1),
                "energy_after_kj_mol": round(relaxed.energy_after, 1),
            }
        )
        print(f"{protein.name}: {len(protein)} residues, {homologs} homologs, folded", flush=True)
    return results


def closing_line(count_: int, out: Path, watch: Stopwatch) -> str:
    """Return the program's last line of output."""
    seconds = f"GPU steps {watch.total('gpu'):.1f} s, CPU steps {watch.total('cpu'):.1f} s"
    return f"{count_} structure{'s' if count_ != 1 else ''} in {out}: {seconds}"
