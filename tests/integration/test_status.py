"""What ``gpu_assigner status`` shows of programs: where they are, since when, and what they have at this moment."""

from __future__ import annotations

import re
import signal

from broker_harness import MIB, Program, Site, wait_until


def row(site: Site, program: Program) -> list[str]:
    """The columns of a program in the table, but for its process and its name."""
    shown = site.gpu_assigner("status", COLUMNS="120").stdout
    [line] = [line for line in shown.splitlines() if line.split()[:1] == [str(program.pid)]]
    return re.split(r"\s{2,}", line.strip())[2:]


def test_what_a_holder_has_is_shown_as_it_is_now(site: Site) -> None:
    site.start("1x64MiB")
    program = site.program()
    program.do("enter")
    program.do("add", "model", 10 * MIB)
    report = site.report()
    assert report is not None
    assert report["gpus"][0]["resident"] == 10 * MIB
    assert report["clients"][0]["resident"] == report["clients"][0]["peak"] == 10 * MIB
    program.do("free")
    assert site.client(program)["resident"] == 0
    program.kill()


def test_every_state_has_a_since(site: Site) -> None:
    site.start("1x64MiB", "--quantum", "0")
    program, other = site.program(), site.program()
    program.do("enter")
    program.do("add", "model", 40 * MIB)
    assert row(site, program)[0] == "running"
    program.do("hold", "evacuate", "restore")
    program.do("leave")
    other.begin("enter")
    program.holds_at("evacuate")
    for seen in (program, other):
        before = site.client(seen)["state_s"]
        wait_until("its time to go by", lambda seen=seen, before=before: site.client(seen)["state_s"] > before)
    state, _, resident, evacuated, _, since = row(site, program)
    assert (state, resident, evacuated) == ("evacuating", "40MiB", "-")
    assert re.fullmatch(r"\d+\.\d s", since)
    program.do("!release")
    other.end("enter")
    state, *_, since = row(site, program)
    assert state == "evacuated"
    assert re.fullmatch(r"\d+\.\d s", since)
    other.do("leave")
    program.do("hold", "restore")
    program.begin("enter")
    program.holds_at("restore")
    state, *_, since = row(site, program)
    assert state == "restoring"
    assert re.fullmatch(r"\d+\.\d s", since)
    program.do("!release")
    program.end("enter")
    for each in (program, other):
        each.kill()


def test_what_has_come_back_is_not_on_the_host_any_more(site: Site) -> None:
    site.start("1x64MiB", "--quantum", "0")
    program, other = site.program(), site.program()
    program.do("enter")
    program.do("add", "model", 30 * MIB)
    program.do("add", "cache", 10 * MIB)
    program.do("leave")
    other.do("enter")
    other.do("add", "model", 40 * MIB)
    other.do("leave")
    wait_until("its memory to leave", lambda: site.client(program)["evacuated"] == 40 * MIB)
    program.do("hold", "restore", "back")
    program.begin("enter")
    program.holds_at("restore")
    for resident, evacuated in ((0, 40), (30, 10), (40, 0)):
        client = site.client(program)
        assert (client["state"], client["resident"], client["evacuated"]) == (
            "restoring",
            resident * MIB,
            evacuated * MIB,
        )
        assert row(site, program)[2:4] == [f"{size}MiB" if size else "-" for size in (resident, evacuated)]
        program.do("!step")
        if evacuated:
            program.holds_at("back")
    program.end("enter")
    for each in (program, other):
        each.kill()


def test_a_stopped_holder_is_shown_and_logged_and_keeps_what_it_has(site: Site) -> None:
    site.start("1x64MiB", "--quantum", "0")
    program, other = site.program(), site.program()
    program.do("enter")
    program.do("add", "model", 40 * MIB)
    program.do("leave")
    program.send_signal(signal.SIGSTOP)
    wait_until("it to be stopped", lambda: site.client(program)["stopped"])
    assert row(site, program)[0] == "stopped"
    assert f"kill -CONT {program.pid}" in site.gpu_assigner("status").stdout
    assert site.broker_log() == ""  # it is in nobody's way
    other.begin("enter")
    wait_until("the broker to say so", site.broker_log)
    assert f"process {program.pid} (leaser.py) is stopped and holds GPU 0, for which others wait" in site.broker_log()
    assert site.client(program)["leased_s"] is not None
    assert site.client(other)["state"] == "waiting"
    program.send_signal(signal.SIGCONT)
    other.end("enter")
    assert row(site, program)[0] == "evacuated"
    other.do("leave")
    program.do("region")
    wait_until("the broker to say that it goes on", lambda: site.broker_log().count("\n") == 2)
    for line in site.broker_log().splitlines():
        assert re.match(r"gpu_assigner: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d: process ", line)
    assert site.broker_log().endswith(f"process {program.pid} (leaser.py) goes on\n")
    assert site.violations() == []
    for each in (program, other):
        each.kill()


def test_help_explains_every_column_and_state(site: Site) -> None:
    site.start("1x64MiB")
    program = site.program()
    program.do("enter")
    shown = site.gpu_assigner("status", COLUMNS="120").stdout.splitlines()
    columns = [re.split(r"\s{2,}", line.strip()) for line in shown if line.split()[:1] in (["GPU"], ["process"])]
    assert [names[0] for names in columns] == ["GPU", "process"]
    states = [
        "running",
        "waiting",
        "restoring",
        "resident",
        "evacuating",
        "evacuated",
        "suspended",
        "detached",
        "stopped",
        "silent",
    ]
    explained = re.findall(r"^  (\S+(?: \S+)*)  ", site.gpu_assigner("status", "--help").stdout, re.MULTILINE)
    assert {*columns[0][1:], *columns[1][2:], *states} <= set(explained)
    program.kill()
