"""When a pause in GPU work is the end of a phase: the adaptive linger."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from acb.config import ASSUMED_BANDWIDTH

MIN_LINGER = 0.002
"""Seconds: pauses shorter than this are not worth a decision; also how finely the agent looks at a contended gate."""

MAX_LINGER = 2.0
"""Seconds: however dear a swap, another client does not wait longer than this for an idle GPU."""


def choose_linger(gaps: Iterable[float], swap_seconds: float) -> float:
    """How long to keep an idle GPU, in seconds, when giving it up costs `swap_seconds` and pauses were as in `gaps`.

    A pause g costs the others g when it is sat out, and the linger plus the swap when it is not; the choice is what
    would have cost least over the given pauses. Knowing none, it is the swap's own cost, which is never more than twice
    the best (the ski-rental rule: Karlin, Manasse, Rudolph, Sleator, "Competitive snoopy caching", 1988).
    """
    known = sorted(gap for gap in list(gaps) if gap > MIN_LINGER)  # a copy: the program's threads go on adding to it
    if not known:
        return _bounded(swap_seconds)
    best, best_cost = MIN_LINGER, (MIN_LINGER + swap_seconds) * len(known)
    sat_out = 0.0
    for index, gap in enumerate(known, start=1):
        sat_out += gap
        # A hair above the gap, or the same gap would not be sat out the next time.
        linger = gap * 1.1
        cost = sat_out + (linger + swap_seconds) * (len(known) - index)
        if cost < best_cost and linger <= MAX_LINGER:
            best, best_cost = linger, cost
    return _bounded(best)


def _bounded(linger: float) -> float:
    return min(MAX_LINGER, max(MIN_LINGER, linger))


class SwapCost:
    """What giving the GPU up has cost of late, in seconds: evacuation plus restoring, nothing when memory could
    stay."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=8)
        self._now: float | None = None

    def yielded(self) -> None:
        """The lease was given back; what it costs is yet to be seen."""
        if self._now is not None:
            self._recent.append(self._now)
        self._now = 0.0

    def moved(self, seconds: float) -> None:
        """Memory was moved, out or in, because of the last yield."""
        self._now = (self._now or 0.0) + seconds

    def estimate(self, resident: int) -> float:
        """Seconds that the next yield will cost a client that holds `resident` bytes."""
        known = [*self._recent, *([self._now] if self._now else [])]
        if not known:
            return 2 * resident / ASSUMED_BANDWIDTH
        return sum(known) / len(known)
