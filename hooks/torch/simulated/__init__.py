"""PyTorch on a simulated GPU: ``cuda`` devices on a build for the CPU, exact results, memory that really runs out.

Tensors stay plain CPU tensors; a ledger of storages says which are on which card (`ledger`), and a dispatch mode on
every thread puts results there (`dispatch`). The rest is PyTorch's own code that has to be told: methods of tensors and
storages, factories, torch.cuda, and a few choices by device.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from acb.devices.simulated import Card, card_paths

if TYPE_CHECKING:
    from acb.client.runtime import Client

_state: Any = None
_watching_threads = False


class _State:
    """The one installation of this process."""

    def __init__(self, card_provider: Callable[[], Sequence[Card]], description: Callable[[], Sequence[Card]]) -> None:
        from acb.hooks.torch.patching import Patches
        from acb.hooks.torch.simulated import places
        from acb.hooks.torch.simulated.ledger import Ledger

        self.ledger = ledger = Ledger(card_provider, description)
        places.bind(lambda: len(ledger.gpus()))
        self.patches = Patches()


def install(
    torch_module: ModuleType,
    card_provider: Callable[[], Sequence[Card] | Card | Client] | None = None,
    description: Callable[[], Sequence[Card] | Card | Client] | None = None,
) -> None:
    """Let ``cuda`` appear in PyTorch, on this thread and every thread started from now on.

    `card_provider` is called once, at the first allocation, inside the region that makes it; it returns the card, the
    cards behind ``cuda:0``, ``cuda:1`` and so on, or the client that is bound to some. `description` gives cards from
    which to answer questions before that. By default both come from this process's client.
    """
    global _state, _watching_threads
    if _state is not None:
        return
    from acb.client.runtime import client, warn_once
    from acb.hooks import threads
    from acb.hooks.torch import patching
    from acb.hooks.torch.simulated import choices, cuda, dispatch, factories, fakes, storages, streams, tensors

    atexit.register(_before_the_end)
    provider, describe = card_provider or client, description or client
    _state = state = _State(lambda: _cards_of(provider()), lambda: _cards_of(describe()))
    steps = [step for module in (cuda, streams, tensors, storages, factories, choices, fakes) for step in module.STEPS]
    patching.apply(state.patches, [_bind(step, state.ledger) for step in steps], warn_once)
    dispatch.enter(state.ledger)
    threads.on_thread_start(_adopt_thread, _release_thread)


def _cards_of(given: Sequence[Card] | Card | Client) -> Sequence[Card]:
    """The cards of a client: those that it is bound to, or before that the first ones, as many as it wants and there
    are.
    """
    if isinstance(given, Card):
        return (given,)
    if isinstance(given, Sequence):
        return given
    assert given.simulated is not None
    ordinals = given.gpus
    if not ordinals or not given.gating:
        ordinals = tuple(range(max(1, min(given.count, len(card_paths(given.simulated))))))
    return [Card.open(given.simulated, ordinal) for ordinal in ordinals]


def uninstall() -> None:
    """Undo install(), for tests."""
    global _state
    if _state is None:
        return
    from acb.hooks.torch.simulated import dispatch

    dispatch.leave()
    _undo(_state.patches)
    _state = None


def _undo(patches: Any) -> None:
    """Undo all patches, also in TorchScript's table of functions that it knows, by their addresses."""
    import torch.jit._builtins as builtins

    modules = builtins._modules_containing_builtins
    before = [dict(vars(module)) for module in modules]
    patches.undo()
    for module, functions in zip(modules, before, strict=True):
        for name, function in functions.items():
            original = vars(module).get(name)
            if original is not function and builtins._builtin_table and id(function) in builtins._builtin_table:
                builtins._builtin_table[id(original)] = builtins._builtin_table.pop(id(function))


def current_ledger() -> Any:
    """The ledger of what is on the card: ``storages()`` lists them, ``resident()`` says how many bytes they take."""
    return _state.ledger if _state is not None else None


def _bind(step: Any, ledger: Any) -> Callable[[Any], None]:
    """A step of patching that knows the ledger."""

    def bound(patches: Any) -> None:
        step(patches, ledger)

    bound.__name__ = f"{step.__name__}_of_the_simulated_GPU"
    return bound


def _adopt_thread() -> None:
    if _state is not None:
        from acb.hooks.torch.simulated import dispatch

        dispatch.enter(_state.ledger)


def _release_thread() -> None:
    """Leave no mode on a thread that ends.

    The thread's own end would let go of it without the interpreter's lock, and wait for that; when the interpreter is
    ending too, CPython before 3.14 ends such a thread in the middle of C++ code, and that aborts the process.
    """
    from acb.hooks.torch.simulated import dispatch

    dispatch.release_thread()


def _before_the_end() -> None:
    if _state is not None:
        from acb.hooks.torch.simulated import collectives

        collectives.let_go()


def _after_fork() -> None:
    if _state is not None:
        _state.ledger.after_fork()


os.register_at_fork(after_in_child=_after_fork)
