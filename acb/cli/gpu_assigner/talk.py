"""Asking a running broker something, from the command line."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

from acb.config import EX_TEMPFAIL, ConfigError, end_it, no_answer
from acb.protocol import MAX_PACKET, AskStatus, AskStop, Goodbye, Message, ProtocolError, Status, decode, encode

PATIENCE = 10.0
"""Seconds: a broker answers in well under one; a silent one is reported."""


def status(path: Path) -> dict[str, Any] | None:
    """What the broker at this socket sees, as in ``status --json``; None when there is no broker.

    Raises ConfigError when it does not answer in time, or in a way that cannot be understood.
    """
    report: dict[str, Any] = {}
    clients: list[dict[str, Any]] = []
    while True:
        answer = _ask(path, AskStatus(after=clients[-1]["id"] if clients else 0))
        if answer is None:
            return None
        if not isinstance(answer, Status):
            raise _stranger(path, answer)
        report |= answer.report
        clients += answer.clients
        if not (answer.more and answer.clients):
            return {**report, "clients": clients}


def stop(path: Path) -> int | None:
    """Tell the broker at this socket to end; its process id, or None when there is no broker.

    Raises ConfigError as status() does.
    """
    answer = _ask(path, AskStop())
    if answer is not None and not isinstance(answer, Goodbye):
        raise _stranger(path, answer)
    return None if answer is None else answer.pid


def _stranger(path: Path, answer: Message) -> ConfigError:
    """The error for a process that answers what no broker of this version does."""
    return ConfigError(
        f"the process at {path} is no GPU broker of this version: it answers {answer.type}; "
        f"end it with: {end_it(path)}",
        EX_TEMPFAIL,
    )


def _ask(path: Path, question: Message) -> Message | None:
    """The answer; None when there is nobody to answer."""
    deadline = time.monotonic() + PATIENCE
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(PATIENCE)
        try:
            while True:
                try:
                    connection.connect(str(path))
                    break
                except BlockingIOError:  # so many others want to connect that they do not even fit the queue
                    if time.monotonic() > deadline:
                        raise TimeoutError from None
                    time.sleep(0.01)
            connection.send(encode(question))
            packet = connection.recv(MAX_PACKET)
            return decode(packet) if packet else None
        except TimeoutError:
            raise ConfigError(no_answer(path), EX_TEMPFAIL) from None
        except (FileNotFoundError, ConnectionError):
            return None
        except (OSError, ProtocolError) as error:
            raise ConfigError(f"cannot talk to the GPU broker at {path}: {error}", EX_TEMPFAIL) from None
