"""A simulated client: a job's phases, and an agent that says what a real one would, when it would.

As acb/client/agent.py has it, a lease is kept until it is revoked, and then given back

- at once in a pause that the program marks, such as the wait for a child process;
- after the linger in any other pause: acb.client.phases.choose_linger over the last 64 pauses;
- after the quantum at the next safe point, which is the end of a region; the rest of the phase follows under the next
  lease. A region that was begun is finished, and each lease does at least one.

An agent is deaf while it moves a piece of memory: what comes meanwhile is heeded, and its time counts, from then on.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from typing import TYPE_CHECKING

from acb.client.gate import MIN_GAP
from acb.client.phases import SwapCost, choose_linger
from acb.protocol import (
    VERSION,
    Evacuate,
    Evacuated,
    Grant,
    Headroom,
    Hello,
    Message,
    MoreRoom,
    Refused,
    Request,
    Restored,
    Revoke,
    Room,
    Uncontended,
    Welcome,
    Yield,
)
from benchmarks.simulation.machine import Card, SimulationError
from benchmarks.simulation.mixes import CPU, GPU, Job

if TYPE_CHECKING:
    from benchmarks.simulation.node import Node

EPSILON = 1e-9
"""Seconds: less than any region; times are sums of floats."""


class Client:
    """A job with its agent."""

    __slots__ = (
        "card", "claim", "coming", "computed", "copying_in", "deferred", "done", "evacuated", "gaps", "id", "index",
        "job", "last_exit", "lease", "left", "moved_in", "node", "patience", "piece", "plan", "preempt_at", "requested",
        "resident", "restoring", "revoked", "run_since", "running", "swap", "swap_told", "waits_since",
    )  # fmt: skip

    def __init__(self, node: Node, number: int, job: Job) -> None:
        self.node, self.id, self.job = node, number, job
        self.card: Card | None = None
        self.lease = self.requested = self.revoked = self.running = self.restoring = self.left = False
        self.deferred: Revoke | None = None
        self.index = -1  # of the phase
        self.done = 0.0  # seconds of the GPU phase that were done under earlier leases
        self.run_since = self.last_exit = self.preempt_at = self.waits_since = 0.0
        self.computed = 0.0  # seconds of GPU work in all
        self.claim = self.resident = self.evacuated = 0
        self.coming = False  # more headroom is to come before it runs
        self.copying_in = 0  # bytes
        self.moved_in = (0, 0.0)  # bytes, seconds, under this lease
        self.piece = 0
        self.gaps: deque[float] = deque(maxlen=64)
        self.swap = SwapCost()
        self.swap_told = -1.0
        self.plan = self.patience = 0  # an event of an older plan is void

    # --- the program ------------------------------------------------------------------------------------------------

    def arrive(self, _: int) -> None:
        """The process starts."""
        job = self.job
        self.node.say(
            self, Hello(VERSION, self.id, job.kind, memory_hint=job.hint, priority=job.priority, weight=job.weight)
        )
        self.last_exit = self.node.now
        self._next()

    def _next(self) -> None:
        """Begin the next phase."""
        node, phases = self.node, self.job.phases
        self.index += 1
        self.done = 0.0
        if self.index == len(phases):
            node.leave(self)
            return
        phase = phases[self.index]
        if phase.kind == GPU:
            self._enter()
            return
        self.plan += 1
        end = node.core(phase.seconds) if phase.kind == CPU else node.now + phase.seconds
        node.at(end, self._pause_over, self.plan)
        self._consider()

    def _pause_over(self, plan: int) -> None:
        if plan == self.plan:
            self._next()

    def _enter(self) -> None:
        """The GPU phase's first region comes to the gate."""
        now = self.node.now
        if not self.lease:
            self._ask()
        elif self.revoked and now >= self.preempt_at - EPSILON:
            self._give_up(wants=True)
        else:
            if now - self.last_exit > MIN_GAP:
                self.gaps.append(now - self.last_exit)
            self._run()

    def _ask(self) -> None:
        if self.card is not None and self.node.now - self.last_exit > MIN_GAP:
            self.gaps.append(self.node.now - self.last_exit)
        self._wait()
        self.node.say(self, Request())

    def _wait(self) -> None:
        self.requested, self.waits_since = True, self.node.now
        self.node.waits(self, 1)

    def _run(self) -> None:
        """Regions follow one another from now on."""
        node, card = self.node, self.card
        assert card is not None
        node.settle(card)
        card.computing += 1
        self.running, self.run_since = True, node.now
        self.plan += 1
        node.at(node.now + self.job.phases[self.index].seconds - self.done, self._phase_over, self.plan)
        self._consider()

    def _phase_over(self, plan: int) -> None:
        if plan == self.plan:
            self._stop(self.job.phases[self.index].seconds)
            self._next()

    def _stop(self, done: float) -> None:
        """The regions end here; `done` seconds of the phase are behind it."""
        node, card = self.node, self.card
        assert card is not None
        node.settle(card)
        card.computing -= 1
        self.running = False
        self.plan += 1
        self.computed += done - self.done
        node.computed += done - self.done
        self.done, self.last_exit = done, node.now

    # --- the agent --------------------------------------------------------------------------------------------------

    def take(self, message: Message) -> None:
        """Deal with one instruction of the broker's."""
        if isinstance(message, Grant):
            self._granted(message)
        elif isinstance(message, Revoke):
            self._revoke(message)
        elif isinstance(message, Evacuate):
            self._evacuate(message.piece)
        elif isinstance(message, Headroom):
            self._more_has_come(message)
        elif isinstance(message, Uncontended):
            self.revoked, self.deferred = False, None
            self.patience += 1
        elif isinstance(message, Room):
            if message.granted:
                self._claim(self.job.memory)
                self._restore()
            else:
                self._fail()
        elif isinstance(message, Refused):
            self._fail()
        elif not isinstance(message, Welcome):
            raise SimulationError(f"a client was sent {message}")

    def _granted(self, grant: Grant) -> None:
        node = self.node
        if self.lease or not self.requested:
            raise SimulationError(f"client {self.id} was granted what it did not ask for")
        node.waits(self, -1)
        card = node.cards[grant.gpu]
        if self.card not in (None, card):
            raise SimulationError(f"client {self.id} was granted GPU {card.ordinal}, but is bound to another")
        node.settle(card)
        self.card, self.lease, self.requested, self.revoked = card, True, False, False
        card.waiting += 1  # it still does until all its memory is back
        card.holders += 1
        if card.holders > card.slots:
            raise SimulationError(f"GPU {card.ordinal} has {card.holders} holders")
        node.outcome.leases += 1
        self.coming, self.moved_in = grant.coming > 0, (0, 0.0)
        self._claim(min(self.job.memory, grant.headroom))
        if self.coming:
            self._restore()
        elif self.claim < self.job.memory:
            self.restoring = True
            node.say(self, MoreRoom(self.resident, self.job.memory - self.resident))
        else:
            self._restore()

    def _claim(self, nbytes: int) -> None:
        """So much of the GPU may be in use by this client from now on."""
        assert self.card is not None
        self.card.occupy(nbytes - self.claim)
        self.claim = nbytes

    def _restore(self) -> None:
        """Bring back what was evacuated, as far as there is room; with the last of it let the program in."""
        node, card = self.node, self.card
        assert card is not None
        self.restoring = True
        if self.copying_in:
            return
        if not self.evacuated and not self.coming:
            if self.moved_in[0]:
                node.say(self, Restored(self.resident, *self.moved_in))
            self._restored()
            return
        nbytes = min(self.evacuated, self.claim - self.resident)
        if nbytes <= 0:
            return  # there is more with each Headroom
        node.settle(card)
        card.copying += 1
        self.copying_in = nbytes
        end = card.copy("in", nbytes, node.now)
        node.at(end, self._copied_in, end - node.now)

    def _copied_in(self, seconds: float) -> None:
        node, card, moved = self.node, self.card, self.copying_in
        assert card is not None
        node.settle(card)
        card.copying -= 1
        if self.left:
            return
        node.copied(moved, last=moved == self.evacuated)
        self.swap.moved(seconds)
        self.resident, self.evacuated, self.copying_in = self.resident + moved, self.evacuated - moved, 0
        self.moved_in = (self.moved_in[0] + moved, self.moved_in[1] + seconds)
        self._restore()

    def _more_has_come(self, message: Headroom) -> None:
        self.coming = message.coming > 0
        self._claim(max(self.claim, min(self.job.memory, message.headroom)))
        if not self.coming and self.claim < self.job.memory:
            self.node.say(self, MoreRoom(self.resident, self.job.memory - self.resident))
        else:
            self._restore()

    def _restored(self) -> None:
        node, card = self.node, self.card
        assert card is not None
        self.restoring = False
        node.settle(card)
        card.waiting -= 1
        node.outcome.waits.setdefault(self.job.kind, array("d")).append(node.now - self.waits_since)
        self.last_exit = node.now  # waiting for the lease is no gap of the program's
        if self.deferred is not None:
            message, self.deferred = self.deferred, None
            self._revoke(message)
        self._run()

    def _revoke(self, message: Revoke) -> None:
        if not self.lease:
            return  # it crossed the Yield
        if self.restoring:
            self.deferred = message
            return
        self.revoked, self.preempt_at, self.swap_told = True, self.node.now + message.quantum, message.swap
        self._consider()

    def _consider(self) -> None:
        """Plan when the lease goes back, if it is revoked; each new plan voids the one before."""
        self.patience += 1
        if not (self.lease and self.revoked) or self.restoring:
            return
        now, phases = self.node.now, self.job.phases
        if self.running:
            phase, region = phases[self.index], self.job.region
            since = self.done + max(now, self.preempt_at) - self.run_since
            safe = region * max(math.floor(self.done / region + EPSILON) + 1, math.ceil(since / region - EPSILON))
            if safe < phase.seconds - EPSILON:
                self.node.at(self.run_since + safe - self.done, self._preempt, self.patience)
            return
        if self.index >= len(phases) or phases[self.index].kind == GPU:
            return  # between two phases: the gate will tell
        if phases[self.index].marked:
            self._give_up(wants=False)
            return
        estimate = self.swap_told if self.swap_told >= 0 else self.swap.estimate(self.job.kept)
        end = min(self.last_exit + choose_linger(self.gaps, estimate), max(now, self.preempt_at))
        if end <= now:
            self._give_up(wants=False)
        else:
            self.node.at(end, self._patience_over, self.patience)

    def _patience_over(self, patience: int) -> None:
        if patience == self.patience:
            self._give_up(wants=False)

    def _preempt(self, patience: int) -> None:
        if patience == self.patience:
            # To the multiple of the region, or errors would add up.
            region = self.job.region
            self._stop(region * round((self.done + self.node.now - self.run_since) / region))
            self._give_up(wants=True)

    def _give_up(self, wants: bool) -> None:
        node, card = self.node, self.card
        assert card is not None
        self.patience += 1
        node.settle(card)
        card.holders -= 1
        self.lease = self.revoked = False
        self.resident = self.job.kept
        self._claim(self.resident)
        self.swap.yielded()
        if wants:
            self._wait()
        phase = self.last_exit - self.run_since
        node.say(self, Yield(self.resident, self.job.memory, wants, "preempted" if wants else "idle", phase))

    def _evacuate(self, piece: int) -> None:
        if self.lease or self.card is None:
            raise SimulationError(f"client {self.id} was to be evacuated while it held the lease, or no GPU at all")
        self.piece = piece or self.resident
        self._copy_out()

    def _copy_out(self) -> None:
        node, card = self.node, self.card
        assert card is not None
        node.settle(card)
        card.copying += 1
        end = card.copy("out", min(self.piece, self.resident), node.now)
        node.at(end, self._copied_out, end - node.now)

    def _copied_out(self, seconds: float) -> None:
        node, card = self.node, self.card
        assert card is not None
        node.settle(card)
        card.copying -= 1
        if self.left:
            return
        moved = min(self.piece, self.resident)
        self.resident -= moved
        self.evacuated += moved
        self._claim(self.resident)
        node.copied(moved, last=not self.resident)
        self.swap.moved(seconds)
        node.say(self, Evacuated(self.resident, moved, seconds, more=self.resident > 0))
        if self.resident:
            self._copy_out()

    def _fail(self) -> None:
        """What it asked for cannot be had: the program sees its framework's own out-of-memory error, and ends."""
        self.node.outcome.failed += 1
        self.node.leave(self)
