"""What Triton does on the GPU: it launches kernels, loads their code, and asks the driver about the device.

A launch is one region: ``kernel[grid](...)``, with the heuristics and the autotuner around it (which would choose
wrongly if the GPU were given up between two measurements), or ``compiled[grid](...)``. Inside a module's forward, or in
code of torch.compile(), which has launchers of its own, the region is there already and a launch costs one look at it.

``kernel.warmup(...)`` compiles only. It asks which GPU it compiles for, which binds the process, and needs no lease
then. Nor do kernels need one that Triton interprets on the host: they copy their tensors by PyTorch's operations.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from acb.client import runtime, visible
from acb.hooks.torch.patching import Patches

_REGIONS = "acb.hooks.torch.regions"


def through_gate(func: Any, args: Any, kwargs: Any) -> Any:
    """Call `func` as a region: one of PyTorch's hooks if PyTorch is there, whose own calls it covers."""
    regions = sys.modules.get(_REGIONS)
    if regions is not None:
        return regions.run(func, args, kwargs)
    if "torch" in sys.modules:
        return func(*args, **kwargs)  # a PyTorch that cannot use a GPU, nor can Triton then
    gate = runtime.client().gate
    gate.enter()
    try:
        return func(*args, **kwargs)
    finally:
        gate.exit()


def _gated(original: Any) -> Any:
    """`original` as a region, unless it is told to compile only."""

    @functools.wraps(original)
    def region(*args: Any, **kwargs: Any) -> Any:
        regions = sys.modules.get(_REGIONS)
        if (regions is not None and regions.here.state.depth) or kwargs.get("warmup"):
            return original(*args, **kwargs)
        return through_gate(original, args, kwargs)

    return region


def _binding(original: Any) -> Any:
    """`original`, once it is known which GPU this process uses: the driver settles that with its first call."""

    @functools.wraps(original)
    def bound(*args: Any, **kwargs: Any) -> Any:
        if not runtime.client().bound and not visible.hidden():
            through_gate(lambda: None, (), {})
        return original(*args, **kwargs)

    return bound


def patch_kernels(patches: Patches) -> None:
    """``kernel[grid](...)``. Until 2.1 each kernel has a launcher generated for it, in place of a method."""
    kind = sys.modules["triton.runtime.jit"].JITFunction
    if "run" in vars(kind):
        patches.replace(kind, "run", _gated)
        return

    def making(original: Any) -> Any:
        @functools.wraps(original)
        def _make_launcher(self: Any, *args: Any) -> Any:
            return _gated(original(self, *args))

        return _make_launcher

    patches.replace(kind, "_make_launcher", making)


def patch_tuners(patches: Patches) -> None:
    """Heuristics and the autotuner: one region around all that they run."""
    tuning = sys.modules["triton.runtime.autotuner"]

    def make(original: Any) -> Any:
        gated = _gated(original)

        @functools.wraps(original)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            return (original if _interpreted(self) else gated)(self, *args, **kwargs)

        return run

    for name in ("Autotuner", "Heuristics"):
        if hasattr(tuning, name):
            patches.replace(getattr(tuning, name), "run", make)


def _interpreted(kernel: Any) -> bool:
    """Whether Triton runs this kernel, or the one that is tuned, on the host: ``TRITON_INTERPRET=1``."""
    while kernel is not None and type(kernel).__name__ != "InterpretedFunction":
        kernel = getattr(kernel, "fn", None)
    return kernel is not None


def _drivers() -> Iterator[Any]:
    """Triton's modules that talk to the GPU's driver: one a maker since 3.0, before that one for all."""
    makers = ("triton.backends.nvidia.driver", "triton.backends.amd.driver")
    for name in (*makers, "triton.runtime.driver", "triton.compiler"):
        if name in sys.modules:
            yield sys.modules[name]


def patch_launchers(patches: Patches) -> None:
    """What launches a compiled kernel, however it is called: ``compiled[grid](...)``, ``compiled.run(...)``."""
    found = [
        kind
        for driver in _drivers()
        for name in ("CudaLauncher", "HIPLauncher")
        if (kind := vars(driver).get(name)) is not None
    ]
    for kind in found:
        patches.replace(kind, "__call__", _gated)
    if not found:
        _patch_compiled(patches)


def _patch_compiled(patches: Patches) -> None:
    """Until 2.3 the launcher is a C function that each compiled kernel loads for itself."""
    kind = sys.modules["triton.compiler"].CompiledKernel
    original = kind.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name in ("run", "c_wrapper"):
            if name in self.__dict__:
                self.__dict__[name] = _gated(self.__dict__[name])

    patches.set(kind, "__init__", __init__)


_UTILITIES: dict[str, Callable[[Any], Any]] = {
    "load_binary": _gated,  # puts code on the GPU
    "set_printf_fifo_size": _gated,
    "cuOccupancyMaxActiveClusters": _gated,
    "cuMemAlloc": _gated,
    "cuMemcpyHtoD": _gated,
    "get_device_properties": _binding,
}


def patch_utilities(patches: Patches) -> None:
    """Triton's own calls of the driver. They are made, like the driver itself, when they are first asked for."""

    def wrap(utilities: Any) -> None:
        for name, make in _UTILITIES.items():
            function = vars(utilities).get(name)
            if function is not None and not hasattr(function, "__wrapped__"):
                setattr(utilities, name, make(function))

    def making(original: Any) -> Any:
        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            wrap(self)

        return __init__

    for driver in _drivers():
        for name in ("CudaUtils", "HIPUtils"):
            kind = vars(driver).get(name)
            if kind is not None:
                patches.replace(kind, "__init__", making)
                if isinstance(vars(kind).get("instance"), kind):
                    wrap(kind.instance)


def patch_driver_start(patches: Patches) -> None:
    """Where PyTorch is not there to ask, Triton 3.9 starts CUDA itself to see whether there is any."""
    for driver in _drivers():
        patches.replace_all(driver, ("_cuda_driver_is_active",), _binding)


STEPS = (
    patch_kernels,
    patch_tuners,
    patch_launchers,
    patch_utilities,
    patch_driver_start,
)
"""In the order in which they are applied."""
