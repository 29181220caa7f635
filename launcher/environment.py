"""What acb-launch puts into the environment of the command; the shell script acb-launch does the same in its fast path.

===============================  ====================================================================================
``PYTHONPATH``                   the bootstrap directory, then what was there
``ACB_HOME``, ``ACB_PYTHON``     the directory that holds the package acb, and the Python of that installation
``ACB_SOCKET``, ``ACB_BROKER``   where the broker listens; ``auto``, ``require`` or ``off``
``ACB_SIMULATED``                the directory of the simulated GPUs, when there are any
``ACB_SIMULATED_GPUS``           what they are, as after --simulate-gpus
``ACB_POOL``, ``ACB_DEVICES``    what the broker lends, for the launcher to check sizes and the client to check ordinals
``ACB_NAME``, ``ACB_TRACE``, ``ACB_GPU_MEMORY``, ``ACB_QUIET``   the options of the same names; memory in bytes
``ACB_GPUS``, ``ACB_PRIORITY``, ``ACB_WEIGHT``   the options of the same names
``XLA_PYTHON_CLIENT_PREALLOCATE``   ``false`` unless set: JAX would take most of the GPU at its first touch
===============================  ====================================================================================
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

HOME = Path(__file__).parent.parent.parent
"""The directory that holds the package acb, links not resolved: the shell script must come to the same text."""

BOOTSTRAP = HOME / "acb" / "launcher" / "bootstrap"
"""The directory with acb's sitecustomize, and nothing else."""


def initial_environment() -> dict[str, str]:
    """The environment this process was started with.

    Not os.environ, to which Python adds LC_CTYPE when the locale is C: the command must not see that.
    """
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return dict(os.environ)
    return dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry[1:])


def with_bootstrap(python_path: str) -> str:
    """The value of PYTHONPATH with the bootstrap directory first, and only there; other entries stay as they are."""
    entries = python_path.split(":") if python_path else []
    return ":".join([str(BOOTSTRAP), *(entry for entry in entries if entry != str(BOOTSTRAP))])


def broker_variables(env_file: Path) -> dict[str, str]:
    """The variables that a running broker asks for, from the file beside its socket; {} when there is none.

    Only names that begin with ``ACB_`` count, and only in a file of this user's own.
    """
    try:
        if env_file.is_symlink() or env_file.stat().st_uid != os.geteuid():
            return {}
        lines = os.fsdecode(env_file.read_bytes()).split("\n")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in lines if re.match(r"ACB_[A-Z0-9_]+=", line))


def instrumented(environ: Mapping[str, str], variables: Mapping[str, str], python: str) -> dict[str, str]:
    """A copy of `environ` with `variables`, and with what lets the acb that `python` has into Python processes."""
    return {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        **environ,
        **variables,
        "PYTHONPATH": with_bootstrap(environ.get("PYTHONPATH", "")),
        "ACB_HOME": str(HOME),
        "ACB_PYTHON": python,
    }
