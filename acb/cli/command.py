"""What all commands share: subcommands from modules, one-line errors, exit statuses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn, TypeVar

from acb._version import __version__
from acb.config import EX_USAGE, ConfigError

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, rather than how they could all be."""

    def error(self, message: str) -> NoReturn:
        """One line on stderr, and exit status 2."""
        self.exit(EX_USAGE, f"{self.prog}: {message}; see: {self.prog} --help\n")


def run(program: str, description: str, subcommands: Sequence[ModuleType], arguments: Sequence[str] | None) -> int:
    """Parse the arguments, run the chosen subcommand's ``run(options)`` and return its exit status.

    A subcommand is a module with a docstring, ``add_arguments(parser)`` and ``run(options) -> int``. A ConfigError
    becomes one line on stderr and its status.
    """
    parser = Parser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in subcommands:
        name = module.__name__.rpartition(".")[2]
        text = (module.__doc__ or "").strip()
        sub = choices.add_parser(
            name, help=text.splitlines()[0], description=text, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away; so do we
        return 141
    return status


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Make a parser that raises ConfigError usable as argparse's `type`, its sentence kept."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
