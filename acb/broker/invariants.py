"""What holds after every event of the broker's core:

- a GPU never has more units running than slots, and a unit runs on all its GPUs or on none;
- what holders may use (their headroom) and what others still have there (their resident bytes) fit its capacity;
- nobody runs while an evacuation that its room needs is under way (follows from the one above, since memory counts as
  resident until its evacuation is acknowledged); who has the lease earlier, to bring its memory back piece by piece,
  waits for an evacuation that is under way;
- every request is granted, refused, or its client is gone, but for those that are bound to a GPU that is not lent, or
  of whose memory, or of a gang's fellow's, the driver does not say where it is: a unit with a waiting member is in the
  line of each of its GPUs, and whenever somebody waits, something is under way that will let him in (a revoked holder,
  an evacuation, somebody before him) or a client that cannot be moved keeps the room;
- a GPU with a free slot stands idle for nobody's sake but of one that cannot be let in yet;
- the answers to MoreRoom are never forgotten;
- a client goes to another GPU only while all that it has is on the host, and only to one of the same kind and size; and
  nobody who could do so waits for a GPU that is taken while such a one is idle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from acb.broker import migration

if TYPE_CHECKING:
    from acb.broker.core import Broker
    from acb.broker.state import Client, Gpu, Unit


class InvariantError(AssertionError):
    """The state machine broke one of its own rules; carries the last transitions."""


def check(broker: Broker) -> None:
    """Raise InvariantError when a rule is broken."""
    try:
        for gpu in broker.gpus:
            _gpu(gpu, broker)
        for client in broker.clients.values():
            _client(client, broker)
            if client.promised and not broker.recovering:
                assert any(_moves(gpu, client) for gpu in client.gpus), (
                    f"nothing comes that client {client.id} waits for"
                )
            if client.waiting and not (client.stranded or client.unit.unclear) and not broker.recovering:
                assert _progress(client, broker), f"client {client.id} waits for nothing"
    except AssertionError as error:
        raise InvariantError(f"{error}\n" + "\n".join(broker.log)) from None


def _gpu(gpu: Gpu, broker: Broker) -> None:
    clients = [client for client in broker.clients.values() if gpu in client.gpus]
    assert gpu.bound == {c.id for c in clients}, "a client is bound elsewhere than it is counted"
    assert gpu.holders == {c.id for c in clients if c.lease}, "holders and leases differ"
    assert len(gpu.units) <= gpu.slots, "more units than slots"
    assert all(c.unit in gpu.units for c in clients if c.lease), "a lease without a slot"
    sums = tuple(sum(column) for column in zip(*(c.books() for c in clients), strict=True)) or (0, 0, 0)
    assert (gpu.in_use, gpu.left_behind, gpu.unmovable) == sums, "the books of memory are wrong"
    assert gpu.in_use <= gpu.capacity, "memory is promised twice"
    assert set(gpu.occupants) == {c.id for c in clients if c.claim}, "the list of occupants is wrong"
    assert abs(gpu.load - sum(unit.load for unit in {c.unit for c in broker.clients.values()} if gpu in unit.gpus)) < (
        1e-6
    ), "the books of load are wrong"
    assert broker.recovering or not broker.scheduler.passed_over(gpu), "idle, and a suspended client waits elsewhere"
    for unit in gpu.units:
        assert unit.active, "a unit that does not run has a slot"
        assert unit.leased(), "nobody of a running unit holds a lease"
        assert all(unit in other.units for other in unit.gpus), "a unit runs on a part of its GPUs"
    if gpu.full and gpu.next() is not None and not broker.recovering:
        assert any(unit.preempt_at is not None for unit in gpu.units), "somebody waits, and no holder knows"
    elif gpu.next() is None:
        assert all(unit.preempt_at is None or unit.backfilled or unit.size > 1 for unit in gpu.units), "revoked in vain"


def _client(client: Client, broker: Broker) -> None:
    assert not (client.lease and client.evacuating), "a holder is evacuated"
    assert not (client.lease and client.waiting), "waits for what it holds"
    assert not client.suspended or not client.resident, "memory that the driver has moved is counted on the GPU"
    assert not (client.suspended and client.lease) or client.resuming, "a suspended client runs"
    assert (client.id in broker.suspended_clients) == (client.suspended and not client.refusal), "lost in the driver"
    if client.origin is not None:
        assert client.suspended, "comes from elsewhere, and its memory is not with the driver"
        assert migration.alike(client.origin, client.gpus[0]), "the driver cannot bring it there"
        assert client.origin is not client.gpus[0], "comes from where it is"
        assert not client.chosen or client.stays, "is taken from the GPU that its user has chosen"
    assert not client.absent or not client.evacuating or client.suspending, "is asked, and cannot hear"
    assert not client.in_pieces or client.evacuating, "is done, and still evacuates"
    assert not client.promised or client.lease, "was promised room without a lease"
    assert not client.promised or client.promised > client.headroom, "was promised what it has"
    assert not client.room_wanted or client.lease, "wants room without a lease"
    out = client.stranded or client.unit.unclear
    assert not client.waiting or out or client.unit.queued or client.unit.active, "waits in no line"
    assert not (client.unit.unclear and client.unit.queued), "cannot be let in, and stands in line"
    assert not client.unclear or client.suspending or broker.in_doubt(client.id), "nobody asks about it"
    assert not (client.stranded and client.gpus), "is bound to two places"
    assert not (client.unit.queued and client.unit.active), "waits in line and runs"
    assert client.booked == client.books(), "the client's memory is not booked"
    if client.unit.queued:
        assert client.unit.wanting(), "stands in line and does not want anything"
        for gpu in client.unit.gpus:
            assert any(unit is client.unit for line in (gpu.line, gpu.newcomers) for unit in line), "lost in line"


def _progress(client: Client, broker: Broker) -> bool:
    """Whether something is under way, or somebody stands in the way, that explains why the client waits."""
    unit = client.unit
    if any(member.evacuating for member in unit.wanting()):
        return True
    if unit.active:
        return broker.scheduler.paused(client) or any(_moves(gpu, client) for gpu in client.gpus)
    return any(gpu.full or gpu.next() is not unit or _kept_out(gpu, unit) for gpu in unit.gpus)


def _moves(gpu: Gpu, client: Client) -> bool:
    return any(other.leaving for other in gpu.occupants.values() if other is not client)


def _kept_out(gpu: Gpu, unit: Unit) -> bool:
    others = [other for other in gpu.occupants.values() if other.unit is not unit]
    return any(o.evacuating or o.stuck or (o.emptied and o.resident) or o.unit.preempt_at is not None for o in others)
