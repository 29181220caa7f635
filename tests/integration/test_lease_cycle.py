"""Real programs take turns on one GPU: grants, evacuation, restoring, preemption, forks, signals, brokers that miss."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from broker_harness import MIB, Site, quiet_end, wait_until


def test_programs_that_do_not_fit_together_take_turns(site: Site) -> None:
    site.start("1x64MiB", "--quantum", "0")
    programs = [site.program() for _ in range(3)]
    for program in programs:
        program.do("take_turns", 1, 40 * MIB)
    for program in programs:
        program.begin("take_turns", 20, 0)
    for program in programs:
        program.end("take_turns")
    report = site.report()
    assert report is not None
    totals = report["totals"]
    assert totals["evacuations"] >= 3
    assert totals["evacuated_bytes"] == 40 * MIB * totals["evacuations"]
    assert totals["refused_evacuations"] == 0
    assert site.violations() == []
    quiet_end(*programs)


def test_memory_is_evacuated_when_another_needs_the_room_and_comes_back(site: Site) -> None:
    site.start("1x64MiB")
    first, second = site.program(), site.program()
    first.do("enter")
    first.do("add", "model", 40 * MIB)
    first.do("leave")
    assert site.client(first)["state"] == "running"  # nobody else wants it
    second.do("enter")
    site.wait_for(first, "evacuated")
    assert first.do("held") == 0
    second.do("add", "model", 50 * MIB)
    second.do("leave")
    first.do("enter")
    first.do("operate")
    assert first.do("held") == 40 * MIB
    seen = site.wait_for(second, "evacuated")
    assert (seen["resident"], seen["evacuated"]) == (0, 50 * MIB)
    first.do("leave")
    second.do("region", 3)
    assert site.violations() == []
    quiet_end(first, second)


def test_memory_that_fits_beside_is_left_where_it_is(site: Site) -> None:
    site.start("1x64MiB")
    programs = [site.program(ACB_GPU_MEMORY=str(20 * MIB)) for _ in range(3)]
    for program in programs:
        program.do("enter")
        program.do("add", "model", 20 * MIB)
        program.do("leave")
    for program in programs:
        program.do("region")
    report = site.report()
    assert report is not None
    assert report["totals"]["evacuations"] == 0
    assert sorted(client["state"] for client in report["clients"]) == ["resident", "resident", "running"]
    quiet_end(*programs)


def test_a_program_that_never_pauses_is_preempted_between_its_regions(site: Site) -> None:
    site.start("1x64MiB", "--quantum", "0")
    busy, other = site.program(), site.program()
    busy.do("enter")
    busy.do("add", "model", 40 * MIB)
    busy.do("leave")
    busy.begin("region_until_released")
    for _ in range(5):
        other.do("enter")
        assert site.client(busy)["state"] in ("waiting", "evacuating", "evacuated")
        other.do("add", "model", 30 * MIB)
        other.do("free")
        other.do("leave")
        wait_until("it to go on", lambda: site.client(busy)["state"] == "running")
    busy.do("!release")
    assert busy.end("region_until_released") > 5
    assert site.violations() == []
    quiet_end(busy, other)


def test_the_quantum_protects_a_busy_program_but_not_an_idle_one(site: Site) -> None:
    site.start("1x64MiB", "--quantum", "1000")
    busy, other = site.program(), site.program()
    busy.do("enter")
    other.begin("enter")
    wait_until("the revoke", lambda: site.client(busy)["revoked"])
    busy.do("background", 20)  # its other threads may go on, too
    assert not busy.do("facts")["closed"]
    assert site.client(other)["state"] == "waiting"
    busy.do("leave")
    other.end("enter")
    other.do("leave")
    assert site.violations() == []
    quiet_end(busy, other)


def test_an_open_region_is_never_cut_short(site: Site) -> None:
    site.start("1x64MiB", "--quantum", "0")
    first, second = site.program(), site.program()
    first.do("enter")
    second.begin("enter")
    site.wait_for(second, "waiting")
    wait_until("the revoke", lambda: site.client(first)["revoked"])
    first.do("add", "model", MIB)
    first.do("operate", 100)
    assert site.client(first)["state"] == "running"
    assert site.client(second)["state"] == "waiting"
    first.do("leave")
    second.end("enter")
    assert site.violations() == []


def test_threads_of_a_program_share_its_lease(site: Site) -> None:
    site.start("1x64MiB", "--quantum", "0")
    first, second = site.program(), site.program()
    first.begin("&in_threads", 6, 200)
    second.begin("in_threads", 6, 200)
    first.end("in_threads")
    second.end("in_threads")
    assert site.violations() == []
    quiet_end(first, second)


def test_a_thread_that_ends_in_its_phase_ends_the_phase(site: Site) -> None:
    site.start()
    first, second = site.program(), site.program()
    first.do("begin_on_a_thread_that_ends")
    second.do("enter")
    quiet_end(first, second)


# --- forks and signals ------------------------------------------------------------------------------------------------


def test_a_fork_is_a_program_of_its_own(site: Site) -> None:
    site.start("1x64MiB")
    parent = site.program()
    parent.do("enter")
    parent.do("add", "model", 40 * MIB)
    assert parent.do("fork_and", "nothing") == 0  # its end takes nothing from the parent
    assert site.client(parent)["state"] == "running"
    parent.do("operate")
    parent.do("leave")
    assert parent.do("fork_and", "take_turns", 3, 50 * MIB) == 0
    parent.do("enter")
    parent.do("operate")
    assert parent.do("fork_and", "held") == 0
    assert site.violations() == []
    quiet_end(parent)


def test_forks_in_the_middle_of_everything(site: Site) -> None:
    site.start("1x64MiB", "--quantum", "0")
    parent, other = site.program(), site.program()
    other.begin("take_turns", 100, 30 * MIB)
    parent.begin("&in_threads", 3, 100)
    for _ in range(5):
        parent.begin("fork_and", "nothing")
    other.end("take_turns")
    said = [parent.next() for _ in range(6)]
    assert sorted((one["done"], one["result"]) for one in said) == [("fork_and", 0)] * 5 + [("in_threads", None)]
    assert site.violations() == []
    quiet_end(parent, other)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_waiting_program_as_without_acb(site: Site, number: int) -> None:
    site.start()
    holder, waiting = site.program(), site.program()
    holder.do("enter")
    waiting.begin("enter")
    site.wait_for(waiting, "waiting")
    assert waiting.kill(number) == -number
    assert waiting.errors.endswith("KeyboardInterrupt\n" if number == signal.SIGINT else "")
    wait_until("it to be gone", lambda: not site.client(waiting))
    wait_until("the revoke to be withdrawn", lambda: not site.client(holder)["revoked"])
    holder.do("leave")
    assert site.client(holder)["state"] == "running"
    quiet_end(holder)


def test_signals_come_to_the_programs_own_threads(site: Site) -> None:
    """A program that blocks a signal everywhere and waits for it gets it: acb's thread does not take it away."""
    site.start()
    program = site.program()
    program.do("enter")
    program.begin("wait_for_signal", signal.SIGUSR1)
    program.holds_at("signals blocked")
    program.send_signal(signal.SIGUSR1)
    assert program.end("wait_for_signal") == signal.SIGUSR1
    quiet_end(program)


def test_a_program_may_end_while_it_is_evacuated(site: Site) -> None:
    site.start()
    first, second = site.program(), site.program()
    first.do("enter")
    first.do("add", "model", 40 * MIB)
    first.do("leave")
    second.do("enter")
    site.wait_for(first, "evacuated")
    quiet_end(first)
    quiet_end(second)


# --- with and without a broker ----------------------------------------------------------------------------------------


def test_require_waits_for_a_broker(site: Site) -> None:
    site.start()
    program = site.program()
    site.kill_broker()
    program.begin("enter")
    wait_until("its thread", lambda: program.do("!facts")["closed"] and "acb-agent" in program.do("!facts")["threads"])
    site.start()
    program.end("enter")
    assert site.client(program)["state"] == "running"
    quiet_end(program)


def test_auto_without_broker_and_gpu_goes_on_with_a_warning(site: Site) -> None:
    site.start()
    card = site.card().path
    site.kill_broker()
    (site.directory / "broker.journal").unlink()
    gpus = {"ACB_SIMULATED": str(card.parent), "ACB_SIMULATED_GPUS": "1x64MiB"}
    program = site.program(ACB_BROKER="auto", CUDA_VISIBLE_DEVICES="", **gpus)
    program.do("enter")
    program.do("add", "model", MIB)
    program.do("leave")
    program.do("region", 3)
    assert program.finish() == 0
    assert program.errors.count("\n") == 1
    assert "no GPU broker runs and none can be started; going on without one" in program.errors
    quiet = site.program(ACB_BROKER="auto", CUDA_VISIBLE_DEVICES="", ACB_QUIET="1", **gpus)
    quiet.do("region", 3)
    quiet_end(quiet)


def test_off_asks_nobody(site: Site) -> None:
    site.start()
    with site.card() as card:
        card.set_holders(None)
    program = site.program(ACB_BROKER="off")
    program.do("enter", "65GiB")
    program.do("leave")
    program.do("region", 3)
    facts = program.do("facts")
    assert "acb-agent" not in facts["threads"]
    assert facts["gpu"] == 0
    assert site.client(program) == {}
    quiet_end(program)


def test_an_idle_program_holds_its_lease_until_another_wants_it(site: Site) -> None:
    site.start()
    first, second = site.program(), site.program()
    first.do("region")
    assert site.client(first)["state"] == "running"
    second.do("region")
    assert site.client(first)["state"] == "detached"
    assert site.client(second)["state"] == "running"
    quiet_end(first, second)


# --- the trace --------------------------------------------------------------------------------------------------------

FOLLOWS = {
    "detached": {"waiting"},
    "waiting": {"running", "restoring", "evacuating"},
    "restoring": {"running", "waiting"},
    "running": {"idle", "waiting", "resident", "detached"},
    "idle": {"running", "waiting", "resident", "detached"},
    "resident": {"evacuating", "waiting"},
    "evacuating": {"evacuated", "waiting", "resident"},
    "evacuated": {"waiting"},
}


def test_the_trace_tells_every_change_in_order_with_its_cause(site: Site, tmp_path: Path) -> None:
    site.start("1x64MiB", "--quantum", "0")
    trace = tmp_path / "trace.jsonl"
    programs = [site.program(ACB_TRACE=str(trace), ACB_NAME=f"program {n}") for n in range(3)]
    for program in programs:
        program.do("take_turns", 1, 40 * MIB)
    for program in programs:
        program.begin("take_turns", 20, 0)
    for program in programs:
        program.end("take_turns")
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    seen = set()
    for program, name in zip(programs, ("program 0", "program 1", "program 2"), strict=True):
        mine = [line for line in lines if line["pid"] == program.pid]
        state, moment = "detached", 0.0
        for line in mine:
            assert line["name"] == name
            assert line["cause"]
            assert line["t"] >= moment, line
            assert line["state"] in FOLLOWS[state], (state, line)
            state, moment = line["state"], line["t"]
            seen.add(state)
        moved = [line["bytes"] for line in mine if line["state"] == "restoring"]
        assert all(size == 40 * MIB for size in moved)
    assert seen >= {"waiting", "running", "restoring", "evacuating"}
    quiet_end(*programs)
