"""The folder of simulated GPUs: there while a process uses it, gone with the last, made again by the next."""

from __future__ import annotations

import fcntl
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from acb.config import parse_simulated, simulated_name
from acb.devices import simulated_folder
from acb.devices.simulated import Card, CardError, card_paths, create_cards

SPEC = parse_simulated("2x1MiB")

USER = """
import atexit, os, sys
from pathlib import Path
from acb.config import parse_simulated
from acb.devices import simulated_folder
from acb.devices.simulated import Card
directory = Path(sys.argv[1])
atexit.register(simulated_folder.leave_all)
simulated_folder.enter(directory, parse_simulated("2x1MiB"))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / simulated_name(SPEC)
    yield directory
    simulated_folder.leave(directory)


class User:
    """A process that uses the folder, runs `then`, says so, and goes on at the next line that it is sent."""

    def __init__(self, directory: Path, then: str = "") -> None:
        code = f"{USER}\nprint('in', flush=True)\nsys.stdin.readline()\n{then}\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "in\n"

    def finish(self) -> str:
        said, _ = self.process.communicate("go\n", timeout=60)
        assert self.process.returncode == 0
        return said

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=60)


def test_it_goes_with_the_last_that_ends(folder: Path) -> None:
    first, second = User(folder), User(folder)
    assert len(card_paths(folder)) == 2
    first.finish()
    assert len(card_paths(folder)) == 2
    second.finish()
    assert list(folder.parent.iterdir()) == []


def test_a_killed_ones_is_swept_by_the_next_that_makes_some(folder: Path) -> None:
    killed, lives = User(folder), User(folder)
    killed.kill()
    simulated_folder.sweep(folder.parent)
    assert len(card_paths(folder)) == 2
    lives.kill()
    assert len(card_paths(folder)) == 2
    simulated_folder.try_out(folder.with_name(simulated_name(parse_simulated("1x2MiB"))), parse_simulated("1x2MiB"))
    assert list(folder.parent.iterdir()) == []


def test_who_comes_after_the_last_makes_it_again(folder: Path) -> None:
    environ = {"ACB_SIMULATED": str(folder), "ACB_SIMULATED_GPUS": str(SPEC)}
    for _ in range(2):
        simulated_folder.enter_given(environ)
        with Card.open(folder, 1) as card:
            card.allocate(1000)
        simulated_folder.leave(folder)
        assert not folder.exists()


@pytest.mark.parametrize("gpus", ["", "nonsense", "1x1MiB"])
def test_what_is_not_known_is_not_made(folder: Path, gpus: str) -> None:
    simulated_folder.enter_given({"ACB_SIMULATED": str(folder), "ACB_SIMULATED_GPUS": gpus})
    assert not folder.exists()
    with pytest.raises(CardError):
        Card.open(folder)


def test_a_folder_of_somebodys_own_stays(folder: Path) -> None:
    create_cards(folder, SPEC)
    simulated_folder.enter_given({"ACB_SIMULATED": str(folder)})
    simulated_folder.leave(folder)
    simulated_folder.sweep(folder.parent)
    assert len(card_paths(folder)) == 2


def test_who_has_memory_on_a_card_keeps_it_without_knowing_of_the_folder(folder: Path) -> None:
    code = "import sys; from acb.devices.simulated import *; card = Card.open(sys.argv[1], 1); card.allocate(1000); " \
        "print(flush=True); sys.stdin.read()"  # fmt: skip
    simulated_folder.enter(folder, SPEC)
    with subprocess.Popen(
        [sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as stranger:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        simulated_folder.leave(folder)
        simulated_folder.sweep(folder.parent)
        assert len(card_paths(folder)) == 2
        stranger.communicate(timeout=60)
    simulated_folder.sweep(folder.parent)
    assert not folder.exists()


def test_a_parent_that_ends_leaves_it_to_its_child(folder: Path) -> None:
    reading, writing = os.pipe()
    daemon = f"""
if os.fork():
    sys.exit()  # as a daemon's parent does
os.read({reading}, 1)
Card.open(directory).allocate(1000)
"""
    code = f"{USER}\n{daemon}"
    with subprocess.Popen([sys.executable, "-c", code, folder], pass_fds=[reading], stdout=subprocess.PIPE) as parent:
        assert parent.wait(60) == 0
        assert parent.stdout is not None
        simulated_folder.sweep(folder.parent)
        assert len(card_paths(folder)) == 2
        assert not select.select([parent.stdout], [], [], 0)[0]  # the child has it open, and lives
        os.write(writing, b"x")
        assert parent.stdout.read() == b""
    os.close(reading)
    os.close(writing)
    assert not folder.exists()


def test_a_child_that_ends_leaves_it_to_its_parent(folder: Path) -> None:
    simulated_folder.enter(folder, SPEC)
    child = os.fork()
    if not child:
        simulated_folder.leave_all()
        os._exit(0)
    os.waitpid(child, 0)
    simulated_folder.sweep(folder.parent)
    assert len(card_paths(folder)) == 2


def test_a_program_that_closes_all_its_files_ends_as_ever(folder: Path) -> None:
    then = """
os.closerange(3, 100)
other = os.open("/dev/null", os.O_RDONLY)
simulated_folder.leave(directory)
print(os.fstat(other).st_rdev == os.stat("/dev/null").st_rdev)
"""
    assert User(folder, then).finish() == "True\n"
    simulated_folder.sweep(folder.parent)
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for directory in (tmp_path / "file", tmp_path / "file" / simulated_name(SPEC), tmp_path / "link"):
        with pytest.raises(CardError, match="cannot use the directory"):
            simulated_folder.try_out(directory, SPEC)
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def before_the_lock(monkeypatch: pytest.MonkeyPatch, kind: int, happens: Callable[[], object]) -> None:
    """Have something happen once, when a lock of this kind is about to be taken."""
    flock, left = fcntl.flock, [happens]

    def taking(descriptor: int, operation: int) -> None:
        if operation & kind and left:
            left.pop()()
        flock(descriptor, operation)

    monkeypatch.setattr(simulated_folder.fcntl, "flock", taking)


def test_who_comes_while_it_is_removed_makes_it_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    User(folder).kill()
    before_the_lock(monkeypatch, fcntl.LOCK_SH, lambda: simulated_folder.sweep(folder.parent))
    simulated_folder.enter(folder, SPEC)
    assert sorted(os.listdir(folder)) == ["gpu0.card", "gpu1.card", "users"]
    simulated_folder.sweep(folder.parent)
    assert len(card_paths(folder)) == 2


def test_who_is_about_to_remove_it_leaves_one_that_was_made_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    User(folder).kill()
    users: list[User] = []

    def another_is_faster() -> None:
        simulated_folder.sweep(folder.parent)
        assert not folder.exists()
        users.append(User(folder))

    before_the_lock(monkeypatch, fcntl.LOCK_EX, another_is_faster)
    simulated_folder.sweep(folder.parent)
    assert len(card_paths(folder)) == 2
    users[0].finish()
    assert not folder.exists()


def test_nobody_gets_in_before_all_cards_are_gone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink, removed = Path.unlink, []

    def removing(path: Path) -> None:
        if path.suffix == ".card":
            with (folder / "users").open() as users, pytest.raises(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_SH | fcntl.LOCK_NB)
        removed.append(path.name)
        unlink(path)

    simulated_folder.enter(folder, SPEC)
    monkeypatch.setattr(Path, "unlink", removing)
    simulated_folder.leave(folder)
    assert removed == ["gpu0.card", "gpu1.card", "users"]


def test_no_card_vanishes_under_a_process_that_uses_it(folder: Path) -> None:
    """Processes come and go in all orders, some killed, while others sweep: each finds its cards, and keeps them."""
    use = """
import random, signal
chance = random.Random(int(sys.argv[2]))
for turn in range(40):
    simulated_folder.enter(directory, parse_simulated("2x1MiB"))
    with Card.open(directory, turn % 2) as card:
        card.allocate(1 << 10)
        there = os.stat(directory / f"gpu{turn % 2}.card").st_ino
        for _ in range(chance.randrange(5)):
            simulated_folder.sweep(directory.parent)
        assert os.stat(directory / f"gpu{turn % 2}.card").st_ino == there == os.fstat(card._file._fd).st_ino
    if chance.random() < 0.02:
        os.kill(os.getpid(), signal.SIGKILL)
    simulated_folder.leave(directory)
"""
    seed = random.randrange(1000)
    users = [
        subprocess.Popen([sys.executable, "-c", f"{USER}\n{use}", folder, str(seed + number)]) for number in range(6)
    ]
    for user in users:
        assert user.wait(100) in (0, -signal.SIGKILL)
    simulated_folder.sweep(folder.parent)
    assert list(folder.parent.iterdir()) == []
