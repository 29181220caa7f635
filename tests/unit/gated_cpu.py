"""PyTorch with the CPU as its gated device, so that what waits at the gate can be tried on any machine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from acb.client.gate import Gate
from acb.hooks import torch as hook
from acb.hooks.torch import devices


class Gated:
    """A gate that tells when a thread stands at it, and counts regions while nothing else does."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.regions = 0
        self.gate = Gate(self.asked.set, self._ended)
        self.gate.open(watched=True)

    def _ended(self) -> None:
        self.regions += 1

    def stops(self, action: Callable[[], Any]) -> bool:
        """Whether `action` waits at the closed gate. The gate is open afterwards, and the action done."""
        self.asked.clear()
        self.gate.close()
        done = threading.Event()

        def act() -> None:
            action()
            done.set()

        thread = threading.Thread(target=act)
        thread.start()
        while not self.asked.wait(0.005) and not done.is_set() and thread.is_alive():
            pass
        stopped = not done.is_set()
        self.gate.open(watched=True)
        thread.join()
        assert done.is_set()
        return stopped


@contextlib.contextmanager
def gated_cpu() -> Iterator[Gated]:
    """PyTorch with CPU tensors behind a gate."""
    made = Gated()
    devices.gate_device_type("cpu")
    hook.install_gating(made.gate)
    try:
        yield made
    finally:
        made.gate.open()
        hook.uninstall_gating()
        devices.ungate_device_type("cpu")
