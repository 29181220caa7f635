"""Runtime directories and disks that a broker cannot use, and what it and its simulated GPUs leave there."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from broker_harness import MIB, Site, fill, one_line

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


# --- runtime directories that cannot be used --------------------------------------------------------------------------


def test_a_directory_open_to_others_is_refused(site: Site) -> None:
    site.directory.chmod(0o750)
    for command in (["start", "--simulate-gpus", "1x32MiB"], ["status"], ["stop"]):
        result = site.gpu_assigner(*command)
        assert result.returncode == 73
        assert "open to others (mode 0750)" in one_line(result.stderr)
    assert os.listdir(site.directory) == []


@as_root
def test_a_directory_of_another_user_is_refused(site: Site) -> None:
    os.chown(site.directory, NOBODY, -1)
    result = site.gpu_assigner("start", "--simulate-gpus", "1x32MiB")
    assert result.returncode == 73
    assert f"belongs to user id {NOBODY}" in one_line(result.stderr)


@pytest.mark.parametrize("kind", ["a file", "a link", "a dangling link", "under a file"])
def test_a_directory_that_is_none_is_refused(site: Site, kind: str) -> None:
    path = site.directory / "rt"
    {
        "a file": lambda: path.write_text(""),
        "a link": lambda: path.symlink_to(tempfile.gettempdir()),
        "a dangling link": lambda: path.symlink_to("nowhere"),
        "under a file": lambda: path.write_text(""),
    }[kind]()
    chosen = path / "deeper" if kind == "under a file" else path
    result = site.gpu_assigner("start", "--simulate-gpus", "1x32MiB", ACB_RUNTIME_DIR=str(chosen))
    assert result.returncode == 73
    assert str(path) in one_line(result.stderr)


def test_a_directory_is_made_when_there_is_none(site: Site) -> None:
    path = site.directory / "a" / "b"
    assert site.gpu_assigner("start", "--simulate-gpus", "1x32MiB", ACB_RUNTIME_DIR=str(path)).returncode == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert site.gpu_assigner("stop", ACB_RUNTIME_DIR=str(path)).returncode == 0


def test_a_path_too_long_for_a_socket_is_refused(site: Site) -> None:
    path = site.directory / ("x" * 100)
    result = site.gpu_assigner("start", "--simulate-gpus", "1x32MiB", ACB_RUNTIME_DIR=str(path))
    assert result.returncode == 2
    assert "longer than 107 bytes" in one_line(result.stderr)


def test_a_directory_that_this_user_may_not_write_is_refused(site: Site) -> None:
    """In a fork of this process: root ignores modes, and who is no root may not be able to run this Python."""
    from acb.broker import server  # noqa: F401 - all that it takes must be there before the user changes
    from acb.cli import gpu_assigner
    from acb.cli.gpu_assigner import start, status, stop  # noqa: F401
    from acb.devices import simulated  # noqa: F401

    if os.getuid() == 0:
        os.chown(site.directory, NOBODY, NOBODY)
    site.directory.chmod(0o500)
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        try:
            os.dup2(writing, 2)
            os.environ["ACB_RUNTIME_DIR"] = str(site.directory)
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            os._exit(gpu_assigner.main(["start", "--foreground", "--simulate-gpus", "1x32MiB"]))
        finally:
            os._exit(99)
    os.close(writing)
    with open(reading) as stream:
        said = stream.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 73, said
    assert str(site.directory) in one_line(said)
    site.directory.chmod(0o700)
    assert os.listdir(site.directory) == []


def test_a_read_only_file_system_is_refused(site: Site, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    result = site.gpu_assigner("start", "--simulate-gpus", "1x32MiB", ACB_RUNTIME_DIR=str(small_disk))
    assert result.returncode == 73
    assert "Read-only" in one_line(result.stderr)
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize("name", ["broker.sock", "broker.env", "broker.lock"])
def test_a_directory_in_the_place_of_a_file(site: Site, name: str) -> None:
    (site.directory / name).mkdir()
    result = site.gpu_assigner("start", "--simulate-gpus", "1x32MiB")
    assert result.returncode == 73
    said = one_line(result.stderr)
    assert f"cannot write {site.directory / name}: Is a directory; remove it" in said
    assert "make room" not in said
    assert os.listdir(site.directory) == [name]


def test_a_launch_without_room_for_a_simulated_gpu_is_advised_once(site: Site, small_disk: Path) -> None:
    fill(small_disk / "filling")
    result = subprocess.run(
        [sys.executable, "-m", "acb.launcher", "--broker", "off", "--simulate-gpus", "1x32MiB", "true"],
        env=site.environment(ACB_RUNTIME_DIR=str(small_disk)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 73
    assert (result.stderr.count("\n"), result.stderr.count("ACB_RUNTIME_DIR")) == (1, 1)


@pytest.mark.parametrize("room", [0, 4096, 8192])
@pytest.mark.parametrize("foreground", [[], ["--foreground"]], ids=["background", "foreground"])
def test_a_full_disk_is_named_and_nothing_is_left(
    site: Site, small_disk: Path, room: int, foreground: list[str]
) -> None:
    filling = small_disk / "filling"
    fill(filling)
    os.truncate(filling, filling.stat().st_size - room)
    result = site.gpu_assigner("start", "--simulate-gpus", "1x32MiB", *foreground, ACB_RUNTIME_DIR=str(small_disk))
    assert result.returncode == 73
    assert str(small_disk) in one_line(result.stderr)
    assert os.listdir(small_disk) == ["filling"]


def test_a_disk_that_fills_up_later_stops_nobody(site: Site, small_disk: Path) -> None:
    assert site.gpu_assigner("start", "--simulate-gpus", "1x32MiB", ACB_RUNTIME_DIR=str(small_disk)).returncode == 0
    site.socket = small_disk / "broker.sock"
    fill(small_disk / "filling")
    with site.connect() as peer:
        peer.socket.send(b"nonsense")  # which it would log
        peer.receive()
    simulated = str(next(small_disk.glob("simulated-*")))
    program = site.program(ACB_RUNTIME_DIR=str(small_disk), ACB_SIMULATED=simulated)
    program.do("take_turns", 2, MIB)
    assert program.finish() == 0
    assert site.gpu_assigner("stop", ACB_RUNTIME_DIR=str(small_disk)).returncode == 0
    assert sorted(os.listdir(small_disk)) == ["broker.log.1", "filling"]


def simulated(site: Site) -> list[str]:
    """The folders of simulated GPUs that there are."""
    return sorted(path.name for path in site.directory.glob("simulated-*"))


def test_simulated_gpus_stay_as_long_as_a_program_uses_them(site: Site) -> None:
    site.start("1x64MiB")
    program, other = site.program(), site.program()
    program.do("enter")
    program.do("add", "model", MIB)
    assert site.gpu_assigner("stop").returncode == 0
    assert simulated(site) == ["simulated-1x64MiB"]
    assert other.finish() == 0  # it has never touched one
    assert simulated(site) == ["simulated-1x64MiB"]
    site.start("1x64MiB")
    program.do("region")
    assert site.used() == MIB
    assert site.gpu_assigner("stop").returncode == 0
    assert program.finish() == 0
    assert simulated(site) == []


def test_simulated_gpus_stay_for_a_program_that_has_nothing_on_them_yet(site: Site) -> None:
    site.start("1x64MiB")
    program = site.program()
    with site.card() as before:
        assert site.gpu_assigner("stop").returncode == 0
        site.start("1x64MiB")
        with site.card() as after:
            assert os.path.samestat(os.fstat(before._file._fd), os.fstat(after._file._fd))
    program.do("enter")
    program.do("add", "model", MIB)
    assert site.used() == MIB
    program.kill()


def test_simulated_gpus_of_a_killed_broker_go_with_the_next(site: Site) -> None:
    site.start("1x64MiB")
    program = site.program()
    program.do("enter")
    site.kill_broker()
    assert simulated(site) == ["simulated-1x64MiB"]
    program.kill()
    (site.directory / "broker.journal").unlink()
    site.start("1x32MiB")
    assert simulated(site) == ["simulated-1x32MiB"]
    site.kill_broker()
    site.start("2x32MiB")
    assert simulated(site) == ["simulated-2x32MiB"]
    assert site.gpu_assigner("stop").returncode == 0
    assert simulated(site) == []


def test_the_next_program_of_a_script_makes_the_simulated_gpus_again(site: Site) -> None:
    site.start("1x64MiB")
    site.kill_broker()
    shutil.rmtree(site.directory / "simulated-1x64MiB")
    gone = {"ACB_SIMULATED": str(site.directory / "simulated-1x64MiB"), "ACB_SIMULATED_GPUS": "1x64MiB"}
    program = site.program(**gone, ACB_BROKER="auto")
    program.do("enter")
    program.do("add", "model", MIB)
    assert (site.report() or {})["clients"][0]["resident"] == MIB  # of a broker that it has started itself
    program.do("leave")
    assert program.finish() == 0
    assert site.gpu_assigner("stop").returncode == 0
    assert simulated(site) == []


def test_a_limit_on_file_sizes_is_like_a_full_disk(site: Site) -> None:
    result = subprocess.run(
        [sys.executable, "-B", "-m", "acb.cli.gpu_assigner", "start", "--simulate-gpus", "1x32MiB"],
        env=site.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )
    assert result.returncode == 73
    one_line(result.stderr)
    assert os.listdir(site.directory) == []
