"""``torch.cuda`` and ``torch.accelerator``: what there is, how it is initialised, its memory, its random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from acb.hooks.torch.patching import Patches
from acb.hooks.torch.simulated import places
from acb.hooks.torch.simulated.ledger import Ledger
from acb.hooks.torch.simulated.places import ordinal

cuda: Any = torch.cuda
NAME = "Simulated GPU"


class DeviceProperties(SimpleNamespace):
    """What torch.cuda.get_device_properties() returns."""

    name: str
    total_memory: int
    major: int
    minor: int


def _properties(ledger: Ledger, index: int) -> DeviceProperties:
    """Those of a GPU; compute capability 8.0, so that programs take their usual ways."""
    return DeviceProperties(
        name=NAME,
        total_memory=ledger.gpus()[index].card.capacity,
        major=8,
        minor=0,
        multi_processor_count=108,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=166912,
        shared_memory_per_multiprocessor=167936,
        L2_cache_size=41943040,
        is_integrated=0,
        is_multi_gpu_board=0,
        clock_rate=1410000,
        memory_clock_rate=1215000,
        memory_bus_width=5120,
        gcnArchName="",
        uuid=f"00000000-0000-0000-0000-{index:012d}",
        pci_bus_id=index,
        pci_device_id=0,
        pci_domain_id=0,
    )


def patch_first_use(patches: Patches, ledger: Ledger) -> None:
    """Initialisation, which gets the card."""

    def _lazy_init() -> None:
        if cuda.is_initialized():
            return
        if ledger.lost:
            raise RuntimeError(
                "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the "
                "'spawn' start method"
            )
        ledger.connect()
        cuda._initialized = True

    # The replacement goes wherever the original was imported to, as in torch.cuda.random.
    import sys

    original = cuda._lazy_init
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.") and vars(module).get("_lazy_init") is original:
            patches.set(module, "_lazy_init", _lazy_init)
    patches.set(cuda, "_initialized", False)
    patches.set(cuda, "_queued_calls", [])
    patches.set(cuda, "_lazy_call", lambda callable, **kwargs: callable())
    patches.set(cuda, "_is_in_bad_fork", lambda: ledger.lost)


def patch_devices(patches: Patches, ledger: Ledger) -> None:
    """What there is, and which is the current one. Answered without using any."""

    def get_device_properties(device: Any = None) -> DeviceProperties:
        """Get the properties of a device."""
        return _properties(ledger, max(0, ordinal(device)))

    def answer(value: Any) -> Any:
        return lambda *args, **kwargs: value

    for name, value in {
        "is_available": True,
        "_is_compiled": True,
        "_device_count_nvml": -1,
        "get_arch_list": ["sm_80"],
        "can_device_access_peer": False,
        "ipc_collect": None,
        "_sleep": None,
        "get_sync_debug_mode": 0,
        "set_sync_debug_mode": None,
        "current_blas_handle": 0,
        "check_error": None,
        "utilization": 0,
    }.items():
        patches.set(cuda, name, answer(value))
    patches.set(cuda, "get_device_properties", get_device_properties)
    patches.set(cuda, "device_count", lambda: places.count())
    patches.set(cuda, "current_device", lambda: places.current())
    patches.set(cuda, "set_device", lambda device: places.choose(ordinal(device)) and None)
    patches.set(cuda, "_exchange_device", lambda index: places.choose(index))
    patches.set(cuda, "_maybe_exchange_device", lambda index: places.choose(index))

    def synchronize(device: Any = None) -> None:
        """Wait for all kernels to complete: they have."""
        ordinal(device)
        cuda._lazy_init()

    patches.set(cuda, "synchronize", synchronize)
    patches.set(cuda, "cudart", lambda: _Runtime(ledger))
    import torch.cuda.nvtx as nvtx

    patches.set(nvtx, "_nvtx", _Nvtx())


class _Runtime:
    """The few functions of the CUDA runtime that programs call through torch.cuda.cudart()."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def cudaProfilerStart(self) -> int:
        """Nothing to profile."""
        return 0

    cudaProfilerStop = cudaProfilerStart

    def cudaMemGetInfo(self, device: int = 0) -> tuple[int, int]:
        """Free and total memory in bytes."""
        card = self._ledger.gpus()[device].card
        return max(0, card.capacity - card.used()), card.capacity


class _Nvtx:
    """Marks for a profiler that is not there."""

    rangePushA = rangePop = markA = rangeStartA = rangeEnd = deviceRangeStart = deviceRangeEnd = staticmethod(
        lambda *args: 0
    )


# --- memory ---------------------------------------------------------------------------------------------------------


def _statistics(ledger: Ledger, index: int) -> dict[str, Any]:
    """In the form of PyTorch's allocator; there is no cache, so what is reserved is what is allocated."""
    gpu = ledger.gpus()[index]
    current, peak = gpu.card.held(), gpu.card.peak()
    count = sum(entry.gpu is gpu for entry in list(ledger.entries.values()))

    def pools(now: int, most: int, allocated: int, freed: int) -> dict[str, dict[str, int]]:
        whole = {"current": now, "peak": most, "allocated": allocated, "freed": freed}
        none = dict.fromkeys(whole, 0)
        return {"all": whole, "large_pool": whole, "small_pool": none}

    nothing = dict.fromkeys(("current", "peak", "allocated", "freed"), 0)
    statistics: dict[str, Any] = {
        name: pools(current, peak, peak, max(0, peak - current))
        for name in ("allocated_bytes", "active_bytes", "requested_bytes", "reserved_bytes")
    }
    statistics["inactive_split_bytes"] = pools(0, 0, 0, 0)
    for name in ("allocation", "active", "segment"):
        statistics[name] = pools(count, count, gpu.allocations, gpu.frees)
    statistics["inactive_split"] = pools(0, 0, 0, 0)
    statistics |= {"oversize_allocations": nothing, "oversize_segments": nothing, "max_split_size": -1}
    statistics |= {"num_ooms": gpu.ooms, "num_alloc_retries": 0, "num_sync_all_streams": 0}
    statistics |= {"num_device_alloc": gpu.allocations, "num_device_free": gpu.frees}
    return statistics


def patch_memory(patches: Patches, ledger: Ledger) -> None:
    """The functions of the C++ allocator on which torch.cuda.memory is built, and those that ask the CUDA runtime."""

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        """Return the global free and total GPU memory."""
        return _Runtime(ledger).cudaMemGetInfo(max(0, ordinal(device)))

    def reset_peak(device: int = 0) -> None:
        ledger.gpus()[device].card.reset_peak()

    def set_fraction(fraction: float, device: int = 0) -> None:
        ledger.gpu(device).fraction = fraction

    def list_gpu_processes(device: Any = None) -> str:
        """Return a human-readable printout of the running processes and their GPU memory use."""
        index = max(0, ordinal(device))
        lines = [f"GPU:{index}"]
        processes = [(pid, held) for pid, held in ledger.gpus()[index].card.processes() if held]
        lines += [f"process {pid:>10d} uses {held / (1 << 20):>12.3f} MB GPU memory" for pid, held in processes]
        return "\n".join(lines if processes else [*lines, "no processes are running"])

    def raw_allocation(*args: Any) -> int:
        raise RuntimeError("the simulated GPU has no addresses to hand out: caching_allocator_alloc() is not simulated")

    for name, value in {
        "_cuda_memoryStats": lambda device=0: _statistics(ledger, device),
        "_cuda_resetPeakMemoryStats": reset_peak,
        "_cuda_resetAccumulatedMemoryStats": lambda device=0: None,
        "_cuda_emptyCache": lambda: None,
        "_cuda_memorySnapshot": lambda *args: {"segments": [], "device_traces": []},
        "_cuda_setMemoryFraction": set_fraction,
        "_cuda_getMemoryFraction": lambda device=0: ledger.gpus()[device].fraction,
        "_cuda_cudaCachingAllocator_raw_alloc": raw_allocation,
        "_cuda_cudaCachingAllocator_raw_delete": lambda pointer: None,
        "_cuda_getAllocatorBackend": lambda: "native",
        "_cuda_clearCublasWorkspaces": lambda: None,
    }.items():
        patches.set(torch._C, name, value)
    for module in (cuda, cuda.memory):
        patches.set(module, "mem_get_info", mem_get_info)
        patches.set(module, "list_gpu_processes", list_gpu_processes)


# --- random numbers -------------------------------------------------------------------------------------------------


def patch_random(patches: Patches, ledger: Ledger) -> None:
    """The GPUs' random numbers are the CPU's: one generator, so that a program computes the same as without a GPU."""
    generator = torch.default_generator

    def get_rng_state(device: Any = "cuda") -> Any:
        """Return the random number generator state."""
        ordinal(device)
        return generator.get_state()

    def set_rng_state(new_state: Any, device: Any = "cuda") -> None:
        """Set the random number generator state."""
        ordinal(device)
        generator.set_state(new_state)

    def set_rng_state_all(new_states: Any) -> None:
        """Set the random number generator state of all devices."""
        for state in new_states:
            generator.set_state(state)

    def manual_seed(seed: int) -> None:
        """Set the seed for generating random numbers."""
        generator.manual_seed(int(seed))

    def manual_seed_all(seed: int) -> None:
        """Set the seed for generating random numbers on all GPUs."""
        generator.manual_seed(int(seed))

    # One function a name: the compiler has rules by function, and accepts no function under two of them.
    functions = {
        "get_rng_state": get_rng_state,
        "get_rng_state_all": lambda: [generator.get_state() for _ in range(places.count())],
        "set_rng_state": set_rng_state,
        "set_rng_state_all": set_rng_state_all,
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed_all,
        "seed": lambda: generator.seed() and None,
        "seed_all": lambda: generator.seed() and None,
        "initial_seed": lambda: generator.initial_seed(),
    }
    for name, function in functions.items():
        patches.set(cuda, name, function)
        patches.set(cuda.random, name, function)
    patches.set(cuda, "default_generators", _Generators())


class _Generators(Sequence[Any]):
    """One a GPU."""

    def __len__(self) -> int:
        return places.count()

    def __getitem__(self, index: Any) -> Any:
        return ((torch.default_generator,) * len(self))[index]


# --- the accelerator, whatever it is --------------------------------------------------------------------------------


def patch_accelerator(patches: Patches, ledger: Ledger) -> None:
    """What torch.accelerator is built on."""
    kind = torch.device("cuda")

    functions = {
        "_get_accelerator": lambda check=None: kind,
        "_accelerator_getAccelerator": lambda: kind,
        "_accelerator_getDeviceIndex": lambda: places.current(),
        "_accelerator_setDeviceIndex": lambda index: places.choose(index) and None,
        "_accelerator_exchangeDevice": lambda index: places.choose(index),
        "_accelerator_maybeExchangeDevice": lambda index: places.choose(index),
        "_accelerator_getStream": lambda index=None: cuda.current_stream(index),
        "_accelerator_setStream": lambda stream: cuda.set_stream(stream),
        "_accelerator_synchronizeDevice": lambda index=None: cuda.synchronize(index) if cuda.is_initialized() else None,
        "_accelerator_isAllocatorInitialized": lambda: cuda.is_initialized(),
        "_accelerator_emptyCache": lambda: None,
        "_accelerator_emptyHostCache": lambda: None,
        "_accelerator_getDeviceStats": lambda index=0: _statistics(ledger, index),
        "_accelerator_resetAccumulatedStats": lambda index=0: None,
        "_accelerator_resetPeakStats": lambda index=0: torch._C._cuda_resetPeakMemoryStats(index),
        "_accelerator_getMemoryInfo": lambda index=None: cuda.mem_get_info(index),
    }
    for name, function in functions.items():
        if hasattr(torch._C, name):
            patches.set(torch._C, name, function)


STEPS = (patch_first_use, patch_devices, patch_memory, patch_random, patch_accelerator)
