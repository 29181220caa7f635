"""What happens to a call that misses jax's fast path: whether its entry may be cached, and how it is counted."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

from acb.hooks.jax.fastpath import OPEN, FastPath
from acb.hooks.jax.internals import Internals, like, replace


def patches(fast_path: FastPath) -> list[Callable[[Internals], None]]:
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
        _patch_old_functions(internals, fast_path)

    def mapped_functions(internals: Internals) -> None:
        """jax.pmap had a fast path of its own until it became a kind of jax.jit (in 0.8 or so)."""
        library = getattr(internals.extension, "pmap_lib", None)

        def make(original: Any) -> Any:
            @like(original)
            def pmap(fun: Any, cache_miss: Any, *rest: Any, **kwargs: Any) -> Any:
                return original(fun, _missing(cache_miss, fast_path, [], 2), *rest, **kwargs)

            return pmap

        if hasattr(library, "pmap"):
            replace(library, "pmap", make)

    return [new_functions, old_functions, mapped_functions]


def _missing(
    cache_miss: Callable[..., Any], fast_path: FastPath, itself: list[Callable[[], Any]], answers: int
) -> Callable[..., Any]:
    """The handler of a function's misses.

    `itself` is the function, weakly; `answers` is how many values this version of jax returns from a miss: the result,
    the data for the fast path, and (since 0.4.31 or so) whether the entry must go, so that a later call makes another.
    """

    @like(cache_miss)
    def miss(*args: Any, **kwargs: Any) -> Any:
        began = fast_path.begins()
        if itself and fast_path.counts(args):
            function = itself[0]()
            if function is not None:
                return (fast_path.call_counted(function, args, kwargs), None, not began.keep)[:answers]
        answer = cache_miss(*args, **kwargs)
        return answer if began.cacheable else (answer[0], None, not began.keep)[:answers]

    return miss


class _Call(threading.local):
    """The call of an old function that is under way on this thread: how it began, and what it calls."""

    began = OPEN
    drop = False
    function: tuple[Any, Any] | None = None


def _patch_old_functions(internals: Internals, fast_path: FastPath) -> None:
    """See old_functions."""
    call = _Call()
    pjit = internals.pjit
    if hasattr(pjit, "_run_python_pjit"):
        _patch_in_two_steps(pjit, fast_path, call)
    else:
        _patch_in_one_step(pjit, fast_path, call)

    def data(original: Any) -> Any:
        @like(original)
        def _get_fastpath_data(*args: Any, **kwargs: Any) -> Any:
            began, call.began = call.began, OPEN
            answer = original(*args, **kwargs) if began.cacheable and not fast_path.never else None
            call.drop = not began.keep
            return answer

        return _get_fastpath_data

    def rebuild(original: Any) -> Any:
        @like(original)
        def _need_to_rebuild_with_fdo(*args: Any, **kwargs: Any) -> Any:
            drop, call.drop = call.drop, False
            return drop or original(*args, **kwargs)

        return _need_to_rebuild_with_fdo

    replace(pjit, "_get_fastpath_data", data)
    if hasattr(pjit, "_need_to_rebuild_with_fdo"):
        replace(pjit, "_need_to_rebuild_with_fdo", rebuild)


def _patch_in_one_step(pjit: Any, fast_path: FastPath, call: _Call) -> None:
    """Before 0.9 or so `_python_pjit_helper` does all of a miss but making the fast path's data."""

    def helper(original: Any) -> Any:
        @like(original)
        def _python_pjit_helper(*args: Any, **kwargs: Any) -> Any:
            began = fast_path.begins()
            answer = original(*args, **kwargs)
            call.began = began
            return answer

        return _python_pjit_helper

    replace(pjit, "_python_pjit_helper", helper)


def _patch_in_two_steps(pjit: Any, fast_path: FastPath, call: _Call) -> None:
    """`_infer_params` traces the function, `_run_python_pjit` runs it.

    A call to be counted goes through a second function made of the same parts, which can take the fast path.
    """
    twins: dict[tuple[int, int], Any] = {}

    def infer(original: Any) -> Any:
        @like(original)
        def _infer_params(fun: Any, info: Any, *args: Any, **kwargs: Any) -> Any:
            began = fast_path.begins()
            answer = original(fun, info, *args, **kwargs)
            call.began, call.function = began, (fun, info)
            return answer

        return _infer_params

    def twin(fun: Any, info: Any) -> Any:
        key = (id(fun), id(info))
        if key not in twins:
            twins[key] = pjit._cpp_pjit(fun, info)  # keeps both, and so their ids, alive
        return twins[key]

    def run(original: Any) -> Any:
        @like(original)
        def _run_python_pjit(p: Any, args_flat: Any, fun: Any, args: Any, kwargs: Any) -> Any:
            began, call.began = call.began, OPEN
            function, call.function = call.function, None
            try:
                jaxpr = p.params["jaxpr"]
                if function is not None and function[0] is fun and fast_path.counts(args) and not _is_high(jaxpr):
                    result = fast_path.call_counted(twin(*function), args, kwargs)
                    return result, None, p.out_tree, args_flat, jaxpr, None, None, ()
                return original(p, args_flat, fun, args, kwargs)
            finally:
                call.began = began  # calls within this one have left theirs

        return _run_python_pjit

    replace(pjit, "_infer_params", infer)
    replace(pjit, "_run_python_pjit", run)


def _is_high(jaxpr: Any) -> bool:
    """Whether a traced function takes or gives what is no array; until 0.10 what jax had traced was wrapped twice."""
    return bool(getattr(jaxpr, "jaxpr", jaxpr).is_high)
