"""Units of several GPUs share slots in a row: what happens on one GPU concerns holders two GPUs away."""

from __future__ import annotations

import random

import pytest

from acb.broker.core import Broker, Gpu
from acb.broker.policies import POLICIES
from acb.protocol import VERSION, Hello, Message, Request, Yield

PLACES = {1: "0", 2: "0,1", 3: "1,2", 4: "0", 5: "2"}
"""The GPUs of each client: 1, 2 and 3 come to hold, 4 waits for GPU 0, and 5 comes to GPU 2."""

HISTORIES = 300


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_holder_is_told_of_the_one_that_waits_whatever_happens_two_gpus_away(policy: str) -> None:
    for seed in range(HISTORIES):
        dice = random.Random(seed)
        broker, now = Broker([Gpu(i, 1000, str(i), slots=2) for i in range(3)], POLICIES[policy](None)), 0.0

        def tell(client: int, message: Message, seconds: float = 0.001, broker: Broker = broker) -> None:
            nonlocal now
            now += seconds
            broker.handle(client, message, now)
            broker.check()  # "somebody waits, and no holder knows"

        for client, gpus in PLACES.items():
            several = {"gpus": gpus, "count": 2} if "," in gpus else {}
            weight = dice.choice([1.0, 1.0, 4.0])
            tell(client, Hello(VERSION, client, str(client), 100, gpu=int(gpus[0]), weight=weight, **several))
        for client in dice.sample([1, 2, 3, 4], dice.randint(0, 4)):  # they have used a part of their share before
            tell(client, Request())
            tell(client, Yield(100, 100), dice.choice([1, 30, 200, 500]))
        for client in (*dice.sample([1, 2, 3], 3), 4, 5):
            tell(client, Request(), dice.choice([0.001, 5, 50, 300, 900]))
        assert not broker.clients[4].lease
        assert any(unit.preempt_at is not None for unit in broker.gpus[0].units)
