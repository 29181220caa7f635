"""All frameworks are evacuated, or none."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acb.client.evacuation import EvacuationError, evacuate_all, fullest


class Fake:
    """A framework with some bytes on the GPU, whose methods fail as told."""

    def __init__(self, size: int, evacuate: Exception | None = None, restore: Exception | None = None) -> None:
        self.name = "fake"
        self.size, self.resident_now = size, size
        self._evacuate, self._restore = evacuate, restore

    def synchronize(self) -> None:
        pass

    def resident(self) -> int:
        return self.resident_now

    def peak(self) -> int:
        return self.size

    def reset_peak(self) -> None:
        pass

    def evacuate(self) -> int:
        if self._evacuate is not None:
            raise self._evacuate
        moved, self.resident_now = self.resident_now, 0
        return moved

    def restore(self) -> int:
        if self._restore is not None:
            raise self._restore
        moved, self.resident_now = self.size - self.resident_now, self.size
        return moved


@given(st.lists(st.integers(0, 1 << 40), max_size=6))
def test_all_go_and_are_counted(sizes: list[int]) -> None:
    fakes = [Fake(size) for size in sizes]
    assert evacuate_all(list(fakes)) == sum(sizes)
    assert all(fake.resident() == 0 for fake in fakes)


@given(
    st.lists(st.integers(0, 1 << 40), max_size=4),
    st.sampled_from([EvacuationError("captured graphs"), MemoryError("no host memory"), ZeroDivisionError("a bug")]),
    st.lists(st.integers(0, 1 << 40), max_size=3),
)
def test_one_that_refuses_brings_all_back(before: list[int], error: Exception, after: list[int]) -> None:
    fakes = [*(Fake(size) for size in before), Fake(7, evacuate=error), *(Fake(size) for size in after)]
    with pytest.raises(EvacuationError) as caught:
        evacuate_all(list(fakes))
    assert str(error) in str(caught.value)
    assert caught.value.moved == 0
    assert all(fake.resident() == fake.size for fake in fakes)


def test_what_cannot_come_back_is_told() -> None:
    """The room has gone meanwhile: the memory stays in host memory, and the next lease brings it back."""
    fakes = [Fake(5), Fake(10, restore=MemoryError()), Fake(20, restore=KeyError()), Fake(3, EvacuationError("no"))]
    with pytest.raises(EvacuationError) as caught:
        evacuate_all(list(fakes))
    assert caught.value.moved == 30
    assert [fake.resident() for fake in fakes] == [5, 0, 0, 3]
    assert EvacuationError.moved == 0


@pytest.mark.parametrize("kind", [EvacuationError, ZeroDivisionError])
def test_a_refusal_keeps_nothing_alive_of_what_was_to_be_moved(kind: type[Exception]) -> None:
    class Tensor:
        pass

    class Holding(Fake):
        def evacuate(self) -> int:
            tensor = Tensor()
            held.append(weakref.ref(tensor))
            raise kind("not today")

    held: list[weakref.ref[Tensor]] = []
    gc.disable()
    try:
        with contextlib.suppress(EvacuationError):
            evacuate_all([Fake(3), Holding(4)])
        assert held[0]() is None
    finally:
        gc.enable()


def test_memory_is_counted_on_the_fullest_gpu() -> None:
    assert fullest([]) == 0
    assert fullest([(0, 5), (1, 3), (0, 1), (1, 4)]) == 7
