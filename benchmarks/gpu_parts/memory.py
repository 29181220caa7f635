"""Two programs under the broker that do not fit together: one runs out of memory while the other's still lies there.

The second says that it needs little, so the first stays resident when the second gets the GPU. Then it wants all that
is left and half of the first one's besides, piece by piece, as programs grow. The call that runs out of memory is
repeated once the broker has had the first one evacuated. What is larger than the GPU ends in the framework's own error.

On a real GPU each program's context takes memory that the broker's books do not show. In place of that, this process
takes some of a simulated one.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from acb.devices.simulated import Card
from benchmarks.gpu_parts.casting import cast, complaint, referee
from benchmarks.gpu_parts.part import GB, MIB, Part
from benchmarks.gpu_parts.stage import OUT_OF_MEMORY, Stage, wait_until

NEED = 20.0
"""Seconds that a framework takes, at most."""


def run(part: Part) -> None:
    """Each framework that is installed, alone with itself."""
    for framework, title in (("torch", "PyTorch"), ("jax", "JAX")):
        if importlib.util.find_spec(framework) is None:
            part.skip(title, f"not installed: {framework}")
        elif part.left() < NEED and part.rows:
            part.skip(title, f"it takes up to {NEED:.0f} s, {part.left():.0f} s are left")
        else:
            play(part, framework, title)


def play(part: Part, framework: str, title: str) -> None:
    """See the module."""
    simulate = part.settings.simulate
    size = 128 * MIB if simulate else max(2 * GB, part.settings.capacity // 25)
    with Stage(part.settings) as stage:
        stage.start_broker("--driver-tier", "off")
        little = f"{size // 8}B"
        first, second = cast(stage, framework, {"first": (), "second": ("--gpu-memory", little)})
        held = first.do("load", "data", size, 4)
        second.do("load", "own", size // 16)
        second.do("work")
        wait_until("the first program to give the GPU up", lambda: stage.state(first) == "resident")
        with context(part, stage, size // 4):
            before = evacuations(stage)
            wanted = stage.free() + held // 2
            figures: dict[str, Any] = {"first": held, "free": wanted - held // 2, "wanted": wanted}
            part.figures[framework] = figures
            problem = complaint(second, "load", "more", wanted, wanted // (held // 8))
            figures["evacuations"] = evacuations(stage) - before
            if framework == "torch":
                figures["ooms"] = second.do("ooms")
                part.check(f"{title}: it did run out of memory", figures["ooms"] > 0, f"{figures['ooms']} times")
            part.check(f"{title}: out of memory while another is resident, the call is repeated with room", not problem,
                       problem or f"{wanted / MIB:.0f} MiB where {figures['free'] / MIB:.0f} were free")  # fmt: skip
            part.check(f"{title}: the room was made by evacuating the other", figures["evacuations"] > 0)
            part.check(f"{title}: its contents are right", second.do("check")["same"])
            if not problem:
                second.do("drop", "more")
            part.check(f"{title}: the other comes back with the right contents", first.do("check")["same"])
            error = complaint(second, "grab", part.settings.capacity * 3 // 2)
            figures["error"] = error
            own = any(word in error for word in OUT_OF_MEMORY)
            part.check(f"{title}: more than the whole GPU ends in the framework's own error", own, error or "no error")
            for program in (first, second):
                part.check(f"{title}: the {program.name} program goes on after that", program.do("check")["same"])
            referee(part, stage)


def evacuations(stage: Stage) -> int:
    """So many there have been."""
    status = stage.status() or {}
    return int(status.get("totals", {}).get("evacuations", 0))


@contextlib.contextmanager
def context(part: Part, stage: Stage, nbytes: int) -> Iterator[None]:
    """So much of a simulated GPU is taken by somebody whom the broker does not know."""
    if not part.settings.simulate:
        yield
        return
    with Card.open(next(stage.directory.glob("simulated-*"))) as card:
        card.allocate(nbytes)
        yield
