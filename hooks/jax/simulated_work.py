"""The work of the simulated GPUs: charges what jax's computations and transfers take, and shows each to the referee.

Every operation is finished when it returns, and there is room for it before it begins.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from acb.hooks.jax.internals import (
    Internals,
    is_simulated,
    is_simulated_device,
    like,
    on_simulated,
    replace,
    simulated_index,
    thread,
)
from acb.hooks.jax.ledger import Ledger, Sizes

_ALIASES = ("_fully_replicated_shard", "_rewrap_with_aval_and_sharding", "clone")
_READS = ("_single_device_array_to_np_array_did_copy", "_single_device_array_to_np_array", "_to_np_array_did_copy")


def patches(ledger: Ledger) -> list[Callable[[Internals], None]]:
    """What makes the simulated GPUs work on the simulated cards."""

    def computations(internals: Internals) -> None:
        sizes: weakref.WeakKeyDictionary[Any, Sizes] = weakref.WeakKeyDictionary()

        def make(original: Any) -> Any:
            @like(original)
            def call(self: Any, *args: Any) -> Any:
                if not is_simulated(self.backend):
                    return original(self, *args)
                needed = sizes.get(self)
                if needed is None:
                    needed = sizes[self] = _needed(self.xla_executable)
                with _operation(ledger, f"jax {self.name}", needed), ledger.room(needed) as born:
                    thread.executing = True
                    try:
                        results = original(self, *args)
                        _finish(internals, self, ledger.arrays(results))
                    finally:
                        thread.executing = False
                        for array in ledger.arrays(args):
                            if array.is_deleted():  # donated
                                ledger.deleted(array)
                    born += ledger.arrays(results)
                return results

            return call

        replace(internals.pxla.ExecuteReplicated, "__call__", make)

    def transfers(internals: Internals) -> None:
        """Arrays from host memory, and from other devices."""

        def make(original: Any) -> Any:
            @like(original)
            def batched_device_put(aval: Any, sharding: Any, xs: Any, devices: Any, *rest: Any, **named: Any) -> Any:
                xs, devices = list(xs), list(devices)
                to_card = any(map(is_simulated_device, devices))
                if not to_card and not any(map(on_simulated, xs)):
                    return original(aval, sharding, xs, devices, *rest, **named)
                moves = [(_place(x), simulated_index(d), _bytes(x)) for x, d in zip(xs, devices, strict=False)]
                touched, arriving = _summary(moves)
                with _operation(ledger, "jax transfer", touched), ledger.room(arriving) as born:
                    _cross(ledger, moves)
                    result = original(
                        aval, sharding, _unshared(xs) if to_card and not thread.moves else xs, devices, *rest, **named
                    )
                    result.block_until_ready()
                    born.append(result)
                return result

            return batched_device_put

        replace(internals.xla_client, "batched_device_put", make)

    def copies(internals: Internals) -> None:
        """Arrays handed to a computation or to device_put: mostly they are where they should be."""

        def make(original: Any) -> Any:
            @like(original)
            def copy(arrays: Any, devices: Any, shardings: Any, *rest: Any, **named: Any) -> Any:
                moves = [
                    move
                    for array, group in zip(arrays, devices, strict=False)
                    for move in _moves(ledger, array, list(group))
                    if move[0] != move[1]
                ]
                if not moves:
                    results = original(arrays, devices, shardings, *rest, **named)
                    if not thread.executing:
                        for result in results:
                            ledger.alias(result)
                    return results
                touched, arriving = _summary(moves)
                with _operation(ledger, "jax transfer", touched), ledger.room(arriving) as born:
                    _cross(ledger, moves)
                    results = original(arrays, devices, shardings, *rest, **named)
                    for result in results:
                        result.block_until_ready()
                    born += results
                return results

            return copy

        replace(internals.xla_client, "batched_copy_array_to_devices_with_sharding", make)

    def reads(internals: Internals) -> None:
        for name in _READS:
            if name in vars(internals.ArrayImpl):
                replace(internals.ArrayImpl, name, lambda original: _reading(original, ledger))

    def births(internals: Internals) -> None:
        """Array objects that share the buffers of others."""
        array = internals.ArrayImpl
        for name in _ALIASES:
            if name in vars(array):
                replace(array, name, lambda original: _aliasing(original, ledger))
        shards = vars(array)["_arrays"]
        setter = shards.fset and _changing(shards.fset, ledger)
        array._arrays = property(_aliasing_all(shards.fget, ledger), setter, shards.fdel, shards.__doc__)
        replace(array, "__init__", lambda original: _changing(original, ledger))
        if hasattr(array, "_replace_with"):
            replace(array, "_replace_with", lambda original: _changing(original, ledger))

    def result_handlers(internals: Internals) -> None:
        """What jax wraps results of transfers with."""
        replace(internals.extension.ResultHandler, "__call__", lambda original: _aliasing(original, ledger))

    def reordering(internals: Internals) -> None:
        if hasattr(internals.xla_client, "reorder_shards"):
            replace(internals.xla_client, "reorder_shards", lambda original: _aliasing(original, ledger))

    def deletion(internals: Internals) -> None:
        def make(original: Any) -> Any:
            @like(original)
            def delete(array: Any) -> None:
                original(array)
                ledger.deleted(array)

            return delete

        replace(internals.ArrayImpl, "delete", make)

    def imports(internals: Internals) -> None:
        """Arrays from DLPack."""
        replace(internals.extension, "dlpack_managed_tensor_to_buffer", lambda original: _aliasing(original, ledger))

    return [computations, transfers, copies, reads, births, result_handlers, reordering, deletion, imports]


def _operation(ledger: Ledger, name: str, indices: Collection[int]) -> AbstractContextManager[None]:
    """The referees' view of one operation on some GPUs; acb's own moving of memory is not the program's work."""
    if thread.moves:
        return contextlib.nullcontext()
    if len(indices) == 1:
        [index] = indices
        return ledger.cards[index].operation(name)
    return _together([ledger.cards[index].operation(name) for index in indices])


@contextlib.contextmanager
def _together(contexts: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _needed(executable: Any) -> Sizes:
    """Bytes that a run of an executable needs on each of its GPUs beyond its arguments: results (reusing none) and
    temporaries.
    """
    try:
        stats = executable.get_compiled_memory_stats()
        results = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
        nbytes = int(results + stats.temp_size_in_bytes)
    except (RuntimeError, AttributeError):
        nbytes = 0
    indices = [simulated_index(device) for device in executable.local_devices()]
    return {index: nbytes for index in indices if index is not None}


def _finish(internals: Internals, execution: Any, results: list[Any]) -> None:
    """Wait until a computation, and its effects, have happened."""
    for array in results:
        array.block_until_ready()
    if execution.has_unordered_effects or execution.ordered_effects or execution.has_host_callbacks:
        for token in list(internals.dispatch.runtime_tokens.output_runtime_tokens.values()):
            token.block_until_ready()


def _bytes(value: Any) -> int:
    """The size of an array, or of what becomes one."""
    try:
        return int(value.nbytes)
    except AttributeError:
        return 8


_Move = tuple["int | None", "int | None", int]
"""Index of the GPU that bytes come from, of the one that they go to, and how many; None: the host."""


def _place(value: Any) -> int | None:
    """The index of the GPU on which a single-device array is; None: on the host, as everything else is."""
    return simulated_index(value._sharding._internal_device_list[0]) if on_simulated(value) else None


def _moves(ledger: Ledger, array: Any, devices: list[Any]) -> list[_Move]:
    """What it takes to have each part of an array on its own of `devices`."""
    if len(devices) == 1 and array._sharding._internal_device_list[0] is devices[0]:
        return []  # mostly, and quicker than looking at its parts
    if not on_simulated(array) and not any(map(is_simulated_device, devices)):
        return []
    return [
        (source, simulated_index(device), nbytes)
        for (source, nbytes), device in zip(ledger.places(array), devices, strict=False)
    ]


def _summary(moves: list[_Move]) -> tuple[set[int], Sizes]:
    """The GPUs that take part, and the bytes that each of them gets."""
    touched: set[int] = set()
    arriving: dict[int, int] = {}
    for source, target, nbytes in moves:
        if source is not None:
            touched.add(source)
        if target is not None:
            touched.add(target)
            arriving[target] = arriving.get(target, 0) + nbytes
    return touched, arriving


def _cross(ledger: Ledger, moves: list[_Move]) -> None:
    """Have the bytes that change places cross the bus."""
    for source, target, nbytes in moves:
        if source != target:
            index = target if source is None else source
            assert index is not None
            ledger.cards[index].copied(nbytes)


def _unshared(values: list[Any]) -> list[Any]:
    """Copies of NumPy arrays: a GPU's array does not change with the program's, whose memory a CPU's may share."""
    import numpy

    return [numpy.array(x, copy=True, order="C") if isinstance(x, numpy.ndarray) else x for x in values]


def _reading(original: Any, ledger: Ledger) -> Any:
    """Reading an array to the host, into memory that is not the card's."""

    @like(original)
    def read(array: Any) -> Any:
        if not on_simulated(array):
            return original(array)
        moves: list[_Move] = [(_place(array), None, array.nbytes)]
        if not array._sharding.is_fully_replicated:  # each part from its own GPU
            moves = [(place, None, nbytes) for place, nbytes in ledger.places(array)]
        with _operation(ledger, "jax read", _summary(moves)[0]):
            answer = original(array)
            host = (answer[0] if isinstance(answer, tuple) else answer).copy()
            _cross(ledger, moves)
        return (host, True) if isinstance(answer, tuple) else host

    return read


def _aliasing(original: Any, ledger: Ledger) -> Any:
    @like(original)
    def alias(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        return ledger.alias(result) if on_simulated(result) else result

    return alias


def _aliasing_all(original: Any, ledger: Ledger) -> Any:
    @like(original)
    def aliases(self: Any) -> Any:
        results = original(self)
        if on_simulated(self) and results is not None and not thread.executing:
            for result in results:
                ledger.alias(result)
        return results

    return aliases


def _changing(original: Any, ledger: Ledger) -> Any:
    """A method after which the array itself has other buffers."""

    @like(original)
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if on_simulated(self):
            ledger.alias(self)
        return answer

    return change
