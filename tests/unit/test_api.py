"""The manual way: nesting, sizes and their errors, without a broker (which ACB_BROKER=off leaves out)."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import acb
from acb.client import runtime
from acb.client.gate import Gate

ROOT = Path(acb.__path__[0]).parent


class FakeAgent:
    """Takes down what the API asks of it."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []
        self.refuses = 0

    def need(self, nbytes: int) -> None:
        self.said.append(("need", nbytes))

    def reserve(self, nbytes: int) -> None:
        self.said.append(("reserve", nbytes))
        if nbytes > (self.refuses or nbytes):
            raise acb.LeaseRefused("too much")

    def end_phase(self) -> None:
        self.said.append(("end", 0))


class FakeClient:
    gating = True

    def __init__(self) -> None:
        self.agent = FakeAgent()
        self.gate = Gate(lambda: None, lambda: None)
        self.gate.open()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClient]:
    fake = FakeClient()
    monkeypatch.setattr(runtime, "_client", fake)
    meta_path = list(sys.meta_path)
    yield fake
    sys.meta_path[:] = meta_path
    assert not fake.gate.inside()


def test_a_phase_is_a_region_and_says_when_it_ends(client: FakeClient) -> None:
    with acb.gpu():
        assert client.gate.inside()
        assert client.agent.said == [("need", 0)]
    assert not client.gate.inside()
    assert client.agent.said == [("need", 0), ("end", 0)]


@pytest.mark.parametrize(("memory", "size"), [("10GiB", 10 << 30), (5, 5), ("1.5K", 1536), (None, 0)])
def test_sizes_are_read(client: FakeClient, memory: Any, size: int) -> None:
    with acb.gpu(memory):
        pass
    with acb.gpu(memory=memory):
        pass
    acb.begin(memory)
    acb.end()
    one = [("need", size), *([("reserve", size)] if size else []), ("end", 0)]
    assert client.agent.said == one * 3


@pytest.mark.parametrize("memory", [0, -1, "0", "lots", "", 1.5, True, False, 1 << 60, "-5GiB", b"1GiB", [1], "1e9"])
def test_impossible_sizes_are_refused_before_anything_happens(client: FakeClient, memory: Any) -> None:
    for use in (acb.gpu, acb.begin):
        with pytest.raises(ValueError, match="size"):
            use(memory)
    assert client.agent.said == []
    assert not client.gate.inside()


def test_phases_nest(client: FakeClient) -> None:
    with acb.gpu("3GiB"):
        with acb.gpu("2GiB"):
            with acb.gpu():
                acb.begin("1GiB")
                acb.end()
        assert client.gate.inside()
        with pytest.raises(ValueError, match="a phase of 4GiB inside one of 3GiB"):
            acb.begin("4GiB")
        with pytest.raises(ValueError, match="inside one of 3GiB"):
            with acb.gpu("4GiB"):
                pass
        assert client.gate.inside()
    assert client.agent.said == [("need", 3 << 30), ("reserve", 3 << 30), ("end", 0)]


def test_a_size_inside_a_phase_without_one_is_asked_for(client: FakeClient) -> None:
    with acb.gpu():
        with acb.gpu("2GiB"):
            pass
    assert client.agent.said == [("need", 0), ("reserve", 2 << 30), ("end", 0)]


def test_a_refusal_leaves_no_phase_behind(client: FakeClient) -> None:
    client.agent.refuses = 5
    with pytest.raises(acb.LeaseRefused):
        acb.begin(6)
    assert not client.gate.inside()
    with pytest.raises(RuntimeError, match=r"without acb\.begin"):
        acb.end()
    acb.begin(5)
    acb.end()


def test_bad_nesting_is_said(client: FakeClient) -> None:
    with pytest.raises(RuntimeError, match=r"acb\.end\(\) without acb\.begin\(\)"):
        acb.end()
    acb.begin()
    with pytest.raises(RuntimeError, match=r"call acb\.end\(\) first"):
        acb.begin()
    with acb.gpu():
        with pytest.raises(RuntimeError, match="leave the block first"):
            acb.end()
    acb.end()
    with acb.gpu():
        with pytest.raises(RuntimeError, match=r"without acb\.begin"):
            acb.end()


def test_a_block_that_is_left_before_its_begin_has_ended(client: FakeClient) -> None:
    def forget() -> None:
        with acb.gpu():
            acb.begin()

    with pytest.raises(RuntimeError, match=r"before acb\.end\(\)"):
        forget()
    assert not client.gate.inside()

    def fail() -> None:
        with acb.gpu():
            acb.begin()
            raise KeyError("the program's own")

    with pytest.raises(KeyError, match="the program's own"):
        fail()
    assert not client.gate.inside()
    with acb.gpu():
        pass


def test_a_phase_is_the_threads_own(client: FakeClient) -> None:
    problems: list[BaseException] = []

    def other() -> None:
        try:
            acb.end()
        except RuntimeError as error:
            problems.append(error)
        acb.begin()
        acb.end()
        try:
            phase.__exit__(None, None, None)
        except RuntimeError as error:
            problems.append(error)

    acb.begin()
    phase = acb.gpu()
    phase.__enter__()
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    phase.__exit__(None, None, None)
    acb.end()
    assert ["on this thread" in str(problems[0]), "on another thread" in str(problems[1])] == [True, True]


def test_exceptions_pass_through(client: FakeClient) -> None:
    with pytest.raises(ZeroDivisionError):
        with acb.gpu():
            raise ZeroDivisionError
    assert client.agent.said[-1] == ("end", 0)


def test_the_decorator_keeps_the_function_what_it_was(client: FakeClient) -> None:
    @acb.gpu("1GiB")
    def predict(a: int, *, b: int = 2) -> tuple[int, int]:
        """What it does."""
        assert client.gate.inside()
        return a, b

    assert predict.__name__ == "predict"
    assert predict.__doc__ == "What it does."
    assert predict(1, b=3) == (1, 3)
    assert predict(1) == (1, 2)
    assert client.agent.said == [("need", 1 << 30), ("reserve", 1 << 30), ("end", 0)] * 2

    @acb.gpu()
    def recursive(n: int) -> int:
        return n and n + recursive(n - 1)

    assert recursive(4) == 10


def test_the_decorator_without_parentheses_says_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"write `@acb\.gpu\(\)`, with parentheses, before predict"):

        @acb.gpu  # type: ignore[arg-type]
        def predict() -> None: ...


def test_what_does_its_work_after_the_call_cannot_be_decorated(client: FakeClient) -> None:
    async def coroutine() -> None: ...

    def generator() -> Iterator[int]:
        yield 1

    async def both() -> Any:
        yield 1

    for function in (coroutine, generator, both):
        with pytest.raises(TypeError, match="around the GPU work inside it"):
            acb.gpu()(function)


def test_the_same_phase_may_be_used_again_and_within_itself(client: FakeClient) -> None:
    phase = acb.gpu("1GiB")
    for _ in range(2):
        with phase, phase:
            pass
    assert client.agent.said == [("need", 1 << 30), ("reserve", 1 << 30), ("end", 0)] * 2


# --- the surface ------------------------------------------------------------------------------------------------------


def test_the_public_surface_is_small() -> None:
    assert sorted(acb.__all__) == ["LeaseRefused", "__version__", "begin", "end", "gpu"]
    for name in acb.__all__:
        assert getattr(acb, name) is not None
    assert issubclass(acb.LeaseRefused, RuntimeError)
    with pytest.raises(AttributeError, match="no attribute 'beginn'"):
        _ = acb.beginn  # type: ignore[attr-defined]


def test_importing_it_is_light_and_needs_nothing() -> None:
    code = """
import sys
import acb
print({"threading", "socket", "json", "subprocess", "dataclasses", "argparse"} & set(sys.modules))
import acb.api, acb.client.agent, acb.devices.nvml
ours = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(sorted(name for name in ours if name not in ("_typing", "sitecustomize") and not name.startswith("__")))
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("set()\n['acb']\n", "")
