"""Start the broker, with your own rights, for this user (inside a batch job: for this job).

It returns when the broker answers, and leaves it running in the background; end it with `gpu_assigner stop`. When
one runs already, it says with which options and does nothing; the exit status is 69 when other ones are asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from acb.broker import log
from acb.broker.history import History
from acb.broker.journal import Journal, as_typed
from acb.broker.policies import POLICIES
from acb.cli.command import argument
from acb.cli.gpu_assigner import pool as pools
from acb.cli.gpu_assigner import talk
from acb.config import (
    EX_CANTCREAT,
    EX_TEMPFAIL,
    EX_UNAVAILABLE,
    ConfigError,
    env_path,
    parse_simulated,
    parse_whole,
    pid_path,
    programs_path,
    socket_path,
)

if TYPE_CHECKING:
    from acb.broker.server import Server

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
        help="lend simulated GPUs, such as 1x2GiB or 2x16GiB+1x8GiB; options: ,bandwidth=20GiB (a second) ,speed=0.5",
    )  # fmt: skip
    parser.add_argument(
        "--scheduler", choices=sorted(POLICIES), metavar="NAME",
        help="who is next: fifo (simple), fair (gpu-sharing), priority, backfill, affinity (gpu-affinity); "
        "default: fifo",
    )  # fmt: skip
    parser.add_argument(
        "--slots", metavar="N", type=argument(_slots),
        help="let so many programs compute on one GPU at once, if their memory fits (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--quantum",
        metavar="SECONDS",
        type=argument(_seconds),
        help="protect a busy program for so long when others wait (default: 33 times what swapping costs, 1 to 120 s)",
    )
    parser.add_argument(
        "--driver-tier", choices=("auto", "on", "off"),
        help="have the CUDA driver move what frameworks cannot: where it can (auto; simulated GPUs: on), or not",
    )  # fmt: skip
    parser.add_argument("--foreground", action="store_true", help="stay in the foreground and log to stderr")
    parser.add_argument("--recover", action="store_true", help="use the options of a broker that left its clients")
    parser.add_argument("--for-launch", action="store_true", help=argparse.SUPPRESS)  # as of a program just launched
    parser.add_argument("--log", metavar="FILE", type=Path, help=argparse.SUPPRESS)  # where to log once it runs


def run(options: argparse.Namespace) -> int:
    """Start one, unless one runs."""
    path = socket_path()
    running = talk.status(path)
    if running is not None:
        return _make_do_with(running, options)
    wishes = argparse.Namespace(**vars(options))
    if options.recover or (options.for_launch and _left_clients(options)):
        _take_over(options)
    options.scheduler = options.scheduler or "fifo"
    options.slots = options.slots or 1
    options.driver_tier = options.driver_tier or "auto"
    if options.foreground:
        return _serve(path, options)
    return _spawn(path, options, wishes)


def _make_do_with(running: Mapping[str, Any], options: argparse.Namespace) -> int:
    """One runs already: 0. Raises ConfigError when other options are asked for than it has."""
    given = running.get("options", {})
    words = f"already running (process {running['pid']}) with {running['devices']}, {as_typed(given)}"
    others = {} if options.recover else _contradictions(options, given, running["gpus"])
    if others:
        raise ConfigError(
            f"{words}, and not with {as_typed(others)}; end it first with: gpu_assigner stop", EX_UNAVAILABLE
        )
    print(f"gpu_assigner: {words}", file=sys.stderr)
    return 0


def _contradictions(options: argparse.Namespace, running: Mapping[str, Any], gpus: list[Any]) -> dict[str, Any]:
    """The options given, of which the running broker, with these GPUs, has others."""
    others = {
        name: value
        for name, value in _options(options).items()
        if value is not None and value != running.get(name)
    }  # fmt: skip
    if POLICIES.get(others.get("scheduler", "")) is POLICIES.get(running.get("scheduler", "")):
        others.pop("scheduler", None)  # another name of the same
    lent = {str(gpu["ordinal"]): n for n, gpu in enumerate(gpus)} | {gpu["visible"]: n for n, gpu in enumerate(gpus)}
    chosen = [lent.get(entry, -1) for entry in options.gpu_list or ()]
    same = options.gpu_list == ["all"] and running.get("gpu_list") is None
    if same or sorted(chosen) == list(range(len(gpus))):
        others.pop("gpu_list", None)
    return others


def _left_clients(options: argparse.Namespace) -> bool:
    """Whether a broker before has left clients that live. Raises ConfigError when the options given contradict its."""
    journal = Journal(_beside("journal"))
    left = sorted(journal.survivors()) if journal.read() else []
    others = _contradictions(options, journal.options, []) if left else {}
    if others:
        had = as_typed({name: journal.options.get(name) for name in others})
        raise ConfigError(
            f"the broker before had {had or 'NVIDIA GPUs'}, and not {as_typed(others)}, and left programs that still "
            f"run (process {', '.join(map(str, left[:10]))}{', …' if left[10:] else ''}); leave the option out, which "
            f"goes on with what it had, or end those programs first",
            EX_UNAVAILABLE,
        )
    return bool(left)


def _slots(text: str) -> int:
    return parse_whole("--slots", text, 1, 48)


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
                with contextlib.suppress(ConfigError):  # the journal of another version
                    setattr(options, name, parse(text))
        if options.scheduler is None and journal.options.get("scheduler") in POLICIES:
            options.scheduler = journal.options["scheduler"]
        if options.driver_tier is None and journal.options.get("driver_tier") in ("auto", "on", "off"):
            options.driver_tier = journal.options["driver_tier"]
        with contextlib.suppress(ConfigError):
            options.slots = options.slots or _slots(str(journal.options.get("slots")))


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
        "slots": None if options.slots is None else str(options.slots),
        "driver_tier": options.driver_tier,
        "quantum": None if options.quantum is None else str(options.quantum),
    }


def _spawn(path: Path, options: argparse.Namespace, wishes: argparse.Namespace) -> int:
    """Run the same command in the background, and wait until the socket answers. `wishes`: the options as given."""
    command = [sys.executable, "-m", "acb.cli.gpu_assigner", "start", "--foreground", "--log", str(_beside("log"))]
    for name, value in _options(options).items():
        command += [f"--{name.replace('_', '-')}", value] if value else []
    said, saying = os.pipe()  # what it says before it runs; not a file, since a full disk may be what it has to say
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=saying,
            start_new_session=True,
            cwd="/",
            env={**os.environ, **_state(), "ACB_RUNTIME_DIR": str(path.parent), "PYTHONPATH": _search_path()},
        )
    except OSError as error:
        os.close(said)
        raise ConfigError(f"cannot start the broker: {error}", EX_CANTCREAT) from None
    finally:
        os.close(saying)
    with open(said, errors="replace") as stream:
        return _wait_for_start(path, process, stream, wishes)


def _state() -> dict[str, str]:
    """Where the background process, in a working directory of its own, is to keep what it learns."""
    programs = programs_path()
    return {} if programs is None else {"ACB_STATE_DIR": str(programs.parent)}


def _wait_for_start(path: Path, process: subprocess.Popen[bytes], said: TextIO, wishes: argparse.Namespace) -> int:
    """Return 0 when a broker answers. Raises ConfigError when the process ends before that, with what it `said`, or
    when somebody else's, started at the same moment, is not as wished."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        report = talk.status(path)
        if report is not None and report["pid"] == process.pid:
            print(f"gpu_assigner: started (process {report['pid']}) with {report['devices']}", file=sys.stderr)
            process.returncode = 0  # it is meant to outlive us: no warning that it does
            return 0
        if report is not None and process.poll() is not None:
            return _make_do_with(report, wishes)
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
        if process.returncode == EX_TEMPFAIL or report is not None:
            time.sleep(0.01)  # somebody else starts one at this very moment: wait for his
            continue
        lines = said.read().strip().splitlines()
        raise ConfigError(
            lines[-1].removeprefix("gpu_assigner: ") if lines else f"the broker ended with status {process.returncode}",
            process.returncode if process.returncode > 0 else EX_TEMPFAIL,
        )
    process.kill()
    raise ConfigError(f"the broker at {path} does not answer after {PATIENCE:.0f} s; try again", EX_TEMPFAIL)


def _serve(path: Path, options: argparse.Namespace) -> int:
    """Be the broker until told to stop. Nothing is left behind then, nor when it cannot be done."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever starts us may have blocked those that are to end us
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _end)
    lock = _lock()
    log.keep(_beside("log"))  # a broker that died has left it
    journal = Journal(_beside("journal"))
    found = journal.path.exists()
    pool = None
    server = None
    failed = False
    try:
        journal.read()
        pool = _pool(options)
        try:
            server = _set_up(path, pool, journal, options)
        except OSError as error:
            raise ConfigError(
                f"cannot write {error.filename or f'in the runtime directory {path.parent}'}: "
                f"{error.strerror or error}; {_remedy(error)}, or set ACB_RUNTIME_DIR to another directory",
                EX_CANTCREAT,
            ) from None
        server.serve()
    except (ConfigError, SystemExit):
        raise
    except BaseException:
        failed = True
        raise
    finally:
        leavings = [path, pid_path(), env_path(), _beside("lock")]
        if not failed:  # else it is about to be written to the log why
            log.close(_beside("log"))
        if server is None and not found:  # else the clients of a broker that died still are in it
            leavings.append(journal.path)
        for leaving in leavings:
            with contextlib.suppress(OSError):
                leaving.unlink()
        if pool is not None:
            pool.close()
        os.close(lock)
    return 0


def _set_up(path: Path, pool: pools.Pool, journal: Journal, options: argparse.Namespace) -> Server:
    """Everything in place, so that whoever sees the socket, or the process id after it, may rely on the rest."""
    from acb.broker.server import Server

    journal.begin(_options(options))
    with open(os.devnull if options.log is None else options.log, "wb") as stream:
        env_path().write_text("".join(f"{name}={value}\n" for name, value in pool.variables().items()))
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_text("gpu_assigner")
        for gpu in pool.gpus:
            gpu.slots = options.slots
        history = History(programs_path())
        server = Server(
            path, pool.gpus, journal, pool.cards, options.scheduler, options.quantum, pool.description, history,
            pool.driver_tier(options.driver_tier, journal), pool.meter(), str(pool.directory or ""),
        )  # fmt: skip
        pid_path().write_text(f"{os.getpid()}\n")
        if options.log is not None:
            os.dup2(stream.fileno(), 2)
    _raise_limit()
    return server


def _remedy(error: OSError) -> str:
    """What helps against it."""
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
        return "remove it"
    return "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to that"


def _raise_limit() -> None:
    """One file descriptor a client: let there be as many as this user may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _end(number: int, frame: object) -> NoReturn:
    """A signal to end, before the broker serves: it ends as if it had."""
    raise SystemExit(0)


def _lock() -> int:
    """Be the only broker at this socket. Raises ConfigError when there is another one."""
    path = _beside("lock")
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}; {_remedy(error)}, or set ACB_RUNTIME_DIR to another directory",
                EX_CANTCREAT,
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
