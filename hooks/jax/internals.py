"""Where jax keeps what acb patches, from 0.4.30 to 0.12, and how one patch is put in place."""

from __future__ import annotations

import functools
import importlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

GATED = {"cuda", "gpu"}
"""The platforms whose work passes the gate, by both names that jax gives them."""


def gate_platform(platform: str) -> None:
    """Gate another platform too, such as ``cpu``: for measuring the gate, and testing it, where there is no GPU."""
    GATED.add(platform)


class Internals:
    """The modules and classes of the jax in this process; an attribute that this version lacks raises."""

    def __init__(self) -> None:
        self.config: Any = importlib.import_module("jax._src.config")
        self.pjit: Any = importlib.import_module("jax._src.pjit")
        self.pxla: Any = importlib.import_module("jax._src.interpreters.pxla")
        self.mlir: Any = importlib.import_module("jax._src.interpreters.mlir")
        self.dispatch: Any = importlib.import_module("jax._src.dispatch")
        self.array: Any = importlib.import_module("jax._src.array")
        self.xla_bridge: Any = importlib.import_module("jax._src.xla_bridge")
        self.xla_client: Any = importlib.import_module("jax._src.lib").xla_client
        self.ArrayImpl: Any = self.xla_client.ArrayImpl
        self.Client: Any = self.extension.Client
        self.Device: Any = self.xla_client.Device
        self.RuntimeError: Any = self.xla_client.XlaRuntimeError
        """jax's own error, which it has called jax.errors.JaxRuntimeError since 0.4.35 or so."""
        self.LoadedExecutable: Any = self.extension.LoadedExecutable

    @functools.cached_property
    def extension(self) -> Any:
        """The C++ module: jaxlib._jax, which was called xla_extension before 0.6."""
        lib = importlib.import_module("jax._src.lib")
        return getattr(lib, "_jax", None) or self.xla_client._xla

    def backends(self) -> list[Any]:
        """The initialised backends, without taking jax's lock: a program's thread may hold it while it waits at the
        gate.
        """
        return list(self.xla_bridge._backends.values())


class _Thread(threading.local):
    """What acb knows of a thread.

    `passes`: it passes the gate unseen, as acb's own work and callbacks from the device do. `moves`: it moves memory
    for acb, which is no operation of the program's.
    """

    passes = False
    moves = False
    executing = False
    """Whether it is inside a computation on the simulated GPU."""


thread = _Thread()


class passing:
    """Within this context the thread's jax calls pass the gate unseen."""

    def __enter__(self) -> None:
        self._before, thread.passes = thread.passes, True

    def __exit__(self, *_: object) -> None:
        thread.passes = self._before


class moving(passing):
    """Within this context the thread moves the program's memory for acb."""

    def __enter__(self) -> None:
        super().__enter__()
        self._moved, thread.moves = thread.moves, True

    def __exit__(self, *_: object) -> None:
        thread.moves = self._moved
        super().__exit__()


_simulated_clients: list[Any] = []
_simulated_devices: dict[int, tuple[Any, int]] = {}


def add_simulated(client: Any) -> None:
    """This backend's devices are simulated GPUs."""
    _simulated_clients.append(client)
    _simulated_devices.update((id(device), (device, index)) for index, device in enumerate(client.devices()))


def is_simulated(client: Any) -> bool:
    """Whether a backend is the simulated GPU's."""
    return any(client is simulated for simulated in _simulated_clients)


def is_simulated_device(device: Any) -> bool:
    """Whether a device is a simulated GPU."""
    return id(device) in _simulated_devices


def simulated_index(device: Any) -> int | None:
    """Which of the simulated GPUs a device is, from 0; None: no such one."""
    known = _simulated_devices.get(id(device))
    return None if known is None else known[1]


def on_simulated(value: Any) -> bool:
    """Whether a jax array lies on a simulated GPU. Anything else: no."""
    try:
        return id(value._sharding._internal_device_list[0]) in _simulated_devices
    except (AttributeError, IndexError, TypeError):
        return False


_HOST_MEMORY = {"pinned_host", "unpinned_host"}


def in_device_memory(array: Any) -> bool:
    """Whether an array is in its device's own memory, not in host memory that the device can reach."""
    kind = getattr(array._sharding, "memory_kind", None)
    if kind not in _HOST_MEMORY:
        return True
    return bool(array._sharding._internal_device_list[0].default_memory().kind == kind)


def on_gated(value: Any) -> bool:
    """Whether a jax array lies, or lay before it was evacuated, on a gated platform. Anything else: no."""
    try:
        return value._sharding._internal_device_list[0].platform in GATED
    except (AttributeError, IndexError, TypeError):
        return False


def apply(patches: list[Callable[[Internals], None]], internals: Internals) -> None:
    """Put patches in place, one by one; one that does not fit this version of jax is said once and left out."""
    from acb.client.runtime import warn_once

    for patch in patches:
        try:
            patch(internals)
        except Exception as error:
            name = patch.__name__.strip("_")
            warn_once(f"jax:{name}", f"jax is used without {name!r}, which does not fit this version of jax: {error!r}")


def repoint(array: Any, other: Any) -> None:
    """Give an array, deleted or not, the buffers of `other`. Before 0.6 or so `_arrays` was assigned for that."""
    if hasattr(array, "_replace_with"):
        array._replace_with(other)
        return
    array._arrays = list(other._arrays)
    identity = id(array)
    _assigned[identity] = weakref.ref(array, lambda ref: _assigned.pop(identity, None))


_assigned: dict[int, weakref.ref[Any]] = {}


def as_assigned(array: Any) -> Any:
    """An array for reading what repoint() gave to this one: C++ may still know the old buffer of one so assigned."""
    return array._arrays[0] if id(array) in _assigned else array


def replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Put ``wrap(original)`` in the place of a function, method or property. Raises AttributeError where there is
    none.
    """
    setattr(owner, name, wrap(getattr(owner, name)))


def like(original: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """functools.wraps for the methods of C++ classes too, which have no proper names to copy."""

    def named(wrapper: Callable[..., Any]) -> Callable[..., Any]:
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            value = getattr(original, name, None)
            if isinstance(value, str):
                setattr(wrapper, name, value)
        wrapper.__wrapped__ = original  # type: ignore[attr-defined]
        return wrapper

    return named
