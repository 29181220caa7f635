"""acb, an AI computing broker: what there is beside `acb-launch` and `gpu_assigner`."""

from __future__ import annotations

from collections.abc import Sequence

from acb.cli import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``acb``."""
    import acb.cli.acb.demo as demo

    return command.run("acb", __doc__ or "", (demo,), arguments)
