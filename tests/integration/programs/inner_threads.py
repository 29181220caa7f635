"""Phases whose work is done by threads of their own, which come to the gate while the phase is open."""

from __future__ import annotations

import select
from concurrent.futures import ThreadPoolExecutor

from acb.client.runtime import client


def main() -> None:
    """A region that cannot end before another thread's has begun."""
    gate = client().gate

    def work() -> int:
        gate.enter()
        gate.exit()
        return 1

    total = 0
    with ThreadPoolExecutor(2) as pool:
        for _ in range(40):
            gate.enter()
            try:
                select.select([], [], [], 0.005)  # it computes, and may be revoked meanwhile
                total += sum(future.result() for future in [pool.submit(work) for _ in range(4)])
            finally:
                gate.exit()
    print(total)


if __name__ == "__main__":
    main()
