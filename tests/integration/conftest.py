"""What tests with real processes share."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import broker_harness
import pytest

from acb.config import SimulatedSpec
from acb.devices.simulated import create_cards


@pytest.fixture
def site() -> Iterator[broker_harness.Site]:
    """A runtime directory of the test's own; brokers and programs started in it are ended with it."""
    with broker_harness.site() as place:
        yield place


@pytest.fixture
def small_disk(site: broker_harness.Site) -> Iterator[Path]:
    """A file system of 256 KiB: enough for a broker's files and a simulated GPU, unless it is filled."""
    path = site.directory / "disk"
    path.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "acb-test", path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        site.gpu_assigner("stop", ACB_RUNTIME_DIR=str(path))  # one that a failed test has left
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def broker(site: broker_harness.Site) -> Iterator[broker_harness.FakeBroker]:
    """A broker of the test's own, with a simulated GPU of 64 MiB."""
    create_cards(site.directory / "simulated-1x64MiB", SimulatedSpec((64 << 20,)))
    fake = broker_harness.FakeBroker(site.socket)
    yield fake
    fake.close()
