"""What moves a client's GPU memory to host memory and back: the seam between the agent and the frameworks' hooks."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Protocol


class EvacuationError(Exception):
    """Memory could not be moved off the GPU; nothing has changed, everything is still resident. Says why.

    `moved`: bytes that are in host memory all the same, because they could not be brought back, of the GPU that had
    most of them; 0 but for evacuate_all.
    """

    moved = 0


class Evacuator(Protocol):
    """Moves one framework's memory. All methods are called by one thread at a time, at a safe point: no thread of the
    program is in a region, and none can enter one until the agent opens the gate again. But for resident() and peak(),
    which may be called at any moment.

    A program with several GPUs gets them all at once and gives all up at once, each with the same headroom. So bytes
    are always those on the fullest of its GPUs: what each of them needs room for at most.
    """

    name: str

    def synchronize(self) -> None:
        """Block until the device work that this framework has queued is done."""

    def resident(self) -> int:
        """Bytes that this framework holds on the fullest GPU now."""

    def peak(self) -> int:
        """The most bytes that this framework has held on any one GPU at once since reset_peak()."""

    def reset_peak(self) -> None:
        """Forget the peak."""

    def evacuate(self) -> int:
        """Copy everything to host memory and free it on the GPUs, every alias surviving. Returns the bytes moved, of
        the GPU that had most of them.

        All or nothing: raises EvacuationError with everything as it was.
        """

    def restore(self) -> int:
        """Bring back what evacuate() moved, bit for bit, each array to its own GPU. Returns the bytes moved, of the GPU
        that got most of them. Nothing evacuated: does nothing.

        Raises MemoryError when a GPU has no room; what could not come back stays safe in host memory and a later
        call tries again.
        """


def fullest(pieces: Iterable[tuple[Hashable, int]]) -> int:
    """The most bytes on one device, from (device, bytes) of every piece of memory; 0 when there are none."""
    totals: dict[Hashable, int] = {}
    for device, nbytes in pieces:
        totals[device] = totals.get(device, 0) + nbytes
    return max(totals.values(), default=0)


def evacuate_all(evacuators: list[Evacuator]) -> int:
    """Evacuate every framework, or none: what was moved comes back when a later one refuses.

    Returns the bytes moved, of which one GPU had all at most: frameworks need not be fullest on the same one. Raises
    EvacuationError when one refuses, or fails in any other way.
    """
    done: list[tuple[Evacuator, int]] = []
    for evacuator in list(evacuators):
        try:
            done.append((evacuator, int(evacuator.evacuate())))
        except Exception as error:
            # No variable holds the refusal, nor is it its own cause: in such a cycle its traceback, and with it all
            # that was to be moved, would stay until the next garbage collection.
            stranded = _bring_back(done)
            if isinstance(error, EvacuationError):
                error.moved += stranded
                raise
            raise _failure(error, stranded) from error
    return sum(moved for _, moved in done)


def _bring_back(done: list[tuple[Evacuator, int]]) -> int:
    """Restore what was evacuated already. Returns the bytes for which that failed; the next lease brings them back."""
    stranded = 0
    for evacuator, moved in reversed(done):
        try:
            evacuator.restore()
        except Exception:  # it stays safe in host memory
            stranded += max(1, moved)
    return stranded


def _failure(error: Exception, stranded: int) -> EvacuationError:
    failure = EvacuationError(f"failed: {error!r}")
    failure.moved = stranded
    return failure
