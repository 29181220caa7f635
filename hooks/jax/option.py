"""An option of jax that is part of a compiled call's key, and of nothing else: turning it makes every call miss."""

from __future__ import annotations

import collections
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from acb.hooks.jax.internals import Internals

NAME = "acb_gate_watched"


class Option(Protocol):
    """On for all threads, or not; and off for one thread within a context."""

    def turn(self, on: bool) -> None:
        """For all threads, from their next call on."""

    def off_here(self) -> AbstractContextManager[Any]:
        """Off for this thread while the context lasts."""


def make_option(internals: Internals) -> Option:
    """The option, off. Raises where this version of jax has no such thing."""
    config = internals.config
    if hasattr(config, "bool_state") and "include_in_jit_key" in inspect.signature(config.bool_state).parameters:
        return _State(config)
    return _Context(config)


class _State:
    """Since 0.4.36 or so jax makes such options itself."""

    def __init__(self, config: Any) -> None:
        self._config = config.config
        self._state: Any = config.bool_state(
            name=NAME, default=False, help="acb: whether calls must be counted.", include_in_jit_key=True
        )

    def turn(self, on: bool) -> None:
        self._config.update(NAME, on)

    def off_here(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._state(False)
        return context


class _Context:
    """Before, the keys held two named tuples, one of the process and one of the thread: they get one field more."""

    def __init__(self, config: Any) -> None:
        self._jit: Any = config.jax_jit
        self._thread_type = _with_field(config._ThreadLocalExtraJitContext)
        process = self._jit.global_state()
        values = process.extra_jit_context or config._GlobalExtraJitContext()
        process.extra_jit_context = _with_field(type(values))(*values)

    def turn(self, on: bool) -> None:
        process = self._jit.global_state()
        process.extra_jit_context = process.extra_jit_context._replace(acb_gate_watched=on)

    @contextmanager
    def off_here(self) -> Iterator[None]:
        """Keys of its own, that is, but all calls in such a context share them."""
        local = self._jit.thread_local_state()
        before = local.extra_jit_context
        values = () if before is None else before[: len(self._thread_type._fields) - 1]
        local.extra_jit_context = self._thread_type(*values, **{NAME: True})
        try:
            yield
        finally:
            local.extra_jit_context = before


def _with_field(kind: Any) -> Any:
    """The same type of named tuple with the option as its last field, off."""
    if NAME in kind._fields:
        return kind
    made: Any = collections.namedtuple(  # type: ignore[misc]
        kind.__name__, (*kind._fields, NAME), defaults=(*(kind._field_defaults.get(n) for n in kind._fields), False)
    )
    return made
