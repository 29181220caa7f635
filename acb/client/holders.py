"""What a program that has waited long can tell of those it waits for: that one's process is stopped, by Ctrl-Z say."""

from __future__ import annotations

from collections.abc import Iterator

from acb.protocol import Status


def stopped(status: Status) -> Iterator[str]:
    """A sentence for each program in the broker's answer that holds a GPU and is stopped."""
    for client in status.clients:
        pid, gpus = client.get("pid"), client.get("gpus")
        if client.get("stopped") and isinstance(pid, int) and isinstance(gpus, list):
            which = " and ".join(map(str, gpus))
            yield (
                f"process {pid} ({client.get('name')}), which has its memory on GPU {which}, is stopped; let it go on "
                f"with fg in its shell or kill -CONT {pid}, or end it with kill -9 {pid}"
            )
