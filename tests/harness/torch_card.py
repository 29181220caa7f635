"""PyTorch on a simulated GPU, for the tests of one module."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import torch

from acb.config import SimulatedSpec
from acb.devices.simulated import Card, create_cards
from acb.hooks.torch import simulated


@contextlib.contextmanager
def torch_card(directory: Path, nbytes: int) -> Iterator[Card]:
    """A GPU of so many bytes, in this directory."""
    create_cards(directory, SimulatedSpec((nbytes,)))
    with Card.open(directory) as card:
        simulated.install(torch, lambda: card, lambda: card)
        yield card
        gc.collect()
        simulated.uninstall()
