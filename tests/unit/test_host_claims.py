"""Claims of host memory: what one evacuation is about to write, no other of the same program counts on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from acb.client.evacuation import EvacuationError
from acb.client.hostmemory import RESERVE, Claim, available_bytes

MIB = 1 << 20


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int | None]]:
    """What the kernel calls available, in a list of one, to be changed."""
    free: list[int | None] = [RESERVE + 10 * MIB]
    monkeypatch.setattr("acb.hostmemory.available_bytes", lambda: free[0])
    yield free
    assert available_bytes() == free[0], "a claim was left"


def test_a_claim_is_out_of_reach_until_it_is_written_or_closed(kernel: list[int | None]) -> None:
    first, second = Claim(), Claim()
    first.cover(6 * MIB)
    with pytest.raises(EvacuationError, match="5MiB do not fit into host memory, of which 260MiB"):
        second.cover(5 * MIB)
    assert second.nbytes == 0
    second.cover(4 * MIB)
    first.cover(2 * MIB)  # it has more
    assert available_bytes() == RESERVE
    first.written(5 * MIB)
    kernel[0] = RESERVE + 5 * MIB  # the kernel has seen that
    assert available_bytes() == RESERVE
    with pytest.raises(EvacuationError):
        first.cover(2 * MIB)
    assert first.nbytes == MIB
    first.close()
    first.close()
    second.cover(5 * MIB)
    second.written(99 * MIB)
    second.close()


def test_a_kernel_that_does_not_say_refuses_nothing(kernel: list[int | None]) -> None:
    kernel[0] = None
    claim = Claim()
    claim.cover(1 << 60)
    assert available_bytes() is None
    claim.close()


def test_a_forked_child_has_no_part_in_it() -> None:
    claim = Claim()
    claim.cover(6 * MIB)
    pid = os.fork()
    if not pid:
        os._exit(0 if available_bytes() == RESERVE + 10 * MIB else 1)
    assert os.waitpid(pid, 0)[1] == 0
    claim.close()
