"""For all tests: what changes PyTorch in this very process comes last."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that install the simulated GPU in the process run after those that need PyTorch as it is."""
    items.sort(key=lambda item: item.path.name.startswith("test_simulated"))
