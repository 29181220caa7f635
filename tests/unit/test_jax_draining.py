"""What jax's evacuator waits for before the GPU goes to somebody else: arrays, effects, and the device itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.experimental import io_callback  # noqa: E402

from acb.hooks.jax import contexts, internals, pool  # noqa: E402
from acb.hooks.jax.evacuator import JaxEvacuator  # noqa: E402


@pytest.fixture
def gated() -> Iterator[None]:
    """The CPU counts as a GPU."""
    internals.GATED.add("cpu")
    try:
        yield
    finally:
        internals.GATED.discard("cpu")


class Device(NamedTuple):
    platform: str


class FakeLibrary:
    """libcuda with one GPU for each of `queued`: what is queued on it, None where the process has no context."""

    def __init__(self, *queued: int | None) -> None:
        self.queued = list(queued)
        self.retained = [0] * len(queued)
        self.current: list[int] = []
        self.trimmed: list[int] = []
        self.fails: set[str] = set()

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.queued)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0

    def cuDevicePrimaryCtxGetState(self, device: Any, flags: Any, active: Any) -> int:
        active._obj.value = self.queued[device.value] is not None
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        assert self.queued[device.value] is not None, "a context was made"
        self.retained[device.value] += 1
        context._obj.value = 100 + device.value
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:
        self.retained[device.value] -= 1
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.current.append(context.value - 100)
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        self.current.pop()
        return 0

    def cuCtxSynchronize(self) -> int:
        if "cuCtxSynchronize" in self.fails:
            return 719
        self.queued[self.current[-1]] = 0
        return 0

    def cuDeviceGetDefaultMemPool(self, pool: Any, device: Any) -> int:
        pool._obj.value = 200 + device.value
        return 0

    def cuMemPoolTrimTo(self, pool: Any, keep: Any) -> int:
        assert keep.value == 0
        assert self.queued[pool.value - 200] == 0, "what is freed after queued work was not in the pool yet"
        self.trimmed.append(pool.value - 200)
        return 0


@pytest.mark.usefixtures("gated")
def test_work_whose_results_are_dropped_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    jnp.ones(3)
    library = FakeLibrary(3, None, 5)
    monkeypatch.setattr(contexts, "_library", lambda: library)
    evacuator = JaxEvacuator(internals.Internals())
    evacuator.synchronize()
    assert library.queued == [0, None, 0]
    assert (library.retained, library.current) == ([0, 0, 0], [])
    library.fails.add("cuCtxSynchronize")  # the program's to see, not the evacuator's
    evacuator.synchronize()
    assert (library.retained, library.current) == ([0, 0, 0], [])


@pytest.mark.usefixtures("gated")
def test_no_driver_is_touched_where_there_is_none_or_no_gpu_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(contexts, "_library", missing)
    JaxEvacuator(internals.Internals()).synchronize()

    library = FakeLibrary(3)
    monkeypatch.setattr(contexts, "_library", lambda: library)
    ledger: Any = object()  # a simulated GPU's work is done when its call returns
    JaxEvacuator(internals.Internals(), ledger).synchronize()
    internals.GATED.discard("cpu")
    JaxEvacuator(internals.Internals()).synchronize()
    assert library.queued == [3]


def test_pools_are_trimmed_once_their_device_is_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary(3, None, 5)
    monkeypatch.setattr(contexts, "_library", lambda: library)
    monkeypatch.setenv(pool.VARIABLE, "platform")
    pool.trim_pool()
    assert not library.trimmed
    monkeypatch.setenv(pool.VARIABLE, "cuda_async")
    pool.trim_pool()
    assert library.trimmed == [0, 2]
    assert (library.retained, library.current) == ([0, 0, 0], [])


@pytest.mark.usefixtures("gated")
def test_a_computation_that_failed_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever class of error jax makes of it; and the device is waited for all the same."""
    array = jnp.ones(3)
    library = FakeLibrary(3)
    monkeypatch.setattr(contexts, "_library", lambda: library)
    evacuator = JaxEvacuator(internals.Internals())
    for error in (RuntimeError, ValueError):

        def fails(_: Any, error: type[Exception] = error) -> Any:
            raise error("RESOURCE_EXHAUSTED: Out of memory")

        library.queued = [3]
        with monkeypatch.context() as patch:
            patch.setattr(type(array), "block_until_ready", fails)
            evacuator.synchronize()
        assert library.queued == [0]


@pytest.mark.usefixtures("gated")
def test_effects_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A computation without a result, such as a callback, leaves nothing but a token."""
    standing, may_go = threading.Event(), threading.Event()

    class Slow:
        """A token whose effect has not happened until `may_go`."""

        def __init__(self, token: Any) -> None:
            self.token = token

        def block_until_ready(self) -> None:
            standing.set()
            assert may_go.wait(60)
            self.token.block_until_ready()

    evacuator = JaxEvacuator(internals.Internals())
    kind = evacuator._internals.dispatch.RuntimeTokenSet
    noted = evacuator.wrap_tokens(kind.set_output_runtime_token)
    monkeypatch.setattr(
        kind, "set_output_runtime_token", lambda tokens, device, token: noted(tokens, device, Slow(token))
    )
    seen: list[float] = []
    jax.jit(lambda x: io_callback(lambda value: seen.append(float(value)), None, x.sum()))(jnp.ones(3))
    done = threading.Event()
    waiter = threading.Thread(target=lambda: (evacuator.synchronize(), done.set()))
    waiter.start()
    while not standing.wait(0.01) and waiter.is_alive():
        pass
    early = done.is_set()
    may_go.set()
    waiter.join()
    jax.effects_barrier()
    assert standing.is_set()
    assert not early
    assert seen == [3]
    standing.clear()
    evacuator.synchronize()
    assert not standing.is_set(), "waited for once"


def test_only_effects_on_gated_devices_are_noted() -> None:
    evacuator = JaxEvacuator(internals.Internals())
    given: list[Any] = []
    noted = evacuator.wrap_tokens(lambda *args: given.append(args))
    here, there = Device("gpu"), Device("cpu")
    for device in (here, there):
        noted("tokens", device, SimpleNamespace(block_until_ready=lambda: None))
    assert [device for _, device, _ in given] == [here, there]
    assert [device for _, device in evacuator._tokens] == [here]
