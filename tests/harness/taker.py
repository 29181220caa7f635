"""The test itself as one more client of a broker: it takes the GPU when it likes, and never touches it."""

from __future__ import annotations

import os

from broker_harness import Site

from acb.protocol import VERSION, Evacuate, Evacuated, Grant, Hello, Refused, Request, Welcome, Yield


class Taker:
    """Asks for the GPU, or for several at once, and has it until give_back()."""

    def __init__(self, site: Site, gpus: int = 1) -> None:
        self._peer = site.connect()
        self._peer.send(Hello(VERSION, os.getpid(), "taker", count=gpus))
        assert isinstance(self._peer.receive(), Welcome)

    def ask(self, nbytes: int = 0) -> None:
        """For `nbytes` in all; nothing said: for the whole GPU, as for any program of which nothing is known yet."""
        self._peer.send(Request(nbytes))

    def granted(self) -> Grant:
        """Wait until it is had."""
        while True:
            message = self._peer.receive()
            assert message is not None, "the broker has hung up"
            assert not isinstance(message, Refused), message
            if isinstance(message, Evacuate):
                self._peer.send(Evacuated(0))  # of what it never had
            elif isinstance(message, Grant):
                return message

    def take(self, nbytes: int = 0) -> Grant:
        """ask(), and wait until it is had."""
        self.ask(nbytes)
        return self.granted()

    def give_back(self) -> None:
        self._peer.send(Yield(0))
