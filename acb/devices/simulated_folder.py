"""The folder of simulated GPUs that all who start with the same specification share: it goes with the last of them.

Each that uses it holds a shared lock on the file ``users`` in it until it ends, however it ends. Who gets that lock for
itself alone knows that nobody does, and removes the folder: a program or a broker that ends, and, after those that were
killed, who makes simulated GPUs next. Nothing is lost with a folder that nobody uses: the next program to want it, of
the same job script say, makes it again. A folder without that file is not acb's own, and stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from acb.config import ConfigError, SimulatedSpec, parse_simulated, simulated_name
from acb.devices.simulated import Card, CardError, card_paths, create_cards

_USERS = "users"

_held: dict[Path, int] = {}
"""Descriptors that have the lock, by folder."""


def enter(directory: Path, spec: SimulatedSpec | None) -> None:
    """Use the folder until leave(), or the end of this process; with `spec` it is made, and its cards, if need be.

    Without, one that is not there, or not acb's own, is left to whoever opens a card. Raises CardError.
    """
    if directory not in _held:
        descriptor = _lock(directory, make=spec is not None)
        if descriptor is None:
            return
        _held[directory] = descriptor
    if spec is not None:
        try:
            create_cards(directory, spec)
        except BaseException:
            leave(directory)
            raise


def enter_given(environ: Mapping[str, str]) -> None:
    """As a program: use the folder that the launcher or the broker has named. Trouble shows when a card is opened."""
    directory = Path(environ["ACB_SIMULATED"])
    try:
        spec = parse_simulated(environ.get("ACB_SIMULATED_GPUS", ""))
    except ConfigError:
        spec = None
    with contextlib.suppress(CardError):
        enter(directory, spec if spec is not None and directory.name == simulated_name(spec) else None)


def try_out(directory: Path, spec: SimulatedSpec) -> None:
    """See that the folder can be made, and leave it: the programs to come make it. Raises CardError."""
    sweep(directory.parent)
    enter(directory, spec)
    leave(directory)


def leave(directory: Path) -> None:
    """Use the folder no more, and remove it if nobody else does."""
    descriptor = _held.pop(directory, None)
    if descriptor is None or not _is(descriptor, directory / _USERS):
        return  # the program may have closed the descriptor, and its number may be another file by now
    with contextlib.suppress(OSError):  # others use it
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(directory)
    os.close(descriptor)


def leave_all() -> None:
    """At the end of a program: leave() what has been entered."""
    for directory in list(_held):
        leave(directory)


def sweep(runtime: Path) -> None:
    """Remove the folders in the runtime directory whose users were killed."""
    for users in runtime.glob(f"{simulated_name(None)}*/{_USERS}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(users, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is(descriptor, users):  # else somebody else has just removed it
                    _remove(users.parent)
            finally:
                os.close(descriptor)


def _lock(directory: Path, *, make: bool) -> int | None:
    """A descriptor with the shared lock; None: there is no such folder of acb's own."""
    users = directory / _USERS
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
    try:
        while True:
            if make:
                with contextlib.suppress(FileExistsError):  # exist_ok fails if it is removed at that moment
                    directory.mkdir(mode=0o700, parents=True)
            try:
                descriptor = os.open(users, flags, 0o600)
            except FileNotFoundError:
                if not make:
                    return None
                if directory.is_symlink():  # to nowhere
                    raise
                continue  # it has just been removed
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is(descriptor, users):
                return descriptor
            os.close(descriptor)  # removed while we waited
    except OSError as error:
        if make:
            with contextlib.suppress(OSError):
                directory.rmdir()  # if there is nothing in it
        raise CardError(f"cannot use the directory of simulated GPUs {directory}: {error.strerror or error}") from None


def _is(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _remove(directory: Path) -> None:
    """Remove a folder whose lock this process has for itself alone."""
    cards = card_paths(directory)
    try:
        for path in cards:
            with Card.open(path) as card:
                if any(pid != os.getpid() for pid, _ in card.processes()):
                    return  # it has opened the card by its name, and knows nothing of the folder
    except CardError:
        return  # of another release
    # `users` goes last: as long as it is there, whoever comes waits for the lock, and finds it gone then.
    for path in (*cards, *directory.glob(".card-*"), directory / _USERS):
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()


# --- forks ------------------------------------------------------------------------------------------------------------
# A lock belongs to what both sides of a fork share. So a child gets one of its own, taken before it is there: its
# parent may end, and look whether it was the last, before the child runs at all.


class _OnThread(threading.local):
    def __init__(self) -> None:
        self.for_child: dict[Path, int] = {}


_on_thread = _OnThread()


def _before_fork() -> None:
    for directory, descriptor in list(_held.items()):
        with contextlib.suppress(OSError):
            mine = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(mine, fcntl.LOCK_SH)
            _on_thread.for_child[directory] = mine


def _after_fork_in_parent() -> None:
    while _on_thread.for_child:
        os.close(_on_thread.for_child.popitem()[1])


def _after_fork_in_child() -> None:
    while _on_thread.for_child:
        directory, mine = _on_thread.for_child.popitem()
        shared = _held.pop(directory, mine)
        if shared == mine:
            os.close(mine)  # another thread of the parent has just left
        else:
            os.close(shared)
            _held[directory] = mine


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
