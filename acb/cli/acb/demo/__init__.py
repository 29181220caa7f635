"""Show what acb does: programs that together do not fit a GPU, without it and with it.

A protein folding program (homology search, structure model, relaxation) runs alone, then four at once without acb, some
of which run out of GPU memory, then four at once under acb, all of which finish with the same results as alone. The GPU
is a simulated one, so this works on any machine; a timeline of the last run is drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

from acb.cli.command import argument
from acb.cli.output import page
from acb.config import EX_CANTCREAT, EX_UNAVAILABLE, ConfigError, SimulatedSpec, parse_simulated

PROGRAMS = {"fold": ["fold.py"] * 4, "fold_jax": ["fold_jax.py"] * 4, "mix": ["fold.py", "fold_jax.py"] * 2}
NEEDS = ("torch", "jax", "transformers", "pyhmmer", "openmm", "matplotlib", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``acb demo``."""
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("demo-out"), help="where results go (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON on stdout when done")
    parser.add_argument(
        "--program", choices=sorted(PROGRAMS), default="fold", help="what the four programs are (default: %(default)s)"
    )
    parser.add_argument(
        "--simulate-gpus",
        metavar="NxSIZE",
        type=argument(parse_simulated),
        default=SimulatedSpec((512 << 20,)),
        help="the simulated GPU (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the three scenes; exit status 0 when all programs finish under acb with the results they have alone."""
    from acb.cli.acb.demo import scenes, timeline
    from acb.cli.acb.demo.progress import Progress
    from acb.cli.signals import Signals

    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the demo needs {', '.join(missing)}; install what it needs with: pip install 'acb-gpu[demo]'",
            EX_UNAVAILABLE,
        )
    out = options.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write in {out}: {error.strerror}; choose another --out", EX_CANTCREAT) from None
    spec: SimulatedSpec = options.simulate_gpus
    with Signals() as signals, scenes.Stage(out, spec, signals.check) as stage, Progress(sys.stderr) as progress:
        summary = scenes.play(stage, PROGRAMS[options.program], progress)
    picture = timeline.draw(out, summary, f"{len(PROGRAMS[options.program])} programs on {stage.gpu_words}")
    summary["timeline"] = picture.name
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    scenes.tell(summary, stage, picture, sys.stderr)
    if options.json:
        with page():
            print(json.dumps(summary, indent=2))
    with_acb = summary["with_acb"]
    return (
        0
        if with_acb["finished"] == len(PROGRAMS[options.program]) and with_acb["outputs_identical"]
        else os.EX_SOFTWARE
    )
