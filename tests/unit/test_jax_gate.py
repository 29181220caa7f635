"""The gate of jax: every route to the device stops at a closed gate, and the fast path is there while it is open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jax")

ROOT = Path(__file__).parents[2]

PRELUDE = """
import json, os, sys, threading
import jax, jax.numpy as jnp, numpy as np
from acb.client import runtime
from acb.hooks.jax import install, internals
internals.gate_platform("cpu")  # the gate does not care, and there need be no GPU
asked = threading.Event()
client = runtime.client()
gate = client.gate
gate._ask, gate._idle = asked.set, lambda: None
entered = []
enter = gate.enter
gate.enter = lambda: (entered.append(1), enter())[1]
install(jax)
evacuator, = client.evacuators
"""

ROUTES = """
from jax import export, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
gate.open()
host = np.arange(6, dtype=np.float32).reshape(2, 3)
device = jax.devices()[0]
x = jax.device_put(host)
pair = jax.device_put(host, NamedSharding(Mesh(np.array(jax.devices()), ("d",)), PartitionSpec("d")))
scalar = jnp.float32(2.5)
whole = jnp.int32(3)
key = jax.random.key(7)
jitted = jax.jit(lambda a: a * 2 + 1)
tree = jax.jit(lambda t: {"out": t["a"][0] @ t["a"][1].T})
aot = jitted.lower(x).compile()
exported = export.export(jitted)(x)
mapped = jax.pmap(lambda a: a + 1)
donating = jax.jit(lambda a: a + 1, donate_argnums=0)
constant = jax.jit(lambda: x.sum())
pure = jax.jit(lambda a: jax.pure_callback(lambda v: np.asarray(v) + 1, a, a))
checkpointed = jax.jit(jax.grad(lambda a: jax.checkpoint(jnp.sin)(a).sum()))
loss = jax.value_and_grad(lambda a: (a ** 2).sum())
routes = {
    "jit": lambda: jitted(x),
    "jit of a tree": lambda: tree({"a": [x, x]})["out"],
    "jit of host data": lambda: jitted(host),
    "jit without arguments": lambda: constant(),
    "new jit": lambda: jax.jit(lambda a: a - 3)(x),
    "aot": lambda: aot(x),
    "export": lambda: exported.call(x),
    "pmap": lambda: mapped(pair),
    "donation": lambda: donating(jnp.array(host)),
    "callback": lambda: pure(x),
    "checkpoint": lambda: checkpointed(x),
    "grad": lambda: loss(x)[1],
    "vmap": lambda: jax.vmap(jnp.sin)(x),
    "scan": lambda: lax.scan(lambda c, a: (c + a, c), jnp.zeros(3), x)[0],
    "eager primitive": lambda: lax.add(x, x),
    "eager numpy": lambda: jnp.sin(x),
    "operator": lambda: x * 2,
    "negation": lambda: -x,
    "matmul": lambda: x @ x.T,
    "indexing": lambda: x[0],
    "update": lambda: x.at[0].set(1),
    "random key": lambda: jax.random.key_data(jax.random.key(3)),
    "random": lambda: jax.random.normal(key, (2,)),
    "device_put": lambda: jax.device_put(host),
    "device_put to a device": lambda: jax.device_put(host, device),
    "device_put of a device array": lambda: jax.device_put(x, jax.devices()[1]),
    "asarray": lambda: jnp.asarray(host),
    "array": lambda: jnp.array([1.0, 2.0]),
    "zeros": lambda: jnp.zeros(4),
    "arange": lambda: jnp.arange(4),
    "sharded": lambda: jax.make_array_from_callback((2, 3), pair.sharding, lambda i: host[i]),
    "shards": lambda: np.asarray(pair.addressable_shards[1].data),
    "assembled": lambda: jax.make_array_from_single_device_arrays((2, 3), x.sharding, [x]),
    "asarray to host": lambda: np.asarray(x),
    "sharded to host": lambda: np.asarray(pair),
    "value": lambda: x._value,
    "device_get": lambda: jax.device_get({"a": x})["a"],
    "async copy": lambda: (x.copy_to_host_async(), 1)[1],
    "block_until_ready": lambda: (x.block_until_ready(), 1)[1],
    "jax.block_until_ready": lambda: (jax.block_until_ready([x]), 1)[1],
    "is_ready": lambda: int(x.is_ready()) * 0,
    "item": lambda: scalar.item(),
    "float": lambda: float(scalar),
    "int": lambda: int(whole),
    "bool": lambda: bool(scalar > 1),
    "index": lambda: [10, 20, 30, 40][whole],
    "tolist": lambda: x.tolist(),
    "repr": lambda: len(repr(x)),
    "format": lambda: len(f"{scalar:.2f}"),
    "iteration": lambda: [float(v) for v in x[1]],
    "copy": lambda: x.copy(),
    "pickle": lambda: __import__("pickle").loads(__import__("pickle").dumps(x)),
    "dlpack": lambda: np.from_dlpack(x),
    "dlpack import": lambda: jnp.from_dlpack(np.arange(3.0, dtype=np.float32)) + 1,
    "astype": lambda: x.astype(jnp.bfloat16),
    "disable_jit": lambda: disabled(),
    "debug nans": lambda: watched_for_nans(),
}

from jax._src import config
if hasattr(config, "use_cpp_shard_args"):  # since 0.11
    from jax._src.interpreters import pxla
    from jax._src.lib import xla_client
    reuse = xla_client.ArrayCopySemantics.REUSE_INPUT
    routes["host data placed by C++"] = lambda: placed()

def placed():
    with config.use_cpp_shard_args(True):
        return pxla.shard_args([pair.sharding], [None], [reuse], [host])[0]

def disabled():
    with jax.disable_jit():
        return jitted(x)

def watched_for_nans():
    with jax.debug_nans(True):
        return jitted(x)

def plain(value):
    return np.asarray(value, dtype=np.float64).tolist()

def try_route(route, evacuate):
    expected = plain(route())
    route()
    del entered[:]
    route()
    counted = len(entered)
    gate.close()
    if evacuate:
        evacuator.synchronize()
        evacuator.evacuate()
        assert not evacuator.resident()
    asked.clear()
    result = []
    done = threading.Event()

    def run():
        try:
            result.append(route())
        except BaseException as error:
            result.append(repr(error))
        done.set()
        asked.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert asked.wait(60)
    stopped = not done.is_set()
    if evacuate:
        evacuator.restore()
    gate.open()
    thread.join()
    answer = result[0] if isinstance(result[0], str) else plain(result[0])
    return stopped, answer == expected or [answer, expected], counted

print(json.dumps({name: [try_route(route, False), try_route(route, True)] for name, route in routes.items()}))
"""

FLIPS = """
compiled = []
from jax._src import compiler
name = "backend_compile_and_load" if hasattr(compiler, "backend_compile_and_load") else "backend_compile"
original = getattr(compiler, name)
setattr(compiler, name, lambda *a, **k: (compiled.append(1), original(*a, **k))[1])
gate.open()
traced = []
@jax.jit
def mine(a):
    traced.append(1)
    return a * 2 + 1
x = jnp.ones(8)
aot = mine.lower(x).compile()
def calls():
    return [mine(x), -x, jnp.sin(x), x * 3, aot(x), jax.lax.exp(x)]
before = [v.tolist() for v in calls()]
calls()
compiled.clear(); traced.clear()
def misses():
    entered.clear()
    same = [v.tolist() for v in calls()] == before
    calls()
    entered.clear()
    calls()
    return len(entered), same
answers = []
for turn in range(20):
    gate.watch(); watched = misses()
    gate.close(); gate.open(watched=True); reopened = misses()
    gate.close(); gate.open(); opened = misses()
    answers.append([watched, reopened, opened])
print(json.dumps({"compiled": len(compiled), "traced": len(traced), "answers": answers}))
"""

ADDRESS = """
from acb.client.evacuation import EvacuationError
gate.open()
answers, other = [], jax.device_put(np.ones(3, np.float32))
for name in ("unsafe_buffer_pointer", "unsafe_raw_buffer"):
    x = jnp.arange(3) + 1
    getattr(x, name, x.unsafe_buffer_pointer)()
    try:
        answers.append(evacuator.evacuate())
    except EvacuationError as error:
        answers.append(str(error))
    del x
answers.append(evacuator.evacuate())
print(json.dumps(answers))
"""

THREADS = """
import random, time
gate.open()
f = jax.jit(lambda a: a @ a)
x = jnp.ones((64, 64))
f(x)
stop, wrong, laps = threading.Event(), [], [0, 0, 0]
inside = 0
execute = internals.Internals().LoadedExecutable.execute_sharded
def work(i):
    y = x
    while not stop.is_set():
        y = f(y) / 64
        if i == 0:
            y = jax.device_put(np.asarray(y))
        if i == 1:
            y = jnp.tanh(y) + x - x
        laps[i] += 1
    if not np.isfinite(np.asarray(y)).all():
        wrong.append(i)
threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
for t in threads:
    t.start()
for turn in range(30):
    target = [n + 2 for n in laps]
    while any(n < m for n, m in zip(laps, target)):
        time.sleep(0)
    if turn % 2:
        gate.watch()
    gate.close()
    while gate.busy():
        time.sleep(0)
    evacuator.synchronize()
    evacuator.evacuate()
    seen = laps[:]
    deleted = internals.Internals().ArrayImpl.is_deleted.__wrapped__
    if [a for a in jax.live_arrays() if not deleted(a) and internals.in_device_memory(a)]:
        wrong.append("left")
    if laps != seen:
        wrong.append("ran on")
    evacuator.restore()
    gate.open()
stop.set()
for t in threads:
    t.join()
print(json.dumps(wrong))
"""


ROOM = """
import resource
gate.open()
jax.config.update("jax_cpu_enable_async_dispatch", False)
def limit(more):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (more if more < 0 else used + more, resource.RLIM_INFINITY))
asked = []
def more_room(self, nbytes):
    asked.append(nbytes)
    limit(resource.RLIM_INFINITY)
    return True
runtime.Client.more_room = more_room
f, g = jax.jit(lambda a: jnp.tile(a, 1 << 26) * 2), jax.jit(lambda a: a + 1)
x = jnp.ones(1)
answers = {}
for name, beside in (("alone", 0), ("beside a little", 1 << 20), ("beside", 2 << 30)):
    runtime.Client.beside = beside
    gate.open()
    f(x), f(x), g(x), g(x)
    before = len(entered)
    g(x)
    counted = len(entered) - before
    limit(100 << 20)
    asked.clear()
    try:
        result = float(f(x)[-1])
    except Exception as error:
        result = str(error).partition(":")[0]
    limit(resource.RLIM_INFINITY)
    answers[name] = [counted, result, list(asked)]
print(json.dumps(answers))
"""


def run(program: str, **environment: str) -> Any:
    """The JSON that a program prints last, run in a process of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ACB_", "JAX_", "XLA_"))}
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program], env=env | environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "acb:" not in done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def routes() -> Any:
    return run(ROUTES)


def test_every_route_stops_at_the_closed_gate(routes: Any) -> None:
    # jax keeps the host copy of a sharded array that was read once: no need for the device there.
    at_hand = {"sharded to host"}
    assert {name for name, (closed, _) in routes.items() if not closed[0]} <= at_hand
    assert {name for name, (_, evacuated) in routes.items() if not evacuated[0]} <= at_hand


def test_every_route_gives_the_same_after_the_wait(routes: Any) -> None:
    assert {name: answers for name, answers in routes.items() if any(a[1] is not True for a in answers)} == {}


def test_compiled_calls_are_not_counted_while_the_gate_is_open(routes: Any) -> None:
    fast = ["jit", "jit of a tree", "aot", "eager primitive", "eager numpy", "operator", "negation", "checkpoint"]
    assert {name: routes[name][0][2] for name in fast} == dict.fromkeys(fast, 0)


def test_flipping_compiles_nothing_and_brings_the_fast_path_back() -> None:
    answer = run(FLIPS)
    assert (answer["compiled"], answer["traced"]) == (0, 0)
    for watched, reopened, opened in answer["answers"]:
        assert [watched[1], reopened[1], opened[1]] == [True] * 3
        assert watched[0] >= 6
        assert reopened[0] >= 6
        assert opened[0] == 0


def test_out_of_memory_beside_others_the_call_is_repeated_even_on_the_fast_path() -> None:
    answers = run(ROOM)
    for name in ("alone", "beside a little"):  # nobody could make room: calls go their fastest way
        assert answers[name] == [0, "RESOURCE_EXHAUSTED", []]
    assert answers["beside"] == [1, 2.0, [1 << 28]]


def test_threads_evacuated_in_the_middle_go_on_as_if_nothing_had_happened() -> None:
    assert run(THREADS) == []


def test_an_array_whose_address_is_known_stays_until_it_is_dropped() -> None:
    stays = "the program holds the GPU address of a jax array"
    assert run(ADDRESS) == [stays, stays, 12]


def test_a_program_on_the_cpu_alone_is_left_alone() -> None:
    program = """
internals.GATED.discard("cpu")
f = jax.jit(lambda a: a * 2)
x = jnp.ones(3)
f(x); f(x)
print(json.dumps([np.asarray(f(x) + x).tolist(), asked.is_set(), len(entered), gate.closed, evacuator.resident()]))
"""
    assert run(program) == [[3, 3, 3], False, 0, True, 0]
