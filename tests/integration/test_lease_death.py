"""Killed at every step of the lease cycle: clients, whose lease and memory are free at once, and brokers, whose clients
keep what they hold and tell the next one."""

from __future__ import annotations

import signal

import pytest
from broker_harness import MIB, Site, wait_until
from lease_death import STEPS, Scene, kill_a_client, kill_the_broker


@pytest.mark.parametrize("step", STEPS)
def test_a_client_is_killed(site: Site, step: str) -> None:
    kill_a_client(site, step)


@pytest.mark.parametrize("step", STEPS)
def test_the_broker_is_killed(site: Site, step: str) -> None:
    kill_the_broker(site, step)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_holds_the_lease_is_undisturbed_and_nobody_else_gets_it_meanwhile(site: Site, number: int) -> None:
    scene = Scene(site, "inside")
    scene.program.send_signal(signal.SIGSTOP)  # so that the other one is the first to find the new broker
    site.kill_broker(number)
    site.start("1x64MiB", "--quantum", "0")
    site.wait_for(scene.other, "waiting")
    scene.program.send_signal(signal.SIGCONT)
    site.wait_for(scene.program, "running")
    scene.program.do("operate", 50)
    site.kill_broker(number)
    scene.program.do("operate", 50)
    site.start("1x64MiB", "--quantum", "0")
    site.wait_for(scene.program, "running")
    site.wait_for(scene.other, "waiting")
    scene.program.do("operate", 50)
    assert site.violations() == []
    scene.program.do("leave")
    scene.other.end("region")
    assert site.violations() == []


def test_the_new_broker_does_not_wait_for_the_dead(site: Site) -> None:
    scene = Scene(site, "waiting")
    site.kill_broker()
    scene.other.kill()
    site.start("1x64MiB", "--quantum", "0")
    scene.program.end("region")
    assert site.violations() == []


def test_brokers_die_time_and_again_under_work(site: Site) -> None:
    site.start("1x64MiB", "--quantum", "0")
    programs = [site.program() for _ in range(3)]
    for program in programs:
        program.begin("take_turns", 60, 40 * MIB)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        wait_until("work", lambda: any(c["state"] == "restoring" or c["evacuated"] for c in site.report()["clients"]))  # type: ignore[index]
        site.kill_broker(number)
        site.start("1x64MiB", "--quantum", "0")
        for program in programs:
            wait_until("it to come back", lambda program=program: site.client(program))  # type: ignore[misc]
    for program in programs:
        program.end("take_turns")
    assert site.violations() == []
    for program in programs:
        assert program.finish() == 0
        assert program.errors == ""


def test_clients_start_a_new_broker_with_the_options_of_the_one_that_died(site: Site) -> None:
    scene = Scene(site, "waiting evacuated", ACB_BROKER="auto")
    site.kill_broker()
    report = wait_until("a new broker", site.report)
    assert report["pid"] != site.brokers[-1].pid
    assert [gpu["capacity"] for gpu in report["gpus"]] == [64 * MIB]
    scene.other_goes_on("waiting evacuated")
    scene.program_goes_on("waiting evacuated")
    for program in (scene.other, scene.program):
        assert program.finish() == 0
        assert program.errors == ""
    assert site.violations() == []
    assert site.gpu_assigner("stop").returncode == 0


def test_a_broker_that_was_stopped_on_purpose_is_not_started_again(site: Site) -> None:
    scene = Scene(site, "waiting", ACB_BROKER="auto")
    assert site.gpu_assigner("stop").returncode == 0
    scene.other.do("operate", 3)
    scene.other.do("leave")
    scene.other.do("region")  # it keeps what it holds
    facts = scene.program.do("!facts")
    assert facts["closed"]
    assert site.report() is None
    site.start("1x64MiB")
    scene.program.end("region")
    assert site.violations() == []
