"""The present thread's stack of function modes: where the sentinel is taken off and put back among the program's."""

from __future__ import annotations

from typing import Any

from torch._C import _get_function_stack_at as mode_at
from torch._C import _len_torch_function_stack as stack_size
from torch._C import _pop_torch_function_stack as pop_mode
from torch._C import _push_on_torch_function_stack as push_mode
from torch.utils._device import DeviceContext

__all__ = ["mode_at", "pop_mode", "push_mode", "put_back", "put_on", "stack_size", "take_off"]


_exit: Any = DeviceContext.__exit__
_DEVICE_IS_LOWEST = "_len_torch_function_stack" in _exit.__code__.co_names
"""Whether a default device insists on the lowest place of the stack; before PyTorch 2.5 it took the highest."""


def put_on(sentinel: Any, position: int = 0) -> None:
    """Put the sentinel on this thread's mode stack at `position`, never below a default device, never twice."""
    above = []
    while (size := stack_size()) > position:
        mode = mode_at(size - 1)
        if mode is sentinel:
            break
        if size == 1 and _DEVICE_IS_LOWEST and isinstance(mode, DeviceContext):
            break
        above.append(pop_mode())
    else:
        size = -1
    if size == -1 or mode_at(size - 1) is not sentinel:
        push_mode(sentinel)
    while above:
        push_mode(above.pop())


def take_off(sentinel: Any) -> int:
    """Take the sentinel off if it is the top mode, and say where it was; -1: left as it was.

    Under modes of the program's own it stays and lets everything through while the thread is in a region.
    """
    top = stack_size() - 1
    if top < 0 or mode_at(top) is not sentinel:
        return -1
    pop_mode()
    return int(top)


def put_back(sentinel: Any, position: int) -> None:
    """Undo take_off(), wherever modes of the program's own have come or gone meanwhile."""
    if stack_size() == position and position != 0:
        push_mode(sentinel)
    elif position >= 0:
        put_on(sentinel, position)
