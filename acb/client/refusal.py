"""A refusal: the exception, and the one sentence that it leaves when a program does not catch it.

A program that knows nothing of acb sees the exception come out of its first GPU call. Twenty frames of acb's and the
framework's own say nothing to its user; what was asked, what there is and what to do does.
"""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import Any


class LeaseRefused(RuntimeError):
    """The broker cannot ever give this process what it asks for; the message says why."""


LeaseRefused.__module__ = "acb"  # where programs know it from


def refused(reason: str) -> LeaseRefused:
    """The exception to raise. Under acb-launch it ends a program that does not catch it with one line.

    A program's own excepthook is left alone, and so is the traceback of one that uses acb without the launcher: its
    author wants to see where he asked for too much.
    """
    if "ACB_HOME" in os.environ:
        if sys.excepthook is sys.__excepthook__:
            sys.excepthook = _excepthook
        if threading.excepthook is threading.__excepthook__:
            threading.excepthook = _threads_excepthook
    return LeaseRefused(reason)


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    refusal = _refusal(error)
    if refusal is not None:
        _say(refusal, trace)
    else:
        sys.__excepthook__(kind, error, trace)


def _threads_excepthook(args: Any) -> None:
    refusal = _refusal(args.exc_value)
    if refusal is not None:
        _say(refusal, args.exc_traceback)
    else:
        threading.__excepthook__(args)


def _refusal(error: BaseException | None) -> LeaseRefused | None:
    """The refusal that the error is, or that it repeats: JAX has every failure of a backend's start in an error of its
    own, with advice that does not fit."""
    words, seen = str(error), set()
    while error is not None and id(error) not in seen:
        if isinstance(error, LeaseRefused):
            return error if str(error) in words else None
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _say(error: LeaseRefused, trace: TracebackType | None) -> None:
    """One line, also with ``acb-launch --quiet``: it is why the program ends."""
    try:
        sys.stderr.write(f"acb: {error}{_where(trace)}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # the program has closed its stderr


def _where(trace: TracebackType | None) -> str:
    """The innermost line of the program's own, which is neither acb's nor Python's nor an installed package's."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    others = (here + os.sep, os.path.dirname(os.path.abspath(os.__file__)) + os.sep, "<")
    found = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(others) and "-packages" + os.sep not in file:
            found = f" ({file}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return found
