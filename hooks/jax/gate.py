"""Takes jax's computations, and the start of its backends, through the gate, wherever they come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from acb.client import runtime, visible
from acb.hooks.jax.fastpath import FastPath
from acb.hooks.jax.internals import GATED, Internals, like, passing, replace, thread
from acb.hooks.jax.room import again_with_more_room


def in_region(original: Callable[..., Any], concerns: Callable[..., bool]) -> Callable[..., Any]:
    """The same callable, as a region of the gate when ``concerns(*args)`` says that it is about a gated device."""

    @like(original)
    def gated(*args: Any, **kwargs: Any) -> Any:
        if thread.passes or not concerns(*args, **kwargs):
            return original(*args, **kwargs)
        gate = runtime.client().gate
        gate.enter()
        try:
            return original(*args, **kwargs)
        finally:
            gate.exit()

    return gated


def patches(fast_path: FastPath) -> list[Callable[[Internals], None]]:
    """The patches of compiled calls and of the start of a backend."""

    def counted_calls(internals: Internals) -> None:
        """Executions that come through Python: calls that missed, and those compiled ahead of time."""

        def execute(original: Any) -> Any:
            return in_region(again_with_more_room(original), lambda self, *args: self.backend.platform in GATED)

        replace(internals.pxla.ExecuteReplicated, "__call__", execute)

    def executables(internals: Internals) -> None:
        """The same a layer below, for whoever calls an executable without jax."""
        for name in ("execute", "execute_sharded", "execute_with_token"):
            if hasattr(internals.LoadedExecutable, name):
                replace(
                    internals.LoadedExecutable,
                    name,
                    lambda original: in_region(original, lambda self, *a, **k: self.client.platform in GATED),
                )

    def compilation(internals: Internals) -> None:
        """Compiling for a GPU tries kernels out on it."""
        for name in ("compile", "compile_and_load", "deserialize_executable", "defragment"):
            if hasattr(internals.Client, name):
                replace(
                    internals.Client,
                    name,
                    lambda original: in_region(original, lambda self, *a, **k: self.platform in GATED),
                )

    def first_use(internals: Internals) -> None:
        """A GPU's backend starts behind the gate: until then the process costs no GPU anything."""

        def make(original: Any) -> Any:
            entering = in_region(original, lambda platform: platform in GATED and not visible.hidden())

            @like(original)
            def _init_backend(platform: str) -> Any:
                backend = entering(platform)
                if platform in GATED or backend.platform in GATED:
                    fast_path.activate()
                return backend

            return _init_backend

        replace(internals.xla_bridge, "_init_backend", make)
        if any(backend.platform in GATED for backend in internals.backends()):
            fast_path.activate()

    def plugins(internals: Internals) -> None:
        """The CUDA plugin counts the GPUs when it is found, before any backend starts, which fixes which they are."""

        def concerns() -> bool:
            wanted = internals.config.jax_platforms.value or "cuda"
            return ("cuda" in wanted or "gpu" in wanted) and not visible.hidden() and _has_cuda_plugin()

        replace(internals.xla_bridge, "discover_pjrt_plugins", lambda original: in_region(original, concerns))

    def callbacks(internals: Internals) -> None:
        """Python called by a computation that the gate let in: it must not wait there, or both would wait for ever."""
        owner = _owner_of("emit_python_callback")

        def make(original: Any) -> Any:
            @like(original)
            def emit_python_callback(ctx: Any, callback: Any, *args: Any, **kwargs: Any) -> Any:
                @like(callback)
                def passed(*values: Any, **named: Any) -> Any:
                    with passing():
                        return callback(*values, **named)

                return original(ctx, passed, *args, **kwargs)

            return emit_python_callback

        replace(owner, "emit_python_callback", make)

    return [counted_calls, executables, compilation, plugins, first_use, callbacks]


def _has_cuda_plugin() -> bool:
    """Whether jax's CUDA plugin is installed, in either of the two ways in which jax finds plugins."""
    import pkgutil
    from importlib.metadata import entry_points

    try:
        import jax_plugins  # type: ignore[import-not-found]

        names = [module.name for module in pkgutil.iter_modules(jax_plugins.__path__)]
    except ImportError:
        names = []
    return any("cuda" in name for name in (*names, *(point.value for point in entry_points(group="jax_plugins"))))


def _owner_of(name: str) -> Any:
    """The module that defines jax's function of that name in this version."""
    import importlib

    for module in ("jax._src.callback", "jax._src.interpreters.mlir"):
        found = importlib.import_module(module)
        if getattr(getattr(found, name, None), "__module__", None) == module:
            return found
    raise AttributeError(name)
