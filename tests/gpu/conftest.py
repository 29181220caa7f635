"""Tests on real hardware: skipped, with the reason, where there is no NVIDIA GPU."""

from __future__ import annotations

import pytest

from acb.devices import nvml


def _reason() -> str:
    """Why these tests cannot run here; empty when they can."""
    try:
        return "" if nvml.devices() else "this job may use no GPU"
    except nvml.NvmlError as error:
        return str(error)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _reason()
    for item in items:
        if item.path.parent.name == "gpu" and reason:
            item.add_marker(pytest.mark.skip(reason=reason))
