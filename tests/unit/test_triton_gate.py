"""Gating of Triton: no kernel is launched, and no code of one loaded, while the gate is closed.

Tried on a stand-in for Triton that is built as its sources are, and on Triton itself where that is installed.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import standin_triton

torch: Any = pytest.importorskip("torch")
from gated_cpu import Gated, gated_cpu  # noqa: E402

from acb.client import runtime  # noqa: E402
from acb.hooks import triton as hook  # noqa: E402


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gated]:
    """PyTorch with CPU tensors behind a gate, which is the process's."""
    with gated_cpu() as made:
        client = types.SimpleNamespace(gating=True, bound=True, gate=made.gate)
        monkeypatch.setattr(runtime, "client", lambda: client)
        yield made


@pytest.fixture
def modules() -> Iterator[None]:
    """Room for another package of Triton's name."""
    own = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "triton"}
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        del sys.modules[name]
    sys.modules.update(own)


@pytest.fixture(params=list(standin_triton.LAYOUTS))
def triton(
    request: pytest.FixtureRequest, tmp_path: Path, modules: None, gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """The stand-in, hooked."""
    monkeypatch.syspath_prepend(str(standin_triton.write(tmp_path, request.param)))
    module = importlib.import_module("triton")
    hook.install(module)
    return module


def kernel(*args: Any) -> None:
    """What a kernel is made of; only an interpreter calls it."""
    sys.modules["triton"].gpu.touch("interpreted")


def launches(triton: Any) -> dict[str, Callable[[], Any]]:
    """The ways to launch a kernel."""
    compiled = triton.jit(kernel)
    tuned = triton.runtime.autotuner.Autotuner(compiled, [{"num_warps": 4}, {"num_warps": 8}])
    heuristic = triton.runtime.autotuner.Heuristics(tuned, {"num_stages": lambda given: 2})
    ready = compiled.warmup(1, grid=(1, 1, 1))
    attribute = "c_wrapper" if isinstance(vars(compiled).get("run"), types.FunctionType) else "run"
    return {
        "kernel[grid]": lambda: compiled[(1, 1, 1)](7),
        "kernel.run": lambda: compiled.run(7, grid=(1, 1, 1), warmup=False),
        "autotuner": lambda: tuned[(1, 1, 1)](7),
        "heuristics": lambda: heuristic[(1, 1, 1)](7),
        "compiled[grid]": lambda: ready[(1, 1, 1)](7),
        "compiled.run": lambda: getattr(ready, attribute)(1, 1, 1, 7),
    }


@pytest.mark.parametrize(
    "way", ["kernel[grid]", "kernel.run", "autotuner", "heuristics", "compiled[grid]", "compiled.run"]
)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_launch_waits_at_the_closed_gate(triton: Any, gated: Gated, way: str, loaded: bool) -> None:
    launch = launches(triton)[way]
    if loaded:
        launch()
    done = len(triton.gpu.touched)
    seen = []

    def touch(what: str, *args: Any) -> None:
        seen.append((what, gated.gate.inside(), gated.gate.closed))

    triton.gpu.touch = touch
    assert gated.stops(launch)
    assert done == len(triton.gpu.touched)
    assert "run kernel" in [what for what, _, _ in seen]
    assert all(inside and not closed for _, inside, closed in seen)


def test_a_launch_is_one_region_with_all_that_is_tried_out_before(triton: Any, gated: Gated) -> None:
    ways = launches(triton)
    for way in ("kernel[grid]", "heuristics", "heuristics", "kernel[grid]"):
        gated.regions = 0
        ways[way]()
        assert gated.regions == 1
    assert triton.gpu.touched.count("run kernel") == 6


def test_launches_inside_a_module_belong_to_its_region(triton: Any, gated: Gated) -> None:
    launch = launches(triton)["kernel[grid]"]

    class Twice(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            launch()
            launch()
            return x

    module, x = Twice(), torch.ones(1)
    gated.regions = 0
    module(x)
    assert gated.regions == 1
    assert triton.gpu.touched == ["load kernel", "run kernel", "run kernel"]


def test_compiling_ahead_waits_for_nobody(triton: Any, gated: Gated) -> None:
    compiled = triton.jit(kernel)
    assert not gated.stops(lambda: compiled.warmup(1, grid=(1, 1, 1)))
    assert compiled.compiled is not None
    assert triton.gpu.touched == []


def test_what_asks_about_the_device_first_binds_the_process(
    triton: Any, gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = sys.modules.get("triton.backends.nvidia.driver") or triton.runtime.driver
    ask = driver.CudaUtils().get_device_properties
    assert not gated.stops(lambda: ask(0))
    monkeypatch.setattr(runtime.client(), "bound", False)
    assert gated.stops(lambda: ask(0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not gated.stops(lambda: ask(0))


@pytest.mark.parametrize("triton", ["3"], indirect=True)
def test_interpreted_kernels_run_on_the_host(triton: Any, gated: Gated) -> None:
    tuned = triton.runtime.autotuner.Autotuner(triton.runtime.jit.InterpretedFunction(kernel), [{}])
    assert not gated.stops(lambda: tuned[(1, 1, 1)](7))
    assert triton.gpu.touched == ["interpreted", "interpreted"]


def test_a_kernel_keeps_its_name_and_hooking_twice_changes_nothing(triton: Any) -> None:
    before = triton.runtime.autotuner.Autotuner.run
    hook.install(triton)
    assert triton.runtime.autotuner.Autotuner.run is before
    assert before.__name__ == "run"


def test_a_part_that_is_missing_is_said_and_costs_only_itself(
    tmp_path: Path, modules: None, gated: Gated, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    standin_triton.write(tmp_path)
    (tmp_path / "triton" / "runtime" / "__init__.py").write_text("from . import jit")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(runtime, "_warned", set())
    triton = importlib.import_module("triton")
    hook.install(triton)
    said = capsys.readouterr().err
    assert said.startswith("acb: Triton hook 'patch tuners' is not in effect: KeyError")
    assert said.count("\n") == 1
    assert gated.stops(lambda: triton.jit(kernel)[(1, 1, 1)](7))


# --- Triton itself, with a driver that launches nothing ---------------------------------------------------------------

SOURCE = """
import triton
import triton.language as tl

@triton.jit
def increase(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)
"""


@pytest.mark.filterwarnings("ignore")
def test_real_triton_compiles_at_any_time_and_launches_through_the_gate(
    tmp_path: Path, gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton: Any = pytest.importorskip("triton", "3.0")
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found]

    hook.install(triton)
    launched: list[bool] = []
    nvidia: Any = importlib.import_module("triton.backends.nvidia.driver")

    class Launcher:
        def __init__(self, *args: Any) -> None: ...

        def __call__(self, *args: Any) -> None:
            launched.append(gated.gate.inside())

    class Driver:
        utils = types.SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
            load_binary=lambda *args: (1, 1, 0, 0, 1024),
            unload_module=lambda module: None,
        )
        launcher_cls = Launcher
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    assert hasattr(nvidia.CudaLauncher.__call__, "__wrapped__")
    assert hasattr(nvidia.CudaUtils.__init__, "__wrapped__")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "standin_kernels.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    triton.runtime.driver.set_active(Driver())
    increase = importlib.import_module("standin_kernels").increase
    x = torch.zeros(8)
    assert not gated.stops(lambda: increase.warmup(torch.float32, 8, BLOCK=8, grid=(1,)))
    assert launched == []
    assert gated.stops(lambda: increase[(1,)](x, 8, BLOCK=8))
    assert launched == [True]
