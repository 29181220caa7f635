"""The driver tier: a program suspended and resumed from outside, by CUDA's checkpoint calls, alone and as second tier.

Whether it works here is tried first, as the broker tries it, on a throw-away process. The program knows nothing of acb.
Every size is moved out and back while it stands still; then the framework moves what it can, and the driver the rest:
contexts, workspaces, whatever else lies there.
"""

from __future__ import annotations

from typing import Any

from acb.broker.checkpointing import Helper
from acb.cli.gpu_assigner.pool import SIMULATED_TIER
from acb.devices.checkpoint import Outcome
from benchmarks.gpu_parts.casting import cast
from benchmarks.gpu_parts.framework import PIECES, SLACK, sizes, slack, words
from benchmarks.gpu_parts.part import GB, MIB, Part, Skip
from benchmarks.gpu_parts.stage import Program, Stage

REST = 10.0
"""Seconds for the program, which does nothing, to come to rest."""

ROOM = 5.0
"""Seconds for the memory to be free again before it is restored."""

SLOW = 1.5 * GB
"""Bytes a second, assumed of the driver until it has been measured."""

TOGETHER = 8 * GB
"""Bytes, at most, with which both tiers are tried."""


class Driver:
    """The checkpoint helper, asked to move one program."""

    def __init__(self, part: Part, stage: Stage, helper: Helper, program: Program) -> None:
        self.part, self.stage, self.helper, self.program = part, stage, helper, program
        self.rate = SLOW

    def suspend(self, size: str) -> Outcome | None:
        """None: it could not, which has been told."""
        return self._ask(size, "suspend", timeout=REST)

    def resume(self, size: str, out: Outcome) -> Outcome | None:
        """After suspend(); None: it could not, which has been told."""
        nothing = {"0": 0} if self.part.settings.simulate else None  # a simulated GPU has no contexts
        return self._ask(size, "resume", needs=out.moved or nothing, patience=ROOM)

    def _ask(self, size: str, op: str, **arguments: Any) -> Outcome | None:
        outcome = self.helper.ask(op, self.program.pid, deadline=max(1.0, self.part.left()), **arguments)
        assert isinstance(outcome, Outcome)
        if not outcome.done:
            self.part.check(f"{size}: the driver can {op} the program", False, outcome.reason)
            return None
        return outcome


def run(part: Part) -> None:
    """The probe, then the sizes in order: what does not work for a small one is not tried with a larger."""
    simulate = part.settings.simulate
    wanted = sizes(part)
    with Stage(part.settings) as stage:
        empty = stage.free()
        program, copier = cast(stage, "torch", {"subject": (), "copier": ()}, acb=False)
        directory = next(map(str, stage.directory.glob("simulated-*")), "")
        environment = {**stage.environment, **({"ACB_SIMULATED": directory} if simulate else {})}
        with Helper(SIMULATED_TIER if simulate else None, environment) as helper:
            if simulate:
                part.skip("probe", "a simulated driver is not probed: it works")
            else:
                probe(part, helper)
            copy = copier.do("copy", min(max(wanted, default=GB), TOGETHER))
            copier.end()
            program.do("work")  # the context and the libraries
            driver = Driver(part, stage, helper, program)
            both = max((nbytes for nbytes in wanted if nbytes <= TOGETHER), default=0)
            for nbytes in wanted:
                expected = 5 + 2 * nbytes / driver.rate
                if part.left() < expected:
                    part.skip(words(nbytes), f"it takes about {expected:.0f} s, {part.left():.0f} s are left")
                elif not play(driver, nbytes, empty, copy, both=nbytes == both):
                    return


def probe(part: Part, helper: Helper) -> None:
    """Raises Skip when there is no driver tier here."""
    result = helper.ask("probe", deadline=part.left())
    assert not isinstance(result, Outcome)
    part.figures["probe"] = result.as_json()
    if not result.works:
        raise Skip(f"the driver tier does not work here: {result.reason}")
    moved = sum(result.moved.values())
    part.check(
        "the probe's throw-away process left the GPU", moved > 0, f"{result.seconds:.1f} s, {moved / MIB:.0f} MiB"
    )


def play(driver: Driver, nbytes: int, empty: int, copy: dict[str, float], *, both: bool) -> bool:
    """Out and back with so many bytes, `both`: then also after the framework. False: the program may be lost."""
    part, stage, program, size = driver.part, driver.stage, driver.program, words(nbytes)
    held = program.do("load", "data", nbytes, PIECES)
    loaded = stage.free()
    figures: dict[str, Any] = {"bytes": held, "used": empty - loaded, "out": [], "back": [], "copy": copy}
    part.figures[size] = figures
    away = loaded
    for _ in range(1 if part.settings.quick or nbytes > TOGETHER else 2):
        out = driver.suspend(size)
        if out is None:
            return False
        away = stage.free()
        back = driver.resume(size, out)
        if back is None:
            return False
        figures["out"].append(held / taken(out))
        figures["back"].append(held / taken(back))
        figures["seconds"] = {"out": out.seconds, "back": back.seconds}
    driver.rate = min(figures["out"] + figures["back"])
    figures["freed"], figures["residual"] = away - loaded, empty - away
    check(part, size, program, "the driver has moved it", addresses=True)
    told = f"{figures['freed'] / MIB:.0f} MiB for {held / MIB:.0f}; {figures['residual'] / MIB:.0f} MiB stay"
    part.check(f"{size}: the memory is free by the driver's count", figures["freed"] >= held - slack(held), told)
    for way, verb in (("out", "suspended"), ("back", "resumed")):
        best = max(figures[way])
        figures[f"{way}_ratio"] = best / copy[way]
        remark = f"{best / GB:.3g} GB/s against {copy[way] / GB:.3g} GB/s"
        part.tell(f"{size} {verb}, of a plain copy's speed", f"{figures[f'{way}_ratio']:.2f}", None, None, remark)
    going = not both or together(driver, size, empty)
    program.do("drop", "data")
    return going


def taken(outcome: Outcome) -> float:
    """Seconds of the driver's calls that do something."""
    return max(1e-6, sum(seconds for call, seconds in outcome.seconds.items() if call != "state"))


def check(part: Part, size: str, program: Program, since: str, *, addresses: bool) -> None:
    """Its contents, and what it computes with them; where they have to be, its addresses."""
    found = program.do("check")
    part.check(f"{size}: every bit is there after {since}", found["same"] and program.do("work"))
    if addresses:
        part.check(f"{size}: every address is what it was after {since}", found["addresses"])


def together(driver: Driver, size: str, empty: int) -> bool:
    """The framework moves what it can, the driver what is left; then the same backwards."""
    part, stage, program = driver.part, driver.stage, driver.program
    moved = program.do("evacuate")
    if not part.check(f"{size}: the framework moves its part", "moved" in moved, moved.get("refused", "")):
        return False
    left = empty - stage.free()
    out = driver.suspend(f"{size} after the framework")
    if out is None:
        return False
    rest = empty - stage.free()
    if driver.resume(f"{size} after the framework", out) is None:
        return False
    returned = program.do("restore")
    part.figures[f"{size} together"] = {"left": left, "rest": rest, "moved": moved, "seconds": out.seconds}
    part.check(f"{size}: all that the framework had moved came back", returned["moved"] == moved["moved"])
    check(part, size, program, "both tiers have moved it", addresses=False)
    part.tell(
        f"{size}: memory that stays after the framework, and after the driver", f"{rest / MIB:.0f} MiB",
        f"at most {SLACK / MIB:.0f} MiB", rest <= SLACK,
        f"{left / MIB:.0f} MiB after the framework; the driver took {taken(out):.2f} s",
    )  # fmt: skip
    return True
