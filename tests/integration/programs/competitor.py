"""Takes the GPU at random moments, for as long as its standard input stays open. Prints how often it had it.

Usage: competitor.py SEED
"""

from __future__ import annotations

import random
import select
import sys

import acb
from acb.client.runtime import client
from acb.devices.simulated import Card


def main() -> None:
    """Each time: wait for a random moment, ask for the GPU, and work on the card itself for a random while."""
    chance = random.Random(int(sys.argv[1]))
    card: Card | None = None
    times = 0
    while not select.select([sys.stdin], [], [], chance.uniform(0.0, 0.03))[0]:
        with acb.gpu(memory="64MiB"):
            card = card or Card.open(client().simulated, client().gpu or 0)
            with card.operation("competitor"):
                card.allocate(card.capacity)  # everybody else must have left
                select.select([sys.stdin], [], [], chance.uniform(0.0, 0.01))
                card.free(card.capacity)
        times += 1
        if times == 1:
            print("ready", flush=True)
    print(times, flush=True)


if __name__ == "__main__":
    main()
