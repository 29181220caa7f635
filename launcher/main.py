"""Usage: acb-launch [OPTION...] [--] COMMAND [ARGUMENT...]

Run COMMAND so that its GPU work goes through the AI computing broker. It needs no change; its exit status, signals,
input and output are its own. A broker is started when none runs.

  --broker auto|require|off   start a broker if none runs (auto, the default), insist on a running one, or use none
  --simulate-gpus NxSIZE      on a machine without a GPU: N simulated ones of SIZE each, as in 1x2GiB or 2x16GiB+1x8GiB
  --gpu-memory SIZE           how much memory COMMAND will need at most, on each of its GPUs, as a hint to the broker
  --gpus K                    let COMMAND see K GPUs, which it gets all at once (torchrun's workers need no option)
  --priority N                -100 to 100: with the scheduler `priority`, who comes first (default 0)
  --weight W                  with the scheduler `fair`, its share of GPU time beside the others' (default 1)
  --name NAME                 what to call COMMAND in `gpu_assigner status`
  --trace FILE                write every change of state, with its cause, to FILE, one JSON object a line
  --quiet                     no messages of acb on stderr but errors
  --version, --help           print that, and end

SIZE is a number and a unit: KiB, MiB, GiB or TiB (powers of 1024, as K, M, G and T alone) or KB, MB, GB or TB (of
1000). Sizes are in bytes: Gb, which may be bits, is refused.

ACB_DISABLE=1 in the environment runs COMMAND as if acb-launch were not there.

Exit statuses of acb-launch itself: 2 wrong usage, 65 more than the broker's GPUs can ever give, 69 no broker or no GPU,
73 a directory or file that cannot be used, 75 a broker that does not answer, 126 COMMAND cannot be executed, 127
COMMAND is not found.
"""

from __future__ import annotations

import getopt
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from acb import __version__, config
from acb.launcher import command
from acb.launcher.environment import BOOTSTRAP, broker_variables, initial_environment, instrumented

T = TypeVar("T")

_OPTIONS = [
    "broker=",
    "simulate-gpus=",
    "gpu-memory=",
    "gpus=",
    "priority=",
    "weight=",
    "name=",
    "trace=",
    "quiet",
    "version",
    "help",
]
BROKER_MODES = ("auto", "require", "off")


class Options:
    """What the command line asks for. (No dataclass: importing that would double the launcher's own start-up.)"""

    def __init__(self, command: list[str], broker: str, *, quiet: bool) -> None:
        self.command = command
        self.broker = broker
        self.quiet = quiet
        self.simulate: str | None = None
        self.variables: dict[str, str] = {}
        """What the options give the command to know, in its environment."""


def main(arguments: Sequence[str] | None = None, *, ignored_signals: int = 0) -> int:
    """Become the command that `arguments` name; return an exit status only if that fails, or for --help, --version.

    `ignored_signals`: the mask of signals that were ignored before this Python started (SigIgn of /proc/PID/status).
    """
    try:
        return _launch(list(sys.argv[1:] if arguments is None else arguments), ignored_signals)
    except (config.ConfigError, command.CommandError) as error:
        if str(error):
            _say(str(error))
        return error.status
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 130


def _launch(arguments: list[str], ignored_signals: int) -> int:
    flags = _leading_flags(arguments)
    if flags & {"-h", "--help", "--version"}:
        print(__doc__.rstrip() if flags & {"-h", "--help"} else f"acb-launch {__version__}")  # noqa: T201
        return 0
    environ = initial_environment()
    options = parse(arguments, environ)
    argv = options.command
    file = command.find(argv[0], environ.get("PATH"))
    if environ.get("ACB_DISABLE", "0") in ("", "0"):
        environ = _prepare(options, environ, file)
    command.execute(file, argv, environ, ignored_signals)


def _leading_flags(arguments: list[str]) -> set[str]:
    """The --help or --version that stands before the command, whatever else is wrong there."""
    found = set()
    for argument in arguments:
        if not argument.startswith("-") or argument == "--":
            break
        found.add(argument)
    return found


def parse(arguments: list[str], environ: dict[str, str]) -> Options:
    """Read the command line; `environ` supplies the broker mode of an enclosing acb-launch. Raises ConfigError."""
    try:
        given, rest = getopt.getopt(arguments, "", _OPTIONS)
    except getopt.GetoptError as error:
        raise config.ConfigError(f"{error}; see acb-launch --help") from None
    if not rest:
        raise config.ConfigError("which command? Write: acb-launch [OPTION…] COMMAND [ARGUMENT…]")
    options = Options(rest, environ.get("ACB_BROKER") or "auto", quiet=bool(environ.get("ACB_QUIET")))
    for name, value in given:
        if name == "--broker":
            options.broker = value
        elif name == "--simulate-gpus":
            options.simulate = str(_named(name, config.parse_simulated, value))
        elif name == "--gpu-memory":
            size = _named(name, config.parse_size, value)
            if value.strip().isdigit() and size < 1 << 20:
                raise config.ConfigError(f"--gpu-memory {value} would be {size} bytes; write a unit, such as {size}GiB")
            options.variables["ACB_GPU_MEMORY"] = str(size)
        elif name == "--gpus":
            options.variables["ACB_GPUS"] = str(config.parse_whole(name, value, 1, config.MAX_GPUS))
        elif name == "--priority":
            options.variables["ACB_PRIORITY"] = str(config.parse_whole(name, value, -100, 100))
        elif name == "--weight":
            options.variables["ACB_WEIGHT"] = str(config.parse_weight(value))
        elif name == "--name":
            if not value.isprintable() or not 0 < len(value) <= 200:
                raise config.ConfigError("--name needs 1 to 200 printable characters")
            options.variables["ACB_NAME"] = value
        elif name == "--trace":
            options.variables["ACB_TRACE"] = _trace_file(value)
        elif name == "--quiet":
            options.quiet = True
            options.variables["ACB_QUIET"] = "1"
    if options.broker not in BROKER_MODES:
        raise config.ConfigError(f"--broker is auto, require or off, not {options.broker!r}")
    return options


def _named(option: str, parse: Callable[[str], T], value: str) -> T:
    """What `parse` makes of the option's value; its error says which option it was."""
    try:
        return parse(value)
    except config.ConfigError as error:
        raise config.ConfigError(f"{option}: {error}", error.status) from None


def _trace_file(name: str) -> str:
    """The absolute path of the trace file, if it can be written; raises ConfigError if not."""
    file = os.path.abspath(name)
    if os.path.isdir(file) or not os.access(file if os.path.exists(file) else os.path.dirname(file), os.W_OK):
        raise config.ConfigError(f"cannot write the trace file {file}; choose another", config.EX_CANTCREAT)
    return file


def _prepare(options: Options, environ: dict[str, str], file: str) -> dict[str, str]:
    """See that there is a broker, if one is wanted, and return the environment for the command."""
    variables: dict[str, str] = {}
    if options.simulate is not None:
        sizes = config.parse_simulated(options.simulate).capacities
        _check_pool(sizes, options, f"--simulate-gpus {options.simulate}")
    if options.broker == "off":
        if "ACB_TRACE" in options.variables and not options.quiet:
            _say("warning: with --broker off no program ever changes its state, so nothing is written to the trace")
        if options.simulate is not None:
            variables["ACB_SIMULATED"] = str(_simulated_cards(options.simulate))
            variables["ACB_SIMULATED_GPUS"] = options.simulate
    else:
        socket = _running_broker(options)
        variables = broker_variables(config.env_path())
        if options.simulate is not None:
            wanted = str(config.simulated_dir(config.parse_simulated(options.simulate)))
            if variables.get("ACB_SIMULATED") != wanted:
                raise config.ConfigError(
                    f"the running broker has other GPUs than --simulate-gpus {options.simulate} asks for; "
                    f"leave the option out, or end that broker first with: gpu_assigner stop",
                    config.EX_UNAVAILABLE,
                )
        sizes_lent = config.parse_pool(variables.get("ACB_POOL", ""))
        if sizes_lent:  # else it is a broker of another release, which will say so itself
            _check_pool(sizes_lent, options, "the running broker")
        variables["ACB_SOCKET"] = str(socket)
    variables |= options.variables | {"ACB_BROKER": options.broker}
    kept_out = command.kept_out(file, options.command, environ.get("PATH"))
    if kept_out is not None and not options.quiet:
        program, argument = kept_out
        _say(f"warning: {program} is started with {argument}, so acb cannot instrument it; it runs without acb")
    if ":" in str(BOOTSTRAP):
        raise config.ConfigError(
            f"acb is installed in {BOOTSTRAP.parent}, whose name has a colon, which PYTHONPATH cannot hold; "
            f"install it elsewhere, or set ACB_DISABLE=1",
            config.EX_UNAVAILABLE,
        )
    return instrumented(environ, variables, sys.executable)


def _check_pool(sizes: Sequence[int], options: Options, whose: str) -> None:
    """Raise ConfigError when GPUs of these sizes, those of `whose`, can never be what the options ask for.

    As the broker judges, at the program's first GPU call: see acb.broker.limits.
    """
    sizes = sorted(sizes, reverse=True)
    wanted = int(options.variables.get("ACB_GPUS", "1"))
    if wanted > len(sizes):
        raise config.ConfigError(
            f"--gpus {wanted}: {whose} has {len(sizes)}; ask for less, or start a broker with more", config.EX_DATAERR
        )
    size = int(options.variables.get("ACB_GPU_MEMORY", "0"))
    if size <= sizes[wanted - 1]:
        return
    memory = f"--gpu-memory {config.format_size(size)}"
    what = f"{memory}: the largest GPU of {whose} has {config.format_size(sizes[0])}"
    if size <= sizes[0]:  # so that it is the number of them that is too much
        what = f"--gpus {wanted} {memory}: {whose} has not so many so large"
    raise config.ConfigError(f"{what}; ask for less, or start a broker with larger ones", config.EX_DATAERR)


def _running_broker(options: Options) -> Path:
    """The socket of a broker that answers; it is started now if there is none and the options allow that."""
    from acb.launcher import broker

    socket = config.socket_path(make=options.broker != "require")
    if broker.answers(socket):
        return socket
    if options.broker == "require":
        raise config.ConfigError(
            f"no broker answers at {socket}; start one with: gpu_assigner start", config.EX_UNAVAILABLE
        )
    broker.start(options.simulate, quiet=options.quiet)
    if not broker.answers(socket):
        raise config.ConfigError(
            f"gpu_assigner has started, but no broker answers at {socket}; see: gpu_assigner status",
            config.EX_UNAVAILABLE,
        )
    return socket


def _simulated_cards(simulate: str) -> Path:
    """The folder of the simulated GPUs that all programs started with the same specification share.

    It is only tried whether it can be made: it is there while a program uses it.
    """
    from acb.devices.simulated import CardError
    from acb.devices.simulated_folder import try_out

    spec = config.parse_simulated(simulate)
    directory = config.simulated_dir(spec)
    try:
        try_out(directory, spec)
    except (CardError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if "ACB_RUNTIME_DIR" not in reason:
            reason += "; set ACB_RUNTIME_DIR to a directory that has room"
        raise config.ConfigError(f"cannot make simulated GPUs in {directory}: {reason}", config.EX_CANTCREAT) from None
    return directory


def _say(message: str) -> None:
    """One line for a person, on stderr."""
    sys.stderr.write(f"acb-launch: {message}\n")
