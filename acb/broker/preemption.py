"""Preemption: until when a unit that runs may go on, now that others wait for its GPUs.

It is told so (Revoke) when somebody needs its slot or its room, and told otherwise when there is no such one any more.
"""

from __future__ import annotations

from collections.abc import Callable

from acb.broker.policies import Policy
from acb.broker.policies.base import MAX_QUANTUM, swap_seconds
from acb.broker.room import Room
from acb.broker.state import Gpu, Unit
from acb.protocol import Message, Revoke, Uncontended


class Preemption:
    """See the module."""

    def __init__(self, policy: Policy, room: Room, send: Callable[[int, Message], None]) -> None:
        self._policy = policy
        self._room = room
        self._send = send

    def contend(self, unit: Unit, now: float) -> None:
        """Tell a running unit until when it may go on, now that others wait for its GPUs; or that none does."""
        gpus = unit.gpus
        if not unit.active or (
            len(gpus) == 1
            and unit.contender is not None
            and unit.contender is gpus[0].challenger
            and gpus[0].slots == 1
            and gpus[0].crowded
        ):
            return  # as it was
        ends = [
            (self._protected_until(unit, gpu, now), gpu)
            for gpu in gpus
            if gpu.challenger is not None and gpu.crowded and self._first_to_go(gpu, now) is unit
        ]
        if not ends:
            if unit.preempt_at is not None and not unit.backfilled:
                self._tell(unit, None, Uncontended())
            return
        end, gpu = min(ends, key=lambda pair: pair[0])
        unit.contender = None if unit.backfilled else gpu.challenger
        if unit.preempt_at is None or end < unit.preempt_at - 0.01 or end > unit.preempt_at + 1.0:
            swap = self._swap_for_leaving(unit, gpu)
            self._tell(unit, end, Revoke(max(0.0, end - now), swap))

    def _tell(self, unit: Unit, preempt_at: float | None, message: Message) -> None:
        unit.preempt_at = preempt_at
        if preempt_at is None:
            unit.contender = None
        for client in unit.leased():
            client.revoked = preempt_at is not None
            self._send(client.id, message)

    def _first_to_go(self, gpu: Gpu, now: float) -> Unit:
        if len(gpu.units) == 1:
            return gpu.units[0]
        return min(gpu.units, key=lambda unit: (self._protected_until(unit, gpu, now), unit.order))

    def _protected_until(self, unit: Unit, gpu: Gpu, now: float) -> float:
        """Until when the unit is not preempted for the first one that waits for the GPU."""
        waiting = gpu.challenger
        assert waiting is not None
        if unit.backfilled and unit.preempt_at is not None:
            return min(unit.preempt_at, now + self._delay_elsewhere(waiting, gpu, now))
        coming = [swap_seconds(client) for client in waiting.wanting() if client.evacuated]
        swap = 0.5 * (self._swap_for_leaving(unit, gpu) + max(coming, default=0.0))
        since = max(unit.granted_at, waiting.asked_at)  # alone, it could not know that its time would count
        end = since + self._policy.quantum(unit, waiting, swap)
        if self._policy.lets_finish(unit, waiting):
            # To stop a phase that is about to end costs a swap, and the program the time until it has the GPU again.
            for client in unit.leased():
                phase = client.profile.phase_seconds()
                if phase is not None:
                    end = max(end, since + min(MAX_QUANTUM, phase - client.phase_seconds))
        return max(end, now + self._policy.outranked_in(unit, waiting, now))

    def delay(self, unit: Unit, now: float) -> float:
        """Seconds, as far as can be told, until what the unit waits for is there."""
        longest = 0.0
        for gpu, _ in unit.places():
            if gpu.full:
                longest = max(longest, min(self._remaining(holder, gpu, now) for holder in gpu.units))
            for other in gpu.occupants.values():
                if other.leaving:
                    longest = max(longest, other.evacuation_at + 0.5 * swap_seconds(other) - now)
        return longest

    def _delay_elsewhere(self, unit: Unit, here: Gpu, now: float) -> float:
        """As delay(), without the holder of one of the GPUs."""
        holders, here.units = here.units, []
        try:
            return self.delay(unit, now)
        finally:
            here.units = holders

    def _remaining(self, holder: Unit, gpu: Gpu, now: float) -> float:
        """Seconds that a holder is expected to go on: its usual phase, at most until it is preempted."""
        end = holder.preempt_at
        if end is None:
            end = now if gpu.challenger is None else self._protected_until(holder, gpu, now)
        for client in holder.leased():
            phase = client.profile.phase_seconds()
            if phase is not None:
                end = min(end, client.started_at + phase)
        return max(0.0, end - now)

    def _swap_for_leaving(self, unit: Unit, gpu: Gpu) -> float:
        """Seconds of moving memory that the unit has to expect when it makes way for the one that is next."""
        waiting = gpu.challenger
        assert waiting is not None
        holder = next((client for place, client in unit.places() if place is gpu), None)
        client = next((client for place, client in waiting.places() if place is gpu), None)
        if holder is None or client is None:
            return 0.0
        stays = max(holder.resident, min(holder.peak, holder.headroom)) if holder.measured else holder.headroom
        free = gpu.capacity - gpu.in_use + holder.booked[0] - stays + client.booked[0]
        return 0.0 if self._room.want(client, gpu) <= free else swap_seconds(holder)
