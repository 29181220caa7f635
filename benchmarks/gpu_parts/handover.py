"""Hand-overs of the GPU between two programs: of the lease alone, with data that stays, and with data that must move.

Two processes pass the GPU to and fro as in benchmarks.handover, from just before the one leaves its phase to just after
the other has entered its own. Where both fit nothing is copied, and what a hand-over takes is compared with a bare
socket round trip between the same two. Where they do not, the one's data goes to host memory and the other's comes
back before it is let in: the bytes of both copies over that time, by a plain pinned copy's speed one way, is 1 if the
copies run one after the other and nothing else takes time, and up to 2 if they run at once.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from acb import hostmemory
from benchmarks import handover, report
from benchmarks.gpu_parts.framework import words
from benchmarks.gpu_parts.part import GB, MIB, Part
from benchmarks.gpu_parts.stage import PROGRAMS, Stage, StageError

LARGEST = 8 * GB
"""Bytes that each of two programs holds that do not fit together: to page-lock more would take longer than the rest."""

LEAVES = 0.6
"""Of the other's bytes, what the GPU holds beside what a program asks for then: enough for the other's context."""

WARM_UP = 3
"""Hand-overs with copying that are not counted: each process loads its data, and page-locks its buffers."""


def run(part: Part) -> None:
    """The lease alone, data that stays, data that moves."""
    quick = part.settings.quick
    lease_alone(part, 60 if quick else 300)
    if importlib.util.find_spec("torch") is None:
        part.skip("hand-overs with data on the GPU", "not installed: torch")
        return
    small = 32 * MIB if part.settings.simulate else 256 * MIB
    data_stays(part, small, 40 if quick else 200)
    large = _large(part)
    if large:
        data_moves(part, large, 3 if quick else 6)
    else:
        part.skip(
            "hand-overs with copying", "the GPU or the host has too little memory for it to be more than a context"
        )


def _large(part: Part) -> int:
    """Bytes that each of two programs holds which do not fit together; 0: the host has not enough memory for them."""
    if part.settings.simulate:
        return (64 if part.settings.quick else 256) * MIB
    most = min(LARGEST // 2 if part.settings.quick else LARGEST, part.settings.capacity // 3)
    host = hostmemory.available_bytes()
    if host is not None:
        most = min(most, int((host - hostmemory.RESERVE) * 0.4))  # both may be in host memory at once
    return most if most >= 2 * GB else 0


def lease_alone(part: Part, rounds: int) -> None:
    """Nothing lies on the GPU: the price of the decision and of telling everybody."""
    with Stage(part.settings) as stage:
        stage.start_broker()
        command = [sys.executable, "-c", handover.PEER]
        commands = [stage.command(f"peer {number}", command) for number in range(2)]
        told = handover.play(stage.environment, commands, rounds, patience=part.left())
    figures = part.figures["lease alone"] = handover.compare(told, rounds)
    ratio, target = figures["ratio"], handover.TARGET
    part.tell("hand-over, nothing on the GPU", *_median(figures, f"at most {target:g} round trips", ratio <= target))


def data_stays(part: Part, nbytes: int, rounds: int) -> None:
    """Both processes have a context and data, and fit: nothing may be moved."""
    told, totals = _play(part, nbytes, min(4 * nbytes + 2 * GB, part.settings.capacity // 4), rounds)
    figures = part.figures["data stays"] = {
        **handover.compare(told, rounds), "bytes": nbytes, "evacuations": totals["evacuations"],
        "used_percentiles_us": report.percentiles(told.used[-rounds:]),
    }  # fmt: skip
    question = f"hand-over, both fit with {words(nbytes)} each"
    figure, _, _, remark = _median(figures)
    first = figures["used_percentiles_us"]["p50"]
    part.tell(question, figure, None, None, f"{remark}; first operation done after {first:.0f} µs")
    evacuations = totals["evacuations"]
    part.check("both fit: nothing is moved, every bit as before", told.intact and not evacuations,
               f"{evacuations} evacuations")  # fmt: skip


def data_moves(part: Part, nbytes: int, rounds: int) -> None:
    """The one's data makes way for the other's."""
    with Stage(part.settings) as stage:
        copy = stage.subject("torch", "copy", acb=False).do("copy", nbytes)
    memory = part.settings.capacity - int(LEAVES * nbytes)
    told, totals = _play(part, nbytes, memory, rounds, warm_up=WARM_UP, rested=0)
    seconds = [time / 1e6 for time in told.handovers]
    taken = report.percentiles(seconds[WARM_UP:])
    plain = (copy["out"] + copy["back"]) / 2
    speed = 2 * nbytes / taken["p50"]
    part.figures["data moves"] = {
        "bytes": nbytes, "memory": memory, "seconds": seconds, "percentiles_s": taken, "copy": copy,
        "bytes_per_s": speed, "ratio": speed / plain, "evacuations": totals["evacuations"],
    }  # fmt: skip
    part.tell(
        f"hand-over with {words(nbytes)} out and {words(nbytes)} in", f"{_time(taken['p50'])}", None, None,
        f"90 % under {_time(taken['p90'])}, the first ones {_time(seconds[0])} and {_time(seconds[1])}; each asks for "
        f"{words(memory)} of {words(part.settings.capacity)}",
    )  # fmt: skip
    part.tell(
        "both copies over that time, of a plain copy's speed", f"{speed / plain:.2f}", None, None,
        f"{speed / GB:.3g} GB/s against {plain / GB:.3g} GB/s one way; 1: one after the other, 2: both at once",
    )  # fmt: skip
    moved = totals["evacuations"] >= len(seconds)
    part.check("all of it moves each time, every bit as before", told.intact and moved,
               f"{totals['evacuations']} evacuations, {len(seconds)} hand-overs")  # fmt: skip


def _play(
    part: Part, nbytes: int, memory: int, rounds: int, warm_up: int = handover.WARM_UP, rested: int = 4
) -> tuple[handover.Told, dict[str, Any]]:
    """What two processes measure that hold `nbytes` each and ask for `memory`, and the broker's totals."""
    with Stage(part.settings) as stage:
        stage.start_broker()
        script = [sys.executable, str(PROGRAMS / "handover_peer.py")]
        commands = [stage.command(f"peer {number}", script) for number in range(2)]
        options = (rounds, nbytes, memory, warm_up, rested)
        told = handover.play(stage.environment, commands, *options, patience=part.left())
        status = stage.status()
    if status is None:
        raise StageError("the broker has ended")
    return told, status["totals"]


def _median(figures: dict[str, Any], target: str | None = None, met: bool | None = None) -> tuple[Any, ...]:
    """The figure and what follows it in a row."""
    hand, trip = figures["handover_percentiles_us"], figures["roundtrip_percentiles_us"]
    remark = f"90 % under {hand['p90']:.0f} µs; {figures['ratio']:.2f} bare socket round trips of {trip['p50']:.0f} µs"
    return f"{hand['p50']:.0f} µs", target, met, remark


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
