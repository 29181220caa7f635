"""Migration: a client that the driver has suspended comes back on another GPU, where its own is taken and that is free.

It has to be restored in any case, so another GPU costs nothing more. It must be of the same kind and size, and the
driver must be able to (NVIDIA 580 and later). Only clients of one GPU move, and only while all that they have is on the
host; what their framework has evacuated comes back on the new GPU, too.

    on A, waits ──move()──▶ on B, origin A ──Resume(A, B)──▶ on B        done
                                                  └────────▶ on A        not done, but safe on the host: it stays there
                                                  └────────▶ on B        nobody knows: tried again, on B

A broker that dies in between leaves B in its journal, and the next one can only go on with B: see DriverTier.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from acb.broker.state import Client, Gpu, Resume

if TYPE_CHECKING:
    from acb.broker.room import Room

EVEN = 1e-6
"""GPUs: loads that differ by less are equal."""


def alike(one: Gpu, other: Gpu) -> bool:
    """Whether the driver can take a process from one to the other."""
    return bool(one.kind) and one.kind == other.kind and one.capacity == other.capacity


def may_move(client: Client) -> bool:
    """Whether a suspended client waits that may come back on another GPU."""
    return (
        client.suspended
        and client.unit.queued
        and client.unit.size == 1
        and not (client.chosen or client.stays or client.evacuating or client.claim)
    )


def candidate(gpu: Gpu, room: Room) -> Client | None:
    """Who is to come here, where there is a slot and nobody waits: the one next in line of those whose GPU is taken.

    The load must not be higher here than it would be there without it.
    """
    found = [
        client
        for client in room.suspended.values()
        if may_move(client) and _better(gpu, client) and not room.kept_by_holders(gpu, client)
    ]
    return min(found, key=lambda client: (client.unit.key, client.unit.order), default=None)


def targets(gpu: Gpu, gpus: Iterable[Gpu], room: Room) -> list[Gpu]:
    """Where a client that waits for this GPU, which is taken, could be brought back instead."""
    if not room.migrates or not any(may_move(c) and c.gpus[0] is gpu for c in room.suspended.values()):
        return []
    return [other for other in gpus if other is not gpu and not other.full and alike(gpu, other)]


def resume(client: Client) -> Resume:
    """The instruction to bring the client's memory back where it is to be now."""
    origin = client.origin
    return Resume() if origin is None else Resume(origin.visible, client.gpus[0].visible)


def gpu_map(held: Iterable[str], source: str, target: str) -> dict[str, str]:
    """For the driver, which must be told of every GPU, by UUID, on which the process has something, and of no two that
    become one: should it have something on the target already, they change places."""
    found = {uuid: uuid for uuid in held}
    found[source] = target
    if target in found:
        found[target] = source
    return found


def _better(gpu: Gpu, client: Client) -> bool:
    there = client.gpus[0]
    return there.full and alike(there, gpu) and gpu.load < there.load - client.unit.load + EVEN
