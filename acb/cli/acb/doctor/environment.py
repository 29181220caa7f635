"""Settings in the environment that do not go together with lending GPUs, and whether acb gets into programs at all."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from acb.cli.acb.doctor.check import Check
from acb.launcher.environment import BOOTSTRAP, instrumented

SECTION = "Environment"

PATIENCE = 30.0
"""Seconds for a bare Python to start."""

_ON = ("1", "true", "yes", "on")
_FRACTIONS = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
_ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the newer name first
_GIVES_BACK = ("platform", "cuda_async")


def checks(environ: Mapping[str, str], root: Path = Path("/")) -> list[Check]:
    """Everything that depends on the environment alone. `root` is where the MPS daemon's pipes lie."""
    found = [
        *_switched_off(environ),
        *_launcher(environ),
        *_managed_memory(environ),
        *_jax_memory(environ),
        *_torch_allocator(environ),
        *_mps(environ, root),
        *_job(environ),
    ]
    if all(check.mark == "ok" for check in found):
        found.append(Check(SECTION, "variables", "ok", "no setting stands in acb's way"))
    return found


def injection(environ: Mapping[str, str]) -> Check:
    """Start a bare Python as acb-launch would, and see whether acb is in it."""
    question = "import sys; print(any(type(f).__name__ == 'AcbFinder' for f in sys.meta_path))"
    environment = instrumented(environ, {"ACB_BROKER": "off"}, sys.executable)
    environment.pop("ACB_DISABLE", None)  # said elsewhere
    try:
        done = subprocess.run(
            [sys.executable, "-c", question],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(SECTION, "injection", "fail", f"a Python cannot be started: {error}", "install acb-gpu again")
    if done.stdout.strip().endswith("True"):
        return Check(SECTION, "injection", "ok", "acb gets into Python programs (but those started with -I, -S or -E)")
    said = done.stderr.strip().splitlines()
    return Check(
        SECTION,
        "injection",
        "fail",
        "a Python started under acb-launch runs without acb" + (f": {said[-1]}" if said else ""),
        "install acb-gpu again; if it stays so, see what else sets PYTHONPATH or sitecustomize",
    )


def _switched_off(environ: Mapping[str, str]) -> list[Check]:
    value = environ.get("ACB_DISABLE", "0")
    if value in ("", "0"):
        return []
    return [
        Check(
            SECTION, "ACB_DISABLE", "fail", f"ACB_DISABLE={value} switches acb off: programs run without it",
            "unset ACB_DISABLE",
        )
    ]  # fmt: skip


def _launcher(environ: Mapping[str, str]) -> list[Check]:
    found = []
    if ":" in str(BOOTSTRAP):
        found.append(
            Check(
                SECTION, "place", "fail", f"acb lies in {BOOTSTRAP.parent}, whose colon PYTHONPATH cannot hold",
                "install acb-gpu elsewhere",
            )
        )  # fmt: skip
    if shutil.which("acb-launch", path=environ.get("PATH")) is None:
        beside = Path(sys.executable).with_name("acb-launch")
        found.append(
            Check(
                SECTION,
                "acb-launch",
                "warn",
                "acb-launch is not on your PATH",
                f"call it as {beside}, or put its directory on the PATH"
                if beside.exists()
                else "call it as: python -m acb.launcher",
            )
        )
    if str(BOOTSTRAP) in environ.get("PYTHONPATH", "").split(":"):
        found.append(Check(SECTION, "PYTHONPATH", "note", "this very shell runs under acb-launch already"))
    return found


def _managed_memory(environ: Mapping[str, str]) -> list[Check]:
    found = []
    names = ["TF_FORCE_UNIFIED_MEMORY"] if environ.get("TF_FORCE_UNIFIED_MEMORY", "").lower() in _ON else []
    for name in _FRACTIONS:
        try:
            if float(environ.get(name) or 0) > 1:
                names.append(name)
        except ValueError:
            text = f"{name}={environ[name]!r} is not a number, and JAX will not start its GPU"
            found.append(Check(SECTION, name, "warn", text, f"unset {name}"))
    if names:
        found.append(
            Check(
                SECTION,
                "JAX memory",
                "warn",
                f"{' and '.join(f'{name}={environ[name]}' for name in names)}: JAX will use managed memory, which the "
                f"driver cannot move off the GPU",
                f"unset {' '.join(names)}: under acb every program has the whole GPU's memory",
            )
        )
    return found


def _jax_memory(environ: Mapping[str, str]) -> list[Check]:
    found = []
    preallocate = environ.get("XLA_PYTHON_CLIENT_PREALLOCATE")
    if preallocate is not None and preallocate.lower() not in ("false", "0"):
        found.append(
            Check(
                SECTION,
                "JAX memory",
                "warn",
                f"XLA_PYTHON_CLIENT_PREALLOCATE={preallocate}: JAX takes most of the GPU at its first touch, and "
                f"everybody else's memory has to go",
                "unset XLA_PYTHON_CLIENT_PREALLOCATE; acb-launch then sets it to false",
            )
        )
    allocator = environ.get("XLA_PYTHON_CLIENT_ALLOCATOR")
    if allocator and allocator not in _GIVES_BACK:
        found.append(
            Check(
                SECTION,
                "JAX memory",
                "warn",
                f"XLA_PYTHON_CLIENT_ALLOCATOR={allocator} never gives memory back: acb cannot move it",
                "unset XLA_PYTHON_CLIENT_ALLOCATOR; acb then chooses cuda_async",
            )
        )
    return found


def _torch_allocator(environ: Mapping[str, str]) -> list[Check]:
    """Expandable segments: acb's evacuator frees and allocates through PyTorch, and so ought to work on them, but that
    was only read in PyTorch's source: freed chunks of theirs (2 or 20 MiB) go back to the driver once nothing is left
    in them. Running out of memory while a segment is mapped can leave the process unable to allocate (pytorch#188008);
    acb makes room after that error."""
    for name in _ALLOCATORS:
        if re.search(r"expandable_segments\s*:\s*true", environ.get(name, ""), re.IGNORECASE):
            return [
                Check(
                    SECTION,
                    "PyTorch memory",
                    "warn",
                    f"{name} has expandable_segments: a program that runs out of memory with them may break before "
                    f"acb can make room (pytorch#188008), and moving them off a GPU has not been tried",
                    f"take expandable_segments out of {name}",
                )
            ]
    return []


def _mps(environ: Mapping[str, str], root: Path) -> list[Check]:
    chosen = environ.get("CUDA_MPS_PIPE_DIRECTORY")
    if chosen == "":
        return []  # the usual way to keep programs off the daemon
    pipes = Path(chosen) if chosen else root / "tmp/nvidia-mps"
    if not chosen and not (pipes / "control").exists():
        return []
    running = "runs" if (pipes / "control").exists() else "is asked for"
    return [
        Check(
            SECTION,
            "MPS",
            "warn",
            f"NVIDIA's Multi-Process Service {running} ({pipes}): programs share one server, and the driver cannot "
            f"suspend them singly",
            "end it: echo quit | nvidia-cuda-mps-control; acb shares the GPU in its place",
        )
    ]


def _job(environ: Mapping[str, str]) -> list[Check]:
    for name, system in (("SLURM_JOB_ID", "Slurm"), ("PJM_JOBID", "PJM")):
        if environ.get(name):
            return [Check(SECTION, "batch job", "ok", f"{system} job {environ[name]}: it has a broker of its own")]
    return []
