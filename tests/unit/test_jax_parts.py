"""The smaller parts of jax's hooks: the fence, out-of-memory messages, the environment, the allocator's pool."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from acb.client import runtime
from acb.client.evacuation import EvacuationError
from acb.hooks.jax import environment, fence, pool, room
from acb.hooks.jax.fence import Fence


def test_the_fence_waits_for_a_thread_that_stands_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "LIMIT", 60)
    call, about_to = threading.Lock(), threading.Event()
    done = threading.Event()
    call.acquire()

    def stand() -> None:
        about_to.set()
        call.acquire()  # as in a long call of C++
        done.set()

    threads = [threading.Thread(target=stand)]
    threads[0].start()
    about_to.wait()
    guard = Fence()
    guard.begin()
    assert threads[0].ident in guard._stood
    threads.append(threading.Thread(target=call.release))
    threads[1].start()
    guard.wait()
    for thread in threads:
        thread.join()
    assert done.is_set()
    assert not guard._stood


def test_the_fence_does_not_wait_for_ever_nor_for_known_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "LIMIT", 0)
    call, known, started = threading.Lock(), threading.Event(), threading.Barrier(3)
    call.acquire()

    def stand() -> None:
        started.wait()
        call.acquire()

    def wait() -> None:
        started.wait()
        known.wait()

    threads = [threading.Thread(target=stand), threading.Thread(target=wait)]
    for thread in threads:
        thread.start()
    started.wait()
    guard = Fence()
    guard.begin()
    guard.wait()
    call.release()
    known.set()
    for thread in threads:
        thread.join()
    assert not fence._harmless(__file__, "stand")
    assert fence._harmless(threading.__file__, "wait")
    assert not fence._harmless(threading.__file__, "run")


@pytest.mark.parametrize(
    ("message", "nbytes"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4096 bytes.", 4096),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 1.5GiB.", 3 << 29),
        ("RESOURCE_EXHAUSTED: Failed to allocate 2.50GiB (2684354560B) for f", 2684354560),
        ("RESOURCE_EXHAUSTED: something else", 0),
    ],
)
def test_what_an_error_asked_for(message: str, nbytes: int) -> None:
    error = RuntimeError(message)
    assert room.out_of_memory(error)
    assert room.asked_for(error) == nbytes


def test_only_running_out_of_memory_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    answers = [True, True, False]
    client = SimpleNamespace(more_room=lambda nbytes: asked.append(nbytes) or answers[len(asked) - 1])
    monkeypatch.setattr(runtime, "client", lambda: client)
    errors = [RuntimeError("RESOURCE_EXHAUSTED: allocate 8 bytes"), RuntimeError("RESOURCE_EXHAUSTED: ?")]

    def work(*values: object) -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    assert room.again_with_more_room(work)(1) == "done"
    assert asked == [8, 1]
    errors.append(RuntimeError("INTERNAL: no"))
    with pytest.raises(RuntimeError, match="INTERNAL"):
        room.again_with_more_room(work)()
    errors.append(RuntimeError("RESOURCE_EXHAUSTED: allocate 8 bytes"))
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        room.again_with_more_room(work)([SimpleNamespace(is_deleted=lambda: True)])  # its argument was consumed
    assert asked == [8, 1]
    errors.append(RuntimeError("RESOURCE_EXHAUSTED: allocate 8 bytes"))
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        room.again_with_more_room(work)()


def test_a_call_that_has_consumed_its_arguments_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they are: in a dictionary, a tree of the program's own, or given by keyword."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    jax = pytest.importorskip("jax")

    class State:
        def __init__(self, weights: Any) -> None:
            self.weights = weights

    jax.tree_util.register_pytree_node(State, lambda state: ((state.weights,), None), lambda _, parts: State(*parts))
    asked: list[int] = []
    monkeypatch.setattr(runtime, "client", lambda: SimpleNamespace(more_room=lambda nbytes: asked.append(nbytes) or 1))
    calls: list[bool] = []

    def step(*args: Any, donates: bool, **kwargs: Any) -> Any:
        leaves = jax.tree_util.tree_leaves((args, kwargs))
        calls.append(donates)
        if len(calls) > 1:
            return [leaf.is_deleted() for leaf in leaves]
        if donates:
            for leaf in leaves:
                leaf.delete()
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4096 bytes.")

    def wrapped(kind: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        array = jax.numpy.ones(3)
        return {
            "dictionary": (({"layer": {"w": array}},), {}),
            "own tree": ((State([array]),), {}),
            "keyword": ((), {"params": array}),
            "list": (([(array,)],), {}),
        }[kind]

    for kind in ("dictionary", "own tree", "keyword", "list"):
        args, kwargs = wrapped(kind)
        calls.clear()
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            room.again_with_more_room(step)(*args, donates=True, **kwargs)
        assert (kind, calls, asked) == (kind, [True], [])
        args, kwargs = wrapped(kind)
        calls.clear()
        assert room.again_with_more_room(step)(*args, donates=False, **kwargs) == [False]
        assert (kind, calls, asked) == (kind, [False, False], [4096])
        asked.clear()


def test_settings_that_do_not_go_together_are_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "_warned", set())
    monkeypatch.delenv("ACB_QUIET", raising=False)
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR", "TF_FORCE_UNIFIED_MEMORY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    environment.prepare()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    monkeypatch.setenv("TF_FORCE_UNIFIED_MEMORY", "1")
    environment.prepare()
    environment.prepare()
    lines = capsys.readouterr().err.splitlines()
    assert [line[:5] for line in lines] == ["acb: "] * 2
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" in lines[0]
    assert "TF_FORCE_UNIFIED_MEMORY" in lines[1]


def test_an_allocator_that_keeps_what_is_freed_refuses_evacuation(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(platform="gpu")
    monkeypatch.setenv(pool.VARIABLE, "bfc")
    with pytest.raises(EvacuationError, match="cuda_async"):
        pool.check_pool(gpu)
    for choice in ("platform", "cuda_async"):
        monkeypatch.setenv(pool.VARIABLE, choice)
        pool.check_pool(gpu)
    pool.trim_pool()  # does nothing where there is no CUDA
