"""Who waits long for the GPU is told so, once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from acb.client import patience as module
from acb.client import runtime
from acb.client.agent import Agent
from acb.protocol import AskStatus, Message, Status


def test_a_person_is_told_once_that_a_program_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "WONDER", -1.0)
    monkeypatch.setattr(runtime, "_warned", set())
    monkeypatch.delenv("ACB_QUIET", raising=False)
    sent: list[Message] = []
    agent: Any = Agent([], "p", False)
    agent._connection = agent._patience._connection = SimpleNamespace(welcomed=True, send=sent.append)
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
    assert sent == [AskStatus()] * 3
    holder = {"id": 1, "pid": 77, "name": "p", "gpus": [0], "stopped": False}
    agent.heard(Status(clients=[holder]))
    assert capsys.readouterr().err == ""
    for _ in range(2):
        agent.heard(Status(clients=[{**holder, "stopped": True}, {"stopped": True}, {}]))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "process 77 (p), which has its memory on GPU 0, is stopped" in said
    assert "kill -CONT 77" in said
