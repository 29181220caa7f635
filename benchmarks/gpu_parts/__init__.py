"""The parts of benchmarks.gpu: one module a part, each run in a process of its own (see __main__)."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple


class Entry(NamedTuple):
    """A part: `module` (".NAME": of this package) has ``run(part)``. `needs` are packages. `limit` and `least` are
    seconds: when it is ended, if later parts need the time, and with how little time left it is not begun.
    `simulated`: why it cannot run on a simulated GPU; "": it can.
    """

    module: str
    title: str
    needs: tuple[str, ...]
    limit: float
    least: float
    simulated: str = ""

    def obstacle(self, *, simulate: bool) -> str:
        """Why it cannot run here, whatever the GPU; '': it can."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        return self.simulated if simulate else ""


FOLD = ("torch", "transformers", "pyhmmer", "openmm")
VIDEO = ("torch", "transformers", "cv2", "skvideo")

# In the order in which they run: what matters most comes first, in case the time runs out.
PARTS = {
    "experiment": Entry(".experiment", "folding jobs: one after the other, at once, with acb", FOLD, 230, 60),
    "torch": Entry(".framework", "framework tier, PyTorch: content, memory, bandwidth", ("torch",), 60, 20),
    "jax": Entry(".framework", "framework tier, JAX: content, memory, bandwidth", ("jax",), 50, 20),
    "driver": Entry(".driver", "driver tier: content, addresses, memory, bandwidth, both tiers", ("torch",), 70, 25),
    "graphs": Entry(".graphs", "a captured CUDA graph: suspended by the driver, or holding", ("torch",), 40, 15),
    "memory": Entry(".memory", "out of memory beside a resident program: room is made", (), 50, 20),
    "kills": Entry(".kills", "kill -9 of programs and of the broker at every step", ("torch",), 80, 25),
    "training": Entry(".training", "a hundred evacuations of a training run: equal bit for bit", ("torch",), 30, 10),
    "handover": Entry(".handover", "hand-overs between two programs: that fit, that do not", (), 50, 15),
    "overhead": Entry(".overhead", "what the hooks cost an undisturbed program", (), 50, 15),
    "workloads": Entry(".workloads", "four different programs at once, and each alone", (), 130, 50),
    "video": Entry(".video", "two video streams on one GPU", VIDEO, 80, 30),
}
