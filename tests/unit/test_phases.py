"""The adaptive linger: never much worse than the best fixed one in hindsight, and within its bounds."""

from __future__ import annotations

import threading
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acb.client.phases import ASSUMED_BANDWIDTH, MAX_LINGER, MIN_LINGER, SwapCost, choose_linger

gaps = st.lists(st.floats(0, 100), max_size=64)
swaps = st.floats(0, 100)


def cost(linger: float, pauses: list[float], swap: float) -> float:
    """What the others lose: a pause that is sat out in full, else the linger and the swap."""
    return sum(gap if gap <= linger else linger + swap for gap in pauses if gap > MIN_LINGER)


@given(gaps, swaps)
def test_it_is_within_its_bounds(pauses: list[float], swap: float) -> None:
    assert MIN_LINGER <= choose_linger(pauses, swap) <= MAX_LINGER


@given(gaps.filter(lambda pauses: any(gap > MIN_LINGER for gap in pauses)), swaps)
def test_it_is_never_much_worse_than_the_best_fixed_linger(pauses: list[float], swap: float) -> None:
    chosen = cost(choose_linger(pauses, swap), pauses, swap)
    fixed = [MIN_LINGER, *(gap for gap in pauses if MIN_LINGER <= gap <= MAX_LINGER / 1.1)]
    best = min(cost(linger, pauses, swap) for linger in fixed)
    assert chosen <= 1.1 * best + 1e-9


@given(swaps)
def test_knowing_nothing_it_is_the_swaps_own_cost(swap: float) -> None:
    """Which for any one pause costs at most twice what the best would (the ski-rental rule)."""
    linger = choose_linger([], swap)
    assert linger == min(MAX_LINGER, max(MIN_LINGER, swap))
    if MIN_LINGER <= swap <= MAX_LINGER:
        for gap in (swap / 2, swap, swap * 1.01, swap * 100):
            if gap > MIN_LINGER:
                best = min(gap, MIN_LINGER + swap)
                assert cost(linger, [gap], swap) <= 2 * best + 1e-9


@pytest.mark.parametrize(
    ("pauses", "swap", "low", "high"),
    [
        ([0.05] * 20, 1.0, 0.05, 0.06),  # short pauses, dear swap: sit them out
        ([0.05] * 20, 0.01, MIN_LINGER, MIN_LINGER),  # the same with a cheap swap: do not
        ([10.0] * 20, 1.0, MIN_LINGER, MIN_LINGER),  # long pauses: give up at once
        ([0.05] * 19 + [60.0], 1.0, 0.05, 0.06),  # data loading, and a checkpoint now and then
        ([0.0001] * 50, 1.0, 1.0, 1.0),  # no pause that counts
    ],
)
def test_what_it_comes_to(pauses: list[float], swap: float, low: float, high: float) -> None:
    assert low <= choose_linger(pauses, swap) <= high


def test_the_program_may_add_pauses_meanwhile() -> None:
    """The gate's own list grows on the program's threads while the agent decides."""
    known: deque[float] = deque([0.1] * 64, maxlen=64)
    stop = threading.Event()

    def program() -> None:
        while not stop.is_set():
            known.append(0.01)

    thread = threading.Thread(target=program)
    thread.start()
    try:
        for _ in range(3000):
            choose_linger(known, 0.05)
    finally:
        stop.set()
        thread.join()


def test_the_swap_cost_is_what_was_measured() -> None:
    swap = SwapCost()
    assert swap.estimate(ASSUMED_BANDWIDTH) == 2.0  # out and in again
    assert swap.estimate(0) == 0
    swap.yielded()
    swap.moved(0.3)
    swap.moved(0.5)
    assert swap.estimate(1 << 40) == pytest.approx(0.8)
    swap.yielded()  # and this time memory could stay
    swap.yielded()
    assert swap.estimate(1 << 40) == pytest.approx(0.4)
    for _ in range(10):
        swap.moved(0.1)
        swap.yielded()
    assert swap.estimate(0) == pytest.approx(0.1)  # what was long ago does not count


@given(st.lists(st.sampled_from(["yielded", 0.1, 0.7]), max_size=40))
def test_an_estimate_lies_among_what_was_seen(events: list[str | float]) -> None:
    swap = SwapCost()
    for event in events:
        if isinstance(event, str):
            swap.yielded()
        else:
            swap.moved(event)
    assert 0 <= swap.estimate(1 << 30) <= 40 * 0.7
