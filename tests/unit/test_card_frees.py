"""What a process has freed on the simulated card is free for others at the latest when held() has returned."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

from acb.config import SimulatedSpec
from acb.devices.simulated import Card, create_cards


def test_a_free_that_a_busy_thread_keeps_waiting_is_booked_when_held_returns(tmp_path: Path) -> None:
    [path] = create_cards(tmp_path / "cards", SimulatedSpec((1000,)))
    with Card.open(path) as card, Card.open(path) as others_view:
        card.allocate(700)
        other = os.open(path, os.O_RDWR)  # as another process that looks at the card
        fcntl.flock(other, fcntl.LOCK_EX)
        looking = threading.Thread(target=card.violations)  # waits for its turn, and keeps the card's books meanwhile
        looking.start()
        while card._mutex.acquire(blocking=False):
            card._mutex.release()
        card.free(700)  # does not wait
        booked = threading.Event()
        asking = threading.Thread(target=lambda: (card.held(), booked.set()))
        asking.start()
        assert not booked.wait(0.05)  # nor may this say that all is done
        os.close(other)
        asking.join(20)
        looking.join(20)
        assert booked.is_set()
        assert others_view.used() == 0
