"""The dispatch mode under which every operation of PyTorch runs, one on each thread."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from acb.hooks.torch.simulated.compute import compute, settled
from acb.hooks.torch.simulated.ledger import Ledger
from acb.hooks.torch.simulated.operations import COMPUTE, HIGHER_ORDER, PASS, Operation, describe
from acb.hooks.torch.simulated.special import SPECIAL

_Tensor: Any = torch.Tensor
_layout: Any = torch._C.TensorBase.layout.__get__
_mode_of: Any = torch._C._get_dispatch_mode
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


class SimulatedGPU(TorchDispatchMode):  # type: ignore[misc]
    """Runs each operation on the CPU, as an operation of the card when a tensor on the card is involved."""

    supports_higher_order_operators = True

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do not wrap the method below for the compiler: that would import it, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # PyTorch has taken this mode off for as long as this runs.
        try:
            return self._dispatch(func, types, args, kwargs)
        except RuntimeError as error:
            if "Expected a value of type 'Tensor'" not in str(error):
                raise
        return self._dispatch(func, types, _with_tensors(func, args), kwargs)

    def _dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if _mode_of(_FAKE) is not None:
            return func(*args, **kwargs or {})  # torch.export and its kin: tensors without memory
        if types and not all(map(_is_plain, types)):
            return NotImplemented  # a subclass that computes in its own way, with operations that come here one by one
        operation = describe(func)
        if operation.kind == PASS:
            out = func(*args, **kwargs) if kwargs else func(*args)
            if out.__class__ is _Tensor and _layout(out) is not torch.strided:
                # A "view" of a sparse tensor may have parts of its own.
                return settled(self.ledger, operation, args, out)
            return out
        if operation.kind == COMPUTE:
            special = SPECIAL.get(operation.base)
            if special is not None and operation.name.startswith("aten."):
                return special(self.ledger, func, operation, args, kwargs or {})
            return compute(self.ledger, func, operation, args, kwargs or {})
        return self._descend(func, operation, args, kwargs or {})

    def _descend(self, func: Any, operation: Operation, args: Any, kwargs: Any) -> Any:
        """Run an operation that consists of others with this mode on again."""
        _push_mode(self)
        try:
            if operation.kind == HIGHER_ORDER:
                if operation.base == "cond":  # whose plain implementation refuses to run under a mode
                    predicate, when_true, when_false, operands = args
                    return (when_true if predicate else when_false)(*operands)
                return func.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd](*args, **kwargs)
            return func.decompose(*args, **kwargs)
        finally:
            _pop_mode(None)


def _with_tensors(func: Any, args: Any) -> Any:
    """Numbers that C++ code had wrapped into tensors arrive as numbers, which most operations do not take back."""
    return tuple(
        torch.scalar_tensor(value, dtype=_NUMBERS[value.__class__])
        if value.__class__ in _NUMBERS and str(argument.type) == "Tensor"
        else value
        for value, argument in zip(args, func._schema.arguments, strict=False)
    )


_plain: dict[Any, bool] = {}


def _is_plain(kind: Any) -> bool:
    """Whether a subclass of tensors leaves operations to PyTorch, as parameters do."""
    known = _plain.get(kind)
    if known is None:
        known = _plain[kind] = kind.__torch_dispatch__ is _Tensor.__torch_dispatch__
    return known


# --- one mode a thread ----------------------------------------------------------------------------------------------


class _OnThread(threading.local):
    mode: SimulatedGPU | None = None


_on_thread = _OnThread()


def enter(ledger: Ledger) -> None:
    """Put the mode on this thread, below whatever modes the program will use; once is enough."""
    if _on_thread.mode is None:
        _on_thread.mode = SimulatedGPU(ledger)
        _on_thread.mode.__enter__()
        # TorchScript would fold what it makes "on the device of that tensor" into constants on the host.
        torch._C._set_graph_executor_optimize(False)


def release_thread() -> None:
    """Leave no mode on this thread, which ends."""
    _on_thread.mode = None
    while torch._C._len_torch_dispatch_stack():
        _pop_mode()


def leave() -> None:
    """Take the mode off this thread, for tests; it must be the only one there."""
    if _on_thread.mode is not None:
        _on_thread.mode.__exit__(None, None, None)
        _on_thread.mode = None
        torch._C._set_graph_executor_optimize(True)
