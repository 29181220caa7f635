"""Show what the broker sees: its GPUs, who holds them, who waits, and where everybody's memory is.

A GPU's columns:
  memory      what it has
  promised    what those who hold it may use in all
  resident    what programs have on it now, whether they hold it or not
  held by     the processes that may compute on it now

A program's columns (a program is there from its first GPU call on):
  state       see below
  GPU         its GPUs, by the broker's ordinals; - when none is chosen yet
  resident    its memory on the GPU (on its fullest, if it has several) at this moment, by the device's count;
              where the device does not tell, what the program has last said, as it does every few seconds
  evacuated   its memory that lies on the host instead
  peak        the most that it has had on the GPU
  since       for how long it has been in this state; without the GPU, since it last gave it back

Its state:
  running     it holds the GPU, and may compute; it keeps it, idle or not, until somebody else wants it
  waiting     it stands at a GPU call until it gets the GPU
  restoring   it has just got the GPU, and its memory is brought back
  resident    it has given the GPU back, and its memory is still there, since nobody needs the room
  evacuating  its memory is being moved to the host, since somebody needs the room
  evacuated   its memory is on the host
  suspended   its memory is on the host by way of the CUDA driver, which stops it at its next GPU call
  detached    it has nothing on a GPU, and wants nothing
  stopped     it holds the GPU or is to move its memory, and its process is stopped, by Ctrl-Z say
  silent      it was there under the broker before, and has not told this one what it holds, which is kept for it
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from acb.cli.gpu_assigner import talk
from acb.config import EX_UNAVAILABLE, format_size, socket_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``gpu_assigner status``."""
    parser.add_argument("--json", action="store_true", help="print everything, as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Ask, and print."""
    path = socket_path()
    report = talk.status(path)
    if report is None:
        print(f"gpu_assigner: no GPU broker runs at {path}; start one with: gpu_assigner start", file=sys.stderr)
        return EX_UNAVAILABLE
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)
    return 0


def _show(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)  # names are the programs' own
    console.print(
        f"gpu_assigner {report['version']}, process {report['pid']}, up {_duration(report['uptime_s'])}, "
        f"scheduler {report['scheduler']}, {report['devices']}",
        soft_wrap=True,
    )
    gpus = Table(box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("GPU", "memory", "promised", "resident", "held by"):
        gpus.add_column(column, justify="left" if column == "held by" else "right")
    for gpu in report["gpus"]:
        holders = ", ".join(str(pid) for pid in gpu["holders"]) or "nobody"
        sizes = (format_size(gpu[key]) for key in ("capacity", "headroom", "resident"))
        gpus.add_row(str(gpu["ordinal"]), *sizes, holders)
    console.print(gpus)
    if report.get("awaited"):
        who = ", ".join(map(str, report["awaited"]))
        console.print(
            f"Nothing is lent for some seconds, for these to say what they hold: process {who}", soft_wrap=True
        )
    if not report["clients"]:
        console.print("No program is connected.")
        return
    rows = [
        (
            str(client["pid"]),
            client["name"],
            _state(client),
            ",".join(map(str, client["gpus"])) or "-",
            *(format_size(client[key]) if client[key] else "-" for key in ("resident", "evacuated", "peak")),
            _duration(client["state_s"]),
        )
        for client in report["clients"]
    ]
    clients = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    names = ("process", "program", "state", "GPU", "resident", "evacuated", "peak", "since")
    widths = [max(map(len, cells)) for cells in zip(names, *rows, strict=True)]
    # On a narrow terminal the program's name gives way: a figure that is cut short is worse than none.
    spare = console.width - 2 * len(names) - sum(widths) + widths[1]
    widths[1] = max(len("program"), min(widths[1], spare))
    for name, width in zip(names, widths, strict=True):
        left = name in ("program", "state")
        clients.add_column(name, justify="left" if left else "right", no_wrap=True, overflow="ellipsis", width=width)
    for row in rows:
        clients.add_row(*row)
    console.print(clients)
    for client in report["clients"]:
        for sentence in _remarks(client):
            console.print(sentence, soft_wrap=True)  # what is to be typed must come in one piece


def _state(client: dict[str, Any]) -> str:
    """The core's word, or what matters more to a person."""
    if client.get("absent"):
        return "silent"
    if client["stopped"]:
        return "stopped"
    return "suspended" if client["suspended"] and client["state"] == "evacuated" else str(client["state"])


def _remarks(client: dict[str, Any]) -> Iterator[str]:
    """What a person should know, or do something about."""
    pid = client["pid"]
    if client["unmovable"]:
        yield f"process {pid} could not be evacuated: {client['unmovable']}"
    if client["stranded"]:
        yield client["stranded"]
    if client.get("absent"):
        yield client["absent"]
    elif client["stopped"]:
        yield f"process {pid} is stopped; let it go on with fg in its shell, or with: kill -CONT {pid}"


def _duration(seconds: float) -> str:
    """``5.2 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
