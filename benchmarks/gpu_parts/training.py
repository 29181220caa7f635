"""A training run that is evacuated and restored a hundred times, also between forward and backward: the same losses.

The run is played twice undisturbed first: where these differ already, nothing can be said.
"""

from __future__ import annotations

import time

from benchmarks.gpu_parts.part import Part, Skip
from benchmarks.gpu_parts.stage import Stage

STEPS, EVACUATIONS = 60, 100


def run(part: Part) -> None:
    """In one process, without a broker: the moments are chosen, not left to chance."""
    steps, evacuations = (6, 10) if part.settings.quick else (STEPS, EVACUATIONS)
    with Stage(part.settings) as stage:
        program = stage.subject("torch", acb=False)
        begun = time.monotonic()
        told = program.do("train", steps, evacuations)
    part.figures |= told | {"seconds": time.monotonic() - begun}
    if not told["steady"]:
        raise Skip("the run is not even the same when it is left alone twice: it uses kernels that differ each time")
    part.check("it was evacuated as often as asked", told["evacuations"] == evacuations, f"{evacuations} times")
    part.check(
        f"losses, weights and optimizer after {evacuations} evacuations are those of the run left alone, bit for bit",
        told["equal"], f"{steps} steps, loss {told['first']:.4f} to {told['last']:.4f}",
    )  # fmt: skip
