"""Takes every compiled call of jax through the gate, and keeps the C++ fast path while the gate is open.

A call of a compiled function normally never leaves C++. What decides whether it may is a key, and an option of jax
that is part of that key but of nothing else: turning it makes every call miss into Python, where it is counted as a
region, and turning it back brings the old entries, and so the fast path, back. Nothing is compiled again.

A counted call need not be a slow one: within its region the option is off again for this thread alone, so that the
call itself takes the fast path.

A call that began before the option was turned runs on in C++ without being counted. The fence (see there) waits for
it.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from acb.client import runtime
from acb.hooks.jax.fence import Fence
from acb.hooks.jax.internals import GATED, Internals, like, on_gated, passing, replace, thread
from acb.hooks.jax.option import make_option
from acb.hooks.jax.room import again_with_more_room


class _Settled(threading.local):
    """What a thread knows of the option, for the calls that begin on it.

    `epoch` is that in which the thread was last seen: its next call's key was made after that. `cacheable` is about
    the call that is under way, `drop` says that its entry must go.
    """

    epoch = -1
    cacheable = True
    drop = False
    off_epoch = -1
    keep = False
    """Whether the entry of the call that has just begun surely has the option on: it may stay, without the fast path.
    """
    counted = False
    """Whether the thread is within a counted call, and the option is off for it."""


class FastPath:
    """The gate's listener: turns the option. Without a backend that is gated it leaves the fast path alone."""

    def __init__(self, internals: Internals) -> None:
        self.settled = _Settled()
        self.never = False
        """Whether no call may ever take the fast path (the simulated GPU must see every array)."""
        self._fence = Fence()
        self._active = False
        self._on = True
        self._wanted = True
        self._epoch = 0
        self._option = make_option(internals)

    def activate(self) -> None:
        """A gated backend is there: from now on follow the gate."""
        self._active = True
        self._turn(self._wanted)

    def open(self) -> None:
        self._turn(True)

    def watch(self) -> None:
        self._turn(False)
        # Calls on the fast path leave no trace: the last of them may have ended just now.
        runtime.client().gate.last_exit = time.monotonic()

    def close(self) -> None:
        self._turn(False)
        if self._active:
            self._fence.wait()

    def _turn(self, on: bool) -> None:
        self._wanted = on
        if not self._active or on is self._on:
            return
        if on:
            self._option.turn(False)
            self._epoch += 1
            self._on = True
        else:
            self._on = False
            self._option.turn(True)
            self._fence.begin()

    def begins(self) -> bool:
        """A call has missed into Python: whether its entry may be cached with the fast path.

        Only if its key surely has the option off: the thread was seen before, since the option was turned off.
        """
        if self.settled.counted:
            return True
        settled = self.settled
        if self._on:
            cacheable = not self.never and (not self._active or settled.epoch == self._epoch)
            settled.epoch = self._epoch
            return cacheable
        settled.keep = settled.off_epoch == self._epoch
        settled.off_epoch = self._epoch
        return False

    def counts(self, args: tuple[Any, ...]) -> bool:
        """Whether a call that has missed can be taken as a region on the fast path: the gate is watched or closed."""
        return (
            self._active
            and not (self._on or self.never or self.settled.counted or thread.passes)
            and any(_holds_gated(value, 3) for value in args)
        )

    def call_counted(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call, as a region, with the option off for this thread."""
        gate = runtime.client().gate
        gate.enter()
        try:
            self.settled.counted = True
            try:
                with self._option.off_here():
                    return function(*args, **kwargs)
            finally:
                self.settled.counted = False
        finally:
            gate.exit()


def _holds_gated(value: Any, depth: int) -> bool:
    """Whether an argument surely holds an array on a gated device; looks at the first parts of a tree only."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return depth > 0 and any(_holds_gated(part, depth - 1) for part in value[:2])
    return on_gated(value)


def in_region(original: Callable[..., Any], concerns: Callable[..., bool]) -> Callable[..., Any]:
    """The same callable, as a region of the gate when ``concerns(*args)`` says that it is about a gated device."""

    @like(original)
    def gated(*args: Any, **kwargs: Any) -> Any:
        if thread.passes or not concerns(*args, **kwargs):
            return original(*args, **kwargs)
        gate = runtime.client().gate
        gate.enter()
        try:
            return original(*args, **kwargs)
        finally:
            gate.exit()

    return gated


def patches(fast_path: FastPath) -> list[Callable[[Internals], None]]:
    """The patches of compiled calls and of the start of a backend."""

    def counted_calls(internals: Internals) -> None:
        """Executions that come through Python: calls that missed, and those compiled ahead of time."""

        def execute(original: Any) -> Any:
            return in_region(again_with_more_room(original), lambda self, *args: self.backend.platform in GATED)

        replace(internals.pxla.ExecuteReplicated, "__call__", execute)

    def executables(internals: Internals) -> None:
        """The same a layer below, for whoever calls an executable without jax."""
        for name in ("execute", "execute_sharded", "execute_with_token"):
            if hasattr(internals.LoadedExecutable, name):
                replace(
                    internals.LoadedExecutable,
                    name,
                    lambda original: in_region(original, lambda self, *a, **k: self.client.platform in GATED),
                )

    def compilation(internals: Internals) -> None:
        """Compiling for a GPU tries kernels out on it."""
        for name in ("compile", "compile_and_load", "deserialize_executable", "defragment"):
            if hasattr(internals.Client, name):
                replace(
                    internals.Client,
                    name,
                    lambda original: in_region(original, lambda self, *a, **k: self.platform in GATED),
                )

    def first_use(internals: Internals) -> None:
        """A GPU's backend starts behind the gate: until then the process costs no GPU anything."""

        def make(original: Any) -> Any:
            entering = in_region(original, lambda platform: platform in GATED)

            @like(original)
            def _init_backend(platform: str) -> Any:
                backend = entering(platform)
                if platform in GATED or backend.platform in GATED:
                    fast_path.activate()
                return backend

            return _init_backend

        replace(internals.xla_bridge, "_init_backend", make)
        if any(backend.platform in GATED for backend in internals.backends()):
            fast_path.activate()

    def callbacks(internals: Internals) -> None:
        """Python called by a computation that the gate let in: it must not wait there, or both would wait for ever."""
        owner = _owner_of("emit_python_callback")

        def make(original: Any) -> Any:
            @like(original)
            def emit_python_callback(ctx: Any, callback: Any, *args: Any, **kwargs: Any) -> Any:
                @like(callback)
                def passed(*values: Any, **named: Any) -> Any:
                    with passing():
                        return callback(*values, **named)

                return original(ctx, passed, *args, **kwargs)

            return emit_python_callback

        replace(owner, "emit_python_callback", make)

    return [counted_calls, executables, compilation, first_use, callbacks]


def miss_patches(fast_path: FastPath) -> list[Callable[[Internals], None]]:
    """The patches of calls that miss the fast path, which decide whether the next one will."""

    def new_functions(internals: Internals) -> None:
        """Functions that will be compiled from now on: their misses."""

        answers = 3 if hasattr(internals.pjit, "_need_to_rebuild_with_fdo") else 2

        def make(original: Any) -> Any:
            @like(original)
            def pjit(name: Any, fun: Any, cache_miss: Any, *rest: Any, **kwargs: Any) -> Any:
                itself: list[Callable[[], Any]] = []
                function = original(name, fun, _missing(cache_miss, fast_path, itself, answers), *rest, **kwargs)
                with contextlib.suppress(TypeError):
                    itself.append(weakref.ref(function))
                return function

            return pjit

        replace(internals.extension, "pjit", make)

    def old_functions(internals: Internals) -> None:
        """Functions that jax compiled, or will, with what was there before acb: their misses pass these globals."""
        _patch_misses(internals, fast_path)

    return [new_functions, old_functions]


def _missing(
    cache_miss: Callable[..., Any], fast_path: FastPath, itself: list[Callable[[], Any]], answers: int
) -> Callable[..., Any]:
    """The handler of a function's misses. Its answer is cached only when it may be.

    `itself` is the function, weakly; `answers` is how many values this version of jax returns from a miss.
    """

    @like(cache_miss)
    def miss(*args: Any, **kwargs: Any) -> Any:
        cacheable = fast_path.begins()
        if itself and fast_path.counts(args):
            drop = not fast_path.settled.keep
            function = itself[0]()
            if function is not None:
                return (fast_path.call_counted(function, args, kwargs), None, drop)[:answers]
        answer = cache_miss(*args, **kwargs)
        if cacheable:
            return answer
        # No data for the fast path; and (since 0.4.31) the entry goes, so that a later call may make a better one.
        return (answer[0], None, not fast_path.never)[:answers]

    return miss


def _patch_misses(internals: Internals, fast_path: FastPath) -> None:
    """See old_functions. `_run_python_pjit` runs a call that missed; before it `_python_pjit_helper` did."""
    pjit, settled = internals.pjit, fast_path.settled

    if hasattr(pjit, "_run_python_pjit"):

        def infer(original: Any) -> Any:
            @like(original)
            def _infer_params(*args: Any, **kwargs: Any) -> Any:
                cacheable = fast_path.begins()
                answer = original(*args, **kwargs)
                settled.cacheable = cacheable
                return answer

            return _infer_params

        def run(original: Any) -> Any:
            @like(original)
            def _run_python_pjit(*args: Any, **kwargs: Any) -> Any:
                cacheable = settled.cacheable
                settled.cacheable = True
                answer = original(*args, **kwargs)
                settled.cacheable = cacheable  # calls within this one have left theirs
                return answer

            return _run_python_pjit

        replace(pjit, "_infer_params", infer)
        replace(pjit, "_run_python_pjit", run)
    else:

        def helper(original: Any) -> Any:
            @like(original)
            def _python_pjit_helper(*args: Any, **kwargs: Any) -> Any:
                cacheable = fast_path.begins()
                answer = original(*args, **kwargs)
                settled.cacheable = cacheable
                return answer

            return _python_pjit_helper

        replace(pjit, "_python_pjit_helper", helper)

    def data(original: Any) -> Any:
        @like(original)
        def _get_fastpath_data(*args: Any, **kwargs: Any) -> Any:
            cacheable, settled.cacheable = settled.cacheable, True
            answer = original(*args, **kwargs) if cacheable and not fast_path.never else None
            settled.drop = not cacheable and not fast_path.never
            return answer

        return _get_fastpath_data

    def rebuild(original: Any) -> Any:
        @like(original)
        def _need_to_rebuild_with_fdo(*args: Any, **kwargs: Any) -> Any:
            drop, settled.drop = settled.drop, False
            return drop or original(*args, **kwargs)

        return _need_to_rebuild_with_fdo

    replace(pjit, "_get_fastpath_data", data)
    if hasattr(pjit, "_need_to_rebuild_with_fdo"):
        replace(pjit, "_need_to_rebuild_with_fdo", rebuild)


def _owner_of(name: str) -> Any:
    """The module that defines jax's function of that name in this version."""
    import importlib

    for module in ("jax._src.callback", "jax._src.interpreters.mlir"):
        found = importlib.import_module(module)
        if getattr(getattr(found, name, None), "__module__", None) == module:
            return found
    raise AttributeError(name)
