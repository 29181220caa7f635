"""Finds one check among those of `acb doctor`."""

from __future__ import annotations

from acb.cli.acb.doctor.check import Check


def marks(checks: list[Check]) -> dict[str, str]:
    """What each subject is marked with."""
    return {check.subject: check.mark for check in checks}


def only(checks: list[Check], subject: str) -> Check:
    """The one check of this subject."""
    (check,) = [check for check in checks if check.subject == subject]
    return check
