"""What each process really has on a GPU, asked of the device now and then: a client's own word is not all of it.

A CUDA context takes a few hundred megabytes that no framework counts, and a client may be wrong, or lie. The device is
only asked while there is somebody who has used it and has no lease now; a device that does not answer is left in peace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from acb.broker.state import Client, Gpu

EVERY = 1.0
"""Seconds between two questions: each costs about a millisecond, and sizes change slowly."""


class Meter:
    """Asks `processes`, which gives the bytes that each process holds on the GPU of a UUID; None: it does not say."""

    def __init__(self, processes: Callable[[str], Mapping[int, int | None]]) -> None:
        self._processes = processes
        self._next = 0.0
        self.problem = ""
        """Why the device is not asked any more."""

    def due(self, gpus: list[Gpu], clients: Mapping[int, Client]) -> float | None:
        """When to look next, in the seconds of time.monotonic(); None: there is nothing to look at."""
        if self.problem or not any(_idle(clients[number]) for gpu in gpus for number in gpu.bound):
            return None
        return self._next

    def look(self, gpus: list[Gpu], clients: Mapping[int, Client], now: float) -> Iterator[tuple[int, int]]:
        """(client's id, bytes) where the device says otherwise than the books; ask after due()."""
        self._next = now + EVERY
        # Those, too, that hold nothing by the books: what they have evacuated has left a context behind.
        everybody = {gpu: [clients[number] for number in gpu.bound] for gpu in gpus}
        try:
            held = self._ask({gpu: list(filter(_idle, bound)) for gpu, bound in everybody.items()})
        except Exception as error:  # whatever a driver does, the broker goes on
            self.problem = str(error) or type(error).__name__
            return
        for client, nbytes in held.items():
            if client.resident != nbytes:
                yield client.id, nbytes

    def held(self, gpus: list[Gpu], clients: Mapping[int, Client]) -> dict[int, int]:
        """The bytes that all clients, by id, have at this moment, as far as the device says; for a person to see."""
        everybody = {gpu: [clients[number] for number in gpu.bound] for gpu in gpus}
        try:
            return {} if self.problem else {client.id: nbytes for client, nbytes in self._ask(everybody).items()}
        except Exception:
            return {}

    def _ask(self, whom: Mapping[Gpu, list[Client]]) -> dict[Client, int]:
        """The bytes that these clients have on their fullest GPU, as far as the device says."""
        held: dict[Client, int] = {}
        for gpu, clients in whom.items():
            found = self._processes(gpu.visible) if clients else {}
            for client in clients:
                nbytes = found.get(client.pid)  # a process of another pid namespace is not found
                if nbytes is not None:
                    held[client] = max(held.get(client, 0), nbytes)
        return held


def _idle(client: Client) -> bool:
    """Whether it has used its GPU, and what it has there stays as it is for now."""
    return client.measured and not (client.lease or client.evacuating)
