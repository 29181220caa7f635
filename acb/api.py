"""The manual way: a program says itself when it needs the GPU.

    import acb

    with acb.gpu(memory="10GiB"):
        ...                         # here the GPU is this program's

    @acb.gpu()
    def predict(batch): ...

    acb.begin("10GiB"); ...; acb.end()

It works with and without ``acb-launch``. Between such phases the GPU can go to another program, and this one's
memory to host memory; it comes back before the next phase begins, or before any stray GPU operation outside of one.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from acb.client import runtime
from acb.config import ConfigError, format_size, parse_size

F = TypeVar("F", bound=Callable[..., Any])
_phases = threading.local()


class gpu:
    """A phase in which this thread uses the GPU: a context manager and a decorator; may be nested, and used again.

    `memory` is what the phase needs in all, as bytes or as text such as ``"10GiB"``; without it the broker goes by what
    it has seen. Entering blocks until the GPU is there. Raises ValueError for an impossible size, or for more memory
    than an enclosing phase has asked for, and acb.LeaseRefused when no GPU can ever give so much.
    """

    def __init__(self, memory: int | str | None = None) -> None:
        if callable(memory):  # as a bare @acb.gpu: to a type checker, too, that is no decorator
            raise TypeError(f"write `@acb.gpu()`, with parentheses, before {getattr(memory, '__name__', memory)}")
        self.memory = _bytes(memory)

    def __enter__(self) -> gpu:
        _enter(self.memory, "with acb.gpu()")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        phases = _open()
        if not phases:
            raise RuntimeError("`with acb.gpu()` is left on another thread than the one that entered it")
        inner = phases[-1][0] == "acb.begin()"
        if inner:
            _leave()
        _leave()
        if inner and error is None:
            raise RuntimeError(
                "acb.begin() in a `with acb.gpu()` block that is left before acb.end(); both have ended now"
            )

    def __call__(self, function: F) -> F:
        import inspect

        kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        if any(is_kind(function) for is_kind in kinds):
            raise TypeError(
                f"{function.__qualname__} is a coroutine or generator function, which does its work after the call; "
                f"write `with acb.gpu():` around the GPU work inside it"
            )

        @functools.wraps(function)
        def with_gpu(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return with_gpu  # type: ignore[return-value]


def begin(memory: int | str | None = None) -> None:
    """Begin a phase on this thread, to be ended by end().

    Blocks and raises as `gpu` does; RuntimeError when one is open.
    """
    nbytes = _bytes(memory)
    if any(how == "acb.begin()" for how, _ in _open()):
        raise RuntimeError("acb.begin() inside a phase that acb.begin() opened on this thread; call acb.end() first")
    _enter(nbytes, "acb.begin()")


def end() -> None:
    """End the phase that begin() opened on this thread.

    RuntimeError when there is none, or an inner one is still open.
    """
    phases = _open()
    if not any(how == "acb.begin()" for how, _ in phases):
        raise RuntimeError("acb.end() without acb.begin() on this thread")
    if phases[-1][0] != "acb.begin()":
        raise RuntimeError("acb.end() inside a `with acb.gpu()` block that began later; leave the block first")
    _leave()


def _open() -> list[tuple[str, int]]:
    """The phases open on this thread, outermost first: how each was begun, and its bytes (0: not said)."""
    if not hasattr(_phases, "open"):
        _phases.open = []
    phases: list[tuple[str, int]] = _phases.open
    return phases


def _enter(nbytes: int, how: str) -> None:
    phases = _open()
    enclosing = max((size for _, size in phases), default=0)
    if enclosing and nbytes > enclosing:
        raise ValueError(
            f"a phase of {format_size(nbytes)} inside one of {format_size(enclosing)}; ask for all in the outer one"
        )
    client = runtime.client()
    if not phases:
        _install_hooks()
    if client.gating and not phases:
        client.agent.need(nbytes)
    client.gate.enter()
    try:
        if nbytes and client.gating and not enclosing:
            client.agent.reserve(nbytes)
    except BaseException:
        client.gate.exit()
        raise
    phases.append((how, nbytes))


def _leave() -> None:
    """End the innermost phase of this thread."""
    phases = _open()
    phases.pop()
    client = runtime.client()
    client.gate.exit()
    if not phases and client.gating:
        client.agent.end_phase()


def _install_hooks() -> None:
    """Without acb-launch: have the frameworks in use, and those imported later, hooked, so that memory can be moved."""
    import acb
    from acb.launcher import finder

    finder.install(os.path.dirname(acb.__path__[0]))


def _bytes(memory: int | str | None) -> int:
    if memory is None:
        return 0
    try:
        size = parse_size(memory) if isinstance(memory, str) else memory
    except ConfigError as error:
        raise ValueError(str(error)) from None
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 1 << 60:
        raise ValueError(f"memory={memory!r} is not a size; give bytes above zero, or text such as '10GiB'")
    return size
