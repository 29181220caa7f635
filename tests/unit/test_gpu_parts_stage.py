"""Which GPU everybody means that a part of benchmarks.gpu starts or asks, on a machine of several: that of a UUID."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from acb.cli.signals import Signals
from acb.devices import nvml
from benchmarks import gpu
from benchmarks.gpu_parts import card, playing, stage
from benchmarks.gpu_parts.part import Settings

UUID = "GPU-11111111-2222-3333-4444-555555555555"


class Nvml:
    """Knows how much is free of one GPU."""

    def __enter__(self) -> Nvml:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def free(self, which: str) -> int:
        return {UUID: 17}[which]


class Started(Exception):
    """Of a process: its command and environment."""


def start(command: list[str], env: dict[str, str], **_: object) -> None:
    raise Started(command, env)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[stage.Stage]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")  # by which CUDA may mean others than NVML
    monkeypatch.setattr(nvml, "Nvml", Nvml)
    monkeypatch.setattr(stage.subprocess, "Popen", start)
    with stage.Stage(Settings(False, True, 100, 0.0, UUID)) as there:
        yield there


def test_broker_and_programs_are_told_the_uuid(there: stage.Stage) -> None:
    with pytest.raises(Started) as broker:
        there.start_broker()
    command, environment = broker.value.args
    assert command[command.index("--gpu-list") + 1] == UUID
    for acb in (False, True):
        with pytest.raises(Started) as program:
            there.program("one", Path("one.py"), acb=acb)
        assert program.value.args[1]["CUDA_VISIBLE_DEVICES"] == environment["CUDA_VISIBLE_DEVICES"] == UUID


def test_what_is_free_is_asked_by_the_uuid(there: stage.Stage) -> None:
    assert there.free() == 17


def test_every_part_is_told_the_uuid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(playing, "play", lambda _name, _entry, settings, *_: told.append(settings) or {})
    monkeypatch.setattr(card, "others", lambda _: "")
    here = card.Card({"name": "a GPU", "uuid": UUID}, 100)
    options = argparse.Namespace(simulate=False, quick=True, limit=100.0, out=tmp_path)
    gpu._play("memory", [], here, options, 100.0, Signals())
    assert Settings(**told[0], deadline=0.0).gpu == UUID
