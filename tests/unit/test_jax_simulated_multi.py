"""Several simulated GPUs of jax: which array is on which, sharded computations, and whose memory runs out."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("jax")

from test_jax_simulated import run

from acb.config import parse_simulated
from acb.devices.simulated import create_cards

COMMON = """
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
a, b = jax.devices()
mesh = Mesh(np.array([a, b]), ("d",))
halves, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
def held():
    return [device.memory_stats()["bytes_in_use"] for device in (a, b)]
"""

MEMORY = """
seen = {"limits": [d.memory_stats()["bytes_limit"] for d in (a, b)], "text": [str(a), str(b)], "counts":
        [jax.device_count(), jax.local_device_count()]}
x = jax.device_put(np.ones(1000, np.float32), b)
seen["on b"] = [held(), x.devices() == {b}]
y = jax.jit(lambda v: v + 1)(x)
seen["computed on b"] = [held(), y.devices() == {b}]
y = jax.device_put(y, a)
seen["moved to a"] = held()
with jax.default_device(b):
    z = jnp.zeros(100)
seen["default"] = [held(), z.devices() == {b}]
del x, y, z
seen["dropped"] = held()
spread = jax.device_put(np.arange(2000, dtype=np.float32), halves)
seen["halves"] = held()
copies = jax.device_put(np.ones(10, np.float32), whole)
seen["whole"] = held()
shards = [s.data for s in spread.addressable_shards]
seen["shards"] = [held(), [s.devices() == {d} for s, d in zip(shards, (a, b))]]
del shards, copies
joined = jax.device_put(spread, a)
seen["joined"] = held()
spread.delete()
seen["deleted"] = held()
again = jax.device_put(joined, halves)
del joined
seen["again"] = [held(), np.array_equal(np.asarray(again), np.arange(2000))]
try:
    again + jax.device_put(1.0 * np.ones(2000, np.float32), a)
except ValueError as error:
    seen["mixed"] = "incompatible devices" in str(error)
del again
seen["end"] = held()
print(json.dumps(seen))
"""

SHARDED = """
rng = np.random.default_rng(0)
x, w = rng.normal(size=(64, 32)).astype(np.float32), rng.normal(size=(32, 8)).astype(np.float32)

def loss(w, x):
    return jnp.tanh(x @ w).mean()

def train(x, w):
    step = jax.jit(lambda w, x: w - 0.1 * jax.grad(loss)(w, x), donate_argnums=0)
    for _ in range(5):
        w = step(w, x)
    return w

found = train(jax.device_put(x, halves), jax.device_put(w, whole))
at_a = train(jax.device_put(x, a), jax.device_put(w, a))
mapped = jax.jit(jax.shard_map(lambda v: jax.lax.psum(v.sum(), "d"), mesh=mesh, in_specs=P("d"), out_specs=P()))
print(json.dumps([
    bool(np.allclose(np.asarray(found), np.asarray(at_a), atol=1e-6)),
    found.devices() == {a, b},
    float(mapped(jax.device_put(np.ones(10, np.float32), halves))),
    held(),
]))
"""

EXHAUSTED = """
errors = []
for device, nbytes in ((b, 12 << 20), (a, 20 << 20), (a, 12 << 20)):
    try:
        jax.device_put(np.ones(nbytes // 4, np.float32), device)
        errors.append("")
    except jax.errors.JaxRuntimeError as error:
        errors.append(str(error))
try:
    jax.device_put(np.ones(5 << 20, np.float32), halves)
except jax.errors.JaxRuntimeError as error:
    errors.append(str(error))
print(json.dumps([errors, held()]))
"""

REFEREE = """
from acb.hooks.jax import ledger
cards = ledger._open_cards()
x, y = jax.device_put(np.ones(8, np.float32), a), jax.device_put(np.ones(8, np.float32), b)
spread = jax.device_put(np.ones(8, np.float32), halves)
double = jax.jit(lambda v: 2 * v)
for value in (x, y, spread):
    double(value)
def seen():
    found = [bool(card.violations()) for card in cards]
    for card in cards:
        card.clear_violations()
    return found
for card in cards:
    card.set_holders([1])
result = {}
double(x); result["a"] = seen()
double(y); result["b"] = seen()
double(spread); result["both"] = seen()
jax.device_put(x, b); result["moved"] = seen()
np.asarray(y); result["read"] = seen()
np.asarray(spread); result["read of both"] = seen()
print(json.dumps(result))
"""

GATED = """
from acb.client import runtime
from acb.hooks.jax import ledger
gate, [evacuator] = runtime.client().gate, runtime.client().evacuators
gate._ask = gate._idle = lambda: None
gate.open()
"""

EVACUATED = """
x = jax.device_put(np.arange(1000, dtype=np.float32), b)
spread = jax.device_put(np.arange(600, dtype=np.float32).reshape(20, 30), halves)
copies = jax.device_put(np.arange(10, dtype=np.float32), whole)
before = [held(), evacuator.resident(), evacuator.peak() >= 5240]
gate.close()
moved = evacuator.evacuate()
cards = ledger._open_cards()
away = [[card.held() for card in cards], evacuator.resident()]
back = evacuator.restore()
gate.open()
print(json.dumps([before, moved, away, back, held(), [
    x.devices() == {b},
    spread.sharding == halves,
    [s.data.devices() == {d} for s, d in zip(spread.addressable_shards, (a, b))],
    copies.sharding == whole,
    np.array_equal(np.asarray(x), np.arange(1000)),
    np.array_equal(np.asarray(spread), np.arange(600).reshape(20, 30)),
    np.array_equal(np.asarray(jax.jit(lambda v: v * 2)(spread)), np.arange(600).reshape(20, 30) * 2),
    np.array_equal(np.asarray(copies), np.arange(10)),
]]))
"""


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    create_cards(tmp_path, parse_simulated("1x16MiB+1x8MiB"))
    return tmp_path


def test_each_buffer_is_charged_where_it_is(cards: Path) -> None:
    assert run(cards, COMMON + MEMORY, ACB_GPUS="2") == {
        "limits": [16 << 20, 8 << 20], "text": ["cuda:0", "cuda:1"], "counts": [2, 2], "on b": [[0, 4000], True],
        "computed on b": [[0, 8000], True], "moved to a": [4000, 4000], "default": [[4000, 4400], True],
        "dropped": [0, 0], "halves": [4000, 4000], "whole": [4040, 4040], "shards": [[4040, 4040], [True, True]],
        "joined": [12000, 4000], "deleted": [8000, 0], "again": [[4000, 4000], True], "mixed": True, "end": [0, 0],
    }  # fmt: skip


def test_sharded_computations(cards: Path) -> None:
    w_bytes = 32 * 8 * 4
    same, both, total, left = run(cards, COMMON + SHARDED, ACB_GPUS="2")
    assert (same, both, total) == (True, True, 10.0)
    assert left == [2 * w_bytes, w_bytes]


def test_out_of_memory_is_each_gpus_own(cards: Path) -> None:
    errors, left = run(cards, COMMON + EXHAUSTED, ACB_GPUS="2")
    assert "allocate 12582912 bytes. (simulated GPU 1)" in errors[0]
    assert "allocate 20971520 bytes. (simulated GPU 0)" in errors[1]
    assert errors[2] == ""
    assert "allocate 10485760 bytes. (simulated GPU 1)" in errors[3]
    assert left == [0, 0]


def test_the_referee_of_each_card_sees_what_touches_it(cards: Path) -> None:
    assert run(cards, COMMON + REFEREE, ACB_GPUS="2") == {
        "a": [True, False], "b": [False, True], "both": [True, True], "moved": [True, True], "read": [False, True],
        "read of both": [True, True],
    }  # fmt: skip


def test_evacuated_arrays_come_back_to_their_own_gpus(cards: Path) -> None:
    before, moved, away, back, after, same = run(cards, GATED + COMMON + EVACUATED, ACB_GPUS="2", ACB_BROKER="auto")
    assert before == [[1240, 5240], 5240, True]
    assert moved == back == 5240
    assert away == [[0, 0], 0]
    assert after == [1240, 5240]
    assert same == [True, True, [True, True], True, True, True, True, True]


def test_a_program_sees_no_more_gpus_than_there_are(cards: Path) -> None:
    assert run(cards, "print(json.dumps(jax.device_count()))", ACB_GPUS="5") == 2
