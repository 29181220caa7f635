"""The simulated card: charging, the referee, dead processes, forks and kills."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acb.config import SimulatedSpec
from acb.devices.simulated import Card, CardError, CardOutOfMemory, card_paths, create_cards

MIB = 1 << 20


@pytest.fixture
def card(tmp_path: Path) -> Card:
    create_cards(tmp_path, SimulatedSpec((100 * MIB,)))
    return Card.open(tmp_path)


def child(code: str, path: Path) -> subprocess.Popen[str]:
    """A process with `card` open that runs `code`, talking through its pipes."""
    program = f"import os, sys\nfrom acb.devices.simulated import *\ncard = Card.open({str(path)!r})\n"
    return subprocess.Popen(
        [sys.executable, "-c", program + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate("\n", timeout=30)
    return out.strip()


def test_cards_carry_what_was_asked_for_and_are_made_once(tmp_path: Path) -> None:
    spec = SimulatedSpec((32 * MIB, 64 * MIB), 10 * MIB, 0.5)
    paths = create_cards(tmp_path / "cards", spec)
    assert [path.name for path in paths] == ["gpu0.card", "gpu1.card"]
    with Card.open(paths[1]) as card:
        assert (card.ordinal, card.capacity, card.bandwidth, card.speed) == (1, 64 * MIB, 10 * MIB, 0.5)
        card.allocate(5)
        assert create_cards(tmp_path / "cards", spec) == paths
        assert card.used() == 5
        with Card.open(tmp_path / "cards", 1) as again:
            assert again.used() == 5


def test_a_card_with_other_values_is_replaced_only_when_nobody_uses_it(tmp_path: Path) -> None:
    (path,) = create_cards(tmp_path, SimulatedSpec((MIB,)))
    with Card.open(path) as card:
        card.allocate(1)
        with pytest.raises(CardError, match=f"used by process {os.getpid()}"):
            create_cards(tmp_path, SimulatedSpec((2 * MIB,)))
    create_cards(tmp_path, SimulatedSpec((2 * MIB, 2 * MIB)))
    with Card.open(path) as card:
        assert card.capacity == 2 * MIB
    create_cards(tmp_path, SimulatedSpec((2 * MIB,)))
    assert card_paths(tmp_path) == [path]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu0.card"]


def test_what_is_no_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="no simulated GPU at"):
        Card.open(tmp_path)
    (tmp_path / "gpu0.card").write_bytes(b"garbage")
    with pytest.raises(CardError, match="not a simulated GPU"):
        Card.open(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CardError, match="cannot make the directory"):
        create_cards(blocked / "below", SimulatedSpec((MIB,)))


def test_capacity_holds_across_processes(card: Card) -> None:
    process = child(
        "card.allocate(60 << 20); print('ready', flush=True); input(); card.free(60 << 20); print(card.held())",
        card.path,
    )
    assert said(process) == "ready"
    card.allocate(40 * MIB)
    with pytest.raises(CardOutOfMemory, match="no room for 1B: 100MiB of 100MiB") as caught:
        card.allocate(1)
    assert (caught.value.requested, caught.value.in_use, caught.value.capacity) == (1, 100 * MIB, 100 * MIB)
    assert card.held(process.pid) == 60 * MIB
    assert dict(card.processes()) == {os.getpid(): 40 * MIB, process.pid: 60 * MIB}
    assert finish(process) == "0"
    assert card.used() == 40 * MIB
    card.allocate(60 * MIB)
    card.free(100 * MIB)
    assert (card.held(), card.peak()) == (0, 100 * MIB)
    card.reset_peak()
    assert card.peak() == 0


def test_two_views_in_one_process_add_up(card: Card) -> None:
    with Card.open(card.path) as other:
        card.allocate(10)
        other.allocate(20)
        assert (card.held(), other.held(), card.held(os.getpid()), card.used()) == (10, 20, 30, 30)
    assert card.used() == 10


def test_memory_of_a_killed_process_is_reclaimed(card: Card) -> None:
    process = child(
        "card.allocate(90 << 20)\nwith card.operation('x'):\n print('ready', flush=True); input()", card.path
    )
    assert said(process) == "ready"
    process.kill()  # not waited for yet: a zombie holds no memory either
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    card.allocate(90 * MIB)
    card.free(90 * MIB)
    process.communicate()
    assert dict(card.processes()) == {os.getpid(): 0}
    card.set_holders([process.pid])
    card.set_holders([])
    assert card.violations() == []


def test_killed_at_random_points_nothing_is_stuck_or_lost(card: Card) -> None:
    code = (
        "print('ready', flush=True)\nwhile True:\n with card.operation('x'):\n  card.allocate(1000)\n card.free(1000)"
    )
    for _ in range(5):
        process = child(code, card.path)
        assert said(process) == "ready"
        for _ in range(200):
            card.allocate(1000)
            card.free(1000)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert card.used() == 0
    card.allocate(card.capacity)


def test_a_forked_child_holds_nothing_and_frees_nothing_of_its_parent(card: Card) -> None:
    card.allocate(50)
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            before = card.held()
            card.free(50)
            card.allocate(7)
            os.write(writes, f"{before} {card.held()} {card.held(os.getppid())}".encode())
        finally:
            os._exit(0)
    os.close(writes)
    with open(reads) as file:
        assert file.read() == "0 7 50"
    os.waitpid(pid, 0)
    assert card.held() == card.used() == 50


def test_exec_gives_back_the_memory_of_the_program_before(card: Card) -> None:
    code = (
        "if 'again' in sys.argv:\n card.allocate(1); print(card.used(), flush=True)\n"
        "else:\n card.allocate(80 << 20); program = open('/proc/self/cmdline').read().split('\\0')[2]\n"
        " os.execv(sys.executable, [sys.executable, '-c', program, 'again'])"
    )
    assert finish(child(code, card.path)) == "1"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_threads_use_the_card_leaves_the_child_unlocked(card: Card) -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            card.allocate(1)
            card.free(1)

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                card.allocate(3)
                os._exit(0 if card.held() == 3 else 1)
            assert os.waitpid(pid, 0)[1] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert card.used() == 0


def test_threads_and_finalizers_lose_no_byte(card: Card) -> None:
    class Held:
        def __init__(self, nbytes: int) -> None:
            card.allocate(nbytes)
            self.nbytes = nbytes
            self.cycle = self  # so that the garbage collector frees it, in the middle of anything

        def __del__(self) -> None:
            with card.operation("finalizer"):
                card.allocate(1)
            card.free(self.nbytes + 1)

    def work(seed: int) -> None:
        for i in range(400):
            Held((seed * 31 + i) % 97 + 1)

    gc.set_threshold(5, 2, 2)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(700, 10, 10)
    gc.collect()
    assert card.held() == card.used() == 0


@given(st.lists(st.integers(1, 40 * MIB), max_size=20))
def test_the_charge_is_the_sum_of_what_fitted(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    directory = tmp_path_factory.mktemp("cards")
    create_cards(directory, SimulatedSpec((100 * MIB,)))
    with Card.open(directory) as card:
        total = 0
        for size in sizes:
            if total + size <= card.capacity:
                card.allocate(size)
                total += size
            else:
                with pytest.raises(CardOutOfMemory):
                    card.allocate(size)
            assert card.held() == card.used() == total
        with pytest.raises(ValueError, match="-1"):
            card.allocate(-1)


def test_the_referee_records_operations_without_the_lease(card: Card) -> None:
    def operate(name: str) -> None:
        with card.operation(name):
            pass

    operate("before any broker")
    card.set_holders([os.getpid()])
    operate("as holder")
    card.set_holders([12345, 6])
    assert card.holders() == (12345, 6)
    operate("aten.mm")
    card.set_holders(None)
    operate("after the broker")
    (violation,) = card.violations()
    assert (violation.pid, violation.operation, violation.holders) == (os.getpid(), "aten.mm", (12345, 6))
    card.clear_violations()
    assert card.violations() == []


def test_losing_the_lease_within_an_operation_is_a_violation(card: Card) -> None:
    process = child(
        "with card.operation('long'):\n print('ready', flush=True); input()\nprint('done', flush=True); input()",
        card.path,
    )
    card.set_holders([process.pid])
    assert said(process) == "ready"
    card.set_holders([os.getpid()])
    assert [(v.pid, v.operation, v.holders) for v in card.violations()] == [(process.pid, "long", (os.getpid(),))]
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert said(process) == "done"
    card.set_holders([process.pid])
    card.set_holders([])
    assert len(card.violations()) == 1
    finish(process)


def test_many_violations_keep_the_first(card: Card) -> None:
    card.set_holders([])
    for i in range(300):
        with card.operation(f"op{i}"):
            pass
    found = card.violations()
    assert [violation.operation for violation in found] == [f"op{i}" for i in range(256)]


def test_more_processes_than_slots_are_refused_in_words(card: Card) -> None:
    views = [Card.open(card.path) for _ in range(256)]
    for view in views:
        view.allocate(1)
    with pytest.raises(CardError, match="256 processes already"):
        card.allocate(1)
    for view in views:
        view.close()
    card.allocate(1)


def test_an_operation_on_two_cards_takes_its_time_once(tmp_path: Path) -> None:
    paths = create_cards(tmp_path, SimulatedSpec((MIB, MIB), speed=0.1))
    import time

    with Card.open(paths[0]) as first, Card.open(paths[1]) as second:
        began = time.monotonic()
        with first.operation("copy"), second.operation("copy"):
            while time.monotonic() - began < 0.01:
                pass
        assert 0.09 <= time.monotonic() - began < 0.5  # 1 second, were it stretched on either


def test_bandwidth_and_speed_take_their_time(tmp_path: Path) -> None:
    create_cards(tmp_path, SimulatedSpec((MIB,), bandwidth=MIB, speed=0.5))
    import time

    with Card.open(tmp_path) as card:
        began = time.monotonic()
        for _ in range(10):
            card.copied(MIB // 500)
        assert time.monotonic() - began >= 0.015
        began = time.monotonic()
        with card.operation("outer"):
            with card.operation("inner"):
                while time.monotonic() - began < 0.02:
                    pass
        assert time.monotonic() - began >= 0.035  # the card began a moment later
