"""Whoever must know of new threads is told of each, on the thread itself, before the program's code."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def run(program: str) -> str:
    """Run a program of its own, since the patches stay; its output. It must say nothing on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PREAMBLE + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


PREAMBLE = """
import _thread, threading
from acb.hooks.threads import on_thread_start
began = []
on_thread_start(lambda: began.append(threading.get_ident()))
"""


@pytest.mark.parametrize(
    "start",
    [
        "threading.Thread(target=work).start()",
        "threading.Timer(0, work).start()",
        "type('Own', (threading.Thread,), {'run': lambda self: work()})().start()",
        "concurrent.futures.ThreadPoolExecutor(1).submit(work)",
        "(pool := multiprocessing.pool.ThreadPool(1), pool.apply_async(work), pool.close(), pool.join())",
        "_thread.start_new_thread(work, ())",
        "asyncio.run(asyncio.to_thread(work))",
    ],
)
def test_every_way_to_start_a_thread(start: str) -> None:
    run(f"""
        import asyncio, concurrent.futures, multiprocessing.pool
        done = threading.Event()
        def work():
            assert threading.get_ident() in began, "it was not told of this thread before its work"
            assert began.count(threading.get_ident()) == 1
            done.set()
        keep = {start}
        assert done.wait(20)
        assert threading.get_ident() not in began
    """)


def test_acbs_own_threads_are_left_alone() -> None:
    run("""
        thread = threading.Thread(target=lambda: None, name="acb-agent")
        thread.start()
        thread.join()
        assert began == []
    """)


def test_all_callbacks_are_called_in_order_and_a_failing_one_costs_nothing() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PREAMBLE
            + textwrap.dedent("""
                order = []
                def fail():
                    order.append(1)
                    1 / 0
                on_thread_start(fail)
                on_thread_start(lambda: order.append(2))
                for _ in range(3):
                    thread = threading.Thread(target=order.append, args=("work",))
                    thread.start()
                    thread.join()
                print(order)
            """),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "[1, 2, 'work', 1, 2, 'work', 1, 2, 'work']\n"
    assert done.stderr.count("\n") == 1
    assert "could not be instrumented: ZeroDivisionError" in done.stderr


def test_a_program_sees_no_difference() -> None:
    code = """
        import threading, _thread, sys, traceback
        lines = []
        def hook(args):
            lines.append((args.exc_type.__name__, args.thread.name, len(traceback.extract_tb(args.exc_traceback))))
        threading.excepthook = hook
        def fail():
            raise KeyError("x")
        for thread in (threading.Thread(target=fail, name="one"), threading.Thread(target=fail, daemon=True)):
            thread.start()
            thread.join()
            lines.append((thread.is_alive(), thread.daemon, thread.ident is not None))
        done = threading.Lock()
        done.acquire()
        result = []
        def bare(a, b=2):
            result.append((a, b, threading.current_thread().name.startswith("Dummy")))
            done.release()
        lines.append(isinstance(_thread.start_new_thread(bare, (1,), {"b": 3}), int))
        done.acquire()
        lines.append(result)
        for wrong in ((5, ()), (fail, 5), (fail,), (fail, (), 5), ()):
            try:
                _thread.start_new_thread(*wrong)
            except TypeError as error:
                lines.append(str(error))
        ended = threading.Event()
        def unraisable(args):
            lines.append((args.exc_type.__name__, getattr(args.object, "__qualname__", None)))
            ended.set()
        sys.unraisablehook = unraisable
        _thread.start_new_thread(fail, ())
        assert ended.wait(20)
        lines.append([thread.name for thread in threading.enumerate()])
        lines.append((threading.active_count(), _thread.start_new_thread.__name__))
        print(*lines, sep="\\n")
    """
    plain = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert plain.returncode == 0, plain.stderr
    assert run(code) == plain.stdout


def test_a_fork_goes_on_telling() -> None:
    run("""
        import os
        if not (pid := os.fork()):
            began.clear()
            thread = threading.Thread(target=lambda: None)
            thread.start()
            thread.join()
            os._exit(0 if len(began) == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    """)
