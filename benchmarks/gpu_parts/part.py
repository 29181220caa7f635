"""What a part is told and what it tells: settings in, rows and figures out, kept on disk after every row.

A part that is killed for its time, or that dies, has told all the same what it had found till then.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GB = 10**9
MIB = 1 << 20


class Skip(Exception):
    """The rest of a part cannot be done here; the message says why."""


@dataclass
class Settings:
    """The GPU (a simulated one, or that of the UUID `gpu`) of `capacity` bytes; `deadline` on time.time()'s clock.

    `quick`: small sizes and few rounds.
    """

    simulate: bool
    quick: bool
    capacity: int
    deadline: float
    gpu: str = ""

    @property
    def spec(self) -> str | None:
        """The simulated GPU, as ``--simulate-gpus`` takes it; None: the real one."""
        return f"1x{self.capacity}" if self.simulate else None


@dataclass
class Part:
    """The rows and figures of one part."""

    name: str
    settings: Settings
    file: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    status: str = "running"
    reason: str = ""

    def left(self) -> float:
        """Seconds until the part is ended."""
        return self.settings.deadline - time.time()

    def tell(
        self, question: str, figure: str, target: str | None = None, met: bool | None = None, remark: str = ""
    ) -> None:
        """A figure; a target that is missed is no failure."""
        self._row("measured", question, figure, target, met, remark)

    def check(self, question: str, true: bool, remark: str = "") -> bool:
        """What has to be so: anything else is a failure."""
        self._row("passed" if true else "failed", question, "yes" if true else "NO", "yes", true, remark)
        return true

    def skip(self, question: str, reason: str) -> None:
        """What was not tried, and why."""
        self._row("skipped", question, "skipped", None, None, reason)

    def end(self, status: str, reason: str = "") -> None:
        """`status`: "done", "skipped" or "failed"."""
        self.status, self.reason = status, reason
        self.save()

    def save(self) -> None:
        """Write it, whole or not at all."""
        body = {key: value for key, value in asdict(self).items() if key not in ("settings", "file")}
        draft = self.file.with_suffix(".part")
        draft.write_text(json.dumps(body))
        draft.replace(self.file)

    def _row(self, kind: str, question: str, figure: str, target: str | None, met: bool | None, remark: str) -> None:
        row = {"kind": kind, "question": question, "figure": figure, "target": target, "met": met, "remark": remark}
        self.rows.append(row)
        self.save()
