"""The policies, one a module: a class with `names`, made with the ``--quantum`` (None: from measured swap costs).

To add one, add a module here; nothing else needs to know.
"""

from __future__ import annotations

import importlib
import pkgutil

from acb.broker.policies.base import Policy

__all__ = ["POLICIES", "Policy"]


def _found() -> dict[str, type[Policy]]:
    policies: dict[str, type[Policy]] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Policy) and value.__module__ == module.name:
                policies |= dict.fromkeys(value.names, value)
    return policies


POLICIES: dict[str, type[Policy]] = _found()
"""By the names that ``--scheduler`` takes."""
