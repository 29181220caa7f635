"""Gating of code that the sentinel cannot see into: compiled, scripted and traced callables, disabled modes, DLPack."""

from __future__ import annotations

import functools
from typing import Any

import torch

from acb.hooks.torch import reach, regions
from acb.hooks.torch.devices import touches
from acb.hooks.torch.patching import Patches
from acb.hooks.torch.regions import gated, run_opaque


def patch_compile(patches: Patches) -> None:
    """What torch.compile() returns: a region, with the sentinel off before its guards look at the mode stack."""
    original = torch.compile

    @functools.wraps(original)
    def compile(model: Any = None, *args: Any, **kwargs: Any) -> Any:
        compiled = original(model, *args, **kwargs)
        if model is None or isinstance(compiled, (torch.nn.Module, type)) or not callable(compiled):
            return compiled  # a decorator, which calls this function again, or what has a gated call already
        return gated(compiled, opaque=True)

    patches.set(torch, "compile", compile)


def patch_script(patches: Patches) -> None:
    """Scripted and traced functions, and the methods of scripted modules."""
    for kind in (torch._C.ScriptFunction, torch._C.ScriptMethod):
        patches.replace(kind, "__call__", lambda original: gated(original, opaque=True))


def patch_script_tools(patches: Patches) -> None:
    """What runs a module in C++ or records it: a recording would show where the sentinel's own code stood."""
    import torch.jit._freeze as freeze
    import torch.jit._serialization as serialization
    import torch.jit._trace as trace

    for owner, names in (
        (trace, ("trace", "trace_module")),
        (freeze, ("freeze", "optimize_for_inference", "run_frozen_optimizations")),
        (serialization, ("load", "save", "jit_module_from_flatbuffer")),
    ):
        patches.replace_all(owner, names, lambda original: gated(original, opaque=True), torch.jit)


def patch_export(patches: Patches) -> None:
    """torch.export, which records modules as well."""
    import torch.export as export

    patches.replace_all(export, ("export", "export_for_training"), lambda original: gated(original, opaque=True))


def patch_disabled_modes(patches: Patches) -> None:
    """``with torch._C.DisableTorchFunction()``: what runs inside is hidden from the sentinel, so it is one region."""
    original: Any = torch._C.DisableTorchFunction

    class DisableTorchFunction:
        """Disables function modes and overrides, the sentinel among them; once the GPU is in use, holding a region."""

        def __enter__(self) -> Any:
            self._stretch = regions.Stretch()
            self._stretch.enter()
            self._inner = original()
            return self._inner.__enter__()

        def __exit__(self, *error: Any) -> Any:
            try:
                return self._inner.__exit__(*error)
            finally:
                self._stretch.exit()

    patches.set(torch._C, "DisableTorchFunction", DisableTorchFunction)


def patch_dlpack(patches: Patches) -> None:
    """DLPack hands out raw addresses: through the gate, and what was handed out is not moved any more."""
    import torch.utils.dlpack as dlpack

    def exporting(original: Any) -> Any:
        @functools.wraps(original)
        def export(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            capsule = original(tensor, *args, **kwargs)
            reach.pin(tensor, "was handed out through DLPack")
            return capsule

        return gated(export)  # with the pinning, or memory could be moved in between

    patches.replace(torch._C, "_to_dlpack", exporting)
    if hasattr(torch._C, "_to_dlpack_versioned"):
        patches.replace(torch._C, "_to_dlpack_versioned", exporting)
    for owner in (dlpack, torch):
        patches.set(owner, "to_dlpack", torch._C._to_dlpack)

    def importing(original: Any) -> Any:
        @functools.wraps(original)
        def from_dlpack(*args: Any, **kwargs: Any) -> Any:
            source = args[0] if args else None
            if touches(args, kwargs) or _on_gpu(source):
                return run_opaque(original, args, kwargs)
            return original(*args, **kwargs)

        return from_dlpack

    patches.replace(dlpack, "from_dlpack", importing, torch)


def _on_gpu(exporter: Any) -> bool:
    """Whether another framework's array says that it lies on a GPU; a bare capsule does not say."""
    ask = getattr(exporter, "__dlpack_device__", None)
    return ask is None or int(ask()[0]) != 1


def patch_array_interface(patches: Patches) -> None:
    """``__cuda_array_interface__`` hands out a raw address too."""
    described: Any = vars(torch.Tensor).get("__cuda_array_interface__")
    if not isinstance(described, property):
        return

    def get(tensor: Any) -> Any:
        interface = described.__get__(tensor)
        reach.pin(tensor, "was handed out through __cuda_array_interface__")
        return interface

    patches.set(torch.Tensor, "__cuda_array_interface__", property(gated(get), doc=described.__doc__))


STEPS = (
    patch_compile,
    patch_script,
    patch_script_tools,
    patch_export,
    patch_disabled_modes,
    patch_dlpack,
    patch_array_interface,
)
"""In the order in which they are applied."""
