"""What moves a client's GPU memory to host memory and back: the seam between the agent and the frameworks' hooks."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class EvacuationError(Exception):
    """Memory could not be moved off the GPU; but for pieces that were yielded before, nothing has changed. Says why.

    `moved`: bytes that are in host memory beyond what was yielded, because they could not be brought back, of the GPU
    that had most of them; 0 but for evacuate_all.
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

    def evacuation(self, piece: int = 0) -> Generator[int]:
        """Copy everything to host memory and free it on the GPUs, every alias surviving; what each step has moved, in
        bytes, of the GPU that had most of them.

        The first step moves nothing and yields 0: all can be moved, as far as can be told, and host memory for all of
        it is taken, or claimed (hostmemory.Claim), so that no other framework of the program counts on it. Closed then,
        it leaves everything as it was. `piece`: about so many bytes a step, of a program with one GPU; 0: all in one
        step. Raises EvacuationError: what was yielded stays in host memory, all else is as it was.
        """

    def restore(self, limit: int | None = None) -> int:
        """Bring back what evacuation() moved, bit for bit, each array to its own GPU, at most `limit` bytes of it.
        Returns the bytes moved, of the GPU that got most of them. Nothing evacuated: does nothing.

        Raises MemoryError when a GPU has no room; what could not come back stays safe in host memory and a later
        call tries again.
        """


def fullest(pieces: Iterable[tuple[Hashable, int]]) -> int:
    """The most bytes on one device, from (device, bytes) of every piece of memory; 0 when there are none."""
    totals: dict[Hashable, int] = {}
    for device, nbytes in pieces:
        totals[device] = totals.get(device, 0) + nbytes
    return max(totals.values(), default=0)


def batches(items: Iterable[tuple[T, int]], piece: int) -> Iterator[list[T]]:
    """Items, given with their sizes in bytes, in lists that come to `piece` bytes or just more; 0: all in one list."""
    batch: list[T] = []
    total = 0
    for item, nbytes in items:
        batch.append(item)
        total += nbytes
        if piece and total >= piece:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def evacuate_all(evacuators: list[Evacuator], piece: int = 0) -> Iterator[int]:
    """Evacuate every framework, or none, as Evacuator.evacuation does one: yields the bytes that each step has moved,
    of which one GPU had all at most (frameworks need not be fullest on the same one).

    Before anything is moved, all must be ready. When one fails later all the same, what was not in pieces comes back.
    Raises EvacuationError when one refuses, or fails in any other way.
    """
    steps: list[tuple[Evacuator, Generator[int]]] = []
    done: list[tuple[Evacuator, int]] = []
    try:
        for evacuator in list(evacuators):
            step = evacuator.evacuation(piece)
            steps.append((evacuator, step))
            next(step, 0)
        for evacuator, step in steps:
            moved = 0
            for nbytes in step:
                moved += int(nbytes)
                if piece:
                    yield int(nbytes)
            done.append((evacuator, moved))
    except Exception as error:
        # No variable holds the refusal, nor is it its own cause: in such a cycle its traceback, and with it all that
        # was to be moved, would stay until the next garbage collection.
        for _, step in steps:
            step.close()
        stranded = 0 if piece else _bring_back(done)
        if isinstance(error, EvacuationError):
            error.moved += stranded
            raise
        raise _failure(error, stranded) from error
    if not piece:
        yield sum(moved for _, moved in done)


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
