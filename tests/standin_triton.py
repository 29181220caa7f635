"""A package `triton` without a compiler, built as Triton's sources are: what a launch passes through, nothing else.

Its kernels do nothing but call ``triton.gpu.touch(what, ...)``, which notes it in ``triton.gpu.touched``.
"""

from __future__ import annotations

from pathlib import Path

_GPU = """
touched = []

def touch(what, *args):
    touched.append(what)
"""

_INTERFACE = """
class KernelInterface:
    def warmup(self, *args, grid, **kwargs):
        return self.run(*args, grid=grid, warmup=True, **kwargs)

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.run(grid=grid, warmup=False, *args, **kwargs)
"""

_AUTOTUNER = """
from .jit import KernelInterface

class Autotuner(KernelInterface):
    def __init__(self, fn, configs):
        self.fn, self.configs, self.best = fn, configs, None

    def run(self, *args, **kwargs):
        if self.best is None:
            for config in self.configs:
                self.fn.run(*args, **kwargs, **config)
            self.best = self.configs[0]
        return self.fn.run(*args, **kwargs, **self.best)

class Heuristics(KernelInterface):
    def __init__(self, fn, values):
        self.fn, self.values = fn, values

    def run(self, *args, **kwargs):
        return self.fn.run(*args, **kwargs, **{name: value(kwargs) for name, value in self.values.items()})
"""

_UTILITIES = """
from triton import gpu

class CudaUtils:
    def __new__(cls):
        if not hasattr(cls, "instance"):
            cls.instance = super().__new__(cls)
        return cls.instance

    def __init__(self):
        self.load_binary = lambda name: gpu.touch(f"load {name}")
        self.get_device_properties = lambda device: {"max_shared_mem": 1024}
"""

_OF_3 = {
    "__init__": """
from . import gpu, runtime, compiler
from .runtime.jit import jit
from .backends.nvidia import driver
""",
    "gpu": _GPU,
    "runtime/__init__": "from . import jit, autotuner",
    "runtime/jit": _INTERFACE
    + """
class JITFunction(KernelInterface):
    def __init__(self, fn):
        self.fn, self.compiled = fn, None

    def run(self, *args, grid, warmup, **kwargs):
        from ..compiler import CompiledKernel
        if self.compiled is None:
            self.compiled = CompiledKernel(self.fn.__name__)
        if not warmup:
            self.compiled.run(*grid, *args)
        return self.compiled

class InterpretedFunction(KernelInterface):
    def __init__(self, fn):
        self.fn = fn

    def run(self, *args, grid, warmup, **kwargs):
        if not warmup:
            self.fn(*args)

def jit(fn):
    return JITFunction(fn)
""",
    "runtime/autotuner": _AUTOTUNER,
    "compiler": """
class CompiledKernel:
    def __init__(self, name):
        self.name, self._run = name, None

    @property
    def run(self):
        if self._run is None:
            from .backends.nvidia import driver
            driver.CudaUtils().load_binary(self.name)
            self._run = driver.CudaLauncher(self.name)
        return self._run

    def __getitem__(self, grid):
        return lambda *args: self.run(*grid, *args)
""",
    "backends/__init__": "",
    "backends/nvidia/__init__": "",
    "backends/nvidia/driver": _UTILITIES
    + """
class CudaLauncher:
    def __init__(self, name):
        self.name = name

    def __call__(self, *args):
        gpu.touch(f"run {self.name}", *args)

def _cuda_driver_is_active():
    return True
""",
}

_OF_2 = {
    "__init__": "from . import gpu, runtime, compiler\nfrom .runtime.jit import jit",
    "gpu": _GPU,
    "runtime/__init__": "from . import driver, jit, autotuner",
    "runtime/driver": _UTILITIES,
    "runtime/jit": _INTERFACE
    + """
class JITFunction(KernelInterface):
    def __init__(self, fn):
        self.fn, self.compiled = fn, None
        self.run = self._make_launcher()

    def _make_launcher(self):
        scope = {"self": self}
        exec('''
def launcher(*args, grid, num_warps=4, warmup=False, **kwargs):
    from triton.compiler import CompiledKernel
    if self.compiled is None:
        self.compiled = CompiledKernel(self.fn.__name__)
    if not warmup:
        self.compiled.c_wrapper(*grid, *args)
    return self.compiled
''', scope)
        return scope["launcher"]

def jit(fn):
    return JITFunction(fn)
""",
    "runtime/autotuner": _AUTOTUNER,
    "compiler": """
from . import gpu
from .runtime import driver

class CompiledKernel:
    def __init__(self, name):
        self.name, self.loaded = name, False
        self.c_wrapper = lambda *args: gpu.touch(f"run {name}", *args)

    def __getattribute__(self, name):
        if name == "c_wrapper" and not self.loaded:
            driver.CudaUtils().load_binary(self.name)
            self.loaded = True
        return super().__getattribute__(name)

    def __getitem__(self, grid):
        return lambda *args: self.c_wrapper(*grid, *args)
""",
}

LAYOUTS = {"3": _OF_3, "2": _OF_2}
"""The sources as those of Triton 3.9, and of 2.0 and 2.1."""


def write(directory: Path, layout: str = "3") -> Path:
    """Write the package below `directory`, which is to be put on the path; returns that."""
    for name, text in LAYOUTS[layout].items():
        file = directory / "triton" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return directory
