"""Standard output as a command's page needs it: whatever the locale cannot write is replaced, and a failure is said."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from acb.config import EX_CANTCREAT, ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """What prints tables and colours, on standard output."""
    from rich.console import Console

    class Page(Console):
        def on_broken_pipe(self) -> None:
            raise  # what it is called to handle: rich would end the process with status 1

    return Page(highlight=False, markup=False, emoji=False)


def writable(text: str) -> str:
    """The text in one line, with a ? for each character that standard output cannot take, or a terminal obeys."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return "".join(c if c.isprintable() else "?" for c in text).encode(encoding, "replace").decode(encoding)


@contextlib.contextmanager
def page() -> Iterator[None]:
    """Print inside. Raises ConfigError when not all of it could be written, on a full disk say."""
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="backslashreplace")  # programs' names may be anything; the locale may be C
    try:
        yield
        if out is not None:  # else it was closed before we started
            out.flush()
    except BrokenPipeError:
        _let_go()
        raise
    except OSError as error:
        _let_go()
        raise ConfigError(
            f"cannot write to standard output: {error.strerror or error}; write to another file", EX_CANTCREAT
        ) from None


def _let_go() -> None:
    """What is still in the buffer goes nowhere, or the interpreter would try it again, and complain."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
