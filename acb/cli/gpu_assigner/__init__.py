"""gpu_assigner, the broker: lends GPUs to the programs that run under acb-launch."""

from __future__ import annotations

from collections.abc import Sequence

from acb.cli import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``gpu_assigner``."""
    from acb.cli.gpu_assigner import start, status, stop

    return command.run("gpu_assigner", __doc__ or "", (start, status, stop), arguments)
