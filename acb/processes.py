"""Which processes live: numbers are used again, and a process that ends is there for a while although it runs no more.

Standard library only and light to import.
"""

from __future__ import annotations

import os
import select
from typing import NamedTuple

_EXITING = 0x4  # PF_EXITING of the kernel's include/linux/sched.h: set before the process's files are closed


class Activity(NamedTuple):
    """What a process is at: `running` when a thread of it runs, or would if there were a CPU for it.

    `stopped`: by a signal or a debugger. `seconds` of CPU time it has used in its life, to a hundredth.
    """

    stopped: bool
    running: bool
    seconds: float


def _stat(which: int | str) -> list[bytes]:
    """The fields of /proc/PID/stat (proc(5)) from the third one on; [] when there is no such process.

    Of a thread when `which` is PID/task/TID.
    """
    try:
        with open(f"/proc/{which}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()  # the name before may hold anything
    except OSError:
        return []


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None: it runs no more, or is just ending."""
    fields = _stat(pid)
    if not fields or fields[0] in (b"Z", b"X") or int(fields[6]) & _EXITING:
        return None
    return int(fields[19])


def stopped(pid: int) -> bool:
    """Whether the process stands still, by Ctrl-Z, a SIGSTOP, or a debugger."""
    return _stat(pid)[:1] in ([b"T"], [b"t"])


def going_on(pid: int) -> str:
    """What can be done about a process that is stopped, in words for a person."""
    return f"let it go on with fg in its shell or kill -CONT {pid}, or end it with: kill -9 {pid}"


def ending(pid: int) -> int | None:
    """A file descriptor that becomes readable when a process that is just ending has ended, with all that it held.

    None: it has already, or it is not ending at all. (Its connections may be closed before its GPU memory is free.)
    """
    fields = _stat(pid)
    if not fields or not (fields[0] in (b"Z", b"X") or int(fields[6]) & _EXITING):
        return None
    return running(pid)


def running(pid: int) -> int | None:
    """The same of any process, ending or not. None: it has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return None
    if select.select([descriptor], [], [], 0)[0]:
        os.close(descriptor)
        return None
    return descriptor


def activity(pid: int) -> Activity | None:
    """What the process is at, all its threads taken together; None: there is no such process, or it ends."""
    fields = _stat(pid)
    if not fields or fields[0] in (b"Z", b"X"):
        return None
    try:
        threads = [_stat(f"{pid}/task/{thread}") for thread in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return None
    states = {thread[0] for thread in threads if thread}
    ticks = int(fields[11]) + int(fields[12])
    return Activity(bool(states & {b"T", b"t"}), b"R" in states, ticks / os.sysconf("SC_CLK_TCK"))
