"""Parts of benchmarks.gpu that do in a moment what real ones do when something is wrong; their names say what."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_parts.part import Part, Skip
from benchmarks.gpu_parts.playing import STOPPED
from benchmarks.gpu_parts.stage import Stage

SLEEPER = "import signal, sys; print('sleeping', flush=True); print('I lie here', file=sys.stderr); signal.pause()"


def run(part: Part) -> None:
    """What the part's name says."""
    part.check("it begins", True)
    {name: play for name, play in globals().items() if callable(play)}[part.name](part)


def passes(part: Part) -> None:
    part.tell("a target", "2", "at most 1", False, "a remark with [/tmp/x] and [gpu:0] in it")


def measures(part: Part) -> None:
    """Its time."""
    part.figures["left"] = part.left()


def fails(part: Part) -> None:
    part.check("one is two", 1 == 2)


def crashes(part: Part) -> None:
    with Stage(part.settings) as stage:
        (stage.directory / "1-program.txt").write_text("what the program has said\n")
        raise RuntimeError("[/broken]")


def dies(part: Part) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def skips(part: Part) -> None:
    raise Skip("there is nothing to do")


def hangs(part: Part) -> None:
    """With a program, whose process id is in the file that it is told of."""
    with Stage(part.settings) as stage:
        with (stage.directory / "1-program.txt").open("w") as log:
            process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        process.stdout.readline()
        file = Path(os.environ["STANDIN_FILE"])
        file.with_suffix(".draft").write_text(str(process.pid))
        file.with_suffix(".draft").rename(file)
        process.wait()


def stops(part: Part) -> None:
    """A process in a session of its own, as a broker's helper is, which ends when it may."""
    with Stage(part.settings) as stage:
        ends = "import os, sys; os.kill(os.getpid(), 19); open(sys.argv[1], 'w')"
        process = subprocess.Popen([sys.executable, "-c", ends, os.environ["STANDIN_FILE"]], start_new_session=True)
        os.waitpid(process.pid, os.WUNTRACED)
        (stage.directory / STOPPED).write_text(str(process.pid))
        os.kill(os.getpid(), signal.SIGKILL)


def listens(part: Part) -> None:
    """Where the stage's broker would."""
    with Stage(part.settings) as stage, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(stage.directory / "broker.sock"))
    part.check("it listens", True)
