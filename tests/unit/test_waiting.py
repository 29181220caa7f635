"""Who waits long for the GPU is told so, once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from acb.client import agent as module
from acb.client import runtime
from acb.client.agent import Agent


def test_a_person_is_told_once_that_a_program_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "WONDER", -1.0)
    monkeypatch.setattr(runtime, "_warned", set())
    monkeypatch.delenv("ACB_QUIET", raising=False)
    agent: Any = Agent([], "p", False)
    agent._connection = SimpleNamespace(welcomed=True)
    agent._say_that_it_waits()
    agent._wanted = True
    agent._say_that_it_waits()
    agent.lease = True
    agent._say_that_it_waits()
    agent.lease = False
    agent._say_that_it_waits()
    assert capsys.readouterr().err == ""  # it has not waited at any two looks in a row
    for _ in range(3):
        agent._say_that_it_waits()
    assert capsys.readouterr().err.count("waiting for the GPU") == 1
