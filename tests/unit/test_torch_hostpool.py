"""The pool of host memory for what PyTorch's evacuator moves: places, slabs, page-locking."""

from __future__ import annotations

import ctypes
import gc
import itertools
import mmap
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from acb.hooks.torch.hostpool import RESERVE, HostPool, Place

MIB = 1 << 20


@settings(max_examples=50, deadline=None)
@given(rounds=st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=20), max_size=5))
def test_places_in_the_pool_never_overlap(rounds: list[list[int]]) -> None:
    pool = HostPool()
    previous: list[Place] = []
    for sizes in rounds:
        places = pool.take(sizes)
        assert [place.nbytes for place in places] == sizes
        taken = sorted((id(place.slab), place.offset, place.offset + place.nbytes) for place in previous + places)
        for (slab, _, end), (next_slab, start, _) in itertools.pairwise(taken):
            assert slab != next_slab or end <= start
        for place in places:
            place.storage().fill_(7)
        pool.give_back(previous)
        previous = places
    pool.give_back(previous)
    pool.trim()
    assert pool.held() == 0


def test_small_ones_leave_a_large_slab_to_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acb.hooks.torch.hostpool.SLAB", MIB)
    pool = HostPool()
    held = 0
    for _ in range(3):
        begun = pool.take([100])
        places = pool.take([5000, 3 * MIB, 700], begun)
        assert [place.nbytes for place in places] == [5000, 3 * MIB, 700]
        held = held or pool.held()
        assert pool.held() == held < 5 * MIB
        pool.give_back(begun + places)


class _Host:
    """A host with so many bytes to give beyond the reserve, of which a pool takes some. `most`: that it ever took."""

    def __init__(self, spare: int) -> None:
        self.spare = spare
        self.locked: dict[int, int] = {}
        self.most = 0
        self.pool = HostPool(self._lock, lambda address: self.locked.pop(address), self._available)

    def _lock(self, address: int, nbytes: int) -> int:
        self.locked[address] = nbytes
        self.most = max(self.most, sum(self.locked.values()))
        return 0

    def _available(self) -> int:
        return self.spare + RESERVE - sum(self.locked.values())


def test_bytes_free_in_many_slabs_are_no_room_for_one_large_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acb.hooks.torch.hostpool.SLAB", MIB)
    host = _Host(8 * MIB)
    in_use = host.pool.take([MIB] * 2)
    small = host.pool.take([MIB] * 6)
    host.pool.give_back(small)
    with pytest.raises(MemoryError, match=f"{7 * MIB} bytes more are needed and the host has {6 * MIB} to give"):
        host.pool.take([7 * MIB])
    assert host.pool.held() == 2 * MIB, "what nothing is in goes back before anything is refused"
    [large] = host.pool.take([6 * MIB])
    assert large.nbytes == 6 * MIB
    assert host.most == 8 * MIB
    host.pool.give_back([*in_use, large])


def test_slabs_that_are_used_again_stay_when_others_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acb.hooks.torch.hostpool.SLAB", MIB)
    host = _Host(8 * MIB)
    before = host.pool.take([MIB] * 8)
    host.pool.give_back(before)
    after = host.pool.take([5 * MIB, MIB, MIB])
    assert {place.slab for place in after[1:]} <= {place.slab for place in before}
    assert host.most == 8 * MIB


def test_a_pool_that_is_large_enough_needs_nothing_of_a_full_host() -> None:
    host = _Host(MIB)
    host.pool.give_back(host.pool.take([MIB]))
    host.spare = -RESERVE
    assert [place.nbytes for place in host.pool.take([MIB])] == [MIB]


@settings(max_examples=100, deadline=None)
@given(
    rounds=st.lists(
        st.tuples(st.lists(st.integers(1, 40_000), max_size=12), st.lists(st.integers(1, 40_000), max_size=12)),
        max_size=5,
    ),
    spare=st.integers(0, 400_000),
)
def test_the_host_never_gives_more_than_it_has(rounds: list[tuple[list[int], list[int]]], spare: int) -> None:
    host = _Host(spare)
    for first, second in rounds:
        begun: list[Place] = []
        rest: list[Place] = []
        try:
            begun = host.pool.take(first)
            rest = host.pool.take(second, begun)
        except MemoryError:
            pass
        assert host.most <= spare
        assert sum(place.nbytes for place in begun + rest) <= host.pool.held() == sum(host.locked.values())
        host.pool.give_back(begun + rest)


def test_page_locking_is_undone_with_the_slab() -> None:
    locked: dict[int, int] = {}

    def register(address: int, nbytes: int) -> int:
        locked[address] = nbytes
        return 0

    pool = HostPool(register, lambda address: locked.pop(address))
    places = pool.take([MIB, 3])
    assert sum(locked.values()) == pool.held()
    assert all(place.slab.page_locked for place in places)
    pool.give_back(places)
    pool.trim()
    assert locked == {}


def test_page_locking_is_undone_when_the_pool_is_dropped() -> None:
    locked: dict[int, int] = {}

    def register(address: int, nbytes: int) -> int:
        locked[address] = nbytes
        return 0

    HostPool(register, lambda address: locked.pop(address)).take([MIB])
    gc.collect()
    assert locked == {}


def test_a_process_that_ends_leaves_page_locking_to_the_driver() -> None:
    """Which may have suspended it, and would never let the call return."""
    program = """
        from acb.hooks.torch.hostpool import HostPool
        pool = HostPool(lambda address, nbytes: 0, lambda address: print("unregistered", flush=True))
        places = pool.take([1000, 2000])
        pool.drop(places[0])
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_dropped_goes_back_at_the_next_sweep() -> None:
    host = _Host(1 << 40)
    dropped, kept = host.pool.take([MIB]), host.pool.take([MIB])
    host.pool.drop(dropped[0])
    assert len(host.locked) == 2
    host.pool.sweep()
    assert list(host.locked) == [kept[0].slab.address]
    assert host.pool.held() == kept[0].slab.nbytes


def _interrupted(number: int, work: Callable[[], object], other: Callable[[], object]) -> bool:
    """Do `work`, with `other` before its line of this number, as if another thread had come; whether it has so many."""
    before, lines = sys.gettrace(), itertools.count()
    done: list[None] = []

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and not done and next(lines) == number:
            done.append(None)
            other()
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return bool(done)


def test_places_may_be_taken_at_any_moment_of_a_drop() -> None:
    for number in itertools.count():
        pool = HostPool()
        [dropped] = pool.take([1000])
        taken: list[Place] = []

        def take(pool: HostPool = pool, taken: list[Place] = taken) -> None:
            taken += pool.take([1000])
            taken[0].storage().fill_(7)

        def drop(pool: HostPool = pool, dropped: Place = dropped) -> None:
            pool.drop(dropped)

        if not _interrupted(number, drop, take):
            break
        pool.sweep()
        assert taken[0].storage()[999] == 7
        assert pool.held() == taken[0].slab.nbytes
    assert number > 0


def test_places_may_be_dropped_at_any_moment_of_a_take() -> None:
    for number in itertools.count():
        pool = HostPool()
        empty, dropped, taken = pool.take([1000]), pool.take([5000]), []
        pool.give_back(empty)

        def take(pool: HostPool = pool, taken: list[Place] = taken) -> None:
            taken += pool.take([1000, 5000, 2000])

        def drop(pool: HostPool = pool, dropped: list[Place] = dropped) -> None:
            pool.drop(dropped[0])

        if not _interrupted(number, take, drop):
            break
        for place in taken:
            place.storage().fill_(7)
        pool.sweep()
        assert pool.held() == sum({place.slab: place.slab.nbytes for place in empty + taken}.values())
        assert all(place.storage()[place.nbytes - 1] == 7 for place in taken)
    assert number > 10


def test_memory_that_cannot_be_page_locked_is_used_as_it_is() -> None:
    pool = HostPool(lambda address, nbytes: 2, None)
    [place] = pool.take([10])
    assert not place.slab.page_locked
    assert place.storage().nbytes() == 10


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_size_that_the_host_cannot_give_is_refused_with_nothing_taken() -> None:
    pool = HostPool(available=lambda: None)
    with pytest.raises(MemoryError):
        pool.take([MIB, 1 << 60])
    gc.collect()
    assert pool.held() == 0


def _status_of_child(work: Callable[[], bool]) -> int:
    """Fork; the child's exit status: 0 if `work` came out true there."""
    child = os.fork()
    if not child:
        status = 2
        try:
            status = int(not work())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _mapped(address: int) -> bool:
    """Whether anything lies at this address in this process."""
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps]
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in spans)


def test_forked_children_have_no_copy_of_the_pool() -> None:
    pool = HostPool()
    [place] = pool.take([MIB])
    place.storage().fill_(7)
    address = place.slab.address
    assert _mapped(address)
    assert _status_of_child(lambda: not _mapped(address)) == 0
    assert place.storage()[MIB - 1] == 7


def test_a_forked_childs_own_memory_stays_when_it_drops_the_parents_pool() -> None:
    unlocked: list[int] = []
    pools = [HostPool(lambda address, nbytes: 0, lambda address: unlocked.append(address))]
    [slab] = {place.slab for place in pools[0].take([MIB])}
    address, nbytes = slab.address, slab.nbytes
    del slab
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]

    def replace() -> bool:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        assert libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == address
        ctypes.memset(address, 9, nbytes)
        pools.clear()
        gc.collect()
        return _mapped(address) and ctypes.string_at(address, 3) == b"\x09\x09\x09" and not unlocked

    assert _status_of_child(replace) == 0
    assert unlocked == []
