"""The process that makes the driver's checkpoint calls for the broker: ``python -m acb.broker.checkpoint_helper``.

One of its own, since a call may hang for ever, and since initialising CUDA costs seconds, and memory that a broker
should not hold. Its stdin is one end of a SOCK_SEQPACKET pair. It first says {"ready": true, …} or {"ready": false,
"reason": …}; then each packet is a request, {"id", "op", "deadline", …}, and is answered by one with the same id: an
Outcome, a Probe, or {"error": …}. `deadline` is in seconds: the kernel ends the process (SIGALRM) when the request
takes longer, be it in the driver, and whether or not anybody still waits for the answer.

When the other end is closed it finishes what it is at and ends: a kill between a lock and a checkpoint would leave a
program stopped that nobody knows of. So it outlives its parent by a deadline at most.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from acb.devices.checkpoint import Checkpointer
from acb.devices.checkpoint_probe import probe
from acb.devices.cuda import CudaError, CudaUnavailable, LibCuda
from acb.devices.nvml import Nvml, NvmlError

PACKET = 64 * 1024
"""Bytes of a request or an answer."""

START = 60.0
"""Seconds to initialise CUDA in: it takes about three."""

MODULE = "acb.broker.checkpoint_helper"


def real_tier() -> Checkpointer:
    """The driver of this machine. Raises CudaUnavailable: also without NVML, since nothing could be resumed then."""
    driver = LibCuda()
    try:
        return Checkpointer(driver, Nvml())
    except NvmlError as error:
        raise CudaUnavailable(f"nobody can tell how much of a GPU is free: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until the other end is closed; the exit status is 0, or 69 where there is no driver for it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--tier",
        default=f"{MODULE}:real_tier",
        help="MODULE:FUNCTION that makes the Checkpointer (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("acb-checkpoint")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.setitimer(signal.ITIMER_REAL, START)
    connection = socket.socket(fileno=os.dup(0))
    module, _, function = options.tier.partition(":")
    try:
        checkpointer: Checkpointer = getattr(importlib.import_module(module), function)()
    except (CudaUnavailable, CudaError) as error:
        _send(connection, {"ready": False, "reason": str(error)})
        return os.EX_UNAVAILABLE
    signal.setitimer(signal.ITIMER_REAL, 0)
    _send(connection, {"ready": True})
    while True:
        packet = connection.recv(PACKET)
        if not packet:
            return 0
        _send(connection, answer(checkpointer, packet))
        signal.setitimer(signal.ITIMER_REAL, 0)


def answer(checkpointer: Checkpointer, packet: bytes) -> dict[str, Any]:
    """Do what a request says. Never raises."""
    number = None
    try:
        request = json.loads(packet)
        number = request["id"]
        act = _OPERATIONS[request["op"]]
        deadline = float(request["deadline"])
        if deadline <= 0:
            raise ValueError("the deadline has passed")
        signal.setitimer(signal.ITIMER_REAL, deadline)
        return {"id": number, **act(checkpointer, request)}
    except Exception as error:  # a request that makes no sense, or a mistake of ours: the next one is answered again
        return {"id": number, "error": f"{type(error).__name__}: {error}"}


def _suspend(checkpointer: Checkpointer, request: dict[str, Any]) -> dict[str, Any]:
    limit = request.get("host_free")
    return checkpointer.suspend(
        int(request["pid"]), float(request["timeout"]), None if limit is None else int(limit), request.get("claimed")
    ).as_json()


def _resume(checkpointer: Checkpointer, request: dict[str, Any]) -> dict[str, Any]:
    return checkpointer.resume(
        int(request["pid"]),
        request.get("needs"),
        gpu_map=request.get("gpu_map"),
        patience=float(request.get("patience", 0)),
    ).as_json()


_OPERATIONS: dict[str, Callable[[Checkpointer, dict[str, Any]], dict[str, Any]]] = {
    "state": lambda checkpointer, request: checkpointer.state(int(request["pid"])).as_json(),
    "suspend": _suspend,
    "resume": _resume,
    "release": lambda checkpointer, request: checkpointer.release(int(request["pid"])).as_json(),
    "probe": lambda checkpointer, request: probe(checkpointer, request.get("command")).as_json(),
}


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(ConnectionError):  # nobody waits for it any more: the next recv ends us
        connection.send(json.dumps(message).encode())


if __name__ == "__main__":
    sys.exit(main())
