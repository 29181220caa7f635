"""The driver tier against a fake driver: every way in which it can fail, and the state that the process is left in."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
from fake_driver import GIB, A, B, FakeDriver, FakeMemory

from acb.devices.checkpoint import Checkpointer, Outcome
from acb.devices.cuda import Result, State
from acb.devices.rooms import OVERHEAD, moved

PID = os.getpid()  # some process that exists


@dataclass
class Tier:
    driver: FakeDriver
    memory: FakeMemory
    checkpointer: Checkpointer

    def suspend(self, timeout: float = 5.0) -> Outcome:
        return self.checkpointer.suspend(PID, timeout)

    def resume(self) -> Outcome:
        return self.checkpointer.resume(PID)


def tier(gpu: str = A, nbytes: int = 40 * GIB, **driver: object) -> Tier:
    fake = FakeDriver(**driver)  # type: ignore[arg-type]
    memory = FakeMemory(fake, {PID: {gpu: nbytes}})
    return Tier(fake, memory, Checkpointer(fake, memory))


def never(uuid: str) -> int:
    raise AssertionError("not to be asked")


# --- as it should go --------------------------------------------------------------------------------------------------


def test_there_and_back_again() -> None:
    it = tier()
    out = it.suspend()
    assert (out.done, out.state, out.problem, out.reason, out.code) == (True, "checkpointed", "", "", 0)
    assert out.moved == {A: 40 * GIB}
    assert set(out.seconds) == {"state", "lock", "checkpoint"}
    back = it.resume()
    assert (back.done, back.state, back.moved) == (True, "running", {A: 40 * GIB})
    assert it.driver.made() == ["lock", "checkpoint", "restore", "unlock"]
    assert ("lock", PID, 5000) in it.driver.calls


def test_both_may_be_asked_twice() -> None:
    it = tier()
    assert it.suspend().done
    assert it.suspend().done
    assert it.driver.made() == ["lock", "checkpoint"]
    assert it.resume().done
    assert it.resume().done
    assert it.driver.made() == ["lock", "checkpoint", "restore", "unlock"]
    assert it.suspend().done


@pytest.mark.parametrize(("timeout", "milliseconds"), [(0.0, 1), (0.0001, 1), (2.5, 2500), (1e9, (1 << 32) - 1)])
def test_no_timeout_means_to_wait_for_ever(timeout: float, milliseconds: int) -> None:
    it = tier()
    it.suspend(timeout)
    assert ("lock", PID, milliseconds) in it.driver.calls  # 0 would


def test_a_lock_that_was_left_is_taken_over_or_released() -> None:
    it = tier(states={PID: State.LOCKED})
    assert it.suspend().done
    assert it.driver.made() == ["checkpoint"]
    it = tier(states={PID: State.LOCKED})
    assert it.resume().done
    assert it.driver.made() == ["unlock"]
    it = tier(states={PID: State.LOCKED})
    assert it.checkpointer.release(PID).done
    assert it.checkpointer.release(PID).done
    assert it.driver.made() == ["unlock"]


# --- a suspend that fails ---------------------------------------------------------------------------------------------

CODES = [
    (Result.INVALID_VALUE, "foreign"),
    (Result.OUT_OF_MEMORY, "memory"),
    (Result.NOT_INITIALIZED, "driver"),
    (Result.OPERATING_SYSTEM, "forbidden"),
    (Result.ILLEGAL_STATE, "state"),
    (Result.NOT_READY, "timeout"),
    (Result.NOT_PERMITTED, "forbidden"),
    (Result.NOT_SUPPORTED, "unsupported"),
    (Result.UNKNOWN, "driver"),
    (4242, "driver"),
]


@pytest.mark.parametrize(("code", "problem"), CODES)
def test_a_lock_that_fails_has_changed_nothing(code: int, problem: str) -> None:
    it = tier(fails={"lock": code})
    out = it.suspend()
    assert (out.done, out.state, out.problem, out.code) == (False, "running", problem, code)
    assert out.reason.endswith("it runs on")
    assert str(PID) in out.reason
    assert it.driver.made() == ["lock"]
    assert out.moved == {}


def test_a_lock_that_times_out_says_after_how_long() -> None:
    assert "did not come to rest within 2.5 s" in tier(fails={"lock": Result.NOT_READY}).suspend(2.5).reason


def test_a_lock_that_holds_in_spite_of_its_error_is_undone() -> None:
    it = tier(fails={"lock": Result.NOT_READY}, then={"lock": State.LOCKED})
    out = it.suspend()
    assert (out.done, out.state, out.problem) == (False, "running", "timeout")
    assert it.driver.made() == ["lock", "unlock"]


@pytest.mark.parametrize(("code", "problem"), CODES)
def test_a_checkpoint_that_fails_is_unlocked(code: int, problem: str) -> None:
    it = tier(fails={"checkpoint": code})
    out = it.suspend()
    assert (out.done, out.state, out.problem, out.code) == (False, "running", problem, code)
    assert out.reason.endswith("it runs on")
    assert it.driver.made() == ["lock", "checkpoint", "unlock"]


def test_a_checkpoint_that_ruins_the_process_says_so() -> None:
    out = tier(fails={"checkpoint": 999}, then={"checkpoint": State.FAILED}).suspend()
    assert (out.done, out.state) == (False, "failed")
    assert "cannot go on" in out.reason


def test_where_even_the_unlock_fails_the_state_is_named() -> None:
    it = tier(fails={"checkpoint": Result.NOT_SUPPORTED, "unlock": 999})
    out = it.suspend()
    assert (out.done, out.state, out.problem, out.code) == (False, "locked", "unsupported", Result.NOT_SUPPORTED)
    assert "left locked" in out.reason
    it.driver.fails.clear()
    assert it.checkpointer.release(PID).state == "running"


def test_where_the_state_cannot_be_asked_nothing_is_tried() -> None:
    it = tier(fails={"state": Result.NOT_INITIALIZED})
    out = it.suspend()
    assert (out.done, out.state, out.problem, out.code) == (False, "unknown", "driver", Result.NOT_INITIALIZED)
    assert it.driver.made() == []


@pytest.mark.parametrize("state", [State.FAILED, State.CHECKPOINTING, State.RESTORING, 9])
def test_other_states_are_left_alone(state: int) -> None:
    for attempt in ("suspend", "resume", "release"):
        it = tier(states={PID: state})
        out = getattr(it.checkpointer, attempt)(*([PID, 1.0] if attempt == "suspend" else [PID]))
        assert (out.done, out.problem) == (False, "state")
        assert out.state in out.reason
        assert it.driver.made() == []


def test_an_old_driver_and_a_process_that_is_gone() -> None:
    out = tier(missing=True).suspend()
    assert (out.done, out.problem, out.state) == (False, "unsupported", "unknown")
    assert "since driver 570" in out.reason
    it = tier()
    gone = it.checkpointer.suspend(1 << 30, 1.0)
    assert (gone.done, gone.problem) == (False, "gone")
    assert it.driver.calls == []


@pytest.mark.parametrize("failing", ["lock", "checkpoint"])
def test_one_whose_state_cannot_be_asked_after_a_failure_is_unlocked_all_the_same(failing: str) -> None:
    """It may be locked, and would stand still for ever; an unlock too many does no harm."""
    it = tier(fails={failing: Result.UNKNOWN}, then={failing: State.LOCKED})
    asked = it.driver.state

    def state(pid: int) -> int:
        if failing in it.driver.made():
            it.driver.fails["state"] = Result.UNKNOWN
        return asked(pid)

    it.driver.state = state  # type: ignore[method-assign]
    out = it.suspend()
    assert it.driver.made()[-2:] == [failing, "unlock"]
    assert it.driver.states[PID] == State.RUNNING
    assert (out.done, out.state, out.problem) == (False, "unknown", "driver")
    assert out.reason.endswith("it is left unknown")


def test_one_that_is_suspended_is_so_although_its_state_cannot_be_asked_afterwards() -> None:
    it = tier()
    it.driver.during_checkpoint = lambda: it.driver.fails.update({"state": Result.UNKNOWN})
    out = it.suspend()
    assert (out.done, out.state, out.problem, out.reason, out.code) == (True, "unknown", "", "", 0)
    it.driver.fails.clear()
    assert it.resume().done


def test_what_does_not_fit_the_host_is_not_begun() -> None:
    it = tier()
    out = it.checkpointer.suspend(PID, 1.0, host_free=39 * GIB)
    assert (out.done, out.problem, out.state) == (False, "memory", "running")
    assert "40GiB" in out.reason
    assert it.driver.made() == []
    assert it.checkpointer.suspend(PID, 1.0, host_free=40 * GIB).done


# --- a resume that fails ----------------------------------------------------------------------------------------------


def test_nothing_is_restored_before_the_room_is_free() -> None:
    it = tier()
    it.suspend()
    it.memory.others[A] = 41 * GIB
    out = it.resume()
    assert (out.done, out.state, out.problem) == (False, "checkpointed", "room")
    assert "40GiB" in out.reason
    assert "39GiB are free" in out.reason
    assert "restore" not in it.driver.made()
    it.memory.others[A] = 40 * GIB
    assert it.resume().done


def test_the_room_is_waited_for() -> None:
    it = tier()
    it.suspend()
    answers = iter([0, 1, 39 * GIB, 40 * GIB])
    assert it.checkpointer.resume(PID, free=lambda uuid: next(answers), patience=60).done
    assert list(answers) == []


def test_room_that_nobody_can_tell_is_no_room() -> None:
    it = tier()
    it.suspend()
    it.memory.silent = True
    assert it.resume().problem == "room"
    fake = FakeDriver(states={PID: State.CHECKPOINTED})
    other = Checkpointer(fake, None)  # a broker that has just started: it has not seen the process leave
    assert "how much memory it needs" in other.resume(PID, free=never).reason
    assert "how much is free" in other.resume(PID, needs={A: GIB}).reason
    assert other.resume(PID, needs={A: GIB}, free=lambda uuid: GIB - 1).problem == "room"
    assert other.resume(PID, needs={A: GIB}, free=lambda uuid: GIB).done


def test_a_failed_restore_is_not_hidden() -> None:
    it = tier(fails={"restore": Result.OUT_OF_MEMORY}, then={"restore": State.FAILED})
    it.suspend()
    out = it.resume()
    assert (out.done, out.state, out.problem, out.code) == (False, "failed", "memory", Result.OUT_OF_MEMORY)
    assert "nothing brings it back" in out.reason
    assert "unlock" not in it.driver.made()


@pytest.mark.parametrize(("code", "problem"), CODES)
def test_a_restore_that_left_the_memory_on_the_host_may_be_tried_again(code: int, problem: str) -> None:
    it = tier(fails={"restore": code})
    it.suspend()
    out = it.resume()
    assert (out.done, out.state, out.problem, out.code) == (False, "checkpointed", problem, code)
    assert "safe on the host" in out.reason
    it.driver.fails.clear()
    assert it.resume().done


def test_an_unlock_that_fails_can_be_repeated() -> None:
    it = tier(fails={"unlock": Result.UNKNOWN})
    it.suspend()
    out = it.resume()
    assert (out.done, out.state, out.problem) == (False, "locked", "driver")
    assert "its memory is on the GPU" in out.reason
    it.driver.fails.clear()
    assert it.resume().done
    it = tier(fails={"unlock": Result.UNKNOWN}, then={"unlock": State.RUNNING})
    it.suspend()
    assert it.resume().done


def test_what_an_earlier_suspend_measured_is_not_taken_for_a_later_one() -> None:
    it = tier()
    it.suspend()
    assert it.resume().done
    it.driver.states[PID] = State.CHECKPOINTED  # by somebody else, and with other memory, perhaps
    out = it.resume()
    assert (out.done, out.state, out.problem) == (False, "checkpointed", "room")
    assert "how much memory it needs" in out.reason
    assert it.driver.made().count("restore") == 1


# --- onto another GPU -------------------------------------------------------------------------------------------------


def test_the_room_is_asked_of_the_gpu_that_it_comes_back_on() -> None:
    it = tier()
    it.suspend()
    it.memory.others[B] = 50 * GIB
    assert it.checkpointer.resume(PID, gpu_map={A: B}).problem == "room"
    it.memory.others = {A: 80 * GIB}
    assert it.checkpointer.resume(PID, gpu_map={A: B}).done
    assert ("restore", PID, (A, B)) in it.driver.calls


@pytest.mark.parametrize(
    ("gpu_map", "cuda", "problem", "words"),
    [
        ({A: B}, 12080, "unsupported", "580"),
        ({B: A}, 13000, "map", f"{A} is not"),
        ({A: "GPU-c"}, 13000, "map", "there is no GPU GPU-c"),
        ({A: B, "GPU-c": A}, 13000, "map", "there is no GPU GPU-c"),
        ({A: B, B: B}, 13000, "map", "would become one"),
    ],
)
def test_a_map_that_makes_no_sense_is_refused(gpu_map: dict[str, str], cuda: int, problem: str, words: str) -> None:
    it = tier(cuda=cuda)
    it.suspend()
    out = it.checkpointer.resume(PID, free=never, gpu_map=gpu_map)
    assert (out.done, out.state, out.problem) == (False, "checkpointed", problem)
    assert words in out.reason
    assert it.resume().done


# --- how much it is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "freed", "expected"),
    [
        ({A: 10 * GIB}, 10 * GIB, 10 * GIB),
        ({A: 10 * GIB}, 10 * GIB + 1000, 10 * GIB + 1000),  # a context that the driver accounts to nobody
        ({A: 10 * GIB}, 70 * GIB, 10 * GIB + OVERHEAD),  # somebody else has gone as well
        ({A: 10 * GIB}, 2 * GIB, 10 * GIB),  # somebody else has come
        ({}, 7 * GIB, 7 * GIB),  # in a container, process ids are not the driver's
        ({}, 0, None),
        ({B: GIB}, 7 * GIB, None),
    ],
)
def test_what_a_restore_will_need(held: dict[str, int], freed: int, expected: int | None) -> None:
    assert moved(held, {A: 0}, {A: freed}).get(A) == expected


@pytest.mark.parametrize("others", [30 * GIB, -4 * GIB], ids=["another one has gone", "another one has grown"])
def test_in_a_container_what_is_claimed_counts_whatever_others_do_meanwhile(others: int) -> None:
    it = tier(nbytes=5 * GIB)
    it.memory.knows_pids, it.memory.others[A] = False, 40 * GIB
    it.driver.during_checkpoint = lambda: it.memory.others.update({A: 40 * GIB - others})
    out = it.checkpointer.suspend(PID, 5.0, claimed={A: 6 * GIB})
    assert out.moved == {A: 6 * GIB}
    it.memory.others[A] = 75 * GIB
    short = it.checkpointer.resume(PID, out.moved)
    assert (short.done, short.problem) == (False, "room")
    assert "restore" not in it.driver.made()
    it.memory.others[A] = 74 * GIB
    assert it.checkpointer.resume(PID, out.moved).done


def test_what_is_claimed_counts_for_the_host_too() -> None:
    it = tier()
    it.memory.knows_pids = False
    out = it.checkpointer.suspend(PID, 5.0, 40 * GIB, {A: 41 * GIB})
    assert (out.done, out.problem) == (False, "memory")


def test_no_claim_is_larger_than_an_empty_gpu() -> None:
    it = tier(nbytes=80 * GIB)
    it.memory.knows_pids = False
    out = it.checkpointer.suspend(PID, 5.0, claimed={A: 81 * GIB})
    assert it.checkpointer.resume(PID, out.moved).done


def test_in_a_container_what_becomes_free_is_what_it_held() -> None:
    it = tier()
    it.memory.knows_pids = False
    assert it.suspend().moved == {A: 40 * GIB}
