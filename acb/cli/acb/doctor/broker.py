"""The runtime directory, the broker in it, what brokers that were killed have left there, and what brokers learn."""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from typing import Any

from acb import disk
from acb._version import __version__
from acb.broker.history import obstacle
from acb.cli.acb.doctor.check import Check
from acb.cli.gpu_assigner import talk
from acb.config import ConfigError, programs_path, runtime_dir, socket_path
from acb.devices.simulated_file import SIZE

SECTION = "Broker"

_TIMEOUT = 2.0  # seconds for somebody to accept a connection


def look() -> tuple[dict[str, Any] | None, list[Check]]:
    """What the running broker reports (None: none runs), and the checks."""
    try:
        directory = runtime_dir(make=False)
        path = socket_path(make=False)
    except ConfigError as error:
        text, _, advice = str(error).rpartition("; ")
        if not text:
            text, advice = advice, "set ACB_RUNTIME_DIR to a directory of your own"
        return None, [Check(SECTION, "directory", "fail", text, advice)]
    report, broker = _broker(path)
    found = [_directory(directory, running=report is not None), broker]
    if report is not None:
        log = _log(path)
        found.append(Check(SECTION, "socket", "ok", str(path)))
        found.append(Check(SECTION, "log", "ok", "where it was started" if log is None else str(log)))
    leavings = stale(directory, None if report is None else path)
    if leavings:
        names = ", ".join(file.name for file in leavings)
        found.append(
            Check(
                SECTION, "leavings", "note", f"killed brokers left {names}",
                f"harmless; to be rid of them: rm {' '.join(str(file) for file in leavings)}",
            )
        )  # fmt: skip
    return report, found


def facts(report: dict[str, Any]) -> dict[str, Any]:
    """A running broker, as ``acb doctor --json`` prints it. `log`: null when it logs to where it was started."""
    path = socket_path(make=False)
    log = _log(path)
    return {
        **{key: report[key] for key in ("version", "pid", "devices")},
        "socket": str(path),
        "log": None if log is None else str(log),
    }


def _log(path: Path) -> Path | None:
    """The log of the broker at this socket; None: it runs in the foreground, and has no file for it."""
    log = path.with_suffix(".log")
    return log if log.exists() else None


def _directory(directory: Path, *, running: bool) -> Check:
    """Whether there is room for a broker's files and a simulated GPU; a broker that runs has made its own already."""
    problem = disk.obstacle(directory, SIZE)
    if problem:
        return Check(
            SECTION, "directory", "warn" if running else "fail", f"{directory} takes no new file: {problem}",
            "make room there, or set ACB_RUNTIME_DIR to another directory",
        )  # fmt: skip
    if not directory.exists():
        return Check(SECTION, "directory", "ok", f"{directory}, which the first broker or simulated GPU makes")
    mode = stat.S_IMODE(directory.stat().st_mode)
    return Check(SECTION, "directory", "ok", f"{directory}, mode {mode:04o}, yours alone")


def learning() -> Check:
    """Whether what brokers learn of programs can be kept."""
    path = programs_path()
    problem = obstacle(path)
    if not problem:
        return Check(SECTION, "learning", "ok", f"what programs need is kept in {path}")
    where = f" in {path}" if path is not None else ""
    return Check(
        SECTION, "learning", "warn", f"what programs need cannot be kept{where}: {problem}; each broker learns it anew",
        "set ACB_STATE_DIR to a directory that you can write",
    )  # fmt: skip


def _broker(path: Path) -> tuple[dict[str, Any] | None, Check]:
    try:
        report = talk.status(path)
    except ConfigError as error:
        text, _, advice = str(error).partition("; ")
        return None, Check(SECTION, "broker", "fail", text, advice or "gpu_assigner stop, then gpu_assigner start")
    if report is None:
        return None, Check(SECTION, "broker", "ok", f"none runs yet; the first acb-launch starts one at {path}")
    clients = len(report["clients"])
    text = (
        f"process {report['pid']} lends {report['devices']}; "
        f"{clients or 'no'} program{'' if clients == 1 else 's'} connected"
    )
    if report["version"] != __version__:
        return report, Check(
            SECTION, "broker", "warn", f"{text}; it is acb {report['version']}, this is {__version__}",
            "when its programs are done: gpu_assigner stop",
        )  # fmt: skip
    return report, Check(SECTION, "broker", "ok", text)


def stale(directory: Path, running: Path | None) -> list[Path]:
    """Sockets in the runtime directory behind which nobody listens."""
    return sorted(path for path in directory.glob("*.sock") if path != running and not _answers(path))


def _answers(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_TIMEOUT)
            connection.connect(str(path))
    except (ConnectionError, FileNotFoundError):
        return False
    except OSError:  # busy, or not ours to ask
        return True
    return True


def lends_simulated(report: dict[str, Any] | None, gpus_here: int) -> list[Check]:
    """A broker with simulated GPUs where there are real ones is seldom meant."""
    if report is None or not gpus_here or "simulated" not in report["devices"]:
        return []
    return [
        Check(
            SECTION, "simulated", "warn", "the running broker lends simulated GPUs, although there are real ones here",
            "gpu_assigner stop, then gpu_assigner start",
        )
    ]  # fmt: skip
