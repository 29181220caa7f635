"""What the parts of benchmarks.gpu call a failure, and what only too little time, or somebody else's GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from acb.devices import nvml
from benchmarks.gpu_parts import card, experiment, jobs, video, workloads
from benchmarks.gpu_parts.part import Part, Settings, Skip


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


class Actor:
    """A program of `takes` seconds that ends with `outcome`."""

    def __init__(self, clock: Clock, takes: float, outcome: str, acb: bool) -> None:
        self.clock, self.takes, self.outcome, self.name, self.acb = clock, takes, outcome, "actor", acb
        self.started = self.ended = clock.now

    def wait(self, seconds: float) -> str:
        late = self.started + self.takes > self.clock.now + seconds
        self.ended = self.clock.now + max(0.0, seconds) if late else self.started + self.takes
        self.clock.now = max(self.clock.now, self.ended)
        return "not done in time" if late else self.outcome

    def problem(self) -> str:
        return "its last words"

    @property
    def seconds(self) -> float:
        return self.ended - self.started


class Stage:
    """Where `script` says what comes of a program, without acb and with it: seconds and outcome."""

    clock: ClassVar[Clock]
    script: ClassVar[dict[bool, tuple[float, str]]]

    def __init__(self, *_: object) -> None:
        self.directory = Path("/nowhere")
        self.environment: dict[str, str] = {}

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start_broker(self, *_: str) -> None:
        pass

    def status(self) -> dict[str, Any]:
        return {"totals": {"evacuations": 9, "evacuated_bytes": 9}}

    def free(self) -> int:
        return 0

    def program(self, *_: object, acb: bool, **__: object) -> Actor:
        return Actor(self.clock, *self.script[acb], acb)


SUMMARY = {
    "gpu_s": 1, "processor_s": 1, "startup_s": 0, "weight_bytes": 1, "proteins": [],
    "steps": [{"name": n, "item": i, "kind": "gpu", "seconds": 1, "start_s": 2 * int(i), "processor_s": 1}
              for i in "01" for n in ("decode", "draw")],
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Stage.clock = Clock(monkeypatch)
    for module in (experiment, workloads, video):
        monkeypatch.setattr(module, "Stage", Stage)
    monkeypatch.setattr(experiment.jobs, "begin", lambda stage, *_, acb: jobs.Job(stage.program(acb=acb), Path("/no")))
    monkeypatch.setattr(jobs, "sized", lambda *_: jobs.Size(Path("/no"), (), "of no size"))
    monkeypatch.setattr(jobs.Job, "summary", lambda _: SUMMARY)
    monkeypatch.setattr(jobs.Job, "results", lambda _: {"a_unrelaxed.pdb": b"END", "detections.json": b"[1]"})
    monkeypatch.setattr(workloads.importlib.util, "find_spec", lambda _: True)
    yield clock
    monkeypatch.undo()  # before pytest asks for the time


def played(
    module: Any, tmp_path: Path, seconds: float, alone: tuple[float, str], acb: tuple[float, str], bare: Any = None
) -> tuple[dict[str, str], str]:
    """The kind of each row of a part of so many seconds, and why it was skipped. `bare`: at once without acb."""
    Stage.script = {False: alone, True: acb}
    part = Part("experiment", Settings(True, True, 768 << 20, seconds), tmp_path / "part.json")
    if bare:
        tell = part.tell

        def told(*arguments: Any) -> None:  # the first figure is of one alone
            tell(*arguments)
            Stage.script[False] = bare

        part.tell = told  # type: ignore[method-assign]
    skipped = ""
    try:
        module.run(part)
    except Skip as skip:
        skipped = str(skip)
    return {row["question"]: row["kind"] for row in part.rows}, skipped


PARTS = pytest.mark.parametrize("module", [experiment, workloads, video])
AT_ONCE = {
    experiment: "4 at once with acb all finish",
    workloads: "train, at once with others, as alone",
    video: "both streams with acb come to their end",
}


@PARTS
def test_a_program_that_crashes_without_acb_is_a_failure(clock: Clock, tmp_path: Path, module: Any) -> None:
    rows, skipped = played(module, tmp_path, 200, (1, "failed"), (1, "finished"))
    assert "failed" in rows.values()
    assert "alone" in skipped or "without acb: its last words" in skipped


@PARTS
@pytest.mark.parametrize(("takes", "outcome"), [(1000, "finished"), (1, "out of memory")])
def test_too_little_time_or_memory_for_one_alone_is_none(
    clock: Clock, tmp_path: Path, module: Any, takes: float, outcome: str
) -> None:
    rows, skipped = played(module, tmp_path, 200, (takes, outcome), (1, "finished"))
    assert "failed" not in rows.values()
    assert skipped


@PARTS
def test_programs_that_hang_under_acb_are_a_failure(clock: Clock, tmp_path: Path, module: Any) -> None:
    rows, _ = played(module, tmp_path, 200, (5, "finished"), (1000, "finished"))
    assert rows[AT_ONCE[module]] == "failed"


@PARTS
def test_programs_that_fail_under_acb_are_a_failure(clock: Clock, tmp_path: Path, module: Any) -> None:
    rows, _ = played(module, tmp_path, 200, (5, "finished"), (1, "failed"))
    assert rows[AT_ONCE[module]] == "failed"


@PARTS
def test_results_that_are_others_under_acb_are_a_failure(
    clock: Clock, tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def results(job: jobs.Job) -> dict[str, bytes]:
        acb = job.program.acb  # type: ignore[attr-defined]
        detection = b'[[{"box": [1], "score": %f}]]' % (0.9 if acb else 0.5)
        return {"a_unrelaxed.pdb": b"ENDMDL" if acb else b"END", "detections.json": detection}

    monkeypatch.setattr(jobs.Job, "results", results)
    rows, _ = played(module, tmp_path, 200, (5, "finished"), (5, "finished"))
    assert (
        sorted(question for question, kind in rows.items() if kind == "failed")
        == {
            experiment: ["4 at once with acb give what one gives alone"],
            workloads: [f"{name}, at once with others, as alone" for name in ("detect", "fold", "fold_jax", "train")],
            video: ["detections are those of the stream alone"],
        }[module]
    )


def test_a_job_that_gives_something_else_each_time_is_a_failure(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter(range(100))
    monkeypatch.setattr(jobs.Job, "results", lambda _: {"a_unrelaxed.pdb": b"%d" % next(numbers)})
    rows, _ = played(experiment, tmp_path, 200, (5, "finished"), (5, "finished"))
    assert rows["the job gives the same twice"] == "failed"


@pytest.mark.parametrize(("module", "seconds"), [(experiment, 25), (workloads, 10), (video, 25)])
def test_programs_that_had_too_little_time_under_acb_are_none(
    clock: Clock, tmp_path: Path, module: Any, seconds: float
) -> None:
    rows, skipped = played(module, tmp_path, seconds * (1 + 1e-9), (1, "finished"), (1000, "finished"))
    assert "failed" in rows.values()  # one after the other they take much less
    clock.now = 0
    takes = {experiment: 2.3, workloads: 1.0, video: 4.0}[module]
    rows, skipped = played(module, tmp_path, seconds * 0.7, (takes, "finished"), (1000, "finished"))
    assert "failed" not in rows.values(), rows
    assert "one after the other" in skipped or "skipped" in rows.values()


@pytest.mark.parametrize("module", [experiment, video])
def test_what_hangs_without_acb_leaves_acb_its_time(clock: Clock, tmp_path: Path, module: Any) -> None:
    rows, skipped = played(module, tmp_path, 30, (2, "finished"), (2, "finished"), bare=(1000, "finished"))
    assert not skipped
    assert rows[AT_ONCE[module]] == "passed"


# --- the GPU ---------------------------------------------------------------------------------------------------------


class Nvml:
    """Of a GPU of 80 GB."""

    taken: ClassVar[list[int]]

    def __enter__(self) -> Nvml:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def most(self, which: str) -> int:
        assert which == "GPU-1"
        return 80 * 10**9

    def free(self, which: str) -> int:
        return self.most(which) - (self.taken.pop(0) if len(self.taken) > 1 else self.taken[0]) * 10**9

    def processes(self, _: str) -> dict[int, int | None]:
        return {17: 72 * 10**9, 18: None}


HERE = card.Card({"name": "a GPU", "uuid": "GPU-1"}, 80 * 10**9)


def test_a_gpu_that_is_somebody_else_s_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "Nvml", Nvml)
    Nvml.taken = [72]
    said = card.others(HERE, 0)
    assert said.startswith("somebody else holds 72.0 of 80.0 GB of a GPU, process 17 72.0 GB, process 18; ")
    Nvml.taken = [72, 1]  # of a part that has just been killed
    assert card.others(HERE) == ""
    assert card.others(card.simulated(1)) == ""
