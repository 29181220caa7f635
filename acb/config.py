"""Where acb keeps its files, and how sizes and simulated GPUs are written: the few settings every part agrees on.

Standard library only and light to import: this module also runs inside the user's programs.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

EX_USAGE, EX_DATAERR, EX_UNAVAILABLE, EX_CANTCREAT, EX_TEMPFAIL = 2, 65, 69, 73, 75
"""Exit statuses: those of sysexits(3), but 2, every command's own, for wrong usage.

The set is that of Fujitsu's broker.
"""

ASSUMED_BANDWIDTH = 8 << 30
"""Bytes a second between host and GPU while no swap has been measured: a slow PCIe 3 bus."""

MAX_GPUS = 64
"""In one pool."""

_NAME_MAX = 100  # of a description of simulated GPUs inside a file's name
_SUN_PATH_MAX = 107  # bytes of a Unix socket's path that Linux accepts, less the closing NUL
_UNITS = {"": 1, "B": 1, **{f"{p}iB": 1 << 10 * (i + 1) for i, p in enumerate("KMGT")}}
_UNITS |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")} | {
    p: 1 << 10 * (i + 1) for i, p in enumerate("KMGT")
}
_FOLDED_UNITS = {name.lower(): factor for name, factor in _UNITS.items()}


class ConfigError(Exception):
    """A setting that cannot be used: one sentence for a person and an exit status from sysexits(3)."""

    def __init__(self, message: str, status: int = EX_USAGE) -> None:
        super().__init__(message)
        self.status = status


class SimulatedSpec(NamedTuple):
    """What ``--simulate-gpus`` asks for.

    `capacities` are in bytes, one a GPU in the order of their ordinals, `bandwidth` in bytes a second between host and
    GPU (None: not limited), `speed` is the fraction of the CPU's own speed at which GPU work appears to run (None: as
    fast as the CPU).
    """

    capacities: tuple[int, ...]
    bandwidth: int | None = None
    speed: float | None = None

    def __str__(self) -> str:
        text = "+".join(f"{count}x{format_size(size, exact=True)}" for count, size in _runs(self.capacities))
        if self.bandwidth is not None:
            text += f",bandwidth={format_size(self.bandwidth, exact=True)}"
        if self.speed is not None:
            text += f",speed={self.speed!r}"
        return text


def _runs(sizes: Iterable[int]) -> list[tuple[int, int]]:
    """(count, size) of every stretch of equal sizes."""
    return [(len(list(run)), size) for size, run in itertools.groupby(sizes)]


def describe_simulated(capacities: Iterable[int]) -> str:
    """Simulated GPUs as a person writes them: ``2 simulated GPUs of 16GiB and 1 of 8GiB``."""
    words = [f"{count} of {format_size(size)}" for count, size in _runs(capacities)]
    words[0] = words[0].replace(" of ", " simulated GPU of " if words[0].startswith("1 ") else " simulated GPUs of ", 1)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def format_pool(capacities: Iterable[int]) -> str:
    """A pool's GPUs for a launcher to read: ``2x17179869184+1x8589934592``, sizes in bytes."""
    return "+".join(f"{count}x{size}" for count, size in _runs(capacities))


def parse_pool(text: str) -> list[int]:
    """The sizes in what format_pool() wrote; [] when the text is something else, of another release say."""
    if not re.fullmatch(r"[0-9]{1,2}x[0-9]{1,19}(\+[0-9]{1,2}x[0-9]{1,19})*", text):
        return []
    runs = [run.split("x") for run in text.split("+")]
    return [int(size) for count, size in runs for _ in range(int(count))]


def parse_size(text: str) -> int:
    """Bytes in a size such as ``10GiB``, ``512M``, ``1.5 GB`` or ``1048576``; K, M, G, T alone are powers of 1024.

    Raises ConfigError when the text is not a size above zero, and for ``Gb``, which may be meant as bits; ``gb`` is
    what batch systems call bytes.
    """
    match = re.fullmatch(r"\s*([0-9]{1,30})(?:\.([0-9]{1,30}))?\s*([A-Za-z]*)\s*", text)
    factor = _FOLDED_UNITS.get(match[3].lower()) if match else None
    if match is None or factor is None:
        raise ConfigError(f"{text!r} is not a size; write a number and a unit, such as 10GiB or 512MiB")
    if match[3].endswith("b") and match[3] != match[3].lower():
        raise ConfigError(f"{text!r} may be bits or bytes; sizes are in bytes: write {match[3][:-1]}B")
    decimals = match[2] or "0"
    size: int = int(match[1]) * factor + int(decimals) * factor // 10 ** len(decimals)
    if not 0 < size < 1 << 60:
        raise ConfigError(f"the size {text!r} is impossible; give one above zero, such as 10GiB")
    return size


def format_size(size: int, *, exact: bool = False) -> str:
    """A size in bytes as a person writes it: ``1.5GiB``. With `exact`, parse_size gives the same number back."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        factor = _UNITS[unit]
        if size >= factor and (not exact or size % factor == 0):
            return f"{size // factor}{unit}" if size % factor == 0 else f"{size / factor:.1f}{unit}"
    return f"{size}B"


def parse_whole(what: str, text: str, least: int, most: int) -> int:
    """The whole number that the option `what` was given. Raises ConfigError unless it is from `least` to `most`."""
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", text.strip()) or not least <= int(text) <= most:
        raise ConfigError(f"{what} needs a whole number from {least} to {most}, not {text!r}")
    return int(text)


def parse_weight(text: str) -> float:
    """A share beside other programs' shares. Raises ConfigError unless it is from 0.01 to 100."""
    weight = _number(text)
    if not 0.01 <= weight <= 100:
        raise ConfigError(f"--weight needs a number from 0.01 to 100, not {text!r}")
    return weight


def parse_simulated(text: str) -> SimulatedSpec:
    """Read ``NxSIZE[+NxSIZE…][,bandwidth=SIZE][,speed=FRACTION]``, as in ``1x2GiB`` or ``2x16GiB+1x8GiB,speed=0.5``.

    Raises ConfigError when it is anything else.
    """
    head, *options = text.split(",")
    capacities: list[int] = []
    for part in head.split("+"):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*[xX]\s*(.+)", part)
        if match is None or not 0 < int(match[1]) <= MAX_GPUS:
            raise ConfigError(
                f"{text!r} does not describe simulated GPUs; write a count (1 to {MAX_GPUS}) and a size, such as "
                f"1x2GiB, and further ones after a +"
            )
        capacities += [parse_size(match[2])] * int(match[1])
    if len(capacities) > MAX_GPUS:
        raise ConfigError(f"{text!r} are {len(capacities)} simulated GPUs; there can be {MAX_GPUS} at most")
    spec = SimulatedSpec(tuple(capacities))
    for option in options:
        name, _, value = option.partition("=")
        if name.strip() == "bandwidth":
            spec = spec._replace(bandwidth=parse_size(value.removesuffix("/s")))
        elif name.strip() == "speed" and 0 < _number(value) <= 1:
            spec = spec._replace(speed=_number(value))
        else:
            raise ConfigError(
                f"{option!r} is not an option of simulated GPUs; there are bandwidth=SIZE (a second) and "
                f"speed=FRACTION (above 0, at most 1)"
            )
    return spec


def _number(text: str) -> float:
    """The number that the text is; 0 when it is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def runtime_dir(*, make: bool = True) -> Path:
    """The directory of sockets and simulated GPUs. Where it is not there, it is made with mode 0700, if `make`.

    ``$ACB_RUNTIME_DIR``, else ``$XDG_RUNTIME_DIR/acb``, else ``/tmp/acb-UID``. Raises ConfigError when it cannot be
    made, belongs to another user, is open to others, or is a link.
    """
    directory = _runtime_path()
    try:
        if make:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        elif not os.path.lexists(directory):
            return directory
        info = directory.lstat()
    except OSError as error:
        raise ConfigError(
            f"cannot use the runtime directory {directory}: {error.strerror or error}; "
            f"set ACB_RUNTIME_DIR to a directory that you can write",
            EX_CANTCREAT,
        ) from None
    if not stat.S_ISDIR(info.st_mode):
        raise ConfigError(
            f"the runtime directory {directory} is not a directory; remove it or set ACB_RUNTIME_DIR", EX_CANTCREAT
        )
    if info.st_uid != os.getuid():
        raise ConfigError(
            f"the runtime directory {directory} belongs to user id {info.st_uid}, not to you; "
            f"set ACB_RUNTIME_DIR to one of yours",
            EX_CANTCREAT,
        )
    if info.st_mode & 0o077:
        raise ConfigError(
            f"the runtime directory {directory} is open to others (mode {stat.S_IMODE(info.st_mode):04o}); "
            f"run: chmod 700 {directory}",
            EX_CANTCREAT,
        )
    return directory


def _runtime_path() -> Path:
    """The runtime directory's place, unchecked."""
    chosen = os.environ.get("ACB_RUNTIME_DIR")
    if chosen:
        return Path(os.path.abspath(chosen))
    xdg = os.environ.get("XDG_RUNTIME_DIR")
    return Path(xdg, "acb") if xdg else Path(f"/tmp/acb-{os.getuid()}")


def job_suffix() -> str:
    """``-JOBID`` inside a Slurm or PJM job, so that each job has a broker of its own; else nothing."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("PJM_JOBID") or ""
    return "-" + re.sub(r"[^A-Za-z0-9._-]", "_", job) if job else ""


def socket_path(*, make: bool = True) -> Path:
    """Where the broker listens: ``$ACB_SOCKET``, else ``broker[-JOBID].sock`` in the runtime directory.

    That is made if need be; whoever only asks needs no directory. Raises ConfigError as runtime_dir does, and when the
    path is longer than a Unix socket's may be.
    """
    chosen = os.environ.get("ACB_SOCKET")
    path = Path(chosen) if chosen else runtime_dir(make=make) / f"broker{job_suffix()}.sock"
    if len(os.fsencode(path)) > _SUN_PATH_MAX:
        raise ConfigError(
            f"the socket path {path} is longer than {_SUN_PATH_MAX} bytes; set ACB_RUNTIME_DIR to a shorter one"
        )
    return path


def pid_path() -> Path:
    """The file with the broker's process id, beside its socket."""
    return socket_path().with_suffix(".pid")


def no_answer(socket: Path) -> str:
    """What to tell a person whose broker, at this socket, hangs, or is stopped."""
    return f"the GPU broker at {socket} does not answer; end it with: {end_it(socket)}"


def end_it(socket: Path) -> str:
    """A shell's command for a broker that does not listen; not pkill, which would end those of other jobs, too."""
    import shlex

    return f"kill -9 $(cat {shlex.quote(str(socket.with_suffix('.pid')))})"


def env_path() -> Path:
    """The file with NAME=value lines for the programs of a broker, beside its socket."""
    return socket_path().with_suffix(".env")


def programs_path() -> Path | None:
    """The file with what brokers have learned of programs: in ``$ACB_STATE_DIR``, else ``$XDG_STATE_HOME/acb``, else
    ``~/.local/state/acb``. None: there is no such place."""
    chosen, xdg = os.environ.get("ACB_STATE_DIR"), os.environ.get("XDG_STATE_HOME")
    home = os.path.expanduser("~/.local/state")
    if not chosen and not xdg and not os.path.isabs(home):
        return None
    return Path(os.path.abspath(chosen) if chosen else os.path.join(xdg or home, "acb"), "programs.json")


def simulated_dir(spec: SimulatedSpec) -> Path:
    """The directory of the simulated GPUs that all programs started with the same `spec` share, within one job."""
    return runtime_dir() / simulated_name(spec)


def simulated_name(spec: SimulatedSpec | None) -> str:
    """The name of that directory; None: what all such names begin with."""
    if spec is None:
        return "simulated-"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", str(spec))
    if len(name) > _NAME_MAX:
        import hashlib

        name = name[:_NAME_MAX] + "-" + hashlib.sha256(str(spec).encode()).hexdigest()[:16]
    return "simulated-" + name + job_suffix()
