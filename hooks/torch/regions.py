"""Regions and the sentinel: how calls into PyTorch, and operations outside every call, pass the gate.

A *region* is one outermost hooked call on one thread. Inside it operations run bare. Outside, each thread carries a
*sentinel*, a TorchFunctionMode that sees every operation and takes those that touch a gated device through the gate,
each a tiny region of its own. So memory may be moved whenever no thread is in a region: nothing can slip in between.

Why the sentinel stays on outside regions, always, rather than letting a long run of such operations go on bare: a bare
run has no end that can be relied on. A thread that goes from it straight into a minute of CPU work would count as busy
all that time, and nobody else would get the GPU. The price is about 1.5 µs an operation outside modules.

What the rest of the package must keep to: `run` for everything that is known to use a gated device, `run_opaque` for
calls that the sentinel cannot see into (compiled and scripted code, the autograd engine).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from acb.client import runtime, visible
from acb.client.gate import MIN_GAP, Gate, ThreadState
from acb.hooks.torch import devices, memory
from acb.hooks.torch.devices import HOST_ONLY, operation_touches, runs_foreign_code, touches
from acb.hooks.torch.memory import OutOfMemoryError, repeatable
from acb.hooks.torch.modestack import mode_at, pop_mode, push_mode, put_back, put_on, stack_size, take_off

PROGRAM, NATIVE, OWN = 0, 1, 2
"""Whose a thread is: the program's; native code's, such as an autograd worker; acb's, which no gate may stop."""

_Tensor: Any = torch.Tensor
_without_modes: Any = torch._C.DisableTorchFunction
_in_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling


def _open_gate() -> Gate:
    gate = Gate(lambda: None, lambda: None)
    gate.open()
    return gate


_gate: Gate = _open_gate()
_bound = False
_used = False


class Sentinel(TorchFunctionMode):  # type: ignore[misc]
    """Takes operations outside regions through the gate. One for each thread; PyTorch hands it on to autograd's
    workers, where it looks at the state of the thread that called backward.
    """

    def __init__(self, state: ThreadState) -> None:
        self.state = state

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # PyTorch has taken this mode off for as long as this runs.
        global _used
        state = self.state
        if state.depth or func in HOST_ONLY:
            return func(*args, **kwargs) if kwargs else func(*args)
        if not (
            (args and isinstance(args[0], _Tensor) and devices.on_gated(args[0]))  # the usual case, in one call less
            or operation_touches(func, args, kwargs)
            or (types and _used and runs_foreign_code(types))
        ):
            if not kwargs:
                return func(*args)
            if "pin_memory" in kwargs:
                return runtime.client().outside.run(func, *args, **kwargs)
            return func(*args, **kwargs)
        # From here on this is Gate.enter() and Gate.exit() written out, for an open gate that nobody waits at; what
        # they count about gaps between regions, operations between two regions need not tell.
        _used = True
        gate = _gate
        state.depth = 1
        if gate.closed or gate.watched:
            state.depth = 0
            return _slowly(func, args, kwargs or {})
        try:
            return func(*args, **kwargs) if kwargs else func(*args)
        except OutOfMemoryError:
            if not repeatable(func, kwargs):
                raise
        finally:
            _leave(gate, state)
        return _slowly(func, args, kwargs or {})


def _slowly(func: Any, args: Any, kwargs: Any) -> Any:
    """Take one operation through the gate, whatever the gate's state; the sentinel is off."""
    if here.exempt():
        return func(*args, **kwargs)
    return _wait_at_gate(_gate, func, args, kwargs, repeatable(func, kwargs))


class _Leaving:
    """Takes the sentinel off a thread that ends, while Python still runs there: it dies with the thread's local data.

    PyTorch's own clean-up comes after the thread's Python state is gone, and aborts the process when the interpreter
    happens to be shutting down.
    """

    def __init__(self, sentinel: Sentinel) -> None:
        self._sentinel = sentinel

    def __del__(self, size: Any = stack_size, pop: Any = pop_mode, push: Any = push_mode) -> None:
        # The functions are held here, for at the interpreter's end the module's own names are gone before this is.
        above = []
        for _ in range(size()):
            mode = pop()
            if mode is self._sentinel:
                break
            above.append(mode)
        while above:
            push(above.pop())


class _Here(threading.local):
    """What is known of the present thread."""

    def __init__(self) -> None:
        self.state: ThreadState = _gate._local.state
        self.sentinel = Sentinel(self.state)
        self.bare = 0  # how deep in calls that run ungated because no gated device has ever been used
        self.owed = 0  # regions that such calls began and must end
        self._leaving = _Leaving(self.sentinel)
        thread = threading._active.get(threading.get_ident())  # type: ignore[attr-defined]
        if thread is None:
            self.kind = NATIVE
        else:
            self.kind = OWN if thread.name.startswith("acb-") else PROGRAM

    def exempt(self) -> bool:
        """Whether this thread passes ungated: acb's own, or an autograd worker, whose caller's region covers it.

        A worker that had to wait at the gate would never let the region end that the gate waits for.
        """
        return self.kind != PROGRAM and (self.kind == OWN or _in_graph_task() != -1)


here = _Here()


def bind(gate: Gate) -> None:
    """Use this gate from now on. Threads that exist keep the old one, except the calling one."""
    global _bound, _gate, _used
    _bound, _gate = True, gate
    _used = torch.cuda.is_initialized()
    here.state = here.sentinel.state = gate._local.state
    here.bare = here.owed = 0


def unbind() -> None:
    """Gate nothing any more: regions go through a gate that is always open, and new threads get no sentinel."""
    global _bound
    bind(_open_gate())
    _bound = False


def used() -> bool:
    """Whether this process may hold anything on a gated device: false until its first region."""
    return _used


def closed() -> bool:
    """Whether the gate is closed now."""
    return _gate.closed


def adopt_thread() -> None:
    """Put the sentinel on the present thread, at its start."""
    if _bound:
        here.kind = PROGRAM
        put_on(here.sentinel)


def release_thread() -> None:
    """Take the sentinel off the present thread, for tests."""
    take_off(here.sentinel)


# --- regions --------------------------------------------------------------------------------------------------------


def run(
    func: Any,
    args: Any,
    kwargs: Any,
    needs_gate: Callable[[Any, Any], bool] | None = None,
    retried: bool = False,
    opaque: bool = False,
) -> Any:
    """Call `func` as a region: block until the gate is open, the sentinel off while it runs.

    With `needs_gate`, only if ``needs_gate(args, kwargs)``, which is asked with the sentinel off: it would see every
    attribute that is read. If not, an opaque call is a region all the same once a gated device is in use, and bare
    before; any other goes on under the sentinel. A call to be retried that runs out of memory is tried again when the
    broker makes room.
    """
    global _used
    thread = here
    state = thread.state
    if state.depth or (thread.kind and thread.exempt()):
        return func(*args, **kwargs)
    gate, sentinel = _gate, thread.sentinel
    if gate.closed or retried or opaque or stack_size() != 1 or mode_at(0) is not sentinel:
        return _run_carefully(func, args, kwargs, needs_gate, retried, opaque)
    # From here on this is the same as _run_carefully() with Gate.enter() and Gate.exit() written out, for the case that
    # has to be quick.
    pop_mode()
    try:
        if needs_gate is None or needs_gate(args, kwargs):
            state.depth = 1
            if gate.closed:
                state.depth = 0
                return _wait_at_gate(gate, func, args, kwargs, retried)
            now = monotonic()
            gap = now - gate.last_exit
            if gap > MIN_GAP:
                gate.gaps.append(gap)
                gate.last_entry = now
            gate.last_thread = state
            _used = True
            return func(*args, **kwargs)
    finally:
        if state.depth:
            _leave(gate, state)
        if stack_size():
            put_on(sentinel)
        else:
            push_mode(sentinel)
    return func(*args, **kwargs)


def _leave(gate: Gate, state: ThreadState) -> None:
    """Gate.exit(), written out."""
    if state.depth > 1:  # the program has begun something in the region that goes on after it
        state.depth -= 1
        return
    gate.last_exit = monotonic()
    state.depth = 0
    if gate.watched:
        gate._idle()


def _run_carefully(func: Any, args: Any, kwargs: Any, needs_gate: Any, retried: bool, opaque: bool) -> Any:
    """As run(), whatever the gate's state and whatever is on the mode stack."""
    sentinel = here.sentinel
    position = take_off(sentinel)
    try:
        if needs_gate is None or (opaque and _used) or _ask(needs_gate, args, kwargs):
            return _wait_at_gate(_gate, func, args, kwargs, retried)
    finally:
        put_back(sentinel, position)
    if opaque:
        return run_bare(func, args, kwargs)
    return func(*args, **kwargs)


def _ask(needs_gate: Callable[[Any, Any], bool], args: Any, kwargs: Any) -> bool:
    """Ask without modes of the program's own seeing it."""
    if not stack_size():
        return needs_gate(args, kwargs)
    with _without_modes():
        return needs_gate(args, kwargs)


def _wait_at_gate(gate: Gate, func: Any, args: Any, kwargs: Any, retried: bool) -> Any:
    """As _pass_gate(), through a gate that may be closed."""
    global _used
    gate.enter()
    try:
        _used = True
        return memory.with_room(func, args, kwargs) if retried else func(*args, **kwargs)
    finally:
        gate.exit()


def run_bare(func: Any, args: Any, kwargs: Any) -> Any:
    """Call `func` with neither gate nor sentinel: nothing gated exists yet, and making it passes first_use()."""
    thread = here
    sentinel = thread.sentinel
    gate = _gate
    thread.bare += 1
    position = take_off(sentinel)
    try:
        return func(*args, **kwargs)
    finally:
        put_back(sentinel, position)
        _end_bare(thread, gate)


def run_opaque(func: Any, args: Any, kwargs: Any) -> Any:
    """Call `func`, which the sentinel cannot see into: a region, unless no gated device was ever used."""
    if here.state.depth:
        return func(*args, **kwargs)
    if _used or touches(args, kwargs):
        return run(func, args, kwargs)
    return run_bare(func, args, kwargs)


def run_watched(func: Any, args: Any, kwargs: Any) -> Any:
    """Call `func` outside regions with the sentinel surely on, also where PyTorch has taken it off for a while."""
    sentinel = here.sentinel
    if any(mode_at(i) is sentinel for i in range(stack_size())):
        return func(*args, **kwargs)
    push_mode(sentinel)
    try:
        return func(*args, **kwargs)
    finally:
        take_off(sentinel)


class Stretch:
    """A region, or a bare stretch before the first use, between enter() and exit() rather than around one call."""

    def __init__(self) -> None:
        self._gate: Gate | None = None
        self._bare = False

    def enter(self) -> None:
        """Block until the gate is open, if a gated device is in use."""
        if here.state.depth or here.exempt():
            return
        if _used:
            self._gate = _gate
            self._gate.enter()
        else:
            self._bare = True
            here.bare += 1

    def exit(self) -> None:
        """End what enter() began."""
        if self._bare:
            _end_bare(here, _gate)
        elif self._gate is not None:
            self._gate.exit()


def _end_bare(thread: _Here, gate: Gate) -> None:
    """End a bare call, and the regions that it came to owe."""
    thread.bare -= 1
    while thread.owed and not thread.bare:
        thread.owed -= 1
        gate.exit()


def first_use(initialise: Callable[[], Any]) -> Any:
    """Initialise the device, through the gate: which GPU it is may only be known then."""
    global _used
    thread = here
    if thread.state.depth or thread.exempt() or visible.hidden():
        return initialise()
    if not thread.bare:
        return run(initialise, (), {})
    gate = _gate
    gate.enter()
    thread.owed += 1  # what goes on in the bare call uses the device from here on
    _used = True
    return initialise()


def gated(
    original: Any, needs_gate: Callable[[Any, Any], bool] = touches, *, retried: bool = False, opaque: bool = False
) -> Any:
    """`original` as a region whenever it is the outermost call on its thread and ``needs_gate(args, kwargs)``."""

    @functools.wraps(original)
    def region(*args: Any, **kwargs: Any) -> Any:
        if _compiling():
            return original(*args, **kwargs)  # the compiler looks through, and the compiled code is a region itself
        return run(original, args, kwargs, needs_gate, retried, opaque)

    region.__script_if_tracing_wrapper = True  # type: ignore[attr-defined]  # torch.jit.script() takes the original
    region.__original_fn = original  # type: ignore[attr-defined]
    return region


def always(args: Any, kwargs: Any) -> bool:
    """For calls that always use the device."""
    return True


def when_used(args: Any, kwargs: Any) -> bool:
    """For calls that do nothing on the device before its first use, such as ``empty_cache``."""
    return _used


def after_fork(gate: Gate) -> None:
    """In a forked child: another gate, and the one thread that came along.

    A child of a process that has initialised CUDA cannot use it: there is nothing to gate.
    """
    if torch.cuda._initialized or torch.cuda._is_in_bad_fork():
        unbind()
        take_off(here.sentinel)
        return
    bind(gate)
    put_on(here.sentinel)
