"""What a person is told of a program that waits long for the GPU, and may wonder why nothing happens."""

from __future__ import annotations

import time
from collections.abc import Iterator

from acb import config, processes
from acb.client.connection import Connection
from acb.protocol import AskStatus, Status

WONDER = 30.0
"""Seconds after which somebody who has to wait for the GPU is told so."""


class Patience:
    """Of one process, which is told everything once. For the agent's thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._since = 0.0  # when it began to wait, or was last told about it; 0: it does not wait

    def waits(self) -> bool:
        """Call it now and then while a lease is wanted and not there. Whether it is time to ask(), too."""
        from acb.client.runtime import warn_once

        now = time.monotonic()
        if not self._connection.welcomed:
            self._since = 0.0
            if self._connection.unanswered():
                warn_once("unanswered", config.no_answer(config.socket_path()))
        elif not self._since:
            self._since = now
        elif now - self._since > WONDER:
            self._since = now
            warn_once("waits", f"waiting for the GPU since {WONDER:.0f} s; to see who has it: gpu_assigner status")
            return True
        return False

    def over(self) -> None:
        """Nothing is waited for."""
        self._since = 0.0

    def ask(self) -> None:
        """Ask the broker who holds what; see told(). With the agent's lock held."""
        self._connection.send(AskStatus())

    @staticmethod
    def told(status: Status) -> None:
        """The broker's answer: say of each stopped program that it is."""
        from acb.client.runtime import warn_once

        for sentence in stopped(status):
            warn_once(sentence, sentence)


def stopped(status: Status) -> Iterator[str]:
    """A sentence for each program in the broker's answer that holds a GPU and is stopped."""
    for client in status.clients:
        pid, gpus = client.get("pid"), client.get("gpus")
        if client.get("stopped") and isinstance(pid, int) and isinstance(gpus, list):
            which = " and ".join(map(str, gpus))
            yield (
                f"process {pid} ({client.get('name')}), which has its memory on GPU {which}, is stopped; "
                f"{processes.going_on(pid)}"
            )
