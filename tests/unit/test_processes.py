"""Which processes live, which are ending, and which have ended."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys

from acb.processes import Activity, activity, ending, start_time, stopped


def test_a_running_process_is_not_ending() -> None:
    assert ending(os.getpid()) is None
    assert start_time(os.getpid()) is not None
    assert ending(1 << 30) is None
    assert start_time(1 << 30) is None
    assert ending(0) is None


def test_a_zombie_has_ended() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert start_time(child) is None
    assert ending(child) is None
    os.waitpid(child, 0)
    assert start_time(child) is None
    assert ending(child) is None


def test_a_process_whose_last_threads_are_not_through_yet_is_ending() -> None:
    """Its main thread has ended, another one lives: as a process looks whose files are just being closed."""
    code = (
        "import ctypes, sys, threading\n"
        "def rest():\n"
        "    print(flush=True)\n"
        "    sys.stdin.read()\n"
        "threading.Thread(target=rest).start()\n"
        "ctypes.CDLL(None).syscall(60, 0)\n"  # exit(2) of this thread only
    )
    if ctypes.sizeof(ctypes.c_void_p) != 8 or os.uname().machine != "x86_64":
        return  # the number of that system call is another one
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while start_time(process.pid) is not None:
            pass
        descriptor = ending(process.pid)
        assert descriptor is not None
        assert select.select([descriptor], [], [], 0)[0] == []
        process.send_signal(signal.SIGKILL)
        assert select.select([descriptor], [], [], 20)[0] == [descriptor]
        os.close(descriptor)
        assert ending(process.pid) is None


def test_what_a_process_is_at() -> None:
    mine = activity(os.getpid())
    assert mine is not None
    assert mine.running
    assert not mine.stopped
    assert activity(1 << 30) is None
    code = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        until(process.pid, stopped=False, running=False)  # it reads
        process.send_signal(signal.SIGSTOP)
        until(process.pid, stopped=True, running=False)
        process.kill()


def test_a_thread_that_computes_counts_for_its_process() -> None:
    code = "import sys, threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()\n"
    code += "print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        first = until(process.pid, stopped=False, running=True)
        while (now := activity(process.pid)) is not None and now.seconds <= first.seconds:
            pass
        assert now is not None
        process.kill()


def until(pid: int, *, stopped: bool, running: bool) -> Activity:
    while (found := activity(pid)) is None or (found.stopped, found.running) != (stopped, running):
        pass
    return found


def test_a_process_that_stands_still_is_seen_to() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            assert not stopped(process.pid)
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            assert stopped(process.pid)
            process.send_signal(signal.SIGCONT)
            os.waitpid(process.pid, os.WCONTINUED)
            assert not stopped(process.pid)
        finally:
            process.kill()
    assert not stopped(process.pid)
