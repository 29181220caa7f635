"""The frameworks of this environment, or of another one: what acb's hooks make of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from acb.cli.acb.doctor import scan
from acb.cli.acb.doctor.check import Check
from acb.config import EX_DATAERR, ConfigError
from acb.hooks import VERSIONS, numbers

SECTION = "Frameworks"

PATIENCE = 30.0
"""Seconds that another environment's Python may take to say what it has."""

INDEX = {"torch": "https://pytorch.org/get-started", "jax": "pip install 'jax[cuda13]'"}


def look(python: str | None = None) -> dict[str, Any]:
    """What scan.scan() says here, or in the environment of the interpreter `python`. Raises ConfigError if that fails.

    Nothing is imported, so no CUDA is initialised.
    """
    if python is None:
        return scan.scan()
    try:
        done = subprocess.run(
            [python, "-I", scan.__file__], capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"{python} does not say what it has ({error}); name a Python of 3.8 or newer", EX_DATAERR
        ) from None


def movable(found: dict[str, Any]) -> list[str]:
    """Titles of the frameworks whose memory acb moves."""
    return [framework["title"] for framework in found["frameworks"] if framework["name"] in VERSIONS]


def checks(found: dict[str, Any], gpu_here: bool) -> list[Check]:
    """The interpreter and its frameworks. `gpu_here`: whether there is a real GPU that they should be built for."""
    lines = [_python(found), *(_one(framework, gpu_here) for framework in found["frameworks"])]
    if not movable(found):
        lines.append(
            Check(
                SECTION,
                "hooked",
                "note",
                f"neither PyTorch nor JAX is installed for {found['executable']}",
                "look into your programs' own environment: acb doctor --python FILE",
            )
        )
    return lines


def _python(found: dict[str, Any]) -> Check:
    version = found["python"]
    if found["free_threaded"]:
        return Check(
            SECTION, "Python", "warn", f"{version}, the free-threaded build, which acb does not support",
            "use the ordinary build",
        )  # fmt: skip
    if numbers(version) < (3, 10):
        return Check(
            SECTION, "Python", "warn", f"{version}: programs run without acb in it", "use Python 3.10 or newer"
        )  # fmt: skip
    return Check(SECTION, "Python", "ok", version)


def _one(framework: dict[str, Any], gpu_here: bool) -> Check:
    name, title, version, cuda = (framework[key] for key in ("name", "title", "version", "cuda"))
    build = "CPU build" if cuda is None else f"for {'ROCm' if cuda == 'rocm' else f'CUDA {cuda}'.strip()}"
    text = f"{version}, {build}"
    if name not in VERSIONS and cuda is None:
        return Check(SECTION, title, "ok", f"{text}: nothing to gate")
    if name not in VERSIONS:
        return Check(
            SECTION, title, "note", f"{text}; not hooked: its GPU work is neither gated nor moved",
            "let it use the GPU only while no program under acb does",
        )  # fmt: skip
    first, tested = VERSIONS[name]
    if numbers(version) < numbers(first):
        return Check(
            SECTION, title, "warn", f"{text}; acb's hooks need {first} or newer", f"update {name}, to {tested} say"
        )  # fmt: skip
    if cuda == "rocm":
        return Check(SECTION, title, "warn", f"{text}; acb lends NVIDIA GPUs only")
    if gpu_here and cuda is None:
        return Check(
            SECTION, title, "warn", f"{text}: it cannot use this machine's GPU",
            f"install its CUDA build: {INDEX[name]}",
        )  # fmt: skip
    if numbers(version)[:2] > numbers(tested)[:2]:
        text += f"; newer than acb was tested with ({tested}): a part that does not fit is named when a program starts"
        return Check(SECTION, title, "note", text)
    return Check(SECTION, title, "ok", text + ("" if gpu_here or cuda else ", enough for simulated GPUs"))


def is_file(text: str) -> str:
    """The interpreter that ``--python`` names. Raises ConfigError when there is none."""
    if not Path(text).is_file():
        raise ConfigError(f"there is no Python {text!r}; name the file, such as env/bin/python", EX_DATAERR)
    return text
