"""What tests with real processes share."""

from __future__ import annotations

from collections.abc import Iterator

import broker_harness
import pytest


@pytest.fixture
def site() -> Iterator[broker_harness.Site]:
    """A runtime directory of the test's own; brokers and programs started in it are ended with it."""
    with broker_harness.site() as place:
        yield place
