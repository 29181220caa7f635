"""acb, an AI computing broker: what there is beside `acb-launch` and `gpu_assigner`."""

from __future__ import annotations

from collections.abc import Sequence

from acb.cli import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``acb``."""
    from acb.cli.acb import demo, doctor

    return command.run("acb", __doc__ or "", (demo, doctor), arguments)
