"""acb, an AI computing broker: lends GPUs out phase by phase to unmodified programs.

Most programs need nothing from here: ``acb-launch python program.py`` runs them as they are. A program that would
rather say itself when it needs the GPU does so with `gpu`, or with `begin` and `end`; it needs no launcher then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from acb._version import __version__

if TYPE_CHECKING:
    from acb.api import begin, end, gpu
    from acb.client.refusal import LeaseRefused

__all__ = ["LeaseRefused", "__version__", "begin", "end", "gpu"]


def __getattr__(name: str) -> Any:
    # Late: the launcher's bootstrap and the command line import this package, and must stay light.
    if name in ("begin", "end", "gpu"):
        from acb import api

        return getattr(api, name)
    if name == "LeaseRefused":
        from acb.client.refusal import LeaseRefused

        return LeaseRefused
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
