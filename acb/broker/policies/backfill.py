"""backfill: first come, first served, but a short phase may use a GPU that the next one cannot use yet."""

from __future__ import annotations

from acb.broker.policies.base import Policy


class Backfill(Policy):
    """While the first in line waits for memory to be moved, or for more GPUs, whoever is done before that may run.

    What is expected of a phase is the 90th percentile of those seen; one that takes longer is revoked, and stops at its
    next safe point.
    """

    names = ("backfill",)
    backfills = True
