"""One of the two processes of benchmarks.handover, with data of its own on the GPU.

``handover_peer.py SOCKET NUMBER ROUNDS BYTES MEMORY WARM_UP RESTED``: it holds BYTES, and each phase asks for MEMORY.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch_subject import Subject

import acb
from benchmarks.handover import peer

PIECES = 8


def main() -> None:
    """Take its turns, then look whether every bit is as it was."""
    descriptor, number, rounds, nbytes, memory, warm_up, rested = map(int, sys.argv[1:])
    stdout, sys.stdout = sys.stdout, sys.stderr  # for us alone, whatever a framework prints
    subject = Subject()

    def load() -> Callable[[], None]:
        subject.load("data", nbytes, PIECES)
        pieces = [tensor for tensor, _, _ in subject.held["data"]]

        def use() -> None:
            sum(int(piece[-1]) for piece in pieces)
            torch.cuda.synchronize()

        use()
        return use

    told = json.loads(peer(descriptor, number, rounds, warm_up=warm_up, rested=rested, memory=memory, load=load))
    with acb.gpu(memory):
        told["intact"] = subject.check()["same"]
    print(json.dumps(told), file=stdout)


if __name__ == "__main__":
    main()
