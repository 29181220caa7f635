"""What the broker counts, for ``gpu_assigner status``."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from acb.protocol import Evacuate, Evacuated, Grant, Message, Restored, Revoke


@dataclass(slots=True)
class Metrics:
    """Counts since the broker's start; bytes, and seconds of waiting for a lease."""

    grants: int = 0
    revokes: int = 0
    evacuations: int = 0
    refused_evacuations: int = 0
    evacuated_bytes: int = 0
    restored_bytes: int = 0
    waits: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))

    def received(self, message: Message) -> None:
        """Count what a client said."""
        if isinstance(message, Evacuated):
            self.evacuated_bytes += message.moved
            self.refused_evacuations += bool(message.reason)
        elif isinstance(message, Restored):
            self.restored_bytes += message.moved

    def sent(self, message: Message, waited: float) -> None:
        """Count what a client is told; `waited` is how long it waited for it, in seconds."""
        if isinstance(message, Grant):
            self.grants += 1
            self.waits.append(waited)
        elif isinstance(message, Revoke):
            self.revokes += 1
        elif isinstance(message, Evacuate):
            self.evacuations += 1

    def report(self) -> dict[str, Any]:
        """The counts, and the mean and 99th percentile of the last 10,000 waits."""
        waits = sorted(self.waits)
        body = asdict(self)
        del body["waits"]
        body["wait_mean_s"] = round(sum(waits) / len(waits), 6) if waits else 0.0
        body["wait_p99_s"] = round(waits[min(len(waits) - 1, int(len(waits) * 0.99))], 6) if waits else 0.0
        return body
