"""The broker's core in single scenes: who is granted what, who makes way, and who is refused."""

from __future__ import annotations

import pytest

from acb.broker.core import Broker, Gpu
from acb.broker.policies import POLICIES
from acb.protocol import (
    VERSION,
    Evacuate,
    Evacuated,
    Grant,
    Headroom,
    Hello,
    Holds,
    MoreRoom,
    Refused,
    Request,
    Restored,
    Revoke,
    Room,
    Uncontended,
    Yield,
)  # fmt: skip

CAPACITY = 1000


def _broker(count: int, hint: int = 0, slots: int = 1) -> Broker:
    broker = Broker([Gpu(0, CAPACITY, "GPU-x", slots)], POLICIES["fifo"](None))
    for client in range(1, count + 1):
        broker.handle(client, Hello(VERSION, 100 + client, f"p{client}", memory_hint=hint), 0.0)
    return broker


def test_an_uncontended_lease_is_granted_at_once_with_the_whole_gpu() -> None:
    broker = _broker(1)
    assert broker.handle(1, Request(), 1.0) == [(1, Grant(0, "GPU-x", CAPACITY))]


def test_the_holder_is_revoked_once_and_the_waiting_one_granted_after_the_evacuation() -> None:
    broker = _broker(2)
    broker.handle(1, Request(), 0.0)
    [(who, revoke)] = broker.handle(2, Request(), 0.25)
    assert who == 1
    assert isinstance(revoke, Revoke)
    assert revoke.quantum == 1.0  # alone, it could not know that its time would count
    assert broker.handle(1, Yield(600, 700), 2.0) == [(1, Evacuate())]
    assert broker.handle(1, Evacuated(0, 600, 0.1), 2.1) == [(2, Grant(0, "GPU-x", CAPACITY))]


def test_memory_that_fits_beside_stays_resident() -> None:
    broker = _broker(2, hint=400)
    broker.handle(1, Request(), 0.0)
    broker.handle(2, Request(), 0.0)
    assert broker.handle(1, Yield(400, 400), 1.0) == [(2, Grant(0, "GPU-x", 400, beside=400))]
    assert broker.clients[1].state == "resident"


def test_a_peak_is_believed_only_when_it_has_settled() -> None:
    broker = _broker(1)
    headrooms = []
    for peak in (100, 300, 300, 200, 300, 300):
        [(_, grant)] = broker.handle(1, Request(), 0.0)
        assert isinstance(grant, Grant)
        headrooms.append(grant.headroom)
        broker.handle(1, Yield(50, peak), 0.0)
    assert headrooms == [CAPACITY, CAPACITY, CAPACITY, CAPACITY, CAPACITY, 330]


def test_a_peak_that_was_exceeded_is_believed_later_each_time() -> None:
    broker = _broker(1)

    def leases_until_believed(peak: int) -> int:
        for count in range(100):
            [(_, grant)] = broker.handle(1, Request(), 0.0)
            assert isinstance(grant, Grant)
            if count and grant.headroom < CAPACITY:
                broker.handle(1, Yield(50, peak), 0.0)
                return count
            broker.handle(1, Holds(50, peak), 0.0)  # heard of before the lease is over
            broker.handle(1, Yield(50, peak), 0.0)
        pytest.fail("never")

    assert [leases_until_believed(peak) for peak in (100, 200, 300, 400)] == [4, 7, 13, 25]


def test_a_request_that_no_gpu_can_hold_is_refused_with_the_sizes() -> None:
    broker = _broker(1, hint=CAPACITY + 1)
    [(_, refused)] = broker.handle(1, Request(), 0.0)
    assert isinstance(refused, Refused)
    assert "1001" in refused.reason
    assert "1000" in refused.reason


def test_the_revoke_is_withdrawn_when_the_waiting_one_dies() -> None:
    broker = _broker(2)
    broker.handle(1, Request(), 0.0)
    broker.handle(2, Request(), 0.0)
    assert broker.gone(2, 0.1) == [(1, Uncontended())]


def test_more_room_evicts_the_others_and_is_refused_when_it_cannot_be_had() -> None:
    broker = _broker(2, hint=400)
    broker.handle(1, Request(), 0.0)
    broker.handle(1, Yield(400, 400), 0.0)
    broker.handle(2, Request(), 0.0)
    assert broker.handle(2, MoreRoom(400, 300), 0.1) == [(1, Evacuate())]
    assert broker.handle(1, Evacuated(0, 400, 0.1), 0.2) == [(2, Room(True))]
    [(_, room)] = broker.handle(2, MoreRoom(400, 700), 0.3)
    assert isinstance(room, Room)
    assert not room.granted
    assert "1.1KiB" in room.reason


def test_who_runs_short_of_what_was_promised_is_believed_and_others_make_way() -> None:
    """The books show no contexts: by them there is room, and there is none."""
    broker = _broker(3, hint=300)
    for client in (1, 2):
        broker.handle(client, Request(), 0.0)
        broker.handle(client, Yield(300, 300), 0.0)
    broker.handle(3, Request(), 0.0)
    assert broker.handle(3, MoreRoom(300, 50), 0.1) == [(3, Room(True))]
    assert broker.handle(3, MoreRoom(300, 50), 0.2) == [(1, Evacuate())]  # one of them is enough
    assert broker.handle(1, Evacuated(0, 300, 0.1), 0.3) == [(3, Room(True))]
    assert broker.handle(3, MoreRoom(300, 50), 0.4) == [(2, Evacuate())]
    assert broker.handle(2, Evacuated(300, 0, 0.1, "no host memory"), 0.5) == [(3, Room(True))]
    assert broker.handle(3, MoreRoom(300, 50), 0.6) == [(3, Room(True))]  # nobody is left: it shall see for itself
    broker.check()


def test_a_client_that_cannot_be_moved_may_overtake_the_one_it_keeps_out() -> None:
    broker = _broker(2)
    broker.handle(1, Request(), 0.0)
    broker.handle(2, Request(), 0.0)
    broker.handle(1, Yield(600, 600, wants=True), 1.0)
    granted, revoked = broker.handle(1, Evacuated(600, 0, 0.0, "captured CUDA graphs"), 1.1)
    assert granted == (1, Grant(0, "GPU-x", CAPACITY))
    assert revoked.client == 1
    assert isinstance(revoked.message, Revoke)
    assert revoked.message.quantum == 1.0
    assert broker.gone(1, 9.0) == [(2, Grant(0, "GPU-x", CAPACITY))]


def test_a_client_that_cannot_be_moved_keeps_nobody_out_of_most_of_the_gpu() -> None:
    broker = _broker(2)
    broker.handle(1, Request(), 0.0)
    broker.handle(1, Yield(100, 100), 1.0)
    assert broker.handle(2, Request(), 2.0) == [(1, Evacuate())]
    refusal = Evacuated(100, 0, 0.0, "captured CUDA graphs")
    assert broker.handle(1, refusal, 2.1) == [(2, Grant(0, "GPU-x", CAPACITY - 100))]


def test_a_new_broker_grants_nothing_before_the_old_ones_clients_have_spoken() -> None:
    broker = Broker([Gpu(0, CAPACITY)], POLICIES["fifo"](None))
    broker.recover({201, 202})
    broker.handle(5, Hello(VERSION, 300, "new"), 0.0)
    assert broker.handle(5, Request(), 0.0) == []
    broker.handle(6, Hello(VERSION, 201, "old", gpu=0, holding=True, resident=500, peak=500), 0.1)
    [(who, revoke)] = broker.recovered({202}, 5.0)
    assert who == 6
    assert isinstance(revoke, Revoke)


def test_another_version_is_refused_with_both_versions() -> None:
    [(_, refused)] = Broker([], POLICIES["fifo"](None)).handle(1, Hello(VERSION + 1, 42, "x"), 0.0)
    assert isinstance(refused, Refused)
    assert f"version {VERSION + 1}" in refused.reason
    assert f"version {VERSION}" in refused.reason


# --- room that changes hands in pieces -------------------------------------------------------------------------------


def _two_that_fill_the_gpu(slots: int = 1) -> Broker:
    """Client 1 holds the lease; client 2's 900 bytes are in host memory, and it waits."""
    broker = _broker(2, slots=slots)
    broker.handle(2, Request(), 0.0)
    broker.handle(2, Yield(900, 900), 0.5)
    broker.handle(1, Request(), 1.0)
    broker.handle(2, Evacuated(0, 900, 0.1), 1.1)
    broker.handle(2, Request(), 2.0)
    return broker


def test_memory_comes_in_behind_what_leaves_and_the_program_runs_when_all_is_there() -> None:
    broker = _two_that_fill_the_gpu()
    [(who, evacuate)] = broker.handle(1, Yield(900, 900), 9.0)
    assert who == 1
    assert isinstance(evacuate, Evacuate)
    assert evacuate.piece > 0
    assert broker.handle(1, Evacuated(600, 300, 0.1, more=True), 9.1) == [(2, Grant(0, "GPU-x", 400, "", 600))]
    assert broker.clients[2].state == "restoring"
    assert broker.clients[1].state == "evacuating"
    assert broker.handle(1, Evacuated(200, 400, 0.1, more=True), 9.2) == [(2, Headroom(800, 200))]
    assert broker.handle(1, Evacuated(30, 170, 0.1), 9.3) == [(2, Headroom(970))], "a context stays"
    assert (broker.clients[1].evacuated, broker.clients[1].resident) == (870, 30)
    assert broker.handle(2, Restored(900, 900, 0.2), 9.4) == []
    broker.check()


def test_it_gets_what_there_is_when_the_rest_does_not_come() -> None:
    broker = _two_that_fill_the_gpu()
    broker.handle(1, Yield(900, 900), 9.0)
    broker.handle(1, Evacuated(600, 300, 0.1, more=True), 9.1)
    assert broker.handle(1, Evacuated(600, 0, 0.0, "no host memory"), 9.2) == [(2, Headroom(400))]
    [(_, room)] = broker.handle(2, MoreRoom(300, 600), 9.3)
    assert isinstance(room, Room)
    assert not room.granted
    assert broker.gone(1, 9.4) == []
    assert broker.handle(2, MoreRoom(300, 600), 9.5) == [(2, Room(True))]


def test_one_that_dies_while_it_leaves_leaves_all_its_room() -> None:
    broker = _two_that_fill_the_gpu()
    broker.handle(1, Yield(900, 900), 9.0)
    broker.handle(1, Evacuated(600, 300, 0.1, more=True), 9.1)
    assert broker.gone(1, 9.2) == [(2, Headroom(CAPACITY))]


def test_one_that_dies_while_it_comes_in_leaves_the_gpu_to_the_next() -> None:
    broker = _two_that_fill_the_gpu()
    broker.handle(1, Yield(900, 900, wants=True), 9.0)
    broker.handle(1, Evacuated(600, 300, 0.1, more=True), 9.1)
    assert broker.gone(2, 9.2) == []
    assert broker.handle(1, Evacuated(0, 600, 0.1), 9.3) == [(1, Grant(0, "GPU-x", CAPACITY))]


def test_nobody_comes_in_early_without_memory_to_bring_back_or_beside_other_holders() -> None:
    broker = _broker(2)
    broker.handle(1, Request(), 0.0)
    broker.handle(2, Request(), 0.0)
    assert broker.handle(1, Yield(900, 900), 1.0) == [(1, Evacuate())]
    assert broker.handle(1, Evacuated(600, 300, 0.1, more=True), 1.1) == []
    broker = _two_that_fill_the_gpu(slots=2)
    assert broker.handle(1, Yield(900, 900), 9.0) == [(1, Evacuate())]
    assert broker.handle(1, Evacuated(600, 300, 0.1, more=True), 9.1) == []


def test_what_came_back_before_a_preemption_is_not_counted_twice() -> None:
    broker = _two_that_fill_the_gpu()
    broker.handle(1, Yield(900, 900, wants=True), 9.0)
    broker.handle(1, Evacuated(600, 300, 0.1, more=True), 9.1)
    broker.handle(1, Evacuated(0, 600, 0.1), 9.2)
    broker.handle(2, Yield(300, 900, wants=True), 12.0)
    client = broker.clients[2]
    assert (client.resident, client.evacuated) == (300, 600)


# --- nobody waits for ever -------------------------------------------------------------------------------------------


def test_what_keeps_a_unit_of_several_gpus_out_may_be_on_any_of_them() -> None:
    broker = Broker([Gpu(0, CAPACITY, "0"), Gpu(1, CAPACITY, "1")], POLICIES["fifo"](None))
    broker.handle(1, Hello(VERSION, 101, "both", count=2), 0.0)
    broker.handle(2, Hello(VERSION, 102, "stays", gpu=1, resident=700, peak=700), 0.0)
    broker.handle(3, Hello(VERSION, 103, "goes", gpu=0, resident=200, peak=200), 0.0)
    broker.handle(1, Request(), 1.0)
    broker.handle(2, Evacuated(700, 0, 0.0, "captured CUDA graphs"), 1.1)
    assert broker.handle(2, Request(), 1.2) == []
    granted, revoked = broker.handle(3, Evacuated(0, 200, 0.1), 1.3)
    assert granted == (2, Grant(1, "1", CAPACITY))
    assert isinstance(revoked.message, Revoke)


def test_a_lease_has_room_for_what_must_come_back_and_others_go_first_while_there_is_none() -> None:
    """Client 2 has 900 in host memory, and the 150 of client 1 cannot be moved."""
    broker = _broker(3)
    broker.handle(2, Request(), 0.0)
    broker.handle(2, Yield(900, 900), 0.5)
    broker.handle(1, Request(), 1.0)
    broker.handle(2, Evacuated(0, 900, 0.1), 1.1)
    broker.handle(1, Yield(150, 150), 2.0)
    assert broker.handle(2, Request(), 3.0) == [(1, Evacuate(64 << 20))]
    assert broker.handle(1, Evacuated(150, 0, 0.0, "captured CUDA graphs"), 3.1) == []
    assert broker.clients[2].state == "waiting"
    granted, revoked = broker.handle(3, Request(), 4.0)
    assert granted == (3, Grant(0, "GPU-x", 850))
    assert isinstance(revoked.message, Revoke), "it is still not its turn"
    broker.gone(3, 5.0)
    assert broker.gone(1, 6.0) == [(2, Grant(0, "GPU-x", CAPACITY))]


def test_who_could_not_be_moved_is_asked_again_at_ever_longer_intervals() -> None:
    broker = _two_that_fill_the_gpu()
    broker.handle(1, Yield(900, 900), 9.0)
    now, asked = 9.1, []
    for _ in range(6):
        assert broker.handle(1, Evacuated(900, 0, 0.0, "no host memory"), now) == []
        assert broker.wake_at is not None
        asked.append(round(broker.wake_at - now))
        now = broker.wake_at
        [(who, evacuate)] = broker.tick(now)
        assert (who, type(evacuate)) == (1, Evacuate)
    assert asked == [5, 10, 20, 40, 60, 60]
    assert broker.handle(1, Evacuated(0, 900, 0.1), now) == [(2, Grant(0, "GPU-x", CAPACITY))]


def test_a_holder_that_speaks_first_after_a_brokers_death_leaves_room_for_what_others_have() -> None:
    broker = Broker([Gpu(0, CAPACITY)], POLICIES["fifo"](None))
    broker.recover({201, 202})
    broker.handle(1, Hello(VERSION, 201, "holds", gpu=0, holding=True, resident=300, peak=350), 0.0)
    broker.handle(2, Hello(VERSION, 202, "stays", gpu=0, resident=600, peak=600), 0.1)
    assert broker.clients[2].resident == 600
    assert broker.clients[1].headroom == 400
    assert broker.handle(1, MoreRoom(300, 200), 1.0) == [(2, Evacuate())]
