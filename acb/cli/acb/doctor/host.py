"""The host: memory to evacuate to, limits on page-locking, and what this user may do to his own processes."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path

from acb.cli.acb.doctor.check import Check
from acb.config import format_size
from acb.hostmemory import RESERVE, available_bytes

SECTION = "Host"

_CAPABILITIES = {14: "IPC_LOCK", 19: "SYS_PTRACE", 21: "SYS_ADMIN"}  # linux/capability.h
_SCOPES = {
    0: "a process may trace any other of its user",
    1: "a process may trace its descendants only",
    2: "only root may trace processes",
    3: "nobody may trace processes",
}


def checks(largest: int, root: Path = Path("/")) -> list[Check]:
    """All about the host. `largest` is the capacity of the largest GPU in bytes, 0: none."""
    locked = [_locked(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])] if largest else []  # no card, no page-locking
    return [_memory(available_bytes(), largest), *locked, _user(root)]


def _memory(available: int | None, largest: int) -> Check:
    if available is None:
        return Check(SECTION, "memory", "note", "the kernel does not say how much host memory is available")
    text = f"{format_size(_rounded(available))} can take evacuated data"
    if largest and available - RESERVE < largest:
        return Check(
            SECTION,
            "memory",
            "warn",
            f"{text}, less than a GPU's {format_size(largest)}",
            "what does not fit stays on the GPU, and others wait: ask for more host memory in your job",
        )
    return Check(SECTION, "memory", "ok", text)


def _locked(limit: int) -> Check:
    if limit == resource.RLIM_INFINITY:
        return Check(SECTION, "locked memory", "ok", "no limit, so evacuation can use page-locked buffers")
    return Check(
        SECTION,
        "locked memory",
        "note",
        f"limited to {format_size(limit)}; where the driver minds, evacuation copies at a fraction of the speed",
        "if it turns out slow: ulimit -l unlimited, or ask for it",
    )


def _user(root: Path) -> Check:
    """Who we are, and whether one of our processes may act on another: the driver tier needs that."""
    held = _capabilities(root)
    who = "root" if os.geteuid() == 0 else f"user id {os.geteuid()}"
    if held:
        who += f", with {', '.join(held)}"
    scope = ptrace_scope(root)
    if scope is None:
        return Check(SECTION, "user", "ok", who)
    text = f"{who}; {_SCOPES.get(scope, f'ptrace scope {scope}')}"
    if scope >= 2 and "SYS_PTRACE" not in held:
        return Check(
            SECTION, "user", "note", f"{text}, which may keep the driver from suspending programs",
            "acb doctor --probe tells; or: sysctl kernel.yama.ptrace_scope=1",
        )  # fmt: skip
    return Check(SECTION, "user", "ok", text)


def ptrace_scope(root: Path = Path("/")) -> int | None:
    """Yama's restriction of ptrace, 0 to 3; None when this kernel has none."""
    try:
        return int((root / "proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        return None


def _capabilities(root: Path) -> list[str]:
    """Those of this process's effective capabilities that matter here."""
    try:
        for line in (root / "proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                bits = int(line.split()[1], 16)
                return [name for number, name in _CAPABILITIES.items() if bits >> number & 1]
    except (OSError, ValueError, IndexError):
        pass
    return []


def facts() -> dict[str, object]:
    """As ``acb doctor --json`` prints it. Sizes in bytes; null: no limit, or not known."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "uid": os.geteuid(),
        "capabilities": _capabilities(Path("/")),
        "ptrace_scope": ptrace_scope(),
        "memory_available": available_bytes(),
        "locked_memory_limit": None if limit == resource.RLIM_INFINITY else limit,
    }


def _rounded(nbytes: int) -> int:
    """To a MiB, where it is worth that."""
    return nbytes if nbytes < 1 << 30 else nbytes // (1 << 20) << 20
