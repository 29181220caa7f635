"""Start the broker, with your own rights, for this user (inside a batch job: for this job).

It returns when the broker answers, and leaves it running in the background; end it with `gpu_assigner stop` or
`pkill gpu_assigner`. When one runs already, it says so and does nothing.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from acb.broker.journal import Journal
from acb.broker.policies import POLICIES
from acb.cli.command import argument
from acb.cli.gpu_assigner import pool as pools
from acb.cli.gpu_assigner import talk
from acb.config import (
    EX_CANTCREAT,
    EX_TEMPFAIL,
    ConfigError,
    env_path,
    parse_simulated,
    pid_path,
    socket_path,
)

PATIENCE = 20.0
"""Seconds until a broker that does not answer after its start is given up."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``gpu_assigner start``."""
    parser.add_argument(
        "--gpu-list", metavar="LIST", type=argument(pools.parse_gpu_list),
        help="the GPUs to lend, by ordinal or UUID, such as 0,1 (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--simulate-gpus", metavar="NxSIZE", type=argument(parse_simulated),
        help="lend simulated GPUs, such as 1x2GiB; options: ,bandwidth=20GiB (a second) ,speed=0.5",
    )  # fmt: skip
    parser.add_argument(
        "--scheduler", choices=sorted(POLICIES), default="fifo", help="who is next (default: %(default)s)"
    )
    parser.add_argument(
        "--quantum",
        metavar="SECONDS",
        type=argument(_seconds),
        help="protect a busy program for so long when others wait (default: ten times what swapping costs, 1 to 60 s)",
    )
    parser.add_argument("--foreground", action="store_true", help="stay in the foreground and log to stderr")
    parser.add_argument("--recover", action="store_true", help="use the options of a broker that died, if one did")


def run(options: argparse.Namespace) -> int:
    """Start one, unless one runs."""
    path = socket_path()
    running = talk.status(path)
    if running is not None:
        print(f"gpu_assigner: already running (process {running['pid']}) with {running['devices']}", file=sys.stderr)
        return 0
    if options.recover:
        _take_over(options)
    # Problems with the options are reported here, in the foreground.
    pool = _pool(options)
    if options.foreground:
        return _serve(path, pool, options)
    return _spawn(path, options)


def _seconds(text: str) -> float:
    """Seconds, zero or more. Raises ConfigError when it is something else."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise ConfigError(f"{text!r} is not a time; write seconds, such as 2.5")
    return seconds


def _take_over(options: argparse.Namespace) -> None:
    """Put the options of the broker that died in place of those not given."""
    journal = Journal(_beside("journal"))
    if journal.read():
        parsers: dict[str, Callable[[str], Any]] = {
            "gpu_list": pools.parse_gpu_list,
            "simulate_gpus": parse_simulated,
            "quantum": _seconds,
        }
        for name, parse in parsers.items():
            text = journal.options.get(name)
            if getattr(options, name) is None and isinstance(text, str):
                setattr(options, name, parse(text))
        if journal.options.get("scheduler") in POLICIES:
            options.scheduler = journal.options["scheduler"]


def _pool(options: argparse.Namespace) -> pools.Pool:
    if options.simulate_gpus is not None:
        return pools.simulated(options.simulate_gpus, options.gpu_list)
    return pools.real(options.gpu_list)


def _options(options: argparse.Namespace) -> dict[str, Any]:
    """The options as text, for the journal and for the background process."""
    return {
        "gpu_list": ",".join(options.gpu_list) if options.gpu_list else None,
        "simulate_gpus": str(options.simulate_gpus) if options.simulate_gpus else None,
        "scheduler": options.scheduler,
        "quantum": None if options.quantum is None else str(options.quantum),
    }


def _spawn(path: Path, options: argparse.Namespace) -> int:
    """Run the same command in the background, and wait until the socket answers."""
    command = [sys.executable, "-m", "acb.cli.gpu_assigner", "start", "--foreground"]
    for name, value in _options(options).items():
        command += [f"--{name.replace('_', '-')}", value] if value else []
    log = _beside("log")
    try:
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
                start_new_session=True,
                cwd="/",
                env={**os.environ, "ACB_RUNTIME_DIR": str(path.parent), "PYTHONPATH": _search_path()},
            )
    except OSError as error:
        raise ConfigError(f"cannot start the broker: {error}", EX_CANTCREAT) from None
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        report = talk.status(path)
        if report is not None:
            print(f"gpu_assigner: started (process {report['pid']}) with {report['devices']}", file=sys.stderr)
            return 0
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
        if process.returncode == EX_TEMPFAIL:
            continue  # somebody else starts one at this very moment: wait for his
        said = log.read_text(errors="replace").strip().splitlines()
        raise ConfigError(
            said[-1].removeprefix("gpu_assigner: ") if said else f"the broker ended with status {process.returncode}",
            process.returncode or EX_TEMPFAIL,
        )
    process.kill()
    raise ConfigError(f"the broker does not answer after {PATIENCE:.0f} s; see {log}", EX_TEMPFAIL)


def _serve(path: Path, pool: pools.Pool, options: argparse.Namespace) -> int:
    """Be the broker until told to stop."""
    from acb.broker.server import Server

    lock = _lock()
    journal = Journal(_beside("journal"))
    journal.read()
    leavings = (pid_path(), env_path(), _beside("log"), _beside("lock"))
    try:
        journal.begin(_options(options))
        server = Server(path, pool.gpus, journal, pool.cards, options.scheduler, options.quantum, pool.description)
        env_path().write_text("".join(f"{name}={value}\n" for name, value in pool.environment.items()))
        Path("/proc/self/comm").write_text("gpu_assigner")
        pid_path().write_text(f"{os.getpid()}\n")
    except OSError as error:
        for leaving in (path, journal.path, *leavings):
            leaving.unlink(missing_ok=True)
        raise ConfigError(
            f"cannot write in the runtime directory {path.parent}: {error.strerror or error}; "
            f"make room, or set ACB_RUNTIME_DIR to another directory",
            EX_CANTCREAT,
        ) from None
    try:
        server.serve()
    finally:
        for leaving in leavings:
            leaving.unlink(missing_ok=True)
        pool.close()
        os.close(lock)
    return 0


def _lock() -> int:
    """Be the only broker at this socket. Raises ConfigError when there is another one."""
    path = _beside("lock")
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}; set ACB_RUNTIME_DIR to another directory", EX_CANTCREAT
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise ConfigError("another broker is starting at this moment", EX_TEMPFAIL) from None
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the one before removed the file while we waited: lock the new one


def _beside(suffix: str) -> Path:
    """A file of the broker's, beside its socket."""
    return socket_path().with_suffix(f".{suffix}")


def _search_path() -> str:
    """PYTHONPATH for the background process: where this very acb lies, before all else."""
    home = str(Path(__file__).parents[3])
    return os.pathsep.join(dict.fromkeys([home, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
