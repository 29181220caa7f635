"""For all tests: what changes PyTorch in this very process comes last; nothing is learned in the user's own files."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import pytest

os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="acb-state-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

pytest.register_assert_rewrite(
    "gangs", "lease_death", "suspending", "users"
)  # bodies of tests that stand outside of them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that install the simulated GPU in the process run after those that need PyTorch as it is."""
    items.sort(key=lambda item: item.path.name.startswith("test_simulated"))
