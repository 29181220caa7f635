"""Clients of a broker that died which live and cannot speak: what they may hold is lent to nobody, the rest is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_harness import MIB, Program, Site, wait_until


def load(program: Program, size: int) -> None:
    program.do("enter")
    program.do("add", "model", size)
    program.do("leave")


def shown(site: Site, pid: int) -> str:
    """What `gpu_assigner status` says of a process, in a sentence."""
    lines = site.gpu_assigner("status", COLUMNS="120").stdout.splitlines()
    return next((line for line in lines if line.startswith(f"process {pid} ")), "")


@contextlib.contextmanager
def in_c(program: Program, fifo: Path) -> Iterator[None]:
    """Inside, a call of the program's keeps the interpreter's lock."""
    os.mkfifo(fifo)
    descriptor = os.open(fifo, os.O_RDWR)
    try:
        program.begin("read_in_c", str(fifo))
        program.holds_at("in C")
        yield
        os.write(descriptor, b"x")
        assert program.end("read_in_c") == 1
    finally:
        os.close(descriptor)


def test_a_holder_that_cannot_speak_keeps_its_lease_until_it_does(site: Site, tmp_path: Path) -> None:
    site.start("1x64MiB", "--quantum", "0")
    program, other = site.program(ACB_NAME="busy"), site.program()
    load(program, 40 * MIB)
    with in_c(program, tmp_path / "fifo"):
        other.begin("enter", 40 * MIB)
        site.wait_for(other, "waiting")
        site.kill_broker()
        site.start("1x64MiB", "--quantum", "0")
        wait_until("it to be given up", site.broker_log)
        site.wait_for(other, "waiting")
        seen = site.client(program)
        assert (seen["state"], seen["resident"], seen["gpus"]) == ("running", 40 * MIB, [0])
        for said in (site.broker_log(), shown(site, program.pid)):
            assert f"process {program.pid} (busy) has not told this broker what it holds" in said
            assert "GPU 0 is lent to nobody else" in said
            assert said.rstrip().endswith(f"kill -9 {program.pid}")
    other.end("enter")
    assert "has said now what it holds" in site.broker_log()
    assert site.client(program)["absent"] is None
    other.do("add", "model", 40 * MIB)
    other.do("leave")
    program.do("region")
    assert site.violations() == []
    for each in (program, other):
        assert each.finish() == 0
        assert each.errors == ""


@pytest.mark.parametrize("ends_by", [signal.SIGKILL, signal.SIGTERM])
def test_memory_of_a_stopped_one_is_lent_to_nobody_and_the_rest_is(site: Site, ends_by: int) -> None:
    site.start("1x64MiB", "--quantum", "0")
    program, other, late = site.program(), site.program(), site.program()
    load(program, 20 * MIB)
    other.do("enter", 10 * MIB)  # beside it
    program.send_signal(signal.SIGSTOP)
    site.kill_broker(ends_by)
    site.start("1x64MiB", "--quantum", "0")
    wait_until("it to be given up", site.broker_log)
    seen = site.client(program)
    assert (seen["state"], seen["resident"], seen["stopped"]) == ("resident", 20 * MIB, True)
    assert f"kill -CONT {program.pid}, or end it with: kill -9 {program.pid}" in site.broker_log()
    assert "the 20MiB that it has on GPU 0 are lent to nobody else" in shown(site, program.pid)
    other.do("add", "more", 10 * MIB)
    other.do("leave")
    other.do("enter", 40 * MIB)
    other.do("leave")
    late.begin("enter", 60 * MIB)
    site.wait_for(late, "waiting")
    program.kill()
    late.end("enter")
    assert "has ended, without a word" in site.broker_log()
    assert not site.client(program)
    assert site.violations() == []


def test_who_holds_nothing_keeps_nobody_waiting(site: Site) -> None:
    site.start("1x64MiB", "--quantum", "0", "--driver-tier", "off")
    waiting, evacuated, holder = site.program(), site.program(), site.program()
    load(evacuated, 40 * MIB)
    holder.do("enter", 60 * MIB)
    waiting.begin("enter")
    site.wait_for(waiting, "waiting")
    assert site.client(evacuated)["state"] == "evacuated"
    for program in (waiting, evacuated):
        program.send_signal(signal.SIGSTOP)
    holder.send_signal(signal.SIGSTOP)
    site.kill_broker()
    site.start("1x64MiB", "--quantum", "0")
    assert (site.report() or {})["awaited"] == [holder.pid]
    holder.send_signal(signal.SIGCONT)
    site.wait_for(holder, "running")
    assert (site.report() or {})["awaited"] == []
    holder.do("leave")
    fresh = site.program()
    fresh.do("enter", 60 * MIB)
    assert site.broker_log() == ""
    assert site.violations() == []


def test_the_broker_after_next_knows_of_it_too(site: Site) -> None:
    site.start("2x64MiB", "--quantum", "0")
    program = site.program()
    program.do("enter")
    program.send_signal(signal.SIGSTOP)
    for _ in range(2):
        site.kill_broker()
        journal = json.loads((site.directory / "broker.journal").read_text())
        assert journal["holders"] == [program.pid]
        site.start("2x64MiB", "--quantum", "0")
        wait_until("it to be given up", site.broker_log)
        assert (site.report() or {})["gpus"][0]["holders"] == [program.pid]
    others = [site.program() for _ in range(2)]
    others[0].do("enter")  # on the other GPU
    others[1].begin("enter")
    site.wait_for(others[1], "waiting")
    assert site.client(others[0])["gpus"] == [1]
    program.kill()
    others[1].end("enter")
    assert site.violations() == []


def test_who_runs_short_beside_a_stopped_one_waits_for_it(site: Site) -> None:
    site.start("1x64MiB", "--quantum", "0")
    program, other = site.program(), site.program()
    load(program, 20 * MIB)
    other.do("enter", 10 * MIB)
    program.send_signal(signal.SIGSTOP)
    site.kill_broker()
    site.start("1x64MiB", "--quantum", "0")
    wait_until("it to be given up", site.broker_log)
    other.begin("add", "model", 60 * MIB)
    late = site.program()
    late.begin("enter")
    site.wait_for(late, "waiting")  # and so the broker has heard of what is short
    program.send_signal(signal.SIGCONT)
    other.end("add")
    assert site.client(program)["evacuated"] == 20 * MIB
    assert site.violations() == []


def launch(site: Site, *options: str) -> subprocess.CompletedProcess[str]:
    """The next program after the broker's death, on a machine without a GPU."""
    return subprocess.run(
        [sys.executable, "-m", "acb.launcher", *options, "--", "true"],
        env=site.environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("options", [[], ["--simulate-gpus", "1x65536KiB"]])
def test_the_next_launch_goes_on_with_the_options_of_a_broker_that_left_its_programs(
    site: Site, options: list[str]
) -> None:
    site.start("1x64MiB", "--scheduler", "fair", "--slots", "2", "--quantum", "0.5", "--driver-tier", "off")
    before = (site.report() or {})["options"]
    program = site.program()
    program.do("enter")
    program.send_signal(signal.SIGSTOP)
    site.kill_broker()
    refused = launch(site, "--simulate-gpus", "2x64MiB")
    assert (refused.returncode, refused.stderr.count("\n")) == (69, 1)
    assert "had --simulate-gpus 1x64MiB, and not --simulate-gpus 2x64MiB" in refused.stderr
    assert f"(process {program.pid})" in refused.stderr
    assert site.report() is None
    launched = launch(site, *options)
    assert launched.returncode == 0, launched.stderr
    assert (site.report() or {})["options"] == before
    program.kill()


def test_the_next_launch_asks_for_what_it_wants_where_no_program_is_left(site: Site) -> None:
    site.start("1x64MiB", "--scheduler", "fair")
    program = site.program()
    program.do("enter")
    site.kill_broker()
    program.kill()
    assert launch(site).returncode == 69  # there is no GPU
    assert launch(site, "--simulate-gpus", "2x64MiB").returncode == 0
    assert (site.report() or {})["scheduler"] == "fifo"
