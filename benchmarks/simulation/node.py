"""One node in virtual time: the real broker core and policy, with simulated clients, GPUs, copies and cores.

Idealised: messages take no time (a real hand-over takes some 0.15 ms), an evacuated client leaves nothing on the GPU (a
CUDA context stays, in life), and copies run at full bandwidth beside computing; each GPU has a link of its own, with
one queue, first come first served, in each direction. Cores of a node are taken by CPU phases first come first served,
one each and for the whole phase; pauses that only wait take none, and a GPU phase none either.

Checked all the time: that no GPU has more holders than slots, that what they may use and what others left there fit it,
and that every job does all its phases. With `check`, also the core's own invariants, after every event.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from acb.broker.core import Broker, Gpu
from acb.protocol import Message
from benchmarks.simulation.clients import Client
from benchmarks.simulation.machine import Card, Machine, Outcome, SimulationError
from benchmarks.simulation.mixes import Job

if TYPE_CHECKING:
    from acb.broker.core import Send
    from acb.broker.policies import Policy


class Node:
    """A broker with its clients. `run()` goes on until every job is done; `hook` is called with each that ends."""

    def __init__(self, machine: Machine, policy: Policy, jobs: Iterable[Job], check: bool = False) -> None:
        self.now = 0.0
        self.outcome = Outcome()
        self.computed = 0.0
        self.machine = machine
        self.broker = Broker([Gpu(i, machine.capacity, f"GPU-{i}", machine.slots) for i in range(machine.gpus)], policy)
        self.cards = [Card(i, machine, self.outcome.lost) for i in range(machine.gpus)]
        self.clients: dict[int, Client] = {}
        self.hook: Callable[[Client], None] = lambda client: None
        self.pause_at = math.inf
        self._check = check
        self._unbound = 0
        self._ids = itertools.count(1)
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._said: deque[tuple[Client, Message | None]] = deque()
        self._hearing = False
        self._ticks_at: float | None = None
        for job in jobs:
            self.start(job)
        limit = len(self.clients) if machine.cores is None else machine.cores
        self._free_at: list[float] | None = None if machine.cores is None else [0.0] * limit
        self.outcome.gpus, self.outcome.cores = machine.gpus, limit

    def start(self, job: Job) -> Client:
        """A process of this job comes at its arrival, or now if that is past."""
        client = Client(self, next(self._ids), job)
        self.clients[client.id] = client
        self.outcome.jobs += 1
        self.outcome.gpu_seconds += job.gpu_seconds
        self.outcome.cpu_seconds += job.cpu_seconds
        self.outcome.longest = max(self.outcome.longest, job.arrival + job.alone)
        self.at(max(self.now, job.arrival), client.arrive, 0)
        return client

    def run(self) -> Outcome:
        """Let time pass until every job is done, or `pause_at` has come."""
        events = self._events
        while self.clients:
            if not events:
                waiting = [client for client in self.clients.values() if client.requested]
                raise SimulationError(f"{len(waiting)} clients wait for ever:\n" + "\n".join(self.broker.log[-40:]))
            if events[0][0] > self.pause_at:
                self.now = self.pause_at
                return self.outcome
            self.now, _, call, argument = heapq.heappop(events)
            call(argument)
        self.outcome.makespan = self.now
        self.outcome.fullest = max(card.computed for card in self.cards)
        if not self.outcome.failed and abs(self.computed - self.outcome.gpu_seconds) > 1e-6 * self.computed:
            raise SimulationError(f"{self.computed} s of GPU work were done, not {self.outcome.gpu_seconds}")
        return self.outcome

    # --- for clients ------------------------------------------------------------------------------------------------

    def at(self, when: float, call: Callable[[Any], None], argument: Any) -> None:
        """Have `call(argument)` made at the virtual time `when`."""
        heapq.heappush(self._events, (when, next(self._order), call, argument))

    def core(self, seconds: float) -> float:
        """When a CPU phase that comes now has ended: on the core that is free first, after those that came before."""
        if self._free_at is None:
            return self.now + seconds
        end = max(self.now, self._free_at[0]) + seconds
        heapq.heapreplace(self._free_at, end)
        return end

    def say(self, client: Client, message: Message | None) -> None:
        """Send a message to the broker; None: the connection is closed. Whatever it causes has happened on return,
        unless this is itself part of that; then it comes after what the broker has already sent."""
        self._said.append((client, message))
        if not self._hearing:
            self._listen()

    def leave(self, client: Client) -> None:
        """The process ends."""
        client.left = True
        client.plan += 1
        client.patience += 1
        card = client.card
        if client.requested:
            self.waits(client, -1)
            client.requested = False
        if card is not None:
            self.settle(card)
            card.holders -= client.lease
            card.waiting -= client.restoring
            client.restoring = False
            client.lease = client.revoked = False
            client._claim(0)
            card.computed += client.computed
        self.say(client, None)

    def settle(self, card: Card) -> None:
        """Before anything changes on a GPU."""
        card.settle(self.now, self._unbound)

    def waits(self, client: Client, change: int) -> None:
        """A client more, or less, waits for a GPU."""
        if client.card is not None:
            self.settle(client.card)
            client.card.waiting += change
            return
        for card in self.cards:
            self.settle(card)
        self._unbound += change

    def copied(self, nbytes: int, *, last: bool) -> None:
        """A copy, out or in, has ended, or a piece of it that is not the last."""
        self.outcome.copies += last
        self.outcome.copied += nbytes

    # --- the broker -------------------------------------------------------------------------------------------------

    def _listen(self, sends: Sequence[Send] = ()) -> None:
        """Deliver these instructions; then the broker hears what was said, until nobody says anything any more."""
        self._hearing = True
        if sends:
            self._deliver(sends)
        while self._said:
            self._hear(*self._said.popleft())
        self._hearing = False
        self._set_timer()

    def _hear(self, client: Client, message: Message | None) -> None:
        if message is None:
            sends = self.broker.gone(client.id, self.now)
            self.clients.pop(client.id, None)
            self.hook(client)
        else:
            sends = self.broker.handle(client.id, message, self.now)
        self._deliver(sends)

    def _deliver(self, sends: Sequence[Send]) -> None:
        self.outcome.messages += len(sends) + 1
        if self._check:
            self.broker.check()
        for number, message in sends:
            client = self.clients.get(number)
            if client is not None and not client.left:
                client.take(message)

    def _set_timer(self) -> None:
        """Have the broker ticked when it wants to be."""
        due = self.broker.wake_at
        if due is not None and (self._ticks_at is None or due < self._ticks_at):
            self._ticks_at = max(due, self.now)
            self.at(self._ticks_at, self._tick, self._ticks_at)

    def _tick(self, due: float) -> None:
        if due != self._ticks_at:
            return  # another was set, for an earlier time
        self._ticks_at = None
        wanted = self.broker.wake_at
        if wanted is not None and wanted <= self.now:
            self._listen(self.broker.tick(self.now))
            wanted = self.broker.wake_at
            if wanted is not None and wanted <= self.now:
                raise SimulationError(f"the broker's timer stands still at {self.now}")
        else:
            self._set_timer()
