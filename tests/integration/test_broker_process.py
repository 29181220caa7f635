"""The broker as a process: start, status, stop, its name, its signals, its log, and options that contradict."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from broker_harness import MIB, FakeBroker, Site, one_line, wait_until

from acb import config
from acb._version import __version__
from acb.processes import start_time
from acb.protocol import AskStatus, Goodbye, Welcome

# --- life -------------------------------------------------------------------------------------------------------------


def test_start_status_stop_and_nothing_is_left(site: Site) -> None:
    started = site.gpu_assigner("start", "--simulate-gpus", "2x32MiB")
    assert (started.returncode, started.stdout) == (0, "")
    assert "2 simulated GPUs of 32MiB" in one_line(started.stderr)
    assert stat.S_IMODE(site.socket.stat().st_mode) == 0o600

    again = site.gpu_assigner("start")
    assert (again.returncode, again.stdout) == (0, "")
    assert "already running" in one_line(again.stderr)

    shown = site.gpu_assigner("status")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "No program is connected" in shown.stdout
    report = json.loads(site.gpu_assigner("status", "--json").stdout)
    assert [gpu["capacity"] for gpu in report["gpus"]] == [32 * MIB, 32 * MIB]
    assert report["clients"] == []
    pid = report["pid"]
    assert str(pid) in again.stderr
    assert Path(f"/proc/{pid}/comm").read_text() == "gpu_assigner\n"

    stopped = site.gpu_assigner("stop")
    assert (stopped.returncode, stopped.stdout) == (0, "")
    assert str(pid) in one_line(stopped.stderr)
    assert start_time(pid) is None
    assert os.listdir(site.directory) == []

    for command in ("status", "stop"):
        missing = site.gpu_assigner(command)
        assert missing.returncode == 69
        assert "no GPU broker runs" in one_line(missing.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_cleanly(site: Site, number: int) -> None:
    site.start()
    with site.connect() as peer:
        site.kill_broker(number)
        assert isinstance(peer.receive(), Goodbye)
    assert site.brokers[-1].returncode == 0
    assert os.listdir(site.directory) == []
    started, ended = (site.log / "broker0").read_text().splitlines()
    assert started.startswith("gpu_assigner: started ")
    for part in (__version__, str(site.brokers[-1].pid), "1 simulated GPU of 64MiB", "--slots 1", str(site.socket)):
        assert part in started
    assert ended.startswith("gpu_assigner: ended ")
    assert signal.Signals(number).name in ended


def test_what_a_broker_in_the_background_has_logged_lies_beside_its_socket_until_it_ends(site: Site) -> None:
    assert site.gpu_assigner("start", "--simulate-gpus", "1x32MiB", "--quantum", "2").returncode == 0
    path = site.directory / "broker.log"
    [line] = wait_until("its first line", lambda: path.read_text().splitlines())
    assert "--simulate-gpus 1x32MiB --scheduler fifo" in line
    assert "--quantum 2.0" in line
    with open(path) as log:
        program = site.program()
        program.do("enter")
        assert site.gpu_assigner("stop").returncode == 0
        end = log.read().splitlines()[-1]
        program.kill()
    assert "by gpu_assigner stop; 1 program that it knew still runs" in end
    assert not path.exists()
    assert not path.with_suffix(".log.1").exists()  # it had nothing to say but that


def test_what_a_broker_has_logged_outlives_it(site: Site, tmp_path: Path) -> None:
    """However it ends; a start and an end alone do not."""
    log = site.directory / "broker.log"
    last = site.directory / "broker.log.1"
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file")  # where nothing learned can be kept, which it has to say
    start = ("start", "--simulate-gpus", "1x32MiB")
    assert site.gpu_assigner(*start, ACB_STATE_DIR=nowhere).returncode == 0
    assert site.gpu_assigner("stop").returncode == 0
    assert sorted(os.listdir(site.directory)) == [last.name]
    first = last.read_text()
    assert "cannot be kept" in first
    assert "by gpu_assigner stop; no program is left" in first.splitlines()[-1]
    assert site.gpu_assigner(*start).returncode == 0
    assert site.gpu_assigner("stop").returncode == 0
    assert last.read_text() == first
    assert site.gpu_assigner(*start).returncode == 0
    report = site.report()
    assert report is not None
    os.kill(report["pid"], signal.SIGKILL)
    said = log.read_text()
    assert site.gpu_assigner("start", "--gpu-list", "0", CUDA_VISIBLE_DEVICES="").returncode == 69
    assert last.read_text() == said
    assert not log.exists()
    old = site.directory / "broker-7.log.1"
    old.touch()
    os.utime(old, (0, 0))
    assert site.gpu_assigner(*start).returncode == 0
    assert last.exists()
    assert not old.exists()


def test_a_broker_that_fails_leaves_its_log(site: Site) -> None:
    text = (
        "from acb.broker.server import Server; Server._readable = lambda self, connection: 1 / 0\n"
        "from acb.cli.gpu_assigner import main; main()"
    )
    log = site.directory / "broker.log"
    arguments = ["start", "--foreground", "--log", str(log), "--simulate-gpus", "1x32MiB"]
    with subprocess.Popen([sys.executable, "-c", text, *arguments], env=site.environment()) as broker:
        wait_until("its log", lambda: log.exists() and "started" in log.read_text())
        with contextlib.suppress(ConnectionError), site.connect() as peer:
            peer.send(AskStatus())
            peer.receive()
        assert broker.wait(30) == 1
    assert "ZeroDivisionError" in log.read_text()
    assert sorted(os.listdir(site.directory)) == ["broker.journal", "broker.log"]


def test_blocked_signals_of_whoever_starts_it_are_not_inherited(site: Site) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        site.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    site.kill_broker(signal.SIGTERM)
    assert site.brokers[-1].returncode == 0


def test_several_starts_at_once_make_one_broker(site: Site) -> None:
    starts = [
        subprocess.Popen(
            [sys.executable, "-m", "acb.cli.gpu_assigner", "start", "--simulate-gpus", "1x32MiB"],
            env=site.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [process.communicate(timeout=60)[1] for process in starts]
    assert [process.returncode for process in starts] == [0, 0, 0], said
    report = site.report()
    assert report is not None
    assert all(f"process {report['pid']}" in line for line in said)
    assert site.gpu_assigner("stop").returncode == 0
    assert os.listdir(site.directory) == []


def test_of_different_starts_at_once_the_loser_hears_that_another_runs(site: Site) -> None:
    wishes = ["--simulate-gpus 1x32MiB", "--simulate-gpus 1x64MiB --scheduler fair"]
    starts = [
        subprocess.Popen(
            [sys.executable, "-m", "acb.cli.gpu_assigner", "start", *wish.split()],
            env=site.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for wish in wishes
    ]
    said = [process.communicate(timeout=60)[1] for process in starts]
    assert sorted(process.returncode for process in starts) == [0, 69], said
    won, lost = (0, 1) if starts[0].returncode == 0 else (1, 0)
    assert f"started (process {(site.report() or {})['pid']})" in one_line(said[won])
    assert "already running" in one_line(said[lost])
    assert wishes[won].split()[1] in said[lost]
    assert f"and not with {wishes[lost]}; end it first with: gpu_assigner stop" in said[lost]
    assert site.gpu_assigner("stop").returncode == 0
    assert os.listdir(site.directory) == []


def test_what_a_killed_broker_leaves_hinders_nobody(site: Site) -> None:
    site.start()
    site.kill_broker()
    assert site.socket.exists()
    assert site.gpu_assigner("status").returncode == 69
    site.start()
    site.kill_broker(signal.SIGTERM)
    assert os.listdir(site.directory) == []


def test_recover_takes_the_options_of_the_broker_that_died(site: Site) -> None:
    site.start("2x48MiB", "--quantum", "0.25")
    site.kill_broker()
    assert site.gpu_assigner("start", "--recover").returncode == 0
    report = site.report()
    assert report is not None
    assert [gpu["capacity"] for gpu in report["gpus"]] == [48 * MIB] * 2
    journal = json.loads((site.directory / "broker.journal").read_text())
    assert journal["options"]["quantum"] == "0.25"


def test_a_journal_that_cannot_be_used_is_as_good_as_none(site: Site) -> None:
    for text in ("", "{", "[]", '{"options": {"simulate_gpus": "many"}, "clients": {}}', "[" * 100_000):
        (site.directory / "broker.journal").write_text(text)
        site.start()
        site.kill_broker(signal.SIGTERM)
    assert site.gpu_assigner("start", "--recover", CUDA_VISIBLE_DEVICES="").returncode == 69
    assert os.listdir(site.directory) == []


def test_jobs_have_brokers_of_their_own(site: Site) -> None:
    jobs: list[dict[str, str | None]] = [{"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8"}, {"PJM_JOBID": "123[4]"}]
    for job in jobs:
        assert site.gpu_assigner("start", "--simulate-gpus", "1x32MiB", **job).returncode == 0
    reports = [json.loads(site.gpu_assigner("status", "--json", **job).stdout) for job in jobs]
    assert len({report["pid"] for report in reports}) == 3
    assert [Path(report["socket"]).name for report in reports] == [
        "broker-7.sock",
        "broker-8.sock",
        "broker-123_4_.sock",
    ]
    assert len(list(site.directory.glob("simulated-*"))) == 3  # as two jobs never share a GPU
    for job in jobs:
        assert site.gpu_assigner("stop", **job).returncode == 0
    assert os.listdir(site.directory) == []


def test_stop_waits_for_the_end_and_gives_up_on_a_hanging_broker(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from acb.cli import gpu_assigner
    from acb.cli.gpu_assigner import talk

    monkeypatch.setattr(talk, "PATIENCE", 0.05)
    monkeypatch.setenv("ACB_RUNTIME_DIR", str(site.directory))
    site.start()
    site.brokers[-1].send_signal(signal.SIGSTOP)
    wait_until("it to stop", lambda: "T (stopped)" in Path(f"/proc/{site.brokers[-1].pid}/status").read_text())
    try:
        assert gpu_assigner.main(["stop"]) == 75
        assert gpu_assigner.main(["status"]) == 75
        assert gpu_assigner.main(["start"]) == 75
        said = capsys.readouterr().err
        assert said.count(f"kill -9 $(cat {site.directory}/broker.pid)\n") == 3
    finally:
        site.brokers[-1].send_signal(signal.SIGCONT)


def test_what_is_to_be_typed_for_a_hanging_broker_survives_any_path(tmp_path: Path) -> None:
    place = tmp_path / "it's a place; with $(blanks)"
    place.mkdir()
    with subprocess.Popen(["sleep", "60"]) as hanging:
        (place / "broker.pid").write_text(f"{hanging.pid}\n")
        typed = config.no_answer(place / "broker.sock").partition("end it with: ")[2]
        assert subprocess.run(["sh", "-c", typed]).returncode == 0
        assert hanging.wait(60) == -signal.SIGKILL


def test_whoever_answers_in_another_way_is_no_broker(site: Site) -> None:
    broker = FakeBroker(site.socket)
    try:
        asking = subprocess.Popen(
            [sys.executable, "-m", "acb.cli.gpu_assigner", "status"],
            env=site.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        broker.accept()
        broker.receive()
        broker.send(Welcome(1, 1))
        _, errors = asking.communicate(timeout=60)
    finally:
        broker.close()
    assert asking.returncode == 75
    assert "no GPU broker of this version" in one_line(errors)


# --- wrong options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--simulate-gpus", "1x32MiB", "--gpu-list", "1"], 65, "no GPU '1'"),
        (["--simulate-gpus", "2x32MiB", "--gpu-list", "0,GPU-17"], 65, "no GPU 'GPU-17'"),
        (["--gpu-list", "0,0"], 2, "each once"),
        (["--gpu-list", "0,,1"], 2, "each once"),
        (["--gpu-list", ""], 2, "each once"),
        (["--simulate-gpus", "1x0GiB"], 2, "impossible"),
        (["--simulate-gpus", "1x9999999999TiB"], 2, "impossible"),
        (["--simulate-gpus", "0x1GiB"], 2, "a count (1 to 64)"),
        (["--simulate-gpus", "1GiB"], 2, "such as 1x2GiB"),
        (["--simulate-gpus", "1x1GiB,speed=2"], 2, "at most 1"),
        (["--simulate-gpus", "1x1GiB,colour=red"], 2, "colour"),
        (["--quantum", "-1"], 2, "not a time"),
        (["--quantum", "nan"], 2, "not a time"),
        (["--scheduler", "lottery"], 2, "lottery"),
        ([], 69, "--simulate-gpus"),
    ],
)
def test_wrong_options_are_named_and_leave_nothing(site: Site, options: list[str], status: int, words: str) -> None:
    result = site.gpu_assigner("start", *options, CUDA_VISIBLE_DEVICES="")
    assert (result.returncode, result.stdout) == (status, "")
    line = result.stderr.splitlines()[-1]  # argparse puts the usage before
    assert words in line
    assert "Traceback" not in result.stderr
    if status != 2:
        one_line(result.stderr)
    assert os.listdir(site.directory) == []


def test_other_options_than_the_running_brokers_are_refused_by_name(site: Site) -> None:
    site.start("2x64MiB", "--scheduler", "fair")
    same = "", "--simulate-gpus 2x64MiB", "--scheduler fair", "--scheduler gpu-sharing", "--slots 1", "--gpu-list all"
    for options in (*same, "--gpu-list 0,1", "--gpu-list 1,0"):
        accepted = site.gpu_assigner("start", *options.split())
        assert accepted.returncode == 0, accepted.stderr
        assert "2 simulated GPUs of 64MiB" in accepted.stderr
        assert "--scheduler fair --slots 1 --driver-tier auto" in one_line(accepted.stderr)
    for options in (
        "--simulate-gpus 1x32MiB", "--scheduler fifo", "--quantum 2.0", "--slots 2", "--driver-tier off",
        "--gpu-list 0", "--gpu-list 0,2",
    ):  # fmt: skip
        refused = site.gpu_assigner("start", "--slots", "1", *options.split())
        assert refused.returncode == 69
        assert "--scheduler fair --slots 1 --driver-tier auto" in one_line(refused.stderr)
        assert f"and not with {options};" in refused.stderr
        assert "gpu_assigner stop" in refused.stderr
