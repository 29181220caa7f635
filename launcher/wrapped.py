"""The command behind commands that run another one: ``env``, ``nice``, ``timeout`` and kin.

The shell script acb-launch knows the names, too: it leaves what may be of interest to the launcher in Python.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

_WRAPPERS = {
    "env": ("uCa", 0),
    "nice": ("n", 0),
    "ionice": ("cn", 0),
    "nohup": ("", 0),
    "setsid": ("", 0),
    "stdbuf": ("ioe", 0),
    "time": ("fo", 0),
    "timeout": ("ks", 1),
    "taskset": ("", 1),
    "chrt": ("TPD", 1),
    "numactl": ("ipmNCwP", 0),
}
"""The letters of their options that take an argument, and how many arguments come before the command."""

_LONG = {
    "--adjustment", "--argv0", "--chdir", "--class", "--classdata", "--cpunodebind", "--error", "--format", "--input",
    "--interleave", "--kill-after", "--membind", "--output", "--physcpubind", "--preferred", "--signal", "--unset",
}  # fmt: skip
"""Long options of any of them that take an argument, also as the next word."""


def unwrapped(argv: Sequence[str]) -> tuple[list[str], tuple[str, str] | None]:
    """The command that this one comes to, and an ``env`` that keeps acb out of it, with its argument, such as -i."""
    command = list(argv)
    against: tuple[str, str] | None = None
    while command and os.path.basename(command[0]) in _WRAPPERS:
        program, name = command[0], os.path.basename(command[0])
        options, command = _split(name, command[1:])
        argument = _against(options) if name == "env" else None
        if argument is not None:
            against = against or (program, argument)
    return command, against


def _split(name: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """A wrapper's own arguments, each option with its value after a ``=``, and the command that it runs."""
    letters, positional = _WRAPPERS[name]
    own: list[str] = []
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "--":
        option = rest.pop(0)
        if name == "env" and option.startswith(("-S", "--split-string")):
            text = option.removeprefix("--split-string").removeprefix("=").removeprefix("-S")
            rest[:0] = (text or (rest.pop(0) if rest else "")).split()
            continue
        if (option in _LONG or _wants_value(option, letters)) and rest:
            option += f"={rest.pop(0)}"
        own.append(option)
    if rest[:1] == ["--"]:
        rest.pop(0)
    while name == "env" and rest and "=" in rest[0]:
        own.append(rest.pop(0))
    return own, rest[positional:]


def _wants_value(option: str, letters: str) -> bool:
    """Whether these short options end with one whose value is the next word."""
    if option.startswith("--"):
        return False
    found = next((place for place, letter in enumerate(option[1:], 1) if letter in letters), None)
    return found is not None and found == len(option) - 1


def _against(options: Sequence[str]) -> str | None:
    """The argument of env's that takes PYTHONPATH away, or replaces it."""
    for option in options:
        if option in ("-", "--ignore-environment"):
            return option
        if option.startswith("PYTHONPATH="):
            return "PYTHONPATH=..."
        if option.startswith("-") and not option.startswith("--") and "i" in _letters(option):
            return "-i"
        if option.replace("=", "").replace("--unset", "-u") == "-uPYTHONPATH":
            return "-u PYTHONPATH"
    return None


def _letters(option: str) -> Iterator[str]:
    """The letters of short options of env's, without what is a value."""
    for letter in option[1:]:
        yield letter
        if letter in _WRAPPERS["env"][0]:
            return
