"""Gating of C++ extensions: modules linked against PyTorch, whose functions no function mode sees.

Such a module is told by its file, which names PyTorch's libraries, whether it was built with
``torch.utils.cpp_extension``, at once or ahead. Its functions are wrapped when its import has just ended, before the
importer binds a name to one of them. What is called of it is

- a region, whenever the module is linked against a library of CUDA: what it does on the GPU need not show in its
  arguments, nor be the process's second use of it;
- a region, if an argument is on a gated device, for any other module: its C++ can reach the GPU through PyTorch only.

Classes are left as they are: a method that C++ calls back would look to it as if the program had overridden it. The
operators of ``torch.ops`` need nothing, for the sentinel sees them. Code of torch.compile() runs in regions already.
"""

from __future__ import annotations

import functools
import sys
from importlib.machinery import ExtensionFileLoader
from types import ModuleType
from typing import Any

from acb.client import visible
from acb.client.runtime import warn_once
from acb.hooks import elf
from acb.hooks.torch.devices import touches
from acb.hooks.torch.patching import Patches
from acb.hooks.torch.regions import gated

_PYTORCH = ("libtorch", "libc10")
_CUDA = (
    *("libtorch_cuda", "libc10_cuda", "libcuda", "libcublas", "libcudnn", "libcufft", "libcurand", "libcusolver"),
    *("libcusparse", "libnccl", "libtorch_hip", "libc10_hip", "libamdhip"),
)
_OWN = ("torch", "functorch")  # top packages of PyTorch, whose extensions are its own
_FUNCTIONS = ("builtin_function_or_method", "nb_func", "cython_function_or_method")


def patch_extension_loading(patches: Patches) -> None:
    """Where Python has loaded an extension module: by an import, or by torch.utils.cpp_extension."""
    loader: Any = ExtensionFileLoader
    original = loader.exec_module

    @functools.wraps(original)
    def exec_module(self: Any, module: Any) -> None:
        original(self, module)
        _loaded(module)

    # Under the import system's file name Python trims this frame from tracebacks of failed imports.
    frame: Any = exec_module
    frame.__code__ = frame.__code__.replace(co_filename="<frozen importlib._bootstrap_external>")
    patches.set(loader, "exec_module", exec_module)


def _loaded(module: Any) -> None:
    """Gate an extension module, if it is one of PyTorch's kind. Raises nothing."""
    try:
        name = module.__name__
        package, _, _ = name.rpartition(".")
        if name.partition(".")[0] in _OWN or (package and package not in sys.modules):
            return  # torch.compile() loads what it has made as part of a package that does not exist
        libraries = elf.needed(module.__file__)
        if any(library.startswith(_PYTORCH) for library in libraries):
            gate_functions(module, any(library.startswith(_CUDA) for library in libraries))
    except Exception as error:
        name = getattr(module, "__name__", module)
        warn_once(f"extension:{name}", f"functions of the extension {name} are not gated: {error!r}")


def gate_functions(module: ModuleType, uses_cuda: bool) -> None:
    """Wrap the functions of an extension module and of the modules that it has defined inside itself.

    Those that tell a version are asked on import by many packages, and are no reason to wait for a GPU.
    """
    for name, value in list(vars(module).items()):
        if isinstance(value, ModuleType):
            inner = getattr(value, "__file__", None) in (None, getattr(module, "__file__", None))
            if inner and value.__name__.startswith(module.__name__ + "."):
                gate_functions(value, uses_cuda)
        elif type(value).__name__ in _FUNCTIONS and not _foreign(value, module) and "version" not in name:
            wrapper = gated(value, _visible if uses_cuda else touches)
            wrapper.__qualname__ = value.__name__  # by which it is pickled; pybind11 has a name of its own there
            setattr(module, name, wrapper)


def _foreign(function: Any, module: ModuleType) -> bool:
    """Whether a module has only borrowed this function from another one."""
    owner = getattr(function, "__self__", module)
    return isinstance(owner, ModuleType) and owner.__name__ != module.__name__  # a second import makes a second module


def _visible(args: Any, kwargs: Any) -> bool:
    return not visible.hidden()


STEPS = (patch_extension_loading,)
"""In the order in which they are applied."""
