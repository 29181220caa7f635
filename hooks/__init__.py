"""Import hooks: one package a framework, whose ``install(module)`` is called when that framework has been imported."""

from __future__ import annotations

VERSIONS = {"torch": ("2.3", "2.13"), "jax": ("0.4.30", "0.12")}
"""For each hooked framework the first version whose internals the hooks know, and the newest one tested.

PyTorch: since 2.3 a storage says whether it can be resized, and keeps its Python object. jax: see jax/internals.py.
"""


def require(name: str, version: str) -> None:
    """Raise RuntimeError when this version of a framework is older than what its hooks know."""
    first = VERSIONS[name][0]
    if numbers(version) < numbers(first):
        raise RuntimeError(f"{name} {version} is older than {first}, so the program runs without acb; update {name}")


def numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` is (2, 13, 0), as is ``2.13.0rc1``."""
    found = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)
