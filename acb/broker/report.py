"""What the broker sees, for ``gpu_assigner status``: one dictionary of the whole, one for each GPU and client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from acb import processes
from acb._version import __version__
from acb.broker import recovery
from acb.broker.core import Broker, Client, Gpu
from acb.protocol import MAX_PACKET, VERSION, Status

STATUS_SIZE = MAX_PACKET * 3 // 4
"""Bytes of clients in a status packet; the rest of the report fits beside them."""

AWAITED = 100
"""Processes that are named as such for which a new broker waits."""

REASON_LENGTH = 200
"""Characters of why a client could not be evacuated."""


def status(core: Broker, head: dict[str, Any], after: int, now: float, held: Mapping[int, int]) -> Status:
    """`head` and the core's view, when it is the first packet, and the clients with ids above `after` that fit.

    `held`: the bytes that clients have on the GPU at this moment, where the device says; for the others, what they have
    last said counts.
    """
    whole: dict[str, Any] = {}
    if not after:
        whole = {
            "version": __version__,
            "protocol": VERSION,
            "scheduler": core.policy.name,
            "gpus": [_gpu(gpu, core, held) for gpu in core.gpus],
            "awaited": sorted(core.recovering)[:AWAITED],
            **head,
        }
    clients: list[dict[str, Any]] = []
    size = 0
    for number in sorted(number for number in core.clients if number > after):
        client = _client(core.clients[number], now, held)
        size += len(json.dumps(client))
        if size > STATUS_SIZE:
            return Status(whole, clients, more=True)
        clients.append(client)
    return Status(whole, clients)


def printable(text: str) -> str:
    """The text with a question mark for what must not come to a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _gpu(gpu: Gpu, core: Broker, held: Mapping[int, int]) -> dict[str, Any]:
    clients = [core.clients[i] for i in gpu.bound]
    return {
        "ordinal": gpu.ordinal,
        "visible": gpu.visible,
        "capacity": gpu.capacity,
        "slots": gpu.slots,
        "load": round(gpu.load, 2),
        "resident": sum(held.get(c.id, c.resident) for c in clients),
        "headroom": sum(c.headroom for c in clients if c.lease),
        "holders": [core.clients[i].pid for i in sorted(gpu.holders)],
    }


def _client(client: Client, now: float, held: Mapping[int, int]) -> dict[str, Any]:
    resident = held.get(client.id, client.resident)
    return {
        "id": client.id,
        "pid": client.pid,
        "name": client.name,
        "state": client.state,
        "gpu": client.gpu,
        "gpus": [gpu.ordinal for gpu in client.gpus],
        "gang": client.unit.gang or None,
        "priority": client.unit.priority,
        "weight": client.unit.weight,
        "resident": resident,
        "evacuated": _on_host(client, resident),
        "peak": max(client.peak, resident),
        "headroom": client.headroom,
        "waiting_s": round(now - client.asked_at, 3) if client.waiting else None,
        "leased_s": round(now - client.granted_at, 3) if client.lease else None,
        "state_s": round(now - _since(client), 3),
        "revoked": client.revoked,
        "suspended": client.suspended,
        "stopped": (client.lease or client.evacuating or client.absent) and processes.stopped(client.pid),
        "unmovable": printable(client.unmovable[:REASON_LENGTH]) or None,
        "stranded": client.stranded or None,
        "absent": recovery.words(client) if client.absent else None,
    }


def _on_host(client: Client, resident: int) -> int:
    """Bytes in host memory: the books count all of it until all is back, so what has come to the GPU is taken off."""
    back = resident - client.resident if client.state == "restoring" else 0
    return client.evacuated - min(client.evacuated, max(0, back))


def _since(client: Client) -> float:
    """When its state began; of one that neither waits nor has the lease, when it gave the last one back, or came."""
    if client.evacuating:
        return client.evacuation_at
    if client.lease:
        return client.granted_at
    return client.asked_at if client.waiting else client.yielded_at
