"""All frameworks are evacuated, or none."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Generator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acb.client.evacuation import EvacuationError, batches, evacuate_all, fullest
from acb.client.memory import Memory


class Fake:
    """A framework with some bytes on the GPU, whose methods fail as told."""

    def __init__(
        self, size: int, evacuate: Exception | None = None, restore: Exception | None = None, late: bool = False
    ) -> None:
        self.name = "fake"
        self.size, self.resident_now = size, size
        self.begun = False
        self._evacuate, self._restore, self._late = evacuate, restore, late

    def synchronize(self) -> None:
        pass

    def resident(self) -> int:
        return self.resident_now

    def peak(self) -> int:
        return self.size

    def reset_peak(self) -> None:
        pass

    def evacuation(self, piece: int = 0) -> Generator[int]:
        if self._evacuate is not None and not self._late:
            raise self._evacuate
        yield 0
        self.begun = True
        while self.resident_now:
            moved = min(piece or self.resident_now, self.resident_now)
            self.resident_now -= moved
            yield moved
        if self._evacuate is not None:
            raise self._evacuate

    def restore(self, limit: int | None = None) -> int:
        if self._restore is not None:
            raise self._restore
        moved, self.resident_now = self.size - self.resident_now, self.size
        return moved


@given(st.lists(st.integers(0, 1 << 40), max_size=6))
def test_all_go_and_are_counted(sizes: list[int]) -> None:
    fakes = [Fake(size) for size in sizes]
    assert list(evacuate_all(list(fakes))) == [sum(sizes)]
    assert all(fake.resident() == 0 for fake in fakes)


@given(st.lists(st.integers(0, 1000), max_size=4), st.integers(1, 400))
def test_they_go_in_pieces(sizes: list[int], piece: int) -> None:
    fakes = [Fake(size) for size in sizes]
    steps = list(evacuate_all(list(fakes), piece))
    assert sum(steps) == sum(sizes)
    assert all(0 < step <= piece for step in steps)


ERRORS = [EvacuationError("captured graphs"), MemoryError("no host memory"), ZeroDivisionError("a bug")]


@given(
    st.lists(st.integers(0, 1 << 40), max_size=4),
    st.sampled_from(ERRORS),
    st.lists(st.integers(0, 1 << 40), max_size=3),
    st.booleans(),
)
def test_one_that_refuses_keeps_all_where_they_are(
    before: list[int], error: Exception, after: list[int], late: bool
) -> None:
    """At once, before any has begun; or when its turn has come, and the others come back."""
    fakes = [*(Fake(size) for size in before), Fake(0, evacuate=error, late=late), *(Fake(size) for size in after)]
    with pytest.raises(EvacuationError) as caught:
        list(evacuate_all(list(fakes)))
    assert str(error) in str(caught.value)
    assert caught.value.moved == 0
    assert all(fake.resident() == fake.size for fake in fakes)
    assert late or not any(fake.begun for fake in fakes)


def test_pieces_that_are_gone_stay_gone_when_a_later_framework_fails() -> None:
    """Somebody has been promised their room."""
    fakes = [Fake(5), Fake(10), Fake(20, EvacuationError("no"), late=True), Fake(40)]
    steps = evacuate_all(list(fakes), piece=10)
    assert list(itertools.islice(steps, 4)) == [5, 10, 10, 10]
    with pytest.raises(EvacuationError, match="no") as caught:
        next(steps)
    assert caught.value.moved == 0
    assert [fake.resident() for fake in fakes] == [0, 0, 0, 40]


def test_what_cannot_come_back_is_told() -> None:
    """The room has gone meanwhile: the memory stays in host memory, and the next lease brings it back."""
    failing = Fake(0, EvacuationError("no"), late=True)
    fakes = [Fake(5), Fake(10, restore=MemoryError()), Fake(20, restore=KeyError()), failing]
    with pytest.raises(EvacuationError) as caught:
        list(evacuate_all(list(fakes)))
    assert caught.value.moved == 30
    assert [fake.resident() for fake in fakes] == [5, 0, 0, 0]
    assert EvacuationError.moved == 0


@given(st.lists(st.integers(1, 100), max_size=20), st.integers(0, 150))
def test_batches_keep_order_and_size(sizes: list[int], piece: int) -> None:
    found = list(batches(((number, size) for number, size in enumerate(sizes)), piece))
    assert [number for batch in found for number in batch] == list(range(len(sizes)))
    assert piece or len(found) <= 1
    for batch in found[:-1]:
        assert piece <= sum(sizes[number] for number in batch) < piece + sizes[batch[-1]]


@pytest.mark.parametrize("kind", [EvacuationError, ZeroDivisionError])
def test_a_refusal_keeps_nothing_alive_of_what_was_to_be_moved(kind: type[Exception]) -> None:
    class Tensor:
        pass

    class Holding(Fake):
        def evacuation(self, piece: int = 0) -> Generator[int]:
            tensor = Tensor()
            held.append(weakref.ref(tensor))
            yield 0
            raise kind("not today")

    held: list[weakref.ref[Tensor]] = []
    gc.disable()
    try:
        with contextlib.suppress(EvacuationError):
            list(evacuate_all([Fake(3), Holding(4)]))
        assert held[0]() is None
    finally:
        gc.enable()


def test_memory_is_counted_on_the_fullest_gpu() -> None:
    assert fullest([]) == 0
    assert fullest([(0, 5), (1, 3), (0, 1), (1, 4)]) == 7


def test_what_a_program_holds_can_be_said_without_asking_the_driver() -> None:
    fake = Fake(10)
    memory = Memory([fake])
    assert memory.resident() == memory.peak() == 10
    memory.evacuate()
    assert memory.resident() == 0

    def suspended() -> int:
        pytest.fail("asked the framework, which would wait in the driver")

    fake.resident = fake.peak = suspended  # type: ignore[method-assign]
    assert (memory.last_resident, memory.last_peak, memory.evacuated) == (0, 10, 10)
