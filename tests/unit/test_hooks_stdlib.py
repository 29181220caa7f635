"""Calls of the standard library that surely mean "no GPU work" mark their thread, and are otherwise what they were."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PREAMBLE = """
import os, socket, subprocess, sys, threading, time
os.environ["ACB_BROKER"] = "off"
from acb.client import runtime
from acb.hooks import stdlib
stdlib.install()
stdlib.install()
gate = runtime.client().gate
gate.enter(); gate.exit()
state = gate._local.state

def marked_while(call, wake=lambda: None):
    '''Whether this thread is marked while it is in the call; another thread looks, and then wakes it.'''
    seen = threading.Event()
    def look():
        while not stop.is_set():
            if state.marked:
                seen.set()
                break
        wake()
    stop = threading.Event()
    thread = threading.Thread(target=look)
    thread.start()
    try:
        call()
    finally:
        stop.set()
        thread.join()
    assert state.marked == 0, "the mark was left behind"
    return seen.is_set()
"""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PREAMBLE + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("setup", "call", "wake"),
    [
        ("", "time.sleep(0.2)", "None"),
        ("p = subprocess.Popen(['cat'], stdin=-1)", "p.wait()", "p.stdin.close()"),
        ("p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(0.1)'])", "p.communicate()", "None"),
        ("", "subprocess.run(['sleep', '0.1'])", "None"),
        ("", "subprocess.check_output(['sleep', '0.1'])", "None"),
        ("a, b = socket.socketpair()", "a.recv(1)", "b.send(b'x')"),
        ("a, b = socket.socketpair()", "a.recv_into(bytearray(1))", "b.send(b'x')"),
        ("a, b = socket.socketpair(); f = a.makefile()", "f.readline()", "b.send(b'x\\n')"),
        (
            "a = socket.create_server(('127.0.0.1', 0)); b = socket.socket()",
            "a.accept()[0].close()",
            "b.connect(a.getsockname())",
        ),
        ("import multiprocessing; a, b = multiprocessing.Pipe()", "a.recv()", "b.send(1)"),
        ("import multiprocessing; a, b = multiprocessing.Pipe()", "a.poll(20)", "b.send(1)"),
        (
            "import multiprocessing.connection as c; a, b = c.Pipe()",
            "c.wait([a], 20)",
            "b.send(1)",
        ),
    ],
)
def test_blocking_calls_mark_their_thread(setup: str, call: str, wake: str) -> None:
    run(f"""
        {setup}
        assert marked_while(lambda: {call}, lambda: {wake})
        for thing in ("a", "b", "f"):
            if thing in globals():
                globals()[thing].close()
    """)


def test_short_sleeps_are_polling() -> None:
    run("""
        def poll():
            for _ in range(20):
                time.sleep(0.002)
            time.sleep(0)
        assert not marked_while(poll)
    """)


def test_a_call_that_fails_leaves_no_mark() -> None:
    run("""
        a, b = socket.socketpair()
        a.settimeout(0.01)
        for call in (lambda: a.recv(1), lambda: time.sleep(-1), lambda: time.sleep("x"), lambda: a.recv()):
            try:
                call()
            except (TimeoutError, ValueError, TypeError):
                assert state.marked == 0
            else:
                raise AssertionError
        a.close(); b.close()
    """)


def test_errors_and_names_are_those_of_the_originals() -> None:
    code = """
        import time, socket, subprocess, inspect
        def said(call):
            try:
                return repr(call())
            except Exception as error:
                return f"{type(error).__name__}: {error}"
        a, b = socket.socketpair()
        for wrong in ((), ("x",), (None,), (-1,), (1, 2), (0,), (float("nan"),)):
            print(said(lambda: time.sleep(*wrong)))
        print(said(lambda: time.sleep(secs=1)))
        for wrong in ((), ("x",), (-1,)):
            print(said(lambda: a.recv(*wrong)))
        print(time.sleep.__name__, time.sleep.__doc__, socket.socket.recv.__name__, subprocess.Popen.wait.__name__)
        print(inspect.signature(subprocess.Popen.communicate))
        print(said(lambda: subprocess.Popen(["true"]).wait(timeout=20)))
        print(said(lambda: subprocess.run(["cat"], input=b"x", stdout=-1).stdout))
        a.close(); b.close()
    """
    plain = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert plain.returncode == 0, plain.stderr
    assert run(code) == plain.stdout


def test_a_mark_tells_the_agent_at_once() -> None:
    """A marked thread that was the last in a region ends its phase without any linger."""
    run("""
        told = []
        gate._idle = lambda: told.append(gate.marked())
        gate.open(watched=True)
        gate.enter(); gate.exit()
        time.sleep(0.02)
        assert told == [False, True]
    """)


def test_forks_mark_their_own_threads() -> None:
    run("""
        pid = os.fork()
        if not pid:
            gate = runtime.client().gate
            gate.enter(); gate.exit()
            state = gate._local.state
            os._exit(0 if marked_while(lambda: time.sleep(0.1)) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    """)
