"""The hooks of jax: its gate, its evacuator and, where GPUs are simulated, the simulated GPU."""

from __future__ import annotations

from typing import Any


def install(module: Any) -> None:
    """Instrument jax, whose top module has just been imported. Never raises: what does not fit is said once."""
    from acb.client.runtime import warn_once

    try:
        _install(module)
    except Exception as error:
        warn_once("jax", f"jax {getattr(module, '__version__', '')} runs without acb, which does not fit it: {error!r}")


def _install(module: Any) -> None:
    from acb.client import runtime
    from acb.hooks.jax import environment, gate, misses, simulated, simulated_work, transfers
    from acb.hooks.jax.evacuator import JaxEvacuator
    from acb.hooks.jax.fastpath import FastPath
    from acb.hooks.jax.internals import Internals, apply
    from acb.hooks.jax.ledger import Ledger

    client = runtime.client()
    if not client.gating and client.simulated is None:
        return
    internals = Internals()
    if getattr(module, "_acb_installed", False):
        return
    module._acb_installed = True
    fast_path = FastPath(internals)
    if client.simulated is not None and simulated.wanted():
        ledger = Ledger(internals)
        fast_path.never = True
        apply([*simulated.patches(ledger), *simulated_work.patches(ledger)], internals)
        runtime.after_fork(ledger.forget)
        evacuator = JaxEvacuator(internals, ledger)
    else:
        environment.prepare()
        evacuator = JaxEvacuator(internals)
    apply(misses.patches(fast_path), internals)
    if not client.gating:
        return
    apply([*gate.patches(fast_path), *transfers.patches(evacuator)], internals)

    def join() -> None:
        client = runtime.client()
        client.gate.add_listener(fast_path)
        client.add_evacuator(evacuator)

    join()
    runtime.after_fork(join)
