"""How much host memory an evacuation may take, asked before it starts: running out half-way would cost the program.

The kernel's own estimate, within the control group: a batch job has less than the machine.
"""

from __future__ import annotations

RESERVE = 256 << 20
"""Bytes of host memory that evacuation leaves to everybody else."""


def available_bytes() -> int | None:
    """Host memory that this process could still take: what the kernel calls available, within its control group.

    None when the kernel does not say.
    """
    limits = [_meminfo_available(), _cgroup_available()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _meminfo_available() -> int | None:
    """MemAvailable of /proc/meminfo, in bytes."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None


def _cgroup_available() -> int | None:
    """What is left under the tightest memory limit of this process's control group and those above it."""
    left: list[int] = []
    for directory, limit, usage, statistics in _cgroup_files():
        try:
            with open(f"{directory}/{limit}") as file:
                ceiling = int(file.read())  # "max" is not a number: no limit here
            with open(f"{directory}/{usage}") as file:
                used = int(file.read())
            used -= _file_cache(f"{directory}/{statistics}")
        except (OSError, ValueError):
            continue
        if ceiling < 1 << 60:
            left.append(ceiling - used)
    return min(left) if left else None


def _cgroup_files() -> list[tuple[str, str, str, str]]:
    """Directory, limit file, usage file and statistics file of the control groups that this process is in."""
    found = []
    try:
        with open("/proc/self/cgroup") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = "/sys/fs/cgroup", ("memory.max", "memory.current", "memory.stat")
        elif "memory" in controllers.split(","):
            root, names = "/sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        found += [("/".join([root, *parts[:depth]]), *names) for depth in range(len(parts), -1, -1)]
    return found


def _file_cache(path: str) -> int:
    """Bytes of file cache in a group's statistics that the kernel would give up first."""
    with open(path) as lines:
        for line in lines:
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0
