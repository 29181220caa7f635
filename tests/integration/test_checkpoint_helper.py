"""The helper process and the broker's end of it, over a fake driver: what hangs or dies holds nobody up."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from broker_harness import wait_until

from acb.broker.checkpointing import DEATHS, Answer, Helper
from acb.devices.checkpoint import Outcome
from acb.devices.checkpoint_probe import Probe
from acb.processes import start_time

UNIT = Path(__file__).resolve().parents[1] / "unit"  # where the fake driver lies
GPU = "GPU-aaaaaaaa-0000-0000-0000-000000000000"
GIB = 1 << 30
PID = os.getpid()
HOUR = 3600.0

Make = Callable[..., Helper]


@pytest.fixture
def make() -> Iterator[Make]:
    """Helpers whose driver is the fake one of the scenario given."""
    with contextlib.ExitStack() as stack:

        def helper(**scenario: Any) -> Helper:
            scenario.setdefault("held", {PID: {GPU: 3 * GIB}})
            environment = {**os.environ, "PYTHONPATH": str(UNIT), "FAKE_DRIVER": json.dumps(scenario)}
            return stack.enter_context(Helper("fake_driver:tier", environment))

        yield helper


def process(helper: Helper) -> subprocess.Popen[bytes]:
    assert helper._process is not None
    return helper._process


def done(result: Outcome | Probe) -> Outcome:
    assert isinstance(result, Outcome)
    assert result.done, result
    return result


def test_there_and_back_again(make: Make) -> None:
    helper = make()
    out = done(helper.ask("suspend", PID, deadline=HOUR, timeout=5))
    assert (out.state, out.moved) == ("checkpointed", {GPU: 3 * GIB})
    assert done(helper.ask("state", PID, deadline=HOUR)).state == "checkpointed"
    assert done(helper.ask("resume", PID, deadline=HOUR, patience=1)).state == "running"
    assert done(helper.ask("release", PID, deadline=HOUR)).state == "running"
    first = process(helper)
    helper.close()
    assert first.returncode == 0


def test_requests_queue_and_a_poller_sees_their_answers(make: Make) -> None:
    helper = make()
    poller = select.epoll()
    poller.register(helper, select.EPOLLIN)
    tickets = [helper.submit(op, PID, deadline=HOUR, timeout=5) for op in ("suspend", "resume", "suspend", "state")]
    answers: list[Answer] = []
    while len(answers) < len(tickets):
        assert poller.poll(60)
        answers += helper.receive()
    assert [answer.ticket for answer in answers] == tickets
    assert [done(answer.result).state for answer in answers] == [
        "checkpointed",
        "running",
        "checkpointed",
        "checkpointed",
    ]
    assert helper.due() is None
    poller.close()


def test_what_the_driver_prints_disturbs_nothing(make: Make) -> None:
    assert done(make(noise=True).ask("state", PID, deadline=HOUR)).state == "running"


def test_without_a_driver_every_request_is_answered_so(make: Make) -> None:
    helper = make(none=True)
    for _ in range(2):
        out = helper.ask("suspend", PID, deadline=HOUR, timeout=5)
        assert isinstance(out, Outcome)
        assert (out.done, out.problem, out.reason) == (False, "unsupported", "there is no CUDA driver here")
    result = helper.ask("probe", deadline=HOUR)
    assert isinstance(result, Probe)
    assert (result.works, result.reason) == (False, "there is no CUDA driver here")
    assert helper.unavailable


def test_a_call_that_hangs_costs_its_deadline_and_the_next_one_is_answered(make: Make) -> None:
    helper = make(kind="hangs")
    done(helper.ask("state", PID, deadline=HOUR))
    first = process(helper)
    begun = time.monotonic()
    out = helper.ask("suspend", PID, deadline=0.3, timeout=5)
    assert isinstance(out, Outcome)
    assert 0.3 <= time.monotonic() - begun < 20
    assert (out.done, out.state, out.problem) == (False, "unknown", "helper")
    assert "hung in the driver" in out.reason
    assert first.returncode == -signal.SIGALRM
    done(helper.ask("state", PID, deadline=HOUR))
    assert process(helper) is not first


def test_a_helper_that_cannot_even_be_alarmed_is_killed(make: Make) -> None:
    helper = make(kind="hangs")
    done(helper.ask("state", PID, deadline=HOUR))
    first = process(helper)
    first.send_signal(signal.SIGSTOP)
    out = helper.ask("state", PID, deadline=0.1)
    assert isinstance(out, Outcome)
    assert out.problem == "helper"
    assert first.returncode == -signal.SIGKILL


def test_one_that_a_kill_does_not_end_is_not_waited_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a call that the kernel cannot interrupt."""
    monkeypatch.setattr("acb.broker.checkpointing.GRACE", 0.1)

    def waits(*_: object) -> None:
        raise AssertionError("it is waited for")

    helper = make()
    done(helper.ask("state", PID, deadline=HOUR))
    first = process(helper)
    first.send_signal(signal.SIGSTOP)  # so that its alarm does not end it, either
    monkeypatch.setattr(first, "kill", lambda: None)
    monkeypatch.setattr(first, "wait", waits)
    out = helper.ask("state", PID, deadline=0.1)
    assert isinstance(out, Outcome)
    assert (out.problem, first.returncode) == ("helper", None)
    done(helper.ask("state", PID, deadline=HOUR))
    assert process(helper) is not first
    poller = select.epoll()
    poller.register(helper, select.EPOLLIN)
    os.kill(first.pid, signal.SIGKILL)
    assert poller.poll(60)
    assert helper.receive() == []
    assert first.returncode == -signal.SIGKILL, "it is reaped when it ends after all"
    assert not poller.poll(0)
    poller.close()


def test_a_helper_that_dies_is_replaced_but_not_for_ever(make: Make) -> None:
    helper = make(kind="crashes")
    for _ in range(2):  # with answers in between
        out = helper.ask("suspend", PID, deadline=HOUR, timeout=5)
        assert isinstance(out, Outcome)
        assert (out.done, out.state, out.problem) == (False, "unknown", "helper")
        assert f"process {PID}" in out.reason
        done(helper.ask("state", PID, deadline=HOUR))
    for _ in range(DEATHS):
        helper.ask("suspend", PID, deadline=HOUR, timeout=5)
    last = helper.ask("state", PID, deadline=HOUR)
    assert isinstance(last, Outcome)
    assert last.problem == "unsupported"
    assert "times in a row" in last.reason


def test_a_start_that_hangs_is_given_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acb.broker.checkpointing.START", 0.0)
    monkeypatch.setattr("acb.broker.checkpointing.GRACE", 0.5)
    helper = make(hangs_at_start=True)
    out = helper.ask("state", PID, deadline=HOUR)
    assert isinstance(out, Outcome)
    assert out.problem == "unsupported"
    assert "did not start in time" in out.reason


def test_a_request_that_makes_no_sense_is_answered_and_the_next_one_too(make: Make) -> None:
    helper = make()
    for op, arguments in (("suspend", {}), ("dance", {}), ("resume", {"needs": 5})):
        done(helper.ask("state", PID, deadline=HOUR))
        if op == "resume":
            done(helper.ask("suspend", PID, deadline=HOUR, timeout=1))
        out = helper.ask(op, PID, deadline=HOUR, **arguments)
        assert isinstance(out, Outcome)
        assert out.problem == "helper"
        assert "refused" in out.reason


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_parent(how: int) -> None:
    code = (
        "import os, time\n"
        "from acb.broker.checkpointing import Helper\n"
        "helper = Helper('fake_driver:tier')\n"
        "helper.ask('state', os.getpid(), deadline=3600)\n"
        "print(helper._process.pid, flush=True)\n"
        "time.sleep(3600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{UNIT}:{UNIT.parents[1]}"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        helper = int(parent.stdout.readline())
        assert start_time(helper) is not None
        parent.send_signal(how)
        parent.wait()
        wait_until("the helper's end", lambda: start_time(helper) is None)


def test_it_finishes_what_it_is_at_when_its_parent_goes(tmp_path: Path) -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "PYTHONPATH": f"{UNIT}:{UNIT.parents[1]}", "FAKE_DRIVER": "{}"}
    command = [sys.executable, "-m", "acb.broker.checkpoint_helper", "--tier", "fake_driver:tier"]
    with ours, subprocess.Popen(command, stdin=its.fileno(), env=environment, cwd="/") as helper:
        its.close()
        assert json.loads(ours.recv(1 << 16)) == {"ready": True}
        target = tmp_path / "target"
        target.write_text(
            "#!/bin/sh\necho pid $$\ntouch $0.begun\nwhile [ ! -e $0.go ]; do sleep 0.01; done\ntouch $0.done\n"
        )
        target.chmod(0o755)
        ours.send(json.dumps({"id": 1, "op": "probe", "deadline": HOUR, "command": [str(target)]}).encode())
        wait_until("the request's begin", lambda: Path(f"{target}.begun").exists())
        ours.close()
        Path(f"{target}.go").touch()
        wait_until("the request's end", lambda: Path(f"{target}.done").exists())
        assert helper.wait(60) == 0


# --- the probe --------------------------------------------------------------------------------------------------------

TARGET = """
import os, signal, sys
if os.fork():
    os._exit(0)
print("pid", os.getpid(), flush=True)
open(sys.argv[1], "w").write(str(os.getpid()))
print({first!r}, flush=True)
for _ in sys.stdin:
    {then}
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("first", "then", "scenario", "words"),
    [
        (f"ready {GPU} 1024", "print('same', flush=True)", {}, None),
        (f"ready {GPU} 1024", "print('different', flush=True)", {}, "not the same"),
        (f"ready {GPU} 1024", "break", {}, "did not go on"),
        ("failed cuInit returned CUDA error 100", "pass", {}, "cuInit returned CUDA error 100"),
        (f"ready {GPU} 1024", "pass", {"fails": {"checkpoint": 801}}, "CUDA_ERROR_NOT_SUPPORTED"),
        (f"ready {GPU} 1024", "pass", {"fails": {"restore": 2}}, "safe on the host"),
    ],
)
def test_a_probe_tells_what_works_and_leaves_nothing(
    make: Make, tmp_path: Path, first: str, then: str, scenario: dict[str, Any], words: str | None
) -> None:
    noted = tmp_path / "pid"
    command = [sys.executable, "-c", TARGET.format(first=first, then=then), str(noted)]
    result = make(**scenario).ask("probe", deadline=HOUR, command=command)
    assert isinstance(result, Probe)
    assert result.works == (words is None), result
    assert (words or "memory intact") in result.reason
    wait_until("the end of the process", lambda: start_time(int(noted.read_text())) is None)


def test_a_probe_without_a_driver_says_what_is_missing(make: Make) -> None:
    result = make().ask("probe", deadline=HOUR)
    assert isinstance(result, Probe)
    if not result.works:
        assert "has no GPU memory" in result.reason


# --- the real calls ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake_libcuda(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which a compiled libcuda stands in for the driver's."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    directory = tmp_path_factory.mktemp("cuda")
    source = Path(__file__).parent / "programs" / "fake_libcuda.c"
    library = directory / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    states = directory / "states"
    states.mkdir()
    return {**os.environ, "PYTHONPATH": str(UNIT), "LD_LIBRARY_PATH": str(directory), "FAKE_CUDA": str(states)}


def test_the_calls_and_the_probe_over_a_compiled_library(fake_libcuda: dict[str, str]) -> None:
    with Helper("fake_driver:real_calls", fake_libcuda) as helper:
        result = helper.ask("probe", deadline=HOUR)
        assert isinstance(result, Probe)
        assert result.works, result
        assert [step["state"] for step in result.steps] == ["checkpointed", "running"]
        pid = result.steps[0]["pid"]
        wait_until("the end of the process", lambda: start_time(pid) is None)


def test_a_gpu_that_locks_but_does_not_checkpoint(fake_libcuda: dict[str, str]) -> None:
    with Helper("fake_driver:real_calls", {**fake_libcuda, "FAKE_CUDA_GB10": "1"}) as helper:
        result = helper.ask("probe", deadline=HOUR)
        assert isinstance(result, Probe)
        assert not result.works
        assert "CUDA_ERROR_NOT_SUPPORTED" in result.reason
        assert result.steps[0]["state"] == "running"
