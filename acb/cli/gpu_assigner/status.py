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
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from acb import processes
from acb.cli import output
from acb.cli.gpu_assigner import table, talk
from acb.cli.gpu_assigner.table import Column
from acb.config import EX_UNAVAILABLE, format_size, socket_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``gpu_assigner status``."""
    parser.add_argument("--json", action="store_true", help="print everything, as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Ask, and print."""
    path = socket_path(make=False)
    report = talk.status(path)
    if report is None:
        print(f"gpu_assigner: no GPU broker runs at {path}; start one with: gpu_assigner start", file=sys.stderr)
        return EX_UNAVAILABLE
    with output.page():
        if options.json:
            print(json.dumps(report, indent=2))
        else:
            _show(report)
    return 0


def _show(report: dict[str, Any]) -> None:
    unicode = output.writable("\N{HORIZONTAL ELLIPSIS}") != "?"
    width = shutil.get_terminal_size().columns - 1  # of the space at their left
    print(
        f"gpu_assigner {report['version']}, process {report['pid']}, up {_duration(report['uptime_s'])}, "
        f"scheduler {report['scheduler']}, {report['devices']}"
    )
    tables = [_gpus(report["gpus"])]
    if report["clients"]:
        tables.append(_programs(report["clients"]))
    for columns in tables:
        for line in table.lines(columns, width, unicode=unicode):
            print(line)
    if report.get("awaited"):
        who = ", ".join(map(str, report["awaited"]))
        print(f"Nothing is lent for some seconds, for these to say what they hold: process {who}")
    if not report["clients"]:
        print("\nNo program is connected.")
    remarks = [sentence for client in report["clients"] for sentence in _remarks(client)]
    if remarks:
        print("\n".join(["", *remarks]))


def _gpus(gpus: list[dict[str, Any]]) -> list[Column]:
    sizes = {key: [format_size(gpu[key]) for gpu in gpus] for key in ("capacity", "headroom", "resident")}
    holders = [", ".join(str(pid) for pid in gpu["holders"]) or "nobody" for gpu in gpus]
    return [
        Column("GPU", 0, [str(gpu["ordinal"]) for gpu in gpus]),
        Column("memory", 3, sizes["capacity"]),
        Column("promised", 4, sizes["headroom"]),
        Column("resident", 2, sizes["resident"]),
        Column("held by", 1, holders, left=True, is_list=True),
    ]


def _programs(clients: list[dict[str, Any]]) -> list[Column]:
    def sizes(key: str) -> list[str]:
        return [format_size(client[key]) if client[key] else "-" for client in clients]

    return [
        Column("process", 0, [str(client["pid"]) for client in clients]),
        Column("program", 2, [output.writable(client["name"]) for client in clients], left=True, is_name=True),
        Column("state", 1, [_state(client) for client in clients], left=True),
        Column("GPU", 3, [",".join(map(str, client["gpus"])) or "-" for client in clients]),
        Column("resident", 4, sizes("resident")),
        Column("evacuated", 6, sizes("evacuated")),
        Column("peak", 7, sizes("peak")),
        Column("since", 5, [_duration(client["state_s"]) for client in clients]),
    ]


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
        yield f"process {pid} is stopped; {processes.going_on(pid)}"


def _duration(seconds: float) -> str:
    """``5.2 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
