"""CUDA_VISIBLE_DEVICES: what the user said with it, and what acb wrote there.

The broker chooses a process's GPU, and CUDA_VISIBLE_DEVICES is how the process is told. Before that it may be the
user's word: an empty one hides every GPU, so that there is nothing to lend; one that leaves some of the broker's GPUs
has the process take the first of those, as CUDA would; one that names only others takes the process out of acb's hands.
A child of a bound process finds what acb wrote for its parent, which is nobody's wish.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

VARIABLE = "CUDA_VISIBLE_DEVICES"
BOUND = "ACB_BOUND"
"""What acb put into VARIABLE, for the children to know it."""

USERS = "ACB_USERS_VISIBLE"
"""What was there before."""

POOL = "ACB_DEVICES"
"""The broker's GPUs in the order of their ordinals, as INDEX=UUID with the machine's own index; `-` before one that is
not lent."""


class Pooled(NamedTuple):
    """A GPU as the broker knows it: `index` is its place in the machine."""

    ordinal: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody misses
    uuid: str
    lent: bool


def bind(setting: str) -> None:
    """Let CUDA, which reads it when it starts in this process, see these GPUs."""
    before = os.environ.get(VARIABLE)
    if before == setting:
        return
    if before is not None and before != os.environ.get(BOUND):
        os.environ[USERS] = before
    os.environ[VARIABLE] = os.environ[BOUND] = setting


def users(environ: Mapping[str, str] | None = None) -> str | None:
    """What the user, or the program, says; None: nothing."""
    environ = os.environ if environ is None else environ
    setting = environ.get(VARIABLE)
    return environ.get(USERS) if setting is not None and setting == environ.get(BOUND) else setting


def hidden(environ: Mapping[str, str] | None = None) -> bool:
    """Whether every GPU is hidden: the user wants the CPU. Simulated GPUs are not CUDA's to hide."""
    if (os.environ if environ is None else environ).get("ACB_SIMULATED"):
        return False
    setting = users(environ)
    return setting is not None and setting.partition(",")[0].strip() in ("", "-1", "NoDevFiles")


def pool(environ: Mapping[str, str] | None = None) -> list[Pooled]:
    """The broker's GPUs; [] when they are simulated, or it has not said."""
    found: list[Pooled] = []
    for entry in ((os.environ if environ is None else environ).get(POOL) or "").split(","):
        index, _, uuid = entry.removeprefix("-").partition("=")
        if not index.isdigit() or not uuid:
            return []
        found.append(Pooled(len(found), int(index), uuid, not entry.startswith("-")))
    return found


def foreign(environ: Mapping[str, str] | None = None) -> bool:
    """Whether only GPUs are left that the broker does not lend."""
    gpus, setting = pool(environ), users(environ)
    if not gpus or setting is None or hidden(environ):
        return False
    return not any(gpu.lent for gpu in _named(gpus, setting))


def chosen(count: int, environ: Mapping[str, str] | None = None) -> tuple[int, ...]:
    """The ordinals of the `count` GPUs that the user's setting leaves, fewer if it leaves fewer; (): the broker may
    choose."""
    gpus, setting = [gpu for gpu in pool(environ) if gpu.lent], users(environ)
    if not gpus or setting is None:
        return ()
    named = [gpu for gpu in _named(gpus, setting) if gpu.lent]
    if len(named) == len(gpus):
        return ()  # as in every batch job: no wish at all
    return tuple(gpu.ordinal for gpu in named[:count])


def brokers(environ: Mapping[str, str] | None = None) -> str | None:
    """What a broker's successor must find in VARIABLE to count the GPUs as it did."""
    return ",".join(gpu.uuid for gpu in pool(environ)) or users(environ)


def _named(gpus: Sequence[Pooled], setting: str) -> list[Pooled]:
    """Those named by index or (the beginning of a) UUID, in the setting's order."""
    found: list[Pooled] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.startswith("-"):
            break  # CUDA reads no further
        for gpu in gpus:
            if gpu not in found and (
                entry == str(gpu.index) or (entry.startswith("GPU-") and gpu.uuid.startswith(entry))
            ):
                found.append(gpu)
    return found
