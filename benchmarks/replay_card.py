"""What a replaying program has of a simulated GPU: its memory there, with an evacuator, and its turn to compute."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Generator
from pathlib import Path

from acb.client import runtime
from acb.client.evacuation import EvacuationError
from acb.devices.simulated import Card, CardOutOfMemory


class Memory:
    """What the program has on the GPU, all one block, and the evacuator that moves it at the speed of the bus."""

    name = "replay"

    def __init__(self, directory: Path, nbytes: int) -> None:
        self.nbytes = nbytes
        self.card: Card | None = None
        self._directory = directory
        self._on_host = 0  # bytes

    def bind(self, gpu: int) -> Card:
        """The card of this GPU; another one than before only while nothing lies there."""
        if self.card is None or self.card.ordinal != gpu:
            if self.card is not None:
                self.card.close()
            self.card = Card.open(self._directory, gpu)
        return self.card

    def load(self, card: Card, more_room: Callable[[int], bool]) -> None:
        """The first phase's first act; raises CardOutOfMemory when the broker, too, finds no room."""
        while True:
            try:
                card.allocate(self.nbytes)
            except CardOutOfMemory:
                if not more_room(self.nbytes):
                    raise
            else:
                card.copied(self.nbytes)
                return

    def synchronize(self) -> None:
        pass

    def resident(self) -> int:
        return self.card.held() if self.card else 0

    def peak(self) -> int:
        return self.card.peak() if self.card else 0

    def reset_peak(self) -> None:
        if self.card:
            self.card.reset_peak()

    def evacuation(self, piece: int = 0) -> Generator[int]:
        held = self.card.held() if self.card else 0
        if self.card is None or held + self._on_host not in (0, self.nbytes):
            raise EvacuationError("not all of its memory is to be found")
        yield 0
        while held:
            nbytes = min(piece or held, held)
            self.card.copied(nbytes)
            self.card.free(nbytes)
            held -= nbytes
            self._on_host += nbytes
            yield nbytes

    def restore(self, limit: int | None = None) -> int:
        nbytes = self._on_host if limit is None else min(limit, self._on_host)
        if not nbytes:
            return 0
        card = self.bind(runtime.client().gpu or 0)
        try:
            card.allocate(nbytes)
        except CardOutOfMemory as error:
            raise MemoryError(str(error)) from None
        card.copied(nbytes)
        self._on_host -= nbytes
        return nbytes


class Turn:
    """The GPU computes for one program at a time: a context manager around each slice."""

    def __init__(self, directory: Path, gpu: int) -> None:
        # Two locks, so that who has just had the GPU cannot have it again before the next in the queue.
        self._next, self._turn = (
            os.open(directory / f"gpu{gpu}.{name}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC) for name in ("next", "turn")
        )

    def __enter__(self) -> None:
        fcntl.flock(self._next, fcntl.LOCK_EX)
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        fcntl.flock(self._next, fcntl.LOCK_UN)

    def __exit__(self, *error: object) -> None:
        fcntl.flock(self._turn, fcntl.LOCK_UN)
