"""Marks on a thread that surely mean "no GPU work": sleeping, waiting for a child process, reading from a socket.

A thread that is in such a call after its last region has ended its phase, and no linger need pass before the GPU can go
to another client. Each mark costs two attribute updates; calls too short to matter are not marked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

SHORT_SLEEP = 0.01
"""Seconds: a sleep shorter than this is polling, not a CPU phase."""

_installed = False


def install() -> None:
    """Patch the blocking calls of the standard library; called when the first GPU framework has been imported."""
    global _installed
    if _installed:
        return
    _installed = True
    from acb.client.runtime import warn_once

    for patch in (_patch_sleep, _patch_subprocess, _patch_sockets, _patch_multiprocessing):
        try:
            patch()
        except Exception as error:
            warn_once(f"stdlib:{patch.__name__}", f"{patch.__name__} is not in effect: {error!r}")


def _marked(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same callable, with the thread marked while it runs."""
    from acb.client import runtime

    @functools.wraps(original)
    def marked(*args: Any, **kwargs: Any) -> Any:
        gate = runtime.client().gate
        gate.mark()
        try:
            return original(*args, **kwargs)
        finally:
            gate.unmark()

    return marked


def _patch_sleep() -> None:
    import time

    original = time.sleep
    marked = _marked(original)

    @functools.wraps(original)
    def sleep(*args: Any, **kwargs: Any) -> None:
        try:
            is_long = args[0] >= SHORT_SLEEP
        except Exception:  # the original says what is wrong
            is_long = False
        if is_long:
            marked(*args, **kwargs)
        else:
            original(*args, **kwargs)

    time.sleep = sleep


def _patch_subprocess() -> None:
    import subprocess

    for name in ("wait", "communicate"):
        setattr(subprocess.Popen, name, _marked(getattr(subprocess.Popen, name)))


def _patch_sockets() -> None:
    """Blocking reads of sockets; file objects made from sockets read through these."""
    import socket

    for name in ("recv", "recv_into", "accept"):
        setattr(socket.socket, name, _marked(getattr(socket.socket, name)))


def _patch_multiprocessing() -> None:
    """A data loader's fetch: waiting for what worker processes send."""
    from multiprocessing import connection

    connection.wait = _marked(connection.wait)
    for name in ("recv", "recv_bytes", "poll"):
        setattr(connection._ConnectionBase, name, _marked(getattr(connection._ConnectionBase, name)))
