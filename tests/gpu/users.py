"""Starts the programs of tests/gpu/programs, and knows what they need."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from broker_harness import Program, Site
from nvidia_site import needs_cuda

PROGRAMS = Path(__file__).parent / "programs"

both = pytest.mark.parametrize("framework", ["torch", "jax"])


def start(site: Site, framework: str, *options: str, **changes: str | None) -> Program:
    """A program that uses this framework, under acb-launch with these options; it has imported it, and waits."""
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    variables: dict[str, str | None] = {}
    if site.place == "nvidia":
        needs_cuda(framework)
        variables["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true"
    return site.launch(PROGRAMS / f"{framework}_user.py", *options, **{**variables, **changes})


def end(site: Site, *programs: Program) -> None:
    """Nobody has touched a GPU without a lease, and all end well."""
    assert site.violations() == []
    for program in programs:
        assert program.finish() == 0, program.errors
        assert "acb:" not in program.errors
