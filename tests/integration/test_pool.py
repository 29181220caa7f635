"""Real programs on a pool of simulated GPUs: spread, bound, several GPUs at once, gangs, slots, policies, options."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from broker_harness import MIB, Site, wait_until

GANG = {"TORCHELASTIC_RUN_ID": "run", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "2"}


def test_programs_are_spread_over_the_pool_and_stay_where_they_are(site: Site) -> None:
    site.start("2x64MiB", "--quantum", "0")
    programs = [site.program() for _ in range(4)]
    for program in programs:
        program.do("take_turns", 1, 40 * MIB)
    places = [program.do("facts")["gpu"] for program in programs]
    assert sorted(places) == [0, 0, 1, 1]
    for program in programs:
        program.begin("take_turns", 10, 0)
    for program in programs:
        program.end("take_turns")
    assert [program.do("facts")["gpu"] for program in programs] == places
    assert site.violations() == []
    for program in programs:
        assert program.finish() == 0, program.errors


def test_a_program_of_two_gpus_waits_for_both_and_keeps_others_off_both(site: Site) -> None:
    site.start("2x64MiB")
    one, other = site.program(), site.program()
    wide = site.program(ACB_GPUS="2")
    one.do("enter")
    other.do("enter")
    wide.begin("enter")
    wait_until("the revokes", lambda: site.client(one)["revoked"] and site.client(other)["revoked"])
    one.do("leave")
    assert site.client(wide)["state"] == "waiting"
    other.do("leave")
    wide.end("enter")
    assert wide.do("facts")["gpus"] == [0, 1]
    one.begin("enter")
    site.wait_for(one, "waiting")
    wide.do("leave")
    one.end("enter")
    for program in (one, other, wide):
        program.kill()


def test_a_gang_runs_together_or_not_at_all(site: Site) -> None:
    site.start("2x64MiB")
    alone = site.program()
    members = [site.program(**GANG, LOCAL_RANK=str(rank)) for rank in range(2)]
    alone.do("enter")
    for member in members:
        member.begin("enter")
        site.wait_for(member, "waiting")
    alone.do("leave")
    for member in members:
        member.end("enter")
    assert [member.do("facts")["gpu"] for member in members] == [0, 1]
    assert [member.do("facts")["gpus"] for member in members] == [[0, 1], [0, 1]]
    for rank, member in enumerate(members):
        member.do("add", "model", 30 * MIB)
        with site.card(rank) as card:
            assert card.held(member.pid) == 30 * MIB
    alone.begin("enter")
    wait_until("the revokes", lambda: all(site.client(member)["revoked"] for member in members))
    members[0].do("leave")
    assert site.client(alone)["state"] == "waiting"  # the other member still computes
    members[0].do("region")  # and this one may go on beside it
    members[1].do("leave")
    alone.end("enter")
    assert site.violations() == []
    for program in (alone, *members):
        program.kill()


def test_a_member_that_is_killed_leaves_no_gpu_behind(site: Site) -> None:
    site.start("2x64MiB")
    members = [site.program(**GANG, LOCAL_RANK=str(rank)) for rank in range(2)]
    for member in members:
        member.do("enter")
    alone = site.program()
    alone.begin("enter")
    site.wait_for(alone, "waiting")
    for member in members:
        member.kill()
    alone.end("enter")
    alone.do("leave")
    assert alone.finish() == 0


def test_a_gang_is_found_again_by_the_next_broker(site: Site) -> None:
    site.start("2x64MiB")
    members = [site.program(**GANG, LOCAL_RANK=str(rank)) for rank in range(2)]
    for member in members:
        member.do("enter")
        member.do("add", "model", 20 * MIB)
    site.kill_broker(signal.SIGKILL)
    site.start("2x64MiB")
    for rank, member in enumerate(members):
        assert site.wait_for(member, "running")["gpu"] == rank
        member.do("operate")
        member.do("leave")
        assert member.finish() == 0
    assert site.violations() == []


def test_a_gang_larger_than_the_pool_is_refused_at_once(site: Site) -> None:
    site.start("2x64MiB")
    wide = site.program(ACB_GPUS="3")
    kind, message = wide.fails("enter")
    assert kind == "LeaseRefused"
    assert "asks for 3 GPUs at once, but the broker has 2" in message
    wide.kill()


def test_two_slots_let_two_compute_at_once(site: Site) -> None:
    site.start("1x64MiB", "--slots", "2")
    programs = [site.program(ACB_GPU_MEMORY=str(20 * MIB)) for _ in range(3)]
    programs[0].do("enter")
    programs[1].do("enter")
    programs[2].begin("enter")
    site.wait_for(programs[2], "waiting")
    assert [site.client(program)["state"] for program in programs[:2]] == ["running", "running"]
    programs[0].do("leave")
    programs[2].end("enter")
    assert site.violations() == []
    for program in programs:
        program.kill()


@pytest.mark.parametrize("scheduler", ["fair", "priority", "backfill", "affinity", "gpu-sharing", "gpu-affinity"])
def test_programs_take_turns_under_every_policy(site: Site, scheduler: str) -> None:
    site.start("1x64MiB", "--quantum", "0", "--scheduler", scheduler)
    programs = [site.program(ACB_PRIORITY=str(number), ACB_WEIGHT=str(1 + number)) for number in range(3)]
    for program in programs:
        program.do("take_turns", 1, 40 * MIB)
    for program in programs:
        program.begin("take_turns", 10, 0)
    for program in programs:
        program.end("take_turns")
    report = site.report()
    assert report is not None
    assert [client["priority"] for client in report["clients"]] == [0, 1, 2]
    assert [client["weight"] for client in report["clients"]] == [1.0, 2.0, 3.0]
    assert site.violations() == []
    for program in programs:
        assert program.finish() == 0, program.errors


def test_a_higher_priority_is_let_in_at_the_next_safe_point(site: Site) -> None:
    site.start("1x64MiB", "--scheduler", "priority")
    low, high = site.program(), site.program(ACB_PRIORITY="5")
    low.do("enter")
    low.do("leave")
    low.begin("region_until_released")
    high.do("enter")
    high.do("leave")
    low.do("!release")
    assert low.end("region_until_released") > 0
    for program in (low, high):
        assert program.finish() == 0, program.errors


def test_what_a_program_needs_is_remembered_by_its_name(site: Site, tmp_path: Path) -> None:
    site.start("1x64MiB", ACB_STATE_DIR=str(tmp_path))
    for _ in range(3):
        program = site.program(ACB_NAME="fold")
        program.do("take_turns", 1, 20 * MIB)
        assert program.finish() == 0
    wait_until("their ends to be seen", lambda: not (site.report() or {})["clients"])
    assert site.gpu_assigner("stop").returncode == 0
    assert set(json.loads((tmp_path / "programs.json").read_text())) == {"fold"}
    site.start("1x64MiB", ACB_STATE_DIR=str(tmp_path))
    known, unknown = site.program(ACB_NAME="fold"), site.program(ACB_NAME="new")
    known.do("enter")
    assert site.client(known)["headroom"] == 22 * MIB
    known.do("leave")
    unknown.do("enter")
    assert site.client(unknown)["headroom"] == 64 * MIB
    for program in (known, unknown):
        program.kill()


def test_what_cannot_be_kept_is_logged_once(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    site.start("1x64MiB", ACB_STATE_DIR=str(tmp_path / "file"))
    program = site.program()
    program.do("take_turns", 1, MIB)
    assert program.finish() == 0
    assert site.gpu_assigner("stop").returncode == 0
    [line] = site.broker_log().splitlines()
    assert f"cannot be kept in {tmp_path / 'file' / 'programs.json'}" in line


def test_a_place_is_understood_as_where_the_broker_was_started(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert site.gpu_assigner("start", "--simulate-gpus", "1x64MiB", ACB_STATE_DIR="learned").returncode == 0
    program = site.program()
    program.do("take_turns", 1, MIB)
    assert program.finish() == 0
    assert site.gpu_assigner("stop").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["learned"]


def test_two_programs_of_one_file_name_are_not_taken_for_each_other(site: Site, tmp_path: Path) -> None:
    site.start("1x64MiB", ACB_STATE_DIR=str(tmp_path))
    program = site.program()
    program.do("take_turns", 1, 20 * MIB)
    assert program.finish() == 0
    wait_until("its end to be seen", lambda: not (site.report() or {})["clients"])
    assert site.gpu_assigner("stop").returncode == 0
    [key] = json.loads((tmp_path / "programs.json").read_text())
    assert Path(key).is_absolute()
    assert Path(key).name == "leaser.py"


def test_a_program_bound_to_a_gpu_that_the_next_broker_lacks_says_so_and_waits_for_one_that_has_it(site: Site) -> None:
    site.start("2x64MiB")
    programs = [site.program() for _ in range(2)]
    for program in programs:
        program.do("take_turns", 1, 10 * MIB)
    here, elsewhere = sorted(programs, key=lambda program: int(program.do("facts")["gpu"]))
    assert site.gpu_assigner("stop").returncode == 0
    site.start("2x64MiB", "--gpu-list", "0")
    site.wait_for(here, "running")
    wait_until("the other one to hear of it", lambda: elsewhere.do("facts")["closed"])
    assert elsewhere.errors == ""  # as long as it wants nothing
    elsewhere.begin("region")
    site.wait_for(elsewhere, "waiting")
    sentence = f"process {elsewhere.pid} is bound to GPU 1, which this broker does not lend"
    wait_until("the program to say so", lambda: elsewhere.errors.count("\n"))
    assert sentence in elsewhere.errors
    assert "--gpu-list 0,1\n" in elsewhere.errors
    assert sentence in site.broker_log()
    assert sentence in site.gpu_assigner("status").stdout
    here.do("region")
    assert site.gpu_assigner("stop").returncode == 0
    site.start("2x64MiB", "--gpu-list", "0,1")
    elsewhere.end("region")
    assert elsewhere.do("facts")["gpu"] == 1
    assert elsewhere.errors.count("\n") == 1
    assert site.violations() == []
    for program in programs:
        program.kill()


def test_a_program_of_other_simulated_gpus_than_the_next_broker_lends_waits_for_one_that_does(site: Site) -> None:
    site.start("2x64MiB", "--quantum", "0")
    spec = {"ACB_SIMULATED_GPUS": "2x64MiB"}
    program, late = site.program(**spec), site.program(**spec)
    program.do("enter")
    program.do("add", "model", 40 * MIB)
    program.do("leave")
    assert site.gpu_assigner("stop").returncode == 0
    site.start("1x32MiB")
    wait_until("it to hear of it", lambda: program.do("facts")["closed"])
    program.begin("region")
    late.begin("region")  # it has never had a GPU, and sees only those of the broker before
    for each in (program, late):
        assert site.wait_for(each, "waiting")["gpus"] == []
        sentence = (
            f"process {each.pid} uses the simulated GPUs in {site.directory}/simulated-2x64MiB, which this broker"
        )
        wait_until("the program to say so", lambda each=each: each.errors.count("\n"))  # type: ignore[misc]
        for said in (each.errors, site.broker_log(), site.gpu_assigner("status").stdout):
            assert sentence in said
            assert "gpu_assigner stop, then: gpu_assigner start --simulate-gpus 2x64MiB\n" in said
    assert site.gpu_assigner("stop").returncode == 0
    site.start("2x64MiB")
    program.end("region")
    late.end("region")
    assert site.client(program)["resident"] == 40 * MIB
    assert site.used() == 40 * MIB
    assert site.violations() == []
    for each in (program, late):
        each.kill()
