"""The journal: who the clients of a broker that died were, told apart from whoever has their numbers now."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from acb.broker.journal import HOLDERS_SPACE, Journal, Place, Suspended
from acb.processes import start_time


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.journal"


def test_a_successor_finds_options_and_the_clients_that_live(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        first = Journal(path)
        assert not first.read()
        first.begin({"scheduler": "fifo"})
        first.came(os.getpid())
        first.came(child.pid)
        first.came(1 << 30)  # no such process
        second = Journal(path)
        assert second.read()
        assert second.options == {"scheduler": "fifo"}
        assert second.survivors() == {os.getpid(), child.pid}
        child.communicate(b"\n")
    assert second.survivors() == {os.getpid()}
    second.begin({})
    third = Journal(path)
    assert third.read()
    assert third.survivors() == {os.getpid()}
    third.went(os.getpid())
    third.went(os.getpid())
    assert Journal(path).read()
    assert json.loads(path.read_text())["clients"] == {}
    third.remove()
    assert os.listdir(path.parent) == []
    third.remove()


def test_a_process_with_a_dead_ones_number_is_another(path: Path) -> None:
    start = start_time(os.getpid())
    assert start is not None
    path.write_text(json.dumps({"options": {}, "clients": {os.getpid(): start - 1, 1: 0, -5: 0}}))
    journal = Journal(path)
    assert journal.read()
    assert journal.survivors() == set()


def test_a_zombie_is_dead(path: Path) -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert start_time(child) is None
    os.waitpid(child, 0)
    assert start_time(child) is None


def test_a_name_with_brackets_does_not_confuse() -> None:
    code = "import sys; open('/proc/self/comm', 'w').write('a) R (b'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        mine = start_time(os.getpid())
        theirs = start_time(child.pid)
        assert mine is not None
        assert theirs is not None
        assert theirs >= mine
        child.communicate(b"")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b"5", b"{}", b'{"options": {}}', b'{"clients": {}}', b"\xff\xfe", b"[" * 100_000,
        b'{"options": 5, "clients": {}}', b'{"options": {}, "clients": []}', b'{"options": {}, "clients": {"x": 1}}',
        b'{"options": {}, "clients": {"1": null}}', b'{"options": {}, "clients": {"1": "x"}}',
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_understood_is_as_none(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    journal = Journal(path)
    assert not journal.read()
    assert journal.survivors() == set()
    journal.begin({})
    assert Journal(path).read()


def test_a_full_disk_stops_no_broker_that_runs(path: Path) -> None:
    child = os.fork()
    if not child:
        status = 1
        try:
            journal = Journal(path)
            journal.begin({"scheduler": "fifo"})
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
            journal.came(os.getpid())  # cannot be noted
            try:
                journal.begin({})  # but whoever begins is told
            except OSError:
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.listdir(path.parent) == [path.name]
    assert json.loads(path.read_text()) == {
        "options": {"scheduler": "fifo"}, "clients": {}, "suspended": {}, "holders": [], "places": {},
    }  # fmt: skip


def test_the_next_broker_hears_whom_the_driver_has_suspended(path: Path) -> None:
    journal = Journal(path)
    journal.begin({})
    journal.came(os.getpid())
    journal.suspends(os.getpid(), Suspended(500, {"GPU-x": 600}))
    journal.suspends(1 << 30, Suspended(1, {}))  # no process of ours
    following = Journal(path)
    assert following.read()
    following.begin({})
    assert following.suspended(os.getpid()) == Suspended(500, {"GPU-x": 600})
    assert following.suspended(1 << 30) is None
    following.resumed(os.getpid())
    assert json.loads(path.read_text())["suspended"] == {}


def test_the_next_broker_hears_who_holds_a_lease_and_where(path: Path) -> None:
    journal = Journal(path)
    journal.begin({})
    journal.came(os.getpid())
    place = Place(["GPU-a", "GPU-b"], "train", "gang", 1, "/run/cards")
    journal.bound(os.getpid(), place)
    assert place.own == ["GPU-b"]
    for pids in ({os.getpid()}, set(), {os.getpid(), *range(1 << 30, (1 << 30) + HOLDERS_SPACE)}, {os.getpid(), 7}):
        size = path.stat().st_size
        journal.held_by(pids)
        assert (path.stat().st_size != size) == (len(pids) > HOLDERS_SPACE)  # or it was in its place
        following = Journal(path)
        assert following.read()
        assert following.holders == pids
        assert following.place(os.getpid()) == place
    following.begin({})
    assert following.holders == {os.getpid()}
    following.went(os.getpid())
    assert json.loads(path.read_text())["places"] == {}
