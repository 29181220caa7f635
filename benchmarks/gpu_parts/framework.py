"""The framework tier, in a process without a broker: are all bits the same, is the memory free, how fast does it go?

The plain copy that it is compared with goes between the GPU and one pinned buffer, in the same part. The first
evacuation of a size page-locks its buffers, and is told apart from the later ones, which reuse them.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from acb import hostmemory
from benchmarks.gpu_parts.part import GB, MIB, Part
from benchmarks.gpu_parts.stage import Program, Stage

RATIO = 0.8
"""Of the plain copy's bandwidth, promised."""

SLACK = 64 * MIB
"""Bytes: allocators round up, and NVML counts in pages of 2 MiB."""

PIECES = 8


def slack(held: int) -> int:
    """Bytes that may be missing of so many: SLACK, but never so much that nothing would have to leave."""
    return min(SLACK, held // 8)


def sizes(part: Part) -> list[int]:
    """Bytes to move: those that fit, the others are skipped by name."""
    if part.settings.simulate:
        return [64 * MIB] if part.settings.quick else [64 * MIB, 256 * MIB]
    found = []
    for nbytes in (1 * GB,) if part.settings.quick else (1 * GB, 8 * GB, 30 * GB):
        host = hostmemory.available_bytes()
        if nbytes * 1.1 + GB > part.settings.capacity:
            part.skip(f"{nbytes / GB:g} GB", f"the GPU has {part.settings.capacity / GB:.0f} GB")
        elif host is not None and nbytes * 1.2 + hostmemory.RESERVE > host:
            part.skip(f"{nbytes / GB:g} GB", f"the host has {host / GB:.0f} GB of memory available")
        else:
            found.append(nbytes)
    return found


def words(nbytes: int) -> str:
    """Such as ``8 GB``."""
    return f"{nbytes / GB:g} GB" if nbytes >= GB else f"{nbytes / MIB:g} MiB"


def run(part: Part) -> None:
    """One process a size: what an earlier one has left behind must not count."""
    for nbytes in sizes(part):
        if part.left() < 8 + 1.2 * nbytes / GB:
            part.skip(words(nbytes), f"only {part.left():.0f} s are left")
            continue
        with Stage(part.settings) as stage:
            copy = plain_copy(stage, nbytes)
            figures = move(part, stage, nbytes)
        judge(part, words(nbytes), figures, copy)


def plain_copy(stage: Stage, nbytes: int) -> dict[str, float] | None:
    """Bytes a second, out and back; None without PyTorch, which does it."""
    if importlib.util.find_spec("torch") is None:
        return None
    program = stage.subject("torch", "copy", acb=False)
    found: dict[str, float] = program.do("copy", nbytes)
    program.end()
    return found


def move(part: Part, stage: Stage, nbytes: int) -> dict[str, Any]:
    """Evacuate and restore `nbytes`; bandwidths in bytes a second, memory in bytes."""
    empty = stage.free()
    program: Program = stage.subject(part.name, acb=False)
    program.do("work")  # the context and the libraries
    idle = stage.free()
    held = program.do("load", "data", nbytes, PIECES)
    loaded = stage.free()
    figures: dict[str, Any] = {"bytes": held, "context": empty - idle, "out": [], "back": []}
    for _ in range(2 if part.settings.quick or nbytes > 10 * GB else 3):
        out = program.do("evacuate")
        if out.get("moved", 0) < held:
            part.check(f"{words(nbytes)}: all of it leaves", False, out.get("refused", f"{out.get('moved')} of {held}"))
            return figures
        away = stage.free()
        back = program.do("restore")
        figures["out"].append(out["moved"] / out["seconds"])
        figures["back"].append(back["moved"] / back["seconds"])
        figures["freed"], figures["residual"] = away - loaded, empty - away
    program.do("restore")  # nothing is left to do
    same = program.do("check")["same"]
    part.check(f"{words(nbytes)}: every bit is back after {len(figures['out'])} evacuations", same)
    enough = figures["freed"] >= held - slack(held)
    told = f"{figures['freed'] / MIB:.0f} of {held / MIB:.0f} MiB; "
    stays = f"{figures['residual'] / MIB:.0f} MiB stay, {figures['context'] / MIB:.0f} MiB of it the context"
    part.check(f"{words(nbytes)}: the memory is free by the driver's count", enough, told + stays)
    return figures


def judge(part: Part, size: str, figures: dict[str, Any], copy: dict[str, float] | None) -> None:
    """The bandwidths, and their ratio to the plain copy's."""
    part.figures[size] = figures | {"copy": copy}
    if not figures["out"]:
        part.save()
        return
    for way, verb in (("out", "evacuated"), ("back", "restored")):
        first, best = figures[way][0], max(figures[way][1:] or figures[way])
        remark = f"the first time {first / GB:.3g} GB/s"
        if copy is None:
            part.tell(f"{size} {verb}", f"{best / GB:.3g} GB/s", None, None, f"{remark}; no PyTorch to compare")
            continue
        ratio = figures[f"{way}_ratio"] = best / copy[way]
        remark += f"; {best / GB:.3g} GB/s against {copy[way] / GB:.3g} GB/s"
        target = f"at least {RATIO}"
        part.tell(f"{size} {verb}, of a plain copy's speed", f"{ratio:.2f}", target, ratio >= RATIO, remark)
