"""What moves a client's GPU memory to host memory and back: the seam between the agent and the frameworks' hooks."""

from __future__ import annotations

from typing import Protocol


class EvacuationError(Exception):
    """Memory could not be moved off the GPU; nothing has changed, everything is still resident. Says why.

    `moved`: bytes that are in host memory all the same, because they could not be brought back; 0 but for evacuate_all.
    """

    moved = 0


class Evacuator(Protocol):
    """Moves one framework's memory. All methods are called by one thread at a time, at a safe point: no thread of the
    program is in a region, and none can enter one until the agent opens the gate again.
    """

    name: str

    def synchronize(self) -> None:
        """Block until the device work that this framework has queued is done."""

    def resident(self) -> int:
        """Bytes that this framework holds on the GPU now."""

    def peak(self) -> int:
        """The most bytes that this framework has held on the GPU at once since reset_peak()."""

    def reset_peak(self) -> None:
        """Forget the peak."""

    def evacuate(self) -> int:
        """Copy everything to host memory and free it on the GPU, every alias surviving. Returns the bytes moved.

        All or nothing: raises EvacuationError with everything as it was.
        """

    def restore(self) -> int:
        """Bring back what evacuate() moved, bit for bit. Returns the bytes moved. Nothing evacuated: does nothing.

        Raises MemoryError when the GPU has no room; what could not come back stays safe in host memory and a later
        call tries again.
        """


def evacuate_all(evacuators: list[Evacuator]) -> int:
    """Evacuate every framework, or none: what was moved comes back when a later one refuses. Returns bytes moved.

    Raises EvacuationError when one refuses, or fails in any other way.
    """
    done: list[tuple[Evacuator, int]] = []
    for evacuator in list(evacuators):
        try:
            done.append((evacuator, int(evacuator.evacuate())))
        except Exception as error:
            refusal = error if isinstance(error, EvacuationError) else EvacuationError(f"failed: {error!r}")
            for other, moved in reversed(done):
                try:
                    other.restore()
                except Exception:  # it stays safe in host memory, and comes back with the next lease
                    refusal.moved += max(1, moved)
            raise refusal from error
    return sum(moved for _, moved in done)
