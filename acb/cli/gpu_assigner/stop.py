"""End the broker of this user (inside a batch job: of this job).

Programs that still run keep what they hold; those that wait for the GPU go on waiting for the next broker.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from pathlib import Path

from acb.cli.gpu_assigner import talk
from acb.config import EX_TEMPFAIL, EX_UNAVAILABLE, ConfigError, socket_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has no options."""


def run(options: argparse.Namespace) -> int:
    """Ask it to end, and wait until it has."""
    path = socket_path(make=False)
    pid = talk.stop(path)
    if pid is None:
        print(f"gpu_assigner: no GPU broker runs at {path}", file=sys.stderr)
        return EX_UNAVAILABLE
    _wait_for_end(pid, path)
    print(f"gpu_assigner: stopped (process {pid})", file=sys.stderr)
    return 0


def _wait_for_end(pid: int, path: Path) -> None:
    """Return when the process has ended. Raises ConfigError when it takes too long."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([descriptor], [], [], talk.PATIENCE)[0]:
            raise ConfigError(f"the GPU broker (process {pid}) at {path} does not end; use: kill -9 {pid}", EX_TEMPFAIL)
    finally:
        os.close(descriptor)
