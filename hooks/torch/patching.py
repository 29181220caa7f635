"""Patches of a framework, one by one, each of which can be undone; one that fails costs only itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

_MISSING = object()


class Patches:
    """What has been changed in a framework, so that it can be put back."""

    def __init__(self) -> None:
        self._changes: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a module or a class."""
        before = vars(owner).get(name, _MISSING)
        if before is _MISSING and isinstance(owner, ModuleType):
            before = getattr(owner, name, _MISSING)  # PyTorch's modules of settings keep them elsewhere
        setattr(owner, name, value)
        self._changes.append((owner, name, before))

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any], *others: ModuleType) -> None:
        """Replace ``owner.name`` by ``make(original)``, and in the `others` wherever they hold the same object."""
        original = getattr(owner, name)
        replacement = make(original)
        self.set(owner, name, replacement)
        for other in others:
            if vars(other).get(name, _MISSING) is original:
                self.set(other, name, replacement)

    def replace_all(self, owner: Any, names: Iterable[str], make: Callable[[Any], Any], *others: ModuleType) -> None:
        """As replace(), for every name that `owner` has: PyTorch's versions differ in what they offer."""
        for name in names:
            if hasattr(owner, name):
                self.replace(owner, name, make, *others)

    def undo(self) -> None:
        """Put everything back, the last change first."""
        while self._changes:
            owner, name, before = self._changes.pop()
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def apply(
    patches: Patches,
    steps: Iterable[Callable[[Patches], None]],
    warn: Callable[[str, str], None],
    framework: str = "PyTorch",
) -> None:
    """Take every step; one that fails is reported once through ``warn(key, message)`` and left out."""
    for step in steps:
        try:
            step(patches)
        except Exception as error:
            what = step.__name__.strip("_").replace("_", " ")
            message = f"{framework} hook {what!r} is not in effect: {type(error).__name__}: {error}"
            warn(f"{framework}:{step.__name__}", message)
