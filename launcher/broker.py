"""Whether a broker answers, and starting one: what the launcher needs to know of it."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from acb.config import EX_UNAVAILABLE, ConfigError
from acb.launcher.environment import HOME

_TIMEOUT = 5.0  # seconds for a broker to accept a connection: it needs microseconds unless it hangs

# As `python -m acb.cli.gpu_assigner`, but with neither the working directory nor PYTHONPATH before acb's own place.
_RUN_MODULE = """
import runpy, sys
home = sys.argv.pop(1)
sys.path[:] = [entry for entry in sys.path if entry]
if home not in sys.path:
    sys.path.insert(0, home)
runpy.run_module("acb.cli.gpu_assigner", run_name="__main__", alter_sys=True)
"""


def answers(path: Path) -> bool:
    """Whether somebody accepts connections on the socket at `path`."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_TIMEOUT)
            connection.connect(str(path))
    except OSError:
        return False
    return True


def start(simulate: str | None, *, quiet: bool) -> None:
    """Have ``gpu_assigner start`` start a broker, with simulated GPUs if `simulate` says which; wait until it answers.

    Where a broker before has left programs that run, it is started with that one's options, which `simulate` must not
    contradict.

    Raises ConfigError with its exit status when it does not; what it said is then on stderr. `quiet` keeps its
    messages back unless it fails.
    """
    import subprocess  # as late as this: it would double the start-up of every launch with an option

    command = [sys.executable, "-E", "-c", _RUN_MODULE, str(HOME), "start"]
    if simulate is not None:
        command += ["--simulate-gpus", simulate]
    command.append("--for-launch")
    # Its standard output is not the command's: whatever it says goes to stderr.
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if quiet else sys.stderr,
        stderr=subprocess.STDOUT if quiet else None,
        check=False,
    )
    if done.returncode == 0:
        return
    if quiet:
        sys.stderr.write(done.stdout.decode(errors="replace"))
    raise ConfigError("", done.returncode if done.returncode > 0 else EX_UNAVAILABLE)
