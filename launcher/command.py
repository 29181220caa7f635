"""The command that acb-launch becomes: finding it, saying when it cannot be instrumented, and executing it."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Mapping, Sequence
from typing import NoReturn

from acb.launcher.wrapped import unwrapped

NOT_FOUND, NOT_RUNNABLE = 127, 126
"""The exit statuses that shells use."""


class CommandError(Exception):
    """A command that cannot be executed: one sentence for a person, and the status a shell would exit with."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def find(name: str, search_path: str | None) -> str:
    """The file that `name` stands for, as execvp(3) looks it up; `search_path` is the value of PATH.

    Raises CommandError when there is none, or none that this user may execute.
    """
    if "/" in name:
        candidates = [name]
    else:
        places = (os.defpath if search_path is None else search_path).split(":") if name else []
        candidates = [os.path.join(place, name) if place else name for place in places]
    denied = None
    for file in candidates:
        if os.path.isfile(file):
            if os.access(file, os.X_OK, effective_ids=True):
                return file
            denied = denied or f"cannot run {file}: no permission to execute it; to give it: chmod +x {file}"
        elif "/" in name and os.path.isdir(file):
            denied = f"cannot run {file}: it is a directory"
    if denied:
        raise CommandError(denied, NOT_RUNNABLE)
    if "/" in name:
        raise CommandError(f"no such command: {name}", NOT_FOUND)
    raise CommandError(f"no such command: {name or repr(name)}; it is in none of the directories of PATH", NOT_FOUND)


def execute(file: str, argv: list[str], environ: Mapping[str, str], ignored_signals: int) -> NoReturn:
    """Become the command; `ignored_signals` is SigIgn of /proc/PID/status before Python changed it (bit 0: signal 1).

    Raises CommandError when the kernel refuses.
    """
    # Python ignores these two for itself, and what is ignored stays ignored through exec.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN if ignored_signals >> (number - 1) & 1 else signal.SIG_DFL)
    try:
        os.execve(file, argv, environ)
    except OSError as error:
        if error.errno == errno.ENOEXEC:  # a script without #!: execvp(3) and every shell give it to sh
            os.execve("/bin/sh", ["/bin/sh", file, *argv[1:]], environ)
        if error.errno == errno.ENOENT:
            interpreter = _script_interpreter(file)[:1]
            reason = f"its interpreter {interpreter[0]} is not there" if interpreter else "a part of it is not there"
            raise CommandError(f"cannot run {file}: {reason}", NOT_RUNNABLE) from None
        raise CommandError(f"cannot run {file}: {error.strerror}", NOT_RUNNABLE) from None


def kept_out(file: str, argv: Sequence[str], search_path: str | None) -> tuple[str, str] | None:
    """The program in this command, and the argument of its own, that surely keep acb's bootstrap out; None: none does.

    Looks at Python's -I, -S and -E, also in the ``#!`` line of a script, and through ``env``, ``nice`` and their kin,
    of which ``env -i`` does the same. A Python further down, in a shell's script say, is not seen.
    """
    inner, against = unwrapped(argv)
    if against is not None:
        return against
    if not inner:
        return None
    if len(inner) != len(argv):
        try:
            file = find(inner[0], search_path)
        except CommandError:
            return None
    flag = python_flag_against(file, inner)
    return None if flag is None else (inner[0], flag)


def python_flag_against(file: str, argv: Sequence[str]) -> str | None:
    """The option, of -I, -S and -E, with which this Python command will ignore acb's bootstrap; None if there is none.

    Looks at the command itself and at the ``#!`` line of a script. A Python further down is not seen.
    """
    if _is_python(argv[0]):
        return _ignoring_flag(argv[1:])
    line = _script_interpreter(file)
    if line and os.path.basename(line[0]) == "env":
        line = line[1].removeprefix("-S").split() if len(line) > 1 else []
    if line and _is_python(line[0]):
        return _ignoring_flag(" ".join(line[1:]).split())
    return None


def _is_python(name: str) -> bool:
    return os.path.basename(name).startswith(("python", "pypy"))


def _ignoring_flag(arguments: Sequence[str]) -> str | None:
    """The first of -I, -S and -E among Python's own options, read as Python's getopt reads them."""
    rest = iter(arguments)
    for argument in rest:
        if len(argument) < 2 or not argument.startswith("-") or argument.startswith("--"):
            if argument in ("--check-hash-based-pycs",):
                next(rest, None)
                continue
            return None
        for place, letter in enumerate(argument[1:], 2):
            if letter in "ISE":
                return f"-{letter}"
            if letter in "cm":
                return None
            if letter in "WX":
                if place == len(argument):
                    next(rest, None)
                break
    return None


def _script_interpreter(file: str) -> list[str]:
    """The interpreter of a ``#!`` script and its one argument, as the kernel splits them; [] for any other file."""
    try:
        with open(file, "rb") as script:
            first = script.readline(256)
    except OSError:
        return []
    return os.fsdecode(first[2:]).strip().split(None, 1) if first.startswith(b"#!") else []
