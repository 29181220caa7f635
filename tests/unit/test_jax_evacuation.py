"""Evacuating and restoring jax arrays: every bit, alias, sharding and type as before; what is dropped stays away."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from acb.client import hostmemory  # noqa: E402
from acb.client.evacuation import EvacuationError  # noqa: E402
from acb.client.hostmemory import RESERVE  # noqa: E402
from acb.client.memory import Memory  # noqa: E402
from acb.hooks.jax import evacuator as evacuation  # noqa: E402
from acb.hooks.jax import hostcopies, internals  # noqa: E402

DTYPES = [
    "bool", "int4", "uint4", "int8", "uint16", "int32", "float16", "bfloat16", "float32", "float8_e4m3fn", "complex64",
]  # fmt: skip


@pytest.fixture(params=[True, False], ids=["page-locked", "ordinary"])
def evacuator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[evacuation.JaxEvacuator]:
    """An evacuator to which the CPU is a GPU; of jax's memory spaces, it has the page-locked one as well."""
    monkeypatch.setattr(internals, "GATED", internals.GATED)
    internals.GATED.add("cpu")
    try:
        yield evacuation.JaxEvacuator(internals.Internals(), pinned=request.param)
    finally:
        internals.GATED.discard("cpu")


def bits(array: Any) -> bytes:
    return np.array(array, copy=True).tobytes()


def describe(array: Any) -> tuple[Any, ...]:
    return array.aval, array.weak_type, array.sharding, array.committed, array.format, bits(array)


def gone(array: Any) -> bool:
    return bool(array.is_deleted())


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    seed=st.integers(0, 2**32 - 1),
    committed=st.booleans(),
    turns=st.integers(1, 2),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_bit_comes_back(
    evacuator: evacuation.JaxEvacuator, dtype: str, shape: tuple[int, ...], seed: int, committed: bool, turns: int
) -> None:
    rng = np.random.default_rng(seed)
    kind = jnp.dtype(dtype)
    if dtype in ("bool", "int4", "uint4"):
        host = rng.integers(0, 2 if dtype == "bool" else 7, shape).astype(kind)
    else:  # any bits, also those of a NaN with a payload
        count = int(np.prod(shape, dtype=int)) * kind.itemsize
        host = np.frombuffer(rng.bytes(count), kind).reshape(shape)
    array = jax.device_put(host, jax.devices()[0] if committed else None)
    before = describe(array)
    for _ in range(turns):
        assert evacuator.evacuate() >= 0
        assert gone(array)
        evacuator.restore()
    assert describe(array) == before
    assert before[-1] == host.tobytes()


@given(
    steps=st.lists(
        st.sampled_from(["new", "drop", "alias", "key", "weak", "jit", "delete", "evacuate", "restore"]), max_size=25
    )
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_history_ends_with_what_a_program_would_have_without(
    evacuator: evacuation.JaxEvacuator, steps: list[str]
) -> None:
    arrays: list[Any] = []
    expected: list[Any] = []
    away = False
    for number, step in enumerate(steps):
        if step == "evacuate":
            evacuator.evacuate()
            away = True
        elif step == "restore":
            evacuator.restore()
            away = False
        elif step == "drop" and arrays:
            del arrays[0], expected[0]
        elif away:
            continue  # the gate keeps the program from this
        elif step == "new":
            arrays.append(jnp.full((3,), number))
            expected.append(np.full((3,), number))
        elif step == "alias" and arrays:
            arrays.append(arrays[-1].addressable_data(0))
            expected.append(expected[-1])
        elif step == "key":
            arrays.append(jax.random.key_data(jax.random.key(number)))
            expected.append(np.array(arrays[-1]))
        elif step == "weak":
            arrays.append(jnp.asarray(number))
            expected.append(np.array(number))
        elif step == "jit" and arrays:
            arrays.append(jax.jit(lambda a: a + 1)(arrays[-1]))
            expected.append(expected[-1] + 1)
        elif step == "delete":
            victim = jnp.zeros(4)
            victim.delete()
    evacuator.restore()
    evacuator.synchronize()
    assert [np.asarray(a).tolist() for a in arrays] == [e.tolist() for e in expected]


def test_aliases_stay_aliases_and_distinct_arrays_distinct(evacuator: evacuation.JaxEvacuator) -> None:
    first = jnp.arange(5.0)
    alias = first.addressable_data(0)
    other = jnp.arange(5.0)
    before = evacuator.resident()
    evacuator.evacuate()
    assert evacuator.resident() == 0
    evacuator.restore()
    assert evacuator.resident() == before
    assert first.unsafe_buffer_pointer() == alias.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()
    first.delete()
    assert gone(alias)
    assert other.tolist() == [0, 1, 2, 3, 4]


def test_keys_constants_weak_types_and_layouts(evacuator: evacuation.JaxEvacuator) -> None:
    key = jax.random.key(3)
    constant = jnp.arange(3.0)
    function = jax.jit(lambda a: a + constant)
    weak = jnp.asarray(2) * 3
    transposed = jax.jit(lambda a: a.T)(jnp.arange(6.0).reshape(2, 3))
    expected = (
        jax.random.normal(key, (2,)).tolist(),
        function(jnp.ones(3)).tolist(),
        describe(weak),
        describe(transposed),
    )
    evacuator.evacuate()
    evacuator.restore()
    assert (
        jax.random.normal(key, (2,)).tolist(), function(jnp.ones(3)).tolist(), describe(weak), describe(transposed)
    ) == expected  # fmt: skip


def test_an_unusual_layout_comes_back(evacuator: evacuation.JaxEvacuator) -> None:
    layouts = pytest.importorskip("jax.experimental.layout")
    plain = jnp.arange(6.0).reshape(2, 3)
    array = jax.device_put(plain, layouts.Format(layouts.Layout((1, 0)), plain.sharding))
    before = describe(array)
    assert before[4].layout.major_to_minor == (1, 0)
    evacuator.evacuate()
    evacuator.restore()
    assert describe(array) == before


def test_64_bit_arrays_made_in_a_context_come_back_outside_it(evacuator: evacuation.JaxEvacuator) -> None:
    with jax.enable_x64(True):
        array = jnp.arange(3, dtype=jnp.float64) / 3
    before = bits(array)
    evacuator.evacuate()
    evacuator.restore()
    assert (array.dtype, bits(array)) == (np.float64, before)


def test_donated_and_deleted_arrays_are_left_alone(evacuator: evacuation.JaxEvacuator) -> None:
    donated, kept = jnp.ones(4), jnp.ones(4)
    result = jax.jit(lambda a: a + 1, donate_argnums=0)(donated)
    deleted = jnp.zeros(3)
    deleted.delete()
    evacuator.evacuate()
    evacuator.restore()
    assert gone(donated)
    assert gone(deleted)
    assert (kept + result).tolist() == [3] * 4


def test_what_is_dropped_while_evacuated_is_dropped_for_good(evacuator: evacuation.JaxEvacuator) -> None:
    array = jnp.ones(1000)
    ref = weakref.ref(array)
    evacuator.evacuate()
    (entry,) = [e for e in evacuator._evacuated.values() if e.ref() is array]
    host = weakref.ref(entry.buffers[0].host)
    del array, entry
    gc.collect()
    assert ref() is None
    assert host() is None
    before = evacuator.resident()
    evacuator.restore()
    assert all(a.nbytes != 4000 for a in evacuator._live())
    assert before == 0


def test_deleting_while_evacuated_deletes(evacuator: evacuation.JaxEvacuator) -> None:
    array = jnp.ones(3)
    alias = array.addressable_data(0)
    kept = jnp.zeros(2)
    delete = evacuator.wrap_delete(type(array).delete)
    is_deleted = evacuator.wrap_is_deleted(type(array).is_deleted)
    evacuator.evacuate()
    assert not is_deleted(array)
    delete(array)
    assert is_deleted(array)
    assert is_deleted(alias)
    evacuator.restore()
    assert gone(array)
    assert kept.tolist() == [0, 0]


def test_no_host_memory_leaves_everything_resident(
    evacuator: evacuation.JaxEvacuator, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = [jnp.full(5, i) for i in range(4)]
    before, resident = [describe(a) for a in arrays], evacuator.resident()
    monkeypatch.setattr(evacuator._copies, "_pinned", False)
    copied: list[Any] = []
    original = hostcopies._to_numpy

    def fails_third(shard: Any) -> Any:
        copied.append(shard.shape)
        if len(copied) == 3:
            raise MemoryError("no host memory")
        return original(shard)

    monkeypatch.setattr(hostcopies, "_to_numpy", fails_third)
    with pytest.raises(EvacuationError, match="no host memory"):
        evacuator.evacuate()
    assert evacuator.resident() == resident
    assert [describe(a) for a in arrays] == before
    monkeypatch.setattr("acb.client.hostmemory.available_bytes", lambda: 0)
    with pytest.raises(EvacuationError, match="do not fit into host memory"):
        evacuator.evacuate()
    assert [describe(a) for a in arrays] == before


def test_page_locked_memory_is_used_where_there_is_some(
    evacuator: evacuation.JaxEvacuator, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = jnp.arange(1000)
    before, page_locked = describe(array), evacuator._copies._pinned

    def kinds() -> set[str | None]:
        copies = [buffer.host for entry in evacuator._evacuated.values() for buffer in entry.buffers]
        return {getattr(getattr(copy, "sharding", None), "memory_kind", None) for copy in copies}

    evacuator.evacuate()
    assert kinds() == ({"pinned_host"} if page_locked else {None})
    evacuator.restore()
    assert describe(array) == before

    def no_room(*_: Any) -> Any:
        raise evacuator._internals.RuntimeError("RESOURCE_EXHAUSTED: Out of host memory")

    if page_locked:
        with monkeypatch.context() as patch:
            patch.setattr(evacuator._copies, "_put", no_room)
            evacuator.evacuate()
        assert kinds() == {None}, "ordinary memory, when the pool is full"
        evacuator.restore()
        assert describe(array) == before
        monkeypatch.setattr(evacuator._copies, "_places", [])
        monkeypatch.setattr("acb.client.hostmemory.available_bytes", lambda: RESERVE + (1 << 20))
        more = jnp.zeros(3 << 18, jnp.uint8)  # it fits, but not if the pool should grow by twice as much
        evacuator.evacuate()
        assert kinds() == {None}
        evacuator.restore()
        assert describe(array) == before
        assert not more.any()


def blocks(*mebibytes: int) -> list[Any]:
    return [jax.block_until_ready(jax.device_put(np.full(n << 20, n, np.uint8))) for n in mebibytes]


def in_pool(evacuator: evacuation.JaxEvacuator) -> dict[bool, int]:
    """MiB that are in XLA's pool, and that are not."""
    found = {True: 0, False: 0}
    for buffer in {buffer for entry in evacuator._evacuated.values() for buffer in entry.buffers}:
        found[evacuator._copies.in_pool(buffer.host)] += buffer.nbytes >> 20
    return found


@pytest.mark.parametrize("evacuator", [True], indirect=True, ids=["page-locked"])
def test_what_fits_into_the_pool_goes_there_and_only_the_rest_needs_host_memory(
    evacuator: evacuation.JaxEvacuator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    jax.clear_caches()
    free = 0  # MiB
    monkeypatch.setattr("acb.hostmemory.available_bytes", lambda: RESERVE + (free << 20) + (1 << 19))
    arrays, free = blocks(40, 30), 200
    assert evacuator.evacuate() >> 20 == 70
    assert in_pool(evacuator) == {True: 70, False: 0}
    evacuator.restore()

    arrays, free = [*arrays, *blocks(10)], 15  # the pool could grow by twice as much
    evacuator.evacuate()
    assert in_pool(evacuator) == {True: 70, False: 10}
    evacuator.restore()
    free = 9
    with pytest.raises(EvacuationError, match="do not fit into host memory"):
        next(evacuator.evacuation(10 << 20))
    free = 20
    evacuator.evacuate()
    assert in_pool(evacuator) == {True: 80, False: 0}
    evacuator.restore()

    arrays, free = blocks(60), 30  # 80 are free there, but not in one piece
    with pytest.raises(EvacuationError, match="do not fit into host memory"):
        evacuator.evacuate()
    arrays, free = blocks(25, 25), 0
    for piece in (0, 1):
        assert sum(evacuator.evacuation(piece)) >> 20 == 50
        assert in_pool(evacuator) == {True: 50, False: 0}
        evacuator.restore()
    assert [set(np.asarray(array).tolist()) for array in arrays] == [{25}, {25}]
    arrays = blocks(40, 30)  # the pool has not become smaller
    evacuator.evacuate()
    assert in_pool(evacuator) == {True: 70, False: 0}
    evacuator.restore()


@pytest.mark.parametrize("evacuator", [True], indirect=True, ids=["page-locked"])
def test_a_pool_that_takes_less_than_was_thought_costs_no_memory_that_is_not_there(
    evacuator: evacuation.JaxEvacuator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    jax.clear_caches()
    free = 200
    monkeypatch.setattr("acb.hostmemory.available_bytes", lambda: RESERVE + (free << 20) + (1 << 19))
    arrays = blocks(40)
    evacuator.evacuate()
    evacuator.restore()

    def no_room(*_: Any) -> Any:
        raise evacuator._internals.RuntimeError("RESOURCE_EXHAUSTED: Out of host memory")

    for free in (30, 50):
        with monkeypatch.context() as patch:
            patch.setattr(evacuator._copies, "_put", no_room)
            if free < 40:
                with pytest.raises(EvacuationError, match="do not fit into host memory"):
                    evacuator.evacuate()
                assert not any(map(gone, arrays))
            else:
                evacuator.evacuate()
                assert in_pool(evacuator) == {True: 0, False: 40}
    evacuator.restore()
    assert set(np.asarray(arrays[0]).tolist()) == {40}


def test_host_memory_is_claimed_at_the_first_step(
    evacuator: evacuation.JaxEvacuator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So two frameworks of one program cannot both count on it."""
    gc.collect()
    jax.clear_caches()
    arrays = blocks(20, 20)
    free = RESERVE + ((100 if evacuator._copies._pinned else 70) << 20)  # the pool could grow by twice as much
    monkeypatch.setattr("acb.hostmemory.available_bytes", lambda: free)
    other = evacuation.JaxEvacuator(evacuator._internals, pinned=False)
    steps, others = evacuator.evacuation(20 << 20), other.evacuation()
    next(steps)
    with pytest.raises(EvacuationError, match="do not fit into host memory"):
        next(others)
    steps.close()
    others = other.evacuation()
    next(others)
    others.close()
    assert hostmemory.available_bytes() == free
    assert not any(map(gone, arrays))

    left = [hostmemory.available_bytes() for _ in evacuator.evacuation(20 << 20)]
    assert left == sorted(left), "what is written is claimed no more"
    assert len(set(left)) > 2
    assert hostmemory.available_bytes() == free
    evacuator.restore()


def test_no_room_to_restore_keeps_the_rest_in_host_memory(
    evacuator: evacuation.JaxEvacuator, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = [jnp.full(5, i) for i in range(4)]
    before = [describe(a) for a in arrays]
    evacuator.evacuate()
    original = evacuator._put
    count = 0

    def fails_second(buffer: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise MemoryError("no room")
        return original(buffer)

    monkeypatch.setattr(evacuator, "_put", fails_second)
    with pytest.raises(MemoryError, match="no room"):
        evacuator.restore()
    assert 0 < evacuator.resident() < sum(a.nbytes for a in arrays) + 10000
    assert evacuator.restore() > 0
    assert [describe(a) for a in arrays] == before
    assert evacuator.restore() == 0


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, OSError], ids=lambda kind: kind.__name__)
def test_no_room_to_restore_is_tried_again_whatever_class_jax_gives_the_error(
    evacuator: evacuation.JaxEvacuator, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    array = jnp.arange(8)
    before = describe(array)
    memory = Memory([evacuator])
    moved = memory.evacuate().nbytes

    def no_room(*_: Any) -> Any:
        raise kind("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 32 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(evacuator._copies, "back", no_room)
        with pytest.raises(MemoryError, match="RESOURCE_EXHAUSTED"):
            memory.restore()
    assert memory.unrestored
    assert memory.evacuated == moved
    memory.restore()
    assert describe(array) == before


def test_a_copy_back_that_fails_on_its_way_loses_nothing(
    evacuator: evacuation.JaxEvacuator, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = [jnp.full(5, i) for i in range(4)]
    before = [describe(a) for a in arrays]
    moved = evacuator.evacuate()
    kind = evacuator._internals.ArrayImpl
    original = kind.block_until_ready

    def fails_second(array: Any) -> Any:
        if array is arrays[1]:
            raise evacuator._internals.RuntimeError("INTERNAL: the copy failed")
        return original(array)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "block_until_ready", fails_second)
        with pytest.raises(evacuator._internals.RuntimeError, match="the copy failed"):
            evacuator.restore()
    assert 0 < evacuator.restore() < moved
    assert [describe(a) for a in arrays] == before
    assert evacuator.restore() == 0


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    aliased=st.sets(st.integers(0, 7)),
    piece=st.integers(1, 500),
    limits=st.lists(st.integers(0, 500), max_size=6),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_leave_and_come_back_in_pieces(
    evacuator: evacuation.JaxEvacuator, sizes: list[int], aliased: set[int], piece: int, limits: list[int]
) -> None:
    gc.collect()
    elsewhere = evacuator._live()
    arrays = [jax.device_put(np.arange(size, dtype=np.float32)) for size in sizes]  # nothing to compile
    arrays += [arrays[number].addressable_data(0) for number in aliased if number < len(sizes)]
    before = [describe(array) for array in arrays]
    steps = evacuator.evacuation(piece)
    assert next(steps) == 0
    assert not any(map(gone, arrays))
    total = 0
    for moved in steps:
        total += moved
        away = {id(array) for array in arrays if gone(array)}
        for number in aliased & set(range(len(sizes))):
            alias = arrays[len(sizes) + sorted(n for n in aliased if n < len(sizes)).index(number)]
            assert (id(arrays[number]) in away) == (id(alias) in away), "an alias was left behind"
    assert all(map(gone, arrays))
    back = 0
    for limit in [*limits, None]:
        moved = evacuator.restore(limit)
        back += moved
        assert limit is None or moved <= limit
    assert back == total >= 4 * sum(sizes)
    assert [describe(array) for array in arrays] == before
    del elsewhere


def test_an_array_whose_address_is_known_is_not_moved(evacuator: evacuation.JaxEvacuator) -> None:
    array = jnp.ones(3)
    evacuator.pin(array)
    with pytest.raises(EvacuationError, match="address"):
        evacuator.evacuate()
    assert array.tolist() == [1, 1, 1]
    del array
    gc.collect()
    evacuator.evacuate()
    evacuator.restore()


def test_peak_and_resident_follow_the_arrays(evacuator: evacuation.JaxEvacuator) -> None:
    gc.collect()
    evacuator.reset_peak()
    base = evacuator.resident()
    array = jnp.ones(1000, jnp.float32)
    assert evacuator.resident() == base + 4000
    assert evacuator.peak() >= base + 4000
    del array
