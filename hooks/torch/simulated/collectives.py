"""Collective operations between processes (torch.distributed): nothing but how a process ends after them.

The backend gloo computes on threads of its own, which let go of the tensors a moment after the program knows that they
are done. A tensor that Python has seen, as the simulated GPU makes it see all of them, can only be let go of with the
interpreter's lock. Before CPython 3.14 a thread that waits for that lock while the interpreter ends is ended in the
middle of C++ code, and that aborts the process.
"""

from __future__ import annotations

import select

from acb.hooks.torch.simulated import operations

MOMENT = 0.05
"""Seconds."""


def let_go() -> None:
    """At the interpreter's end: if there were collective operations, let go of the lock for a moment."""
    if any(operation.name.startswith("c10d.") for operation in operations.known()):
        select.select([], [], [], MOMENT)  # not time.sleep(), which acb takes for the program's own
