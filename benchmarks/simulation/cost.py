"""What a decision of the broker's core costs, in real time, as its clients grow.

One broker of 8 GPUs; all clients are connected and ask for a GPU all the time. A *lease cycle* is Yield by a holder,
Grant to the next one, and Request by the one that yielded: two messages in. Two settings: *beside*, in which the memory
of all fits the GPUs, and *swap*, in which each needs a whole GPU, so that a cycle is Yield, Evacuate, Evacuated, Grant,
Restored and Request. Timed are the calls of Broker.handle() (and tick(), where a timer is due) alone.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from itertools import starmap
from typing import Any

from acb.broker.core import Broker, Gpu
from acb.broker.policies import POLICIES
from acb.protocol import VERSION, Evacuate, Evacuated, Grant, Hello, Message, Request, Restored, Yield
from benchmarks import report
from benchmarks.simulation.mixes import GiB

GPUS = 8
CAPACITY = 32 * GiB
SMALL = 4 << 20
"""Bytes: of 10,000 clients that are spread over the GPUs, all fit."""

SETTINGS = ("beside", "swap")
ROUNDS = 5
CYCLES = 400
"""Of a round. Before the first, not counted, each client has had its turn three times: then their memory is known."""
WARM_UP = 3

PATIENCE = 60.0
"""Real seconds for one measurement; one that takes longer counts as not reached."""


class Cycling:
    """A broker and its clients, which do nothing but take turns."""

    def __init__(self, clients: int, policy: str, setting: str) -> None:
        self.size = SMALL if setting == "beside" else CAPACITY
        self.broker = Broker([Gpu(i, CAPACITY, f"GPU-{i}", 1) for i in range(GPUS)], POLICIES[policy](None))
        self.now = 0.0
        self.spent = 0.0  # real seconds in the core
        self.decisions = 0
        self.holders: deque[int] = deque()
        self.evacuated: set[int] = set()
        self.deadline = time.perf_counter() + PATIENCE
        for client in range(1, clients + 1):
            # Of several priorities and weights, so that policies have something to sort.
            hello = Hello(VERSION, client, "cycling", self.size, priority=client % 3, weight=1.0 + client % 2)
            self.tell(client, hello)
            self.tell(client, Request())

    def cycle(self) -> None:
        """The holder of the oldest lease gives it back and asks for the next one."""
        client = self.holders.popleft()
        self.now += 0.01
        self.tell(client, Yield(self.size, self.size, False, "idle"))
        self.tell(client, Request())

    def tell(self, client: int, message: Message) -> None:
        """Have the core take in a message, and answer what it instructs."""
        said: deque[tuple[int, Message]] = deque([(client, message)])
        while said:
            number, message = said.popleft()
            begin = time.perf_counter()
            sends = self.broker.handle(number, message, self.now)
            due = self.broker.wake_at
            if due is not None and due <= self.now:
                sends = [*sends, *self.broker.tick(self.now)]
            end = time.perf_counter()
            self.spent += end - begin
            self.decisions += 1
            if end > self.deadline:
                raise TimeoutError
            for to, instruction in sends:
                if isinstance(instruction, Evacuate):
                    self.evacuated.add(to)
                    said.append((to, Evacuated(0, self.size, 0.5)))
                elif isinstance(instruction, Grant):
                    self.holders.append(to)
                    if to in self.evacuated:
                        self.evacuated.remove(to)
                        said.append((to, Restored(self.size, self.size, 0.5)))


def measure(clients: int, policy: str, setting: str, rounds: int = ROUNDS, cycles: int = CYCLES) -> dict[str, Any]:
    """Real microseconds of a decision (a message that the core takes in) and of a lease cycle, medians of rounds."""
    point: dict[str, Any] = {"clients": clients, "policy": policy, "setting": setting}
    per_cycle, per_decision = [], []
    try:
        cycling = Cycling(clients, policy, setting)
        for _ in range(WARM_UP * clients):
            cycling.cycle()
        for _ in range(rounds):
            cycling.spent, cycling.decisions = 0.0, 0
            for _ in range(cycles):
                cycling.cycle()
            per_cycle.append(cycling.spent / cycles * 1e6)
            per_decision.append(cycling.spent / cycling.decisions * 1e6)
    except TimeoutError:
        return {**point, "cycle_us": None, "decision_us": None}
    return {**point, "cycle_us": statistics.median(per_cycle), "decision_us": statistics.median(per_decision)}


def table(policies: Sequence[str], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """All points: settings by policies by numbers of clients."""
    plan = [(clients, policy, setting) for setting in SETTINGS for policy in policies for clients in sorted(sizes)]
    return list(report.track(starmap(measure, plan), "cost of a decision", len(plan)))


def summary(points: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """`decisions_per_s`: lease cycles a second at the most clients, *beside*, under the slowest policy.

    `cost_growth`: a decision's cost at the most clients over that at the fewest, of the policy and setting in which it
    grows most. None: something was not reached.
    """
    sizes = sorted({point["clients"] for point in points})
    cost = {(point["setting"], point["policy"], point["clients"]): point["decision_us"] for point in points}
    most = [point["cycle_us"] for point in points if point["clients"] == sizes[-1] and point["setting"] == "beside"]
    growths = [
        large / cost[setting, policy, sizes[0]] if large and cost[setting, policy, sizes[0]] else None
        for (setting, policy, clients), large in cost.items()
        if clients == sizes[-1]
    ]
    return {
        "decisions_per_s": None if None in most else 1e6 / max(most),
        "cost_growth": None if None in growths else max(g for g in growths if g is not None),
    }
