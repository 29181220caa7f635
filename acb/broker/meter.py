"""What each process really has on a GPU, asked of the device now and then: a client's own word is not all of it.

A CUDA context takes a few hundred megabytes that no framework counts, and a client may be wrong, or lie. The device is
only asked while there is somebody who has used it and has no lease now. A GPU that does not answer is asked again after
ever longer pauses, and the others as before; what a client says counts meanwhile that has something on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from acb.broker.state import Client, Gpu

EVERY = 1.0
"""Seconds between two questions: each costs about a millisecond, and sizes change slowly."""

LONGEST_PAUSE = 60.0
"""Seconds until a GPU that has not answered is asked again, at most; the first pause is twice EVERY."""


class _Silence(NamedTuple):
    """Of a GPU that does not answer: it is left in peace `until` then, for `pause` seconds in all."""

    until: float
    pause: float


class Meter:
    """Asks `processes`, which gives the bytes that each process holds on the GPU of a UUID; None: it does not say."""

    def __init__(self, processes: Callable[[str], Mapping[int, int | None]]) -> None:
        self._processes = processes
        self._next = 0.0
        self._silent: dict[Gpu, _Silence] = {}
        self._news: list[str] = []

    def due(self, gpus: list[Gpu], clients: Mapping[int, Client]) -> float | None:
        """When to look next, in the seconds of time.monotonic(); None: there is nothing to look at."""
        used = [gpu for gpu in gpus if any(_idle(clients[number]) for number in gpu.bound)]
        return min((max(self._next, self._rests_until(gpu)) for gpu in used), default=None)

    def look(self, gpus: list[Gpu], clients: Mapping[int, Client], now: float) -> Iterator[tuple[int, int]]:
        """(client's id, bytes) where the device says otherwise than the books; ask after due()."""
        self._next = now + EVERY
        answers: dict[Gpu, Mapping[int, int | None]] = {}
        # Those, too, that hold nothing by the books: what they have evacuated has left a context behind.
        idle = {number: client for number, client in clients.items() if client.gpus and _idle(client)}
        for gpu in gpus:
            if not idle.keys().isdisjoint(gpu.bound) and self._rests_until(gpu) <= now:
                try:
                    answers[gpu] = self._processes(gpu.visible)
                except Exception as error:  # whatever a driver does, the broker goes on
                    self._fell_silent(gpu, str(error) or type(error).__name__, now)
                else:
                    self._answered(gpu)
        for client, nbytes in _held(idle.values(), answers):
            if client.resident != nbytes or client.left_unknown:
                yield client.id, nbytes

    def held(self, gpus: list[Gpu], clients: Mapping[int, Client]) -> dict[int, int]:
        """The bytes that all clients, by id, have at this moment, as far as the device says; for a person to see."""
        answers: dict[Gpu, Mapping[int, int | None]] = {}
        for gpu in gpus:
            if gpu.bound and gpu not in self._silent:
                try:
                    answers[gpu] = self._processes(gpu.visible)
                except Exception:
                    pass  # look() will tell
        return {client.id: nbytes for client, nbytes in _held(clients.values(), answers)}

    def holds(self, gpu: Gpu, pid: int) -> int | None:
        """The bytes that a process has on the GPU at this moment; None: the device does not say."""
        try:
            return self._processes(gpu.visible).get(pid, 0)
        except Exception:  # whatever a driver does, the broker goes on
            return None

    def news(self) -> list[str]:
        """Which GPUs do not answer any more, or do again, since this was last asked: sentences for a person."""
        news, self._news = self._news, []
        return news

    # --- GPUs that do not answer --------------------------------------------------------------------------------------

    def _rests_until(self, gpu: Gpu) -> float:
        silence = self._silent.get(gpu)
        return silence.until if silence is not None else 0.0

    def _fell_silent(self, gpu: Gpu, reason: str, now: float) -> None:
        before = self._silent.get(gpu)
        pause = min(LONGEST_PAUSE, 2 * (before.pause if before is not None else EVERY))
        self._silent[gpu] = _Silence(now + pause, pause)
        if before is None:
            what = f"GPU {gpu.ordinal} does not say what processes hold there, so what they say counts until it does"
            self._news.append(f"{what}: {reason}")

    def _answered(self, gpu: Gpu) -> None:
        if self._silent.pop(gpu, None) is not None:
            self._news.append(f"GPU {gpu.ordinal} says again what processes hold there")


def _held(clients: Iterable[Client], answers: Mapping[Gpu, Mapping[int, int | None]]) -> Iterator[tuple[Client, int]]:
    """The bytes that clients have on their fullest GPU; nothing of those of which a GPU has not answered."""
    for client in clients:
        if client.gpus and all(gpu in answers for gpu in client.gpus):
            # A process of another pid namespace is not found.
            sizes = [size for gpu in client.gpus if (size := answers[gpu].get(client.pid)) is not None]
            if sizes:
                yield client, max(sizes)


def _idle(client: Client) -> bool:
    """Whether it has used its GPU, and what it has there stays as it is for now."""
    return client.measured and client.at_rest
