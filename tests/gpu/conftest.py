"""Tests of what acb promises on real GPUs. Those marked `gpu` are skipped, with the reason, where there is none.

The same bodies run on simulated GPUs wherever the thing exists there, so that they are known to work as tests.
"""

from __future__ import annotations

from collections.abc import Iterator

import broker_harness
import nvidia_site
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
        if item.get_closest_marker("gpu") and reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["simulated", pytest.param("nvidia", marks=pytest.mark.gpu)])
def site(request: pytest.FixtureRequest) -> Iterator[broker_harness.Site]:
    """A runtime directory of the test's own, on simulated GPUs or real ones; what is started in it ends with it."""
    kind = nvidia_site.NvidiaSite if request.param == "nvidia" else broker_harness.Site
    with broker_harness.site(kind, "torch") as place:
        yield place
