"""Simulated GPUs for jax: a second CPU backend that calls itself ``gpu``.

Inside, jax goes on to compile for the CPU, so results are those of the CPU, bit for bit; outside, devices, backend and
arrays answer as a GPU's do. Their memory is the simulated cards' (see ledger and simulated_work).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from acb.hooks.jax.hostbuffers import hide_memory
from acb.hooks.jax.internals import (
    Internals,
    add_simulated,
    is_simulated,
    is_simulated_device,
    like,
    on_simulated,
    replace,
    simulated_index,
)
from acb.hooks.jax.ledger import Ledger, count_gpus

KIND = "Simulated GPU"
_NAMES = {"cuda", "gpu"}
_ATTRIBUTES = {"compute_capability": "8.0", "core_count": 1}


def patches(ledger: Ledger) -> list[Callable[[Internals], None]]:
    """What makes the simulated GPU appear; to be put in place before any backend starts."""

    def backend_factory(internals: Internals) -> None:
        """The backend ``cuda``, in the place of a real one if there is one."""
        bridge = internals.xla_bridge

        def make(original: Any) -> Any:
            @like(original)
            def _init_backend(platform: str) -> Any:
                if platform != "cuda":
                    return original(platform)
                client = _make_client(internals)
                add_simulated(client)
                for hook in getattr(bridge, "_backend_initialization_hooks", ()):
                    hook(client)
                return client

            return _init_backend

        def registering(original: Any) -> Any:
            @like(original)
            def _discover_and_register_pjrt_plugins() -> Any:
                answer = original()
                if "cuda" not in bridge._backend_factories:
                    bridge.register_backend_factory("cuda", _never_called, priority=500, fail_quietly=False)
                return answer

            return _discover_and_register_pjrt_plugins

        replace(bridge, "_init_backend", make)
        replace(bridge, "_discover_and_register_pjrt_plugins", registering)
        bridge._alias_to_platforms["gpu"] = ["cuda"]

    def visible_gpu(internals: Internals) -> None:
        """jax looks for NVIDIA's device files before it starts the backend ``cuda`` (since 0.4.32 or so)."""
        try:
            hardware: Any = importlib.import_module("jax._src.hardware_utils")
        except ImportError:
            return
        if hasattr(hardware, "has_visible_nvidia_gpu"):
            hardware.has_visible_nvidia_gpu = lambda: True

    def backend_answers(internals: Internals) -> None:
        client = internals.Client
        replace(client, "platform", lambda original: _answer(original, is_simulated, "gpu"))
        replace(client, "platform_version", lambda original: _answer(original, is_simulated, "cuda (simulated)"))

    def device_answers(internals: Internals) -> None:
        device = internals.Device
        replace(device, "platform", lambda original: _answer(original, is_simulated_device, "gpu"))
        replace(device, "device_kind", lambda original: _answer(original, is_simulated_device, KIND))
        replace(device, "__repr__", lambda original: _named(original, "CudaDevice(id={})"))
        replace(device, "__str__", lambda original: _named(original, "cuda:{}"))
        replace(device, "memory_stats", lambda original: _memory_stats(original, ledger))
        replace(device, "__getattr__", _attributes)

    def device_list_answers(internals: Internals) -> None:
        kind = internals.xla_client.DeviceList
        if not hasattr(kind, "device_kind"):
            return  # before 0.6 or so
        replace(
            kind, "device_kind", lambda original: _answer(original, lambda self: is_simulated_device(self[0]), KIND)
        )

    def array_answers(internals: Internals) -> None:
        array = internals.ArrayImpl
        replace(array, "platform", lambda original: _method_answer(original, "gpu"))
        # DLPack passes an address on: that of host memory.
        replace(array, "__dlpack_device__", _dlpack_device)

    def lowering(internals: Internals) -> None:
        """Compiling goes by the backend's true platform, and asks the backend for it here."""

        def make(original: Any) -> Any:
            @like(original)
            def get_backend(self: Any, *args: Any, **kwargs: Any) -> Any:
                return self.backend if is_simulated(self.backend) else original(self, *args, **kwargs)

            return get_backend

        context = internals.mlir.ModuleContext
        if hasattr(context, "get_backend"):
            replace(context, "get_backend", make)
        else:  # before 0.4.36 or so
            getter = context.backend.fget
            context.backend = property(lambda self: self._backend if is_simulated(self._backend) else getter(self))

        def check(original: Any) -> Any:
            @like(original)
            def check_backend_matches(inner: Any, outer: Any) -> None:
                if inner not in _NAMES:
                    original(inner, outer)

            return check_backend_matches

        replace(internals.mlir, "check_backend_matches", check)

    def true_platform(internals: Internals) -> None:
        """Before 0.7 or so jax compiled for ``backend.platform``; since then for ``_raw_platform``, the true one."""
        if hasattr(internals.Client, "_raw_platform"):
            return
        _lower_for_the_cpu(internals)

    def exporting(internals: Internals) -> None:
        """What is exported here is to run here."""
        module: Any = importlib.import_module("jax._src.export._export")
        replace(module, "default_export_platform", lambda original: lambda: _export_platform(original))

    def hidden_memory(internals: Internals) -> None:
        """A GPU's memory cannot be read through Python's buffer protocol."""
        hide_memory(internals.ArrayImpl)

    return [
        backend_factory, visible_gpu, backend_answers, device_answers, device_list_answers, array_answers, lowering,
        true_platform, exporting, hidden_memory,
    ]  # fmt: skip


def wanted() -> bool:
    """Whether jax, too, shall see the simulated GPU: not if the user keeps it to the CPU."""
    platforms = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME") or ""
    return not platforms or bool(_NAMES & set(platforms.split(",")))


def _make_client(internals: Internals) -> Any:
    """A CPU client of its own with a device a GPU."""
    options: dict[str, Any] = {"asynchronous": internals.xla_bridge._CPU_ENABLE_ASYNC_DISPATCH.value}
    count = count_gpus()
    try:
        return internals.xla_client.make_cpu_client(**options, num_devices=count)
    except TypeError:  # before 0.5 the number came from XLA_FLAGS alone
        if count > 1:
            raise RuntimeError(f"{count} simulated GPUs need jax 0.5 or newer; ask for one, or update jax") from None
        return internals.xla_client.make_cpu_client(**options)


def _never_called() -> Any:
    raise RuntimeError("the simulated GPU's backend is made elsewhere")


def _answer(original: Any, simulated: Callable[[Any], bool], value: str) -> property:
    getter = original.fget
    return property(lambda self: value if simulated(self) else getter(self), doc=original.__doc__)


def _named(original: Any, pattern: str) -> Callable[[Any], str]:
    return lambda self: pattern.format(self.id) if is_simulated_device(self) else original(self)


def _method_answer(original: Any, value: str) -> Callable[[Any], str]:
    return lambda self: value if on_simulated(self) else original(self)


def _dlpack_device(original: Any) -> Callable[[Any], Any]:
    def __dlpack_device__(self: Any) -> Any:
        return (1, 0) if on_simulated(self) else original(self)  # kDLCPU

    return __dlpack_device__


def _memory_stats(original: Any, ledger: Ledger) -> Callable[[Any], Any]:
    def memory_stats(self: Any) -> Any:
        if not is_simulated_device(self):
            return original(self)
        index = simulated_index(self) or 0
        card, buffers = ledger.cards[index], ledger.buffers(index)
        return {
            "num_allocs": len(buffers),
            "bytes_in_use": card.held(),
            "peak_bytes_in_use": card.peak(),
            "largest_alloc_size": max(buffers, default=0),
            "bytes_limit": card.capacity,
            "bytes_reserved": 0,
            "peak_bytes_reserved": 0,
            "largest_free_block_bytes": 0,
        }

    return memory_stats


def _attributes(original: Any) -> Callable[[Any, str], Any]:
    def __getattr__(self: Any, name: str) -> Any:
        if name in _ATTRIBUTES and is_simulated_device(self):
            return _ATTRIBUTES[name]
        return original(self, name)

    return __getattr__


def _export_platform(original: Callable[[], str]) -> str:
    platform = original()
    return "cpu" if platform in _NAMES else platform


def _lower_for_the_cpu(internals: Internals) -> None:
    """For older versions: hand the true platform to the lowering of computations for the simulated GPU."""

    def make(original: Any) -> Any:
        @like(original)
        def lower(*args: Any, lowering_platforms: Any = None, **kwargs: Any) -> Any:
            if lowering_platforms is None and internals.xla_bridge.default_backend() == "gpu":
                lowering_platforms = ("cpu",)
            return original(*args, lowering_platforms=lowering_platforms, **kwargs)

        return lower

    replace(internals.pxla, "lower_sharding_computation", make)
