"""PyTorch's gating and evacuation on a real GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.version.cuda is None or not torch.cuda.is_available(), reason="no GPU for PyTorch"),
]
GIB = 1 << 30


def on_own_thread(work: Callable[[], Any]) -> Any:
    """Do what the agent does, where the agent does it. Passes on what it raises."""
    with ThreadPoolExecutor(1, "acb-test") as executor:
        return executor.submit(work).result()


def test_everything_leaves_the_gpu_and_comes_back() -> None:
    from acb.hooks.torch.evacuator import TorchEvacuator

    evacuator = TorchEvacuator()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.LSTM(256, 64)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(8, 4, 256, device="cuda")
    loss = model(x)[0].pow(2).mean()
    loss.backward()
    optimizer.step()
    kept = torch.arange(GIB // 4, device="cuda", dtype=torch.float32)
    view = kept[::2]
    loss = model(x)[0].pow(2).mean()
    before = [p.detach().cpu() for p in model.parameters()], view.sum().item(), kept._version
    gc.collect()
    held = evacuator.resident()
    moved = on_own_thread(evacuator.evacuate)
    assert moved >= GIB
    assert torch.cuda.memory_allocated() == 0
    assert evacuator.resident() < held - moved + (64 << 20)
    assert on_own_thread(evacuator.restore) == moved
    loss.backward()
    assert all(torch.equal(a, b.detach().cpu()) for a, b in zip(before[0], model.parameters(), strict=True))
    assert (view.sum().item(), kept._version) == before[1:]


def test_the_second_evacuation_goes_at_the_speed_of_the_bus() -> None:
    from acb.hooks.torch.evacuator import TorchEvacuator

    evacuator = TorchEvacuator()
    kept = torch.ones(GIB, device="cuda", dtype=torch.uint8)
    assert on_own_thread(evacuator.evacuate) >= GIB
    on_own_thread(evacuator.restore)
    begun = time.perf_counter()
    moved = on_own_thread(evacuator.evacuate)
    print(f"\nevacuated {moved / GIB:.1f} GiB at {moved / GIB / (time.perf_counter() - begun):.1f} GiB/s")
    begun = time.perf_counter()
    on_own_thread(evacuator.restore)
    print(f"restored at {moved / GIB / (time.perf_counter() - begun):.1f} GiB/s")
    assert kept.sum().item() == GIB
    assert all(slab.page_locked for slab in evacuator._pool._slabs)


def test_memory_comes_back_for_the_stream_that_it_was_allocated_for() -> None:
    from acb.hooks.torch.evacuator import TorchEvacuator
    from acb.hooks.torch.streams import owners

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        kept = torch.ones(64 << 20, device="cuda", dtype=torch.uint8)
    other = torch.ones(64 << 20, device="cuda", dtype=torch.uint8)
    evacuator = TorchEvacuator()
    for _ in range(2):
        assert owners().of(kept.data_ptr()) == side.cuda_stream
        assert owners().of(other.data_ptr()) == 0
        assert on_own_thread(evacuator.evacuate) >= 128 << 20
        on_own_thread(evacuator.restore)
    assert kept.sum().item() == other.sum().item() == 64 << 20


def test_memory_that_cannot_be_page_locked_leaves_no_error_to_the_program() -> None:
    from acb.hooks.torch.pagelocks import page_locking

    register, _ = page_locking()
    assert register(4096, 4096) != 0  # nothing is there
    assert (torch.ones(3, device="cuda") * 2).sum().item() == 6


def test_backward_on_workers_of_the_engine_does_not_wait_at_a_closed_gate() -> None:
    from acb.client.gate import Gate
    from acb.hooks import torch as hook
    from acb.hooks.torch import regions

    gate = Gate(lambda: None, lambda: None)
    gate.open()
    hook.install_gating(gate)
    try:
        inner = torch.nn.Linear(4, 4).cuda()
        x = torch.ones(4, device="cuda", requires_grad=True)
        y = torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False).sum()

        def close(gradient: Any) -> Any:
            gate.close()  # the worker recomputes a module after this
            return gradient * 1

        y.register_hook(close)
        y.backward()
        gate.open()
        assert x.grad is not None
    finally:
        gate.open()
        hook.uninstall_gating()
        assert not regions.used() or torch.cuda.is_initialized()
