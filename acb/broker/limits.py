"""Limits: what the GPUs of a broker can never give a client, and what it is told about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from acb.broker.room import Room
from acb.broker.state import Client, Gpu
from acb.config import ConfigError, format_size, parse_simulated
from acb.protocol import Hello


def impossible(client: Client, gpus: Sequence[Gpu]) -> str:
    """Why the client can never get what it asks for; '': it can."""
    unit = client.unit
    if client.refusal:
        return client.refusal
    what = f"process {client.pid}"
    if unit.gang:
        what += f", one of {unit.size} that run together,"
    if unit.size > len(gpus):
        return (
            f"{what} asks for {unit.size} GPUs at once, but the broker has {len(gpus)}; "
            f"{'start fewer' if unit.gang else 'ask for less'}, or start a broker with more"
        )
    floor = Room.floor(client)
    sizes = sorted((gpu.capacity for gpu in client.gpus or gpus), reverse=True)
    largest = sizes[(len(sizes) if client.gpus else unit.size) - 1]
    if floor <= largest:
        return ""
    advice = "ask for less, or start a broker with larger ones"
    if unit.size > 1 and not client.gpus:
        size = format_size(floor)
        return f"{what} asks for {size} on each of {unit.size} GPUs, but the broker has not so many so large; {advice}"
    size = format_size(largest)
    return f"{what} asks for {format_size(floor)} of GPU memory, but the largest GPU has {size}; {advice}"


def stranded(client: Client, missing: Sequence[int], lent: Iterable[int]) -> str:
    """What to tell a client that is bound to GPUs which are not lent: its memory is there, and it sees no other."""
    which = "GPU " + " and ".join(map(str, missing))
    needed = ",".join(str(n) for n in sorted({*lent, *missing}))
    return (
        f"process {client.pid} is bound to {which}, which this broker does not lend, and waits for one that does; "
        f"run: gpu_assigner stop, then: gpu_assigner start, with --gpu-list {needed}"
    )


def of_another_pool(hello: Hello) -> str:
    """What to tell a client of simulated GPUs which are not lent: it sees no other."""
    try:
        option = f"--simulate-gpus {parse_simulated(hello.pool_gpus)}"
    except ConfigError:
        option = "with these"
    return (
        f"process {hello.pid} uses the simulated GPUs in {hello.pool}, which this broker does not lend, and waits for "
        f"one that does; run: gpu_assigner stop, then: gpu_assigner start {option}"
    )
