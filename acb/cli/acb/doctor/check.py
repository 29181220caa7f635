"""One line of the doctor's checklist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Mark = Literal["ok", "note", "warn", "fail"]
"""Fine; worth knowing; works, but less well than it could; acb cannot work before this is mended."""


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found in plain words, and what to do about it, where something is to be done."""

    section: str
    subject: str
    mark: Mark
    text: str
    advice: str = ""

    def as_json(self) -> dict[str, Any]:
        """As ``acb doctor --json`` prints it."""
        return dict(vars(self))
