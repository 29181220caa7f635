"""Import hooks: one package a framework, whose ``install(module)`` is called when that framework has been imported."""

from __future__ import annotations

VERSIONS = {"torch": ("2.0", "2.13"), "jax": ("0.4.30", "0.12")}
"""For each hooked framework the first version whose internals the hooks know, and the newest one tested.

PyTorch: storages and the default device are where they look for them since 2.0. jax: see jax/internals.py.
"""
