"""Every check of a part of benchmarks.gpu can fail: played are programs that obey, one of which says something wrong.

Of parts experiment, workloads and video: test_gpu_parts_excuses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu_parts import casting, framework, kills, memory, training
from benchmarks.gpu_parts.part import GB, Part, Settings, Skip
from benchmarks.gpu_parts.stage import StageError

Lie = Callable[..., Any]
GONE = StageError("victim (process 1) has ended: its last words")


class Actor:
    """A program that says what all is well with; `lie` may say something else of a command, or raise it."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage, self.name, self.pid = stage, name, 1
        self.dead = False
        self.process = SimpleNamespace(poll=lambda: -9 if self.dead else None)
        self._begun: tuple[Any, ...] = ()

    def ready(self) -> None:
        pass

    end = ready

    def kill(self) -> None:
        self.dead = True
        self.stage.killed += 1

    def begin(self, *command: Any) -> None:
        self._begun = command
        if command[0] == "halt" or (command[0] == "work" and len(command) > 2):
            Path(command[-1]).touch()

    def do(self, *command: Any) -> Any:
        self.begin(*command)
        return self.result()

    def result(self) -> Any:
        said = self.stage.lie(self.name, *self._begun)
        if isinstance(said, Exception):
            raise said
        return getattr(self, self._begun[0])(*self._begun[1:]) if said is None else said

    def work(self, *_: Any) -> bool:
        return True

    def halt(self, *_: Any) -> None:
        pass

    drop = capture = halt

    def load(self, name: str, nbytes: int, *_: Any) -> int:
        self.stage.held[name] = nbytes
        self.stage.evacuations += name == "more"
        return nbytes

    def check(self) -> dict[str, bool]:
        return {"same": True, "addresses": True}

    def ooms(self) -> int:
        return 1

    def grab(self, _: int) -> None:
        raise StageError(f"{self.name}: grab: OutOfMemoryError: CUDA out of memory")

    def copy(self, _: int) -> dict[str, float]:
        return {"out": 50e9, "back": 50e9}

    def evacuate(self) -> dict[str, float]:
        self.stage.away = True
        return {"moved": sum(self.stage.held.values()), "seconds": 0.1}

    def restore(self) -> dict[str, float]:
        self.stage.away = False
        return {"moved": sum(self.stage.held.values()), "seconds": 0.1}

    def train(self, _: int, evacuations: int) -> dict[str, Any]:
        return {"steady": True, "equal": True, "evacuations": evacuations, "first": 2.0, "last": 1.0}


class Anything(str):
    """A state that is whatever one waits for."""

    __slots__ = ()

    def __eq__(self, _: object) -> bool:
        return True

    __hash__ = str.__hash__


class Client(dict[str, Any]):
    """None, and suspended if one asks for that."""

    def get(self, *_: Any) -> Any:
        return True


class Stage:
    """A GPU of 80 GB, and a broker that does as it should; see Actor for `lie`, which is also asked for "free"."""

    lie: Lie
    folder: Path

    def __init__(self, *_: object) -> None:
        self.directory, self.spec = self.folder, None
        self.held: dict[str, int] = {}
        self.away = False
        self.evacuations = self.killed = 0

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start_broker(self, *_: str) -> None:
        pass

    kill_broker = start_broker

    def program(self, name: str, *_: object, **__: object) -> Actor:
        return Actor(self, name)

    def subject(self, _: str, name: str = "subject", **__: object) -> Actor:
        return Actor(self, name)

    def state(self, _: Actor) -> str:
        return Anything()

    def client(self, _: Actor) -> dict[str, Any]:
        return self.lie("broker", "client", self.killed) or Client()

    def status(self) -> dict[str, Any]:
        return {"totals": {"evacuations": self.lie("broker", "evacuations") or self.evacuations}}

    def free(self) -> int:
        used = 0 if self.away else sum(self.held.values())
        return 80 * GB - (self.lie("gpu", "used", self.killed) or used)


def truth(*_: Any) -> Any:
    return None


def but(who: str, what: str, said: Any) -> Lie:
    """The truth, but for what one says of a command, or of the first argument of one: "load more"."""
    return lambda name, *command: (
        said if name == who and what in (command[0], " ".join(map(str, command[:2]))) else None
    )


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Lie], list[str]]:
    """The questions of a part's checks that have failed; nothing is waited for."""

    def wait_until(what: str, true: Callable[[], Any], *_: float) -> Any:
        if value := true():
            return value
        raise StageError(f"waited in vain for {what}")

    for module in (framework, kills, memory, training):
        monkeypatch.setattr(module, "Stage", Stage)
    for module in (casting, kills, memory):  # type: ignore[assignment]
        monkeypatch.setattr(module, "wait_until", wait_until)
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: name == "torch" or None)
    monkeypatch.setattr(kills.DriverScene, "obstacle", lambda *_: "")
    monkeypatch.setattr(kills.DriverScene, "stop", lambda _: None)
    monkeypatch.setattr(framework.hostmemory, "available_bytes", lambda: None)
    Stage.folder = tmp_path

    def run(name: str, lie: Lie) -> list[str]:
        Stage.lie = staticmethod(lie)
        part = Part(name, Settings(False, True, 80 * GB, time.time() + 100), tmp_path / "part.json")
        try:
            {"torch": framework, "memory": memory, "kills": kills, "training": training}[name].run(part)
        except Skip as skip:
            return [f"skipped: {skip}"]
        assert part.rows
        return [row["question"] for row in part.rows if row["kind"] == "failed"]

    return run


@pytest.mark.parametrize("name", ["torch", "memory", "kills", "training"])
def test_nothing_fails_where_all_is_well(play: Callable[[str, Lie], list[str]], name: str) -> None:
    assert play(name, truth) == []


def kept(who: str, what: str, killed: int = 0, *_: Any) -> Any:
    """Each program that is killed leaves memory on the GPU."""
    return killed * 3 * GB if (who, what) == ("gpu", "used") else None


def lingers(who: str, what: str, killed: int = 0, *_: Any) -> Any:
    """The broker does not see that programs have ended."""
    return {"suspended": True} if (who, what) == ("broker", "client") and killed else None


WRONG = {"same": False, "addresses": True}
LIES = [
    ("torch", but("subject", "check", WRONG), "every bit is back"),
    ("torch", but("subject", "evacuate", {"moved": GB, "seconds": 1}), "the memory is free"),  # it is still there
    ("training", but("subject", "train", {"steady": True, "equal": False, "evacuations": 10, "first": 2, "last": 1}),
     "bit for bit"),
    ("training", but("subject", "train", {"steady": True, "equal": True, "evacuations": 9, "first": 2, "last": 1}),
     "as often as asked"),
    ("training", but("subject", "train", {"steady": False, "equal": False, "evacuations": 10}), "skipped: "),
    ("memory", but("second", "ooms", 0), "it did run out of memory"),
    ("memory", but("second", "load more", StageError("second: load: OutOfMemoryError: no")), "is repeated with room"),
    ("memory", but("broker", "evacuations", 7), "the room was made by evacuating the other"),
    ("memory", but("second", "check", WRONG), "its contents are right"),
    ("memory", but("first", "check", WRONG), "the other comes back with the right contents"),
    ("memory", but("second", "grab", 1), "ends in the framework's own error"),
    ("memory", but("second", "grab", StageError("second: grab: KeyError: 'x'")), "ends in the framework's own error"),
    *((
        ("kills", but("other", "check", WRONG), f"the broker is killed while a program is {step}"),
        ("kills", but("other", "check", WRONG), f"a program is killed {step}: the other goes on"),
        ("kills", kept, f"a program is killed {step}: its memory is free"),
        ("kills", lingers, f"a program is killed {step}: its memory is free"),
    ) for step in (kills.STEPS | kills.DRIVER_STEPS).values()),
    ("kills", but("suspending", "check", {"same": True, "addresses": False}),
     "the broker is killed while a program is about to be suspended"),
    ("kills", but("holding", "check", GONE), f"killed {kills.STEPS['holding']}: all goes on"),
]  # fmt: skip
CASES = [case for entry in LIES for case in (entry if isinstance(entry[0], tuple) else [entry])]


@pytest.mark.parametrize(("name", "lie", "question"), CASES)
def test_what_is_wrong_fails(play: Callable[[str, Lie], list[str]], name: str, lie: Lie, question: str) -> None:
    failed = play(name, lie)
    assert any(question in one for one in failed), failed
