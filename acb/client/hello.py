"""The hello: what a process tells a broker first, of itself, of what it wants, and of what it holds already."""

from __future__ import annotations

import binascii
import os
import sys
from typing import Any

from acb import config
from acb.client import visible, wishes
from acb.client.memory import Memory
from acb.protocol import VERSION, Hello


def hello(name: str, gpu: int | None, gpus: tuple[int, ...], memory: Memory, *, lease: bool, simulated: bool) -> Hello:
    """`gpu`, `gpus`: where the process is bound, None if it is not; `lease`: whether it holds one, of a broker before.

    With the agent's lock held.
    """
    if lease:  # or else the driver may have suspended this process, and would keep this thread
        memory.resident()
        memory.peak()
    return Hello(
        VERSION,
        os.getpid(),
        name,
        memory_hint=_hint(),
        **_place(gpu, gpus, simulated),
        holding=lease,
        resident=memory.last_resident,
        evacuated=memory.evacuated,
        peak=memory.last_peak if gpu is not None else 0,
        program=_program(),
        arguments=_arguments(),
        **(_pool() if simulated else {}),
        **wishes.of_this_process()._asdict(),
    )


def _place(gpu: int | None, gpus: tuple[int, ...], simulated: bool) -> dict[str, Any]:
    """Fields of the Hello: where this process is bound, or wants to be."""
    wish = wishes.of_this_process()
    chosen = () if simulated else visible.chosen(wish.gang_size or wish.count)
    if gpu is None:
        gpus = chosen
        if gpus and len(gpus) == (wish.gang_size or wish.count):
            gpu = gpus[wish.rank if wish.gang else 0]
    if gpu is None:
        return {"gpu": -1, "gpus": ""}
    return {"gpu": gpu, "gpus": ",".join(map(str, gpus)) if len(gpus) > 1 else "", "chosen": bool(chosen)}


def _pool() -> dict[str, Any]:
    """Fields of the Hello: which simulated GPUs these are, and no others will do."""
    folder = os.environ.get("ACB_SIMULATED")
    if not folder:
        return {}
    pool = os.path.realpath(folder).encode("utf-8", "replace").decode()
    return {"pool": pool, "pool_gpus": os.environ.get("ACB_SIMULATED_GPUS", "")}


def _program() -> str:
    """By what the broker is to remember this program: what the user calls it, else its file; '': its name will do."""
    file = sys.argv[0] if getattr(sys, "argv", None) else ""
    if os.environ.get("ACB_NAME") or not os.path.isfile(file):
        return ""
    return os.path.abspath(file).encode("utf-8", "replace").decode()


def _arguments() -> str:
    """A short digest of what stands behind the program on its command line."""
    text = "\0".join((getattr(sys, "argv", None) or ())[1:])
    return f"{binascii.crc32(text.encode('utf-8', 'replace')):08x}"


def _hint() -> int:
    """What ``acb-launch --gpu-memory`` said, in bytes; 0: nothing."""
    try:
        return config.parse_size(os.environ.get("ACB_GPU_MEMORY") or "0")
    except config.ConfigError:
        return 0
