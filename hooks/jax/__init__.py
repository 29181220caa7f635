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
    from acb.hooks.jax import environment, gate, transfers
    from acb.hooks.jax.evacuator import JaxEvacuator
    from acb.hooks.jax.internals import Internals, apply

    client = runtime.client()
    if not client.gating and client.simulated is None:
        return
    internals = Internals()
    if getattr(module, "_acb_installed", False):
        return
    module._acb_installed = True
    environment.prepare()
    fast_path = gate.FastPath(internals)
    evacuator = JaxEvacuator(internals)

    def join() -> None:
        client = runtime.client()
        client.gate.add_listener(fast_path)
        client.add_evacuator(evacuator)

    if client.gating:
        apply([*gate.patches(fast_path), *transfers.patches(evacuator)], internals)
        join()
        runtime.after_fork(join)
