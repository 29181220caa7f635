"""Asking a running broker something, from the command line."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from acb.config import EX_TEMPFAIL, ConfigError
from acb.protocol import MAX_PACKET, AskStatus, AskStop, Goodbye, Message, ProtocolError, Status, decode, encode

PATIENCE = 10.0
"""Seconds: a broker answers in well under one; a silent one is reported."""


def status(path: Path) -> dict[str, Any] | None:
    """What the broker at this socket sees, as in ``status --json``; None when there is no broker.

    Raises ConfigError when it does not answer in time, or in a way that cannot be understood.
    """
    report: dict[str, Any] = {"clients": []}
    for answer in _ask(path, AskStatus()):
        if not isinstance(answer, Status):
            raise ConfigError(
                f"the process at {path} is no GPU broker of this version: it answers {answer.type}", EX_TEMPFAIL
            )
        report = {**report, **answer.report, "clients": report["clients"] + answer.clients}
        if not answer.more:
            return report
    return None


def stop(path: Path) -> int | None:
    """Tell the broker at this socket to end; its process id, or None when there is no broker."""
    for answer in _ask(path, AskStop()):
        if isinstance(answer, Goodbye):
            return answer.pid
    return None


def _ask(path: Path, question: Message) -> list[Message]:
    """The answers up to the last one."""
    answers: list[Message] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(PATIENCE)
        try:
            connection.connect(str(path))
            connection.send(encode(question))
            while packet := connection.recv(MAX_PACKET):
                answers.append(decode(packet))
                if not getattr(answers[-1], "more", False):
                    break
        except TimeoutError:
            raise ConfigError(
                f"the GPU broker at {path} does not answer; end it with: pkill -9 gpu_assigner", EX_TEMPFAIL
            ) from None
        except (FileNotFoundError, ConnectionError):
            return answers
        except (OSError, ProtocolError) as error:
            raise ConfigError(f"cannot talk to the GPU broker at {path}: {error}", EX_TEMPFAIL) from None
    return answers
