"""The simulated GPU of jax: answers as a GPU's, results as the CPU's, memory accounted for to the last byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from acb.config import parse_simulated
from acb.devices.simulated import Card, create_cards

pytest.importorskip("jax")

ROOT = Path(__file__).parents[2]

SIMULATED = """
import gc, json, os, sys, threading
import jax
from acb.hooks.jax import install
install(jax)
import jax.numpy as jnp, numpy as np
"""

PLAIN = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
"""

ANSWERS = """
gpu, = jax.devices()
cpu = jax.devices("cpu")[0]
x = jnp.ones(3)
moved = jax.device_put(x, cpu)
mesh = jax.sharding.Mesh(np.array([gpu]), ("d",))
spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
try:
    memoryview(x)
    readable = True
except (TypeError, BufferError):
    readable = False
print(json.dumps({
    "same": [jax.devices("gpu") == [gpu], jax.devices("cuda") == [gpu], jax.local_devices() == [gpu], cpu != gpu],
    "backend": [jax.default_backend(), gpu.client.platform, gpu.platform, x.platform(), cpu.platform, moved.platform()],
    "text": [repr(gpu), str(gpu), gpu.device_kind, gpu.compute_capability],
    "devices": [x.devices() == {gpu}, moved.devices() == {cpu}, spread.devices() == {gpu}],
    "stats": gpu.memory_stats(),
    "counts": [jax.device_count(), jax.process_count()],
    "readable": readable,
    "cpu": jax.jit(lambda a: a + 1, device=cpu)(np.ones(2)).tolist() if False else (moved + 1).tolist(),
}))
"""

MEMORY = """
dev, = jax.devices()
def held():
    return dev.memory_stats()["bytes_in_use"]
seen = {}
x = jnp.ones((1000, 250)); seen["new"] = held()
y = x + 1; seen["result"] = held()
del x; seen["dropped"] = held()
z = jax.jit(lambda a: a * 2, donate_argnums=0)(y); seen["donated"] = [held(), y.is_deleted()]
del y; seen["donated, dropped"] = held()
shard = z.addressable_shards[0].data; again = z.addressable_data(0); del z; seen["alias"] = held()
del shard; seen["an alias left"] = held()
same = jax.device_put(again, dev); typed = again.view(jnp.int32); del again; seen["device_put and view"] = held()
del same, typed; seen["none left"] = held()
host = np.ones((100, 100), np.float32)
arrays = [jax.device_put(host), jax.device_put(host)]; seen["twice"] = held()
arrays[0].delete(); seen["deleted"] = held()
host[:] = 5; seen["private"] = float(arrays[1].sum())
del arrays; seen["list"] = held()
key = jax.random.key(0); seen["key"] = held(); del key
cpu = jax.device_put(jnp.ones(100), jax.devices("cpu")[0]); seen["on the cpu"] = held()
three = jax.jit(lambda a: (a, a + 1, a.T))(jnp.ones((10, 10))); seen["three"] = held(); del three
small = jnp.ones(10, jnp.int4); seen["int4"] = held() in (5, 10); del small
ref = jax.new_ref(jnp.zeros(100)) if hasattr(jax, "new_ref") else None
if ref is not None:
    def add():
        ref[...] += 1
    add(); jax.jit(add)(); seen["ref"] = [held(), float(ref[...].sum())]
del ref, add; jax.clear_caches(); gc.collect(); seen["end"] = held()
cycle = [jnp.ones(1000)]; cycle.append(cycle); del cycle; gc.collect(); seen["cycle"] = held()
print(json.dumps(seen))
"""

EXHAUSTED = """
dev, = jax.devices()
errors = []
kept = jnp.ones((1 << 20,), jnp.float32)
def attempt(make):
    try:
        make()
        errors.append("none")
    except jax.errors.JaxRuntimeError as error:
        errors.append(str(error))
big = np.ones((8 << 20,), np.float32)
attempt(lambda: jax.device_put(big))
attempt(lambda: jnp.ones((8 << 20,), jnp.float32))
attempt(lambda: jax.jit(lambda a: jnp.outer(a, a))(jnp.ones(4000)))
@jax.jit
def temporaries(a):
    b = jnp.sin(jnp.sort(jnp.tile(a, 40)))
    return jnp.sort(b)[::-1].sum()
attempt(lambda: temporaries(kept))
fits = jax.device_put(np.ones((2 << 20,), np.float32))
held = dev.memory_stats()["bytes_in_use"]
ok = float(kept[:10].sum())
del fits, kept
print(json.dumps([errors, held, ok, dev.memory_stats()["bytes_in_use"]]))
"""

REFEREE = """
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from acb.devices.simulated import Card
from acb.hooks.jax import ledger
dev, = jax.devices()
x = jnp.ones(3)
card, = [c for c in __import__("acb.devices.simulated").devices.simulated._cards]
card.set_holders([1])
def violations(work):
    card.clear_violations()
    work()
    return len(card.violations())
f = jax.jit(lambda a: a + 1)
card.set_holders([os.getpid()]); f(x); aot = f.lower(x).compile(); aot(x); card.set_holders([1])
print(json.dumps({
    "jit": violations(lambda: f(x)), "aot": violations(lambda: aot(x)), "operator": violations(lambda: x * 2),
    "put": violations(lambda: jax.device_put(np.ones(3))), "read": violations(lambda: np.asarray(x)),
    "to the cpu": violations(lambda: jax.device_put(x, jax.devices("cpu")[0])),
    "on the cpu": violations(lambda: f(jax.device_put(np.ones(3), jax.devices("cpu")[0]))),
    "nothing": violations(lambda: (x.shape, x.dtype, x.devices())),
}))
card.set_holders(None)
"""

TRAINING = """
def attention(p, x):
    q, k, v = (jnp.einsum("nld,dhk->nhlk", x, p[n]) for n in "qkv")
    a = jax.nn.softmax(jnp.einsum("nhlk,nhmk->nhlm", q, k) / np.sqrt(q.shape[-1]))
    return x + jnp.einsum("nhlk,hkd->nld", jnp.einsum("nhlm,nhmk->nhlk", a, v), p["o"])
def layer(p, x):
    x = attention(p, x)
    m = x.mean(-1, keepdims=True)
    n = (x - m) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x + jax.nn.gelu(n @ p["up"]) @ p["down"]
def model(ps, x):
    y, _ = jax.lax.scan(lambda x, p: (layer(p, x), None), x, ps)
    return y.mean((1, 2))
def loss(ps, x, y):
    return ((model(ps, x) - y) ** 2).mean()
def init(key):
    ks = jax.random.split(key, 6)
    shapes = dict(q=(16, 2, 8), k=(16, 2, 8), v=(16, 2, 8), o=(2, 8, 16), up=(16, 32), down=(32, 16))
    return {n: 0.1 * jax.random.normal(k, (2, *s)) for (n, s), k in zip(shapes.items(), ks)}
@jax.jit
def step(state, x, y):
    ps, m, v, t = state
    value, g = jax.value_and_grad(loss)(ps, x, y)
    m = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, m, g)
    v = jax.tree.map(lambda a, b: 0.99 * a + 0.01 * b * b, v, g)
    ps = jax.tree.map(lambda p, a, b: p - 1e-2 * a / (jnp.sqrt(b) + 1e-8), ps, m, v)
    return (ps, m, v, t + 1), value
key = jax.random.key(42)
params = init(key)
zeros = jax.tree.map(jnp.zeros_like, params)
state, losses = (params, zeros, zeros, 0), []
rng = np.random.default_rng(0)
for i in range(5):
    x = rng.normal(size=(4, 12, 16)).astype(np.float32)
    state, value = step(state, x, x.sum((1, 2)))
    losses.append(float(value).hex())
out = jax.device_get(state)
eager = [np.asarray(v).tobytes().hex() for v in (
    jnp.linalg.svd(jnp.arange(12.0).reshape(3, 4))[1], jnp.fft.fft(jnp.arange(8.0)),
    jnp.sort(jax.random.normal(key, (50,))), jax.random.gamma(key, 2.0, (20,)),
    jax.scipy.special.erfinv(jnp.linspace(-0.9, 0.9, 9)), jnp.ones(4, jnp.bfloat16) / 3)]
print(json.dumps([losses, [np.asarray(l).tobytes().hex() for l in jax.tree.leaves(out)], eager]))
"""

THREADS = """
dev, = jax.devices()
f = jax.jit(lambda a: (a @ a) / 64)
wrong = []
def work(i):
    x = jnp.full((64, 64), 1.0)
    for _ in range(30):
        x = f(x)
        y = jax.device_put(np.asarray(x))
    if not (np.asarray(y) == 1).all():
        wrong.append(i)
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
del threads; gc.collect()
print(json.dumps([wrong, dev.memory_stats()["bytes_in_use"]]))
"""

REVOKED = """
import random, time
from acb.client import runtime
from acb.hooks.jax import ledger
client = runtime.client()
gate, (evacuator,) = client.gate, client.evacuators
gate._ask = gate._idle = lambda: None
card = ledger._open_cards()[0]
me, other = [os.getpid()], [1]
f = jax.jit(lambda a: (a @ a) / 8)
donating = jax.jit(lambda a: a + 1, donate_argnums=0)
stop, laps, wrong = threading.Event(), [0, 0, 0], []
def computing(x):
    x = f(x)
    y = jnp.sin(x).at[0].set(0) * 0 + donating(jnp.array(x)) - 1
    return y[::-1]
def moving(x):
    host = np.asarray(x)
    x = jax.device_put(host)
    float(x[0, 0]); x.block_until_ready(); jax.device_get([x, x]); x.tolist(); repr(x)
    return jnp.asarray(host) + jax.random.key_data(jax.random.key(1))[0].astype(jnp.float32)
def compiling(x):
    n = laps[2] % 7 + 1
    return jax.grad(lambda a: (a * n).sum() / n)(x) * jax.jit(lambda a: a / n * n)(x)
def work(i, step):
    x = jnp.ones((8, 8))
    kept = [x, x.addressable_data(0)]
    while not stop.is_set():
        x = step(x)
        laps[i] += 1
    if not (np.asarray(x) == 1).all() or not (np.asarray(kept[1]) == 1).all():
        wrong.append([i, np.asarray(x).tolist()])
threads = [threading.Thread(target=work, args=(i, s)) for i, s in enumerate([computing, moving, compiling])]
card.set_holders(me)
gate.open()
[t.start() for t in threads]
rng = random.Random(5)
evacuations = 0
for turn in range(25):
    goal, most = laps[:], rng.choice([1, 1, 2])
    while sum(laps) < sum(goal) + most:
        time.sleep(rng.random() / 200)
    gate.close()
    while gate.busy():
        time.sleep(0)
    evacuator.synchronize()
    card.set_holders(other)
    if turn % 2:
        evacuator.evacuate()
        evacuations += 1
        if card.held() or evacuator.resident():
            wrong.append(["left", card.held(), evacuator.resident()])
    seen = laps[:]
    time.sleep(rng.random() / 200)
    card.set_holders(me)
    evacuator.restore()
    gate.open()
stop.set()
[t.join() for t in threads]
del threads; gc.collect(); jax.clear_caches(); gc.collect()
print(json.dumps([wrong, [list(v) for v in card.violations()], card.held()]))
"""

ROOM = """
from acb.client import runtime
client = runtime.client()
gate, (evacuator,) = client.gate, client.evacuators
gate._ask = gate._idle = lambda: None
gate.open()
asked, big = [], [jnp.ones((3 << 20,))]
def more_room(nbytes):
    asked.append(nbytes)
    return bool(big) and not big.clear()
client.agent.more_room = more_room
put = jax.device_put(np.ones((2 << 20,), np.float32))
big.append(jnp.ones((3 << 19,)))
made = jax.jit(lambda: jnp.ones((1 << 20,)))()
try:
    np_ = jax.device_put(np.ones((4 << 20,), np.float32))
except jax.errors.JaxRuntimeError as error:
    seen = str(error)[:18]
gate.close()
evacuator.evacuate()
from acb.hooks.jax import ledger
card = ledger._open_cards()[0]
card.allocate(12 << 20)
try:
    evacuator.restore()
except MemoryError as error:
    seen += "|" + str(error)[:18]
card.free(12 << 20)
evacuator.restore()
gate.open()
print(json.dumps([asked, seen, float(np.asarray(put).sum()), float(np.asarray(made).sum())]))
"""

FORKED = """
child = os.fork()
if not child:
    x = jnp.ones(1000)
    ok = jax.default_backend() == "gpu" and jax.devices()[0].memory_stats()["bytes_in_use"] == 4000
    os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
x = jnp.ones(10)
print(json.dumps([os.waitstatus_to_exitcode(status), jax.devices()[0].memory_stats()["bytes_in_use"]]))
"""


def launch(directory: Path | None, program: str, **environment: str) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ACB_", "JAX_", "XLA_"))}
    env["PYTHONPATH"] = str(ROOT)
    if directory is None:
        env["JAX_PLATFORMS"] = "cpu"
    else:
        env |= {"ACB_BROKER": "off", "ACB_SIMULATED": str(directory)}
    code = (PLAIN if directory is None else SIMULATED) + program
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(directory: Path | None, program: str, **environment: str) -> Any:
    """The JSON that a program prints last."""
    process = launch(directory, program, **environment)
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert "acb:" not in errors, errors
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def card(tmp_path: Path) -> Path:
    create_cards(tmp_path, parse_simulated("1x16MiB"))
    return tmp_path


def test_a_program_sees_a_gpu(card: Path) -> None:
    answer = run(card, ANSWERS)
    assert answer["same"] == [True] * 4
    assert answer["backend"] == ["gpu", "gpu", "gpu", "gpu", "cpu", "cpu"]
    assert answer["text"] == ["CudaDevice(id=0)", "cuda:0", "Simulated GPU", "8.0"]
    assert answer["devices"] == [True] * 3
    assert answer["stats"]["bytes_limit"] == 16 << 20
    assert answer["stats"]["bytes_in_use"] <= 24
    assert answer["counts"] == [1, 1]
    assert not answer["readable"]
    assert answer["cpu"] == [2, 2, 2]


@pytest.mark.parametrize("platforms", ["gpu", "cuda,cpu"])
def test_asking_for_the_gpu_by_name(card: Path, platforms: str) -> None:
    assert run(card, "print(json.dumps(jax.devices()[0].platform))", JAX_PLATFORMS=platforms) == "gpu"


def test_a_program_kept_to_the_cpu_stays_there(card: Path) -> None:
    program = "print(json.dumps([jax.default_backend(), jnp.ones(3).tolist()]))"
    assert run(card, program, JAX_PLATFORMS="cpu") == ["cpu", [1, 1, 1]]


def test_every_byte_is_accounted_for(card: Path) -> None:
    seen = run(card, MEMORY)
    mib = 1000000
    assert seen.pop("int4")
    assert seen == {
        "new": mib, "result": 2 * mib, "dropped": mib, "donated": [mib, True], "donated, dropped": mib, "alias": mib,
        "an alias left": mib, "device_put and view": 2 * mib, "none left": 0, "twice": 80000, "deleted": 40000,
        "private": 10000, "list": 0, "key": 8, "on the cpu": 0, "three": 1200, "ref": [400, 200], "end": 0, "cycle": 0,
    }  # fmt: skip


def test_out_of_memory_is_jaxs_own_error_and_leaves_the_rest_alone(card: Path) -> None:
    errors, held, ok, left = run(card, EXHAUSTED)
    assert [e.startswith("RESOURCE_EXHAUSTED: Out of memory while trying to allocate ") for e in errors] == [True] * 4
    assert "allocate 33554432 bytes. (simulated GPU)" in errors[0]
    assert (held, ok, left) == (12 << 20, 10, 0)


def test_two_programs_share_the_card_and_the_dead_give_back(card: Path, request: pytest.FixtureRequest) -> None:
    hog = launch(card, "x = jnp.ones((3 << 20,)); print('ready', flush=True); threading.Event().wait()")
    request.addfinalizer(lambda: (hog.kill(), hog.communicate()))
    assert hog.stdout is not None
    assert hog.stdout.readline() == "ready\n"
    program = """
try:
    x = jnp.ones((2 << 20,)); print(json.dumps("fits"))
except jax.errors.JaxRuntimeError:
    print(json.dumps("out of memory"))
"""
    assert run(card, program) == "out of memory"
    hog.kill()
    hog.communicate()
    assert run(card, program) == "fits"
    with Card.open(card) as there:
        assert there.used() == 0


def test_the_referee_sees_every_operation_and_nothing_else(card: Path) -> None:
    seen = run(card, REFEREE)
    assert {name for name, count in seen.items() if count} == {"jit", "aot", "operator", "put", "read", "to the cpu"}


def test_training_and_attention_are_those_of_the_cpu_bit_for_bit(card: Path) -> None:
    with ThreadPoolExecutor() as pool:
        simulated, plain = pool.map(run, (card, None), (TRAINING, TRAINING))
    assert simulated == plain


def test_revoked_at_random_moments_nothing_runs_without_the_lease(card: Path) -> None:
    assert run(card, REVOKED, ACB_BROKER="auto") == [[], [], 0]


def test_the_broker_is_asked_for_room_before_the_program_sees_an_error(card: Path) -> None:
    asked, seen, put, made = run(card, ROOM, ACB_BROKER="auto")
    assert asked == [8 << 20, 4 << 20, 16 << 20]
    assert seen == "RESOURCE_EXHAUSTED|RESOURCE_EXHAUSTED"
    assert (put, made) == (2 << 20, 1 << 20)


def test_threads(card: Path) -> None:
    assert run(card, THREADS) == [[], 0]


def test_a_forked_child_holds_what_it_makes_itself(card: Path) -> None:
    assert run(card, FORKED) == [0, 40]
