"""The simulation in virtual time: scenarios that can be worked out by hand, conservation, determinism, its referee."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from acb.broker.core import Broker, Send
from acb.broker.policies import POLICIES
from acb.client.phases import MAX_LINGER, MIN_LINGER
from acb.protocol import VERSION, Grant, Hello, Message, Request, Welcome
from benchmarks import simulate
from benchmarks.simulation import cost, quanta, runs, starvation
from benchmarks.simulation.clients import Client
from benchmarks.simulation.machine import Card, Machine, Outcome, SimulationError
from benchmarks.simulation.mixes import CPU, GPU, GPU_SHARE, MIXES, WAIT, Job, Phase, jobs
from benchmarks.simulation.node import Node

ONE_GPU = Machine(gpus=1, capacity=10, bandwidth=10.0)
"""Ten bytes, which a copy takes a second for."""


def _job(*phases: Phase, size: int = 10, region: float = 1.0, arrival: float = 0.0) -> Job:
    return Job("job", phases, size, size, region, arrival, hint=size)


def _node(machine: Machine, quantum: float | None, *wanted: Job) -> Node:
    return Node(machine, POLICIES["fifo"](quantum), wanted, check=True)


def test_the_bound_is_the_largest_of_three() -> None:
    outcome = Outcome(makespan=60.0, gpus=4, cores=3, gpu_seconds=100.0, cpu_seconds=90.0, longest=20.0)
    assert outcome.bound == 30.0
    assert outcome.efficiency == 0.5
    outcome.gpu_seconds = 160.0
    assert outcome.bound == 40.0
    outcome.longest = 45.0
    assert outcome.bound == 45.0


def test_two_jobs_that_do_not_fit_together_swap_at_their_pauses() -> None:
    first = _job(Phase(GPU, 5), Phase(CPU, 3, marked=True), Phase(GPU, 2))
    outcome = _node(ONE_GPU, 100.0, first, first).run()
    # GPU: first 0-5, out 5-6; second 6-11, out 11-12; first in 12-13, 13-15, ends; second in 15-16, 16-18.
    assert outcome.makespan == 18.0
    assert (outcome.copies, outcome.copied, outcome.leases) == (4, 40, 4)
    assert list(outcome.waits["job"]) == [0.0, 6.0, 5.0, 2.0]
    assert outcome.lost == {"copying": 4.0, "lingering": 0.0, "empty": 0.0}
    assert outcome.fullest == outcome.bound == 14.0


def test_a_phase_is_cut_at_the_first_safe_point_after_the_quantum() -> None:
    outcome = _node(ONE_GPU, 3.0, *[_job(Phase(GPU, 5), size=5, region=2.0)] * 2).run()
    # A region ends at 2 and at 4; the second is granted at 4 and cut at 8; then a second each is left.
    assert outcome.makespan == 10.0
    assert outcome.copies == 0
    assert list(outcome.waits["job"]) == [0.0, 4.0, 4.0, 1.0]


def test_a_lease_does_one_region_even_with_no_quantum() -> None:
    outcome = _node(ONE_GPU, 0.0, *[_job(Phase(GPU, 3), size=5)] * 2).run()
    assert outcome.makespan == 6.0
    assert outcome.leases == 6


def test_nobody_yields_while_nobody_waits() -> None:
    outcome = _node(ONE_GPU, None, _job(*[Phase(GPU, 1), Phase(CPU, 1, marked=True)] * 20)).run()
    assert outcome.leases == 1
    assert outcome.makespan == 40.0


def test_an_unmarked_pause_ends_the_lease_after_the_linger() -> None:
    pausing = _job(Phase(GPU, 1), Phase(CPU, 50), Phase(GPU, 1), size=5)
    outcome = _node(ONE_GPU, 100.0, pausing, _job(Phase(GPU, 1), size=5, arrival=0.5)).run()
    assert outcome.makespan == 52.0
    waited = outcome.waits["job"][1]
    assert 0.5 + MIN_LINGER <= waited <= 0.5 + MAX_LINGER
    assert outcome.lost["lingering"] == pytest.approx(waited - 0.5)


def test_a_short_pause_that_was_learned_is_sat_out() -> None:
    steps = [Phase(GPU, 0.1), Phase(CPU, 0.02)] * 50
    stepping = _job(*steps)
    other = _job(Phase(GPU, 1), arrival=1.0)
    outcome = _node(ONE_GPU, 2.0, stepping, other).run()
    assert outcome.leases == 3  # cut once, by the quantum, though a swap is dearer than any pause


def test_cores_are_taken_first_come_first_served() -> None:
    machine = Machine(gpus=1, capacity=10, bandwidth=10.0, cores=2)
    outcome = _node(machine, None, *[_job(Phase(CPU, seconds)) for seconds in (3, 1, 2, 2)]).run()
    assert outcome.makespan == 5.0
    assert outcome.bound == 4.0


def test_waiting_takes_no_core() -> None:
    machine = Machine(gpus=1, capacity=10, bandwidth=10.0, cores=1)
    assert _node(machine, None, *[_job(Phase(WAIT, 3))] * 4).run().makespan == 3.0


def test_copies_in_one_direction_queue_and_in_two_do_not() -> None:
    card = Card(0, ONE_GPU, {})
    assert card.copy("out", 20, 1.0) == 3.0
    assert card.copy("out", 10, 2.0) == 4.0
    assert card.copy("in", 10, 2.0) == 3.0
    assert card.copy("out", 10, 9.0) == 10.0


def test_memory_that_does_not_fit_is_noticed() -> None:
    card = Card(0, ONE_GPU, {})
    card.occupy(10)
    with pytest.raises(SimulationError, match="11 bytes are in use on GPU 0"):
        card.occupy(1)


@pytest.mark.parametrize("policy", runs.policies())
@pytest.mark.parametrize("mix", MIXES)
def test_every_job_does_all_its_phases_within_the_bound(mix: str, policy: str) -> None:
    done: list[Client] = []
    wanted = list(jobs(mix, range(9), seed=3, length=0.05))
    node = Node(Machine(2, 32 << 30, 24.0 * (1 << 30), cores=4), POLICIES[policy](None), wanted, check=True)
    node.hook = done.append
    outcome = node.run()
    assert len(done) == outcome.jobs == 9
    for client in done:
        assert client.index == len(client.job.phases)
        assert client.computed == pytest.approx(client.job.gpu_seconds)
    assert outcome.gpu_seconds == pytest.approx(sum(job.gpu_seconds for job in wanted))
    assert outcome.failed == 0
    assert 0 < outcome.efficiency < 1 + 1e-9
    assert all(card.used == card.holders == card.computing == card.copying == card.waiting == 0 for card in node.cards)


def test_a_run_is_the_same_for_the_same_seed_and_however_it_is_spread() -> None:
    what = runs.Run("mixed", "fifo", clients=10, gpus=10, length=0.02, seed=5)
    [outcome, other] = runs.run_all([what, what._replace(seed=6)], processes=2)
    described, again = runs.describe(what, outcome), runs.describe(what, runs.run(what))
    assert described | {"real_s": 0} == again | {"real_s": 0}
    assert other.makespan != outcome.makespan


def test_a_job_depends_on_its_number_alone() -> None:
    assert list(jobs("mixed", range(1, 10, 4), seed=2)) == list(jobs("mixed", range(10), seed=2))[1::4]


def test_alphafold2s_share_of_the_gpu_is_the_one_that_was_published() -> None:
    made = list(jobs("alphafold2", range(200), seed=1))
    shares = [job.gpu_seconds / job.alone for job in made]
    assert sum(shares) / len(shares) == pytest.approx(GPU_SHARE, abs=0.01)
    assert all(0.60 <= job.cpu_seconds / job.alone <= 0.70 for job in made)


# --- a broker that is not to be trusted -------------------------------------------------------------------------------


class Careless:
    """Grants everybody everything, at once or, if `later` is given, when its timer has run for so long."""

    def __init__(self, later: float | None = None) -> None:
        self.later = later
        self.log: list[str] = []
        self.wake_at: float | None = None
        self.asked: list[int] = []

    def handle(self, client_id: int, message: Message, now: float) -> list[Send]:
        if isinstance(message, Hello):
            return [Send(client_id, Welcome(VERSION, client_id))]
        if not isinstance(message, Request):
            return []
        if self.later is None:
            return [Send(client_id, Grant(0, "", 10))]
        self.asked.append(client_id)
        self.wake_at = now + self.later
        return []

    def gone(self, client_id: int, now: float) -> list[Send]:
        return []

    def tick(self, now: float) -> list[Send]:
        self.wake_at = None
        return [Send(client, Grant(0, "", 10)) for client in self.asked]


def _careless(broker: Careless, wanted: Sequence[Job]) -> Node:
    node = Node(ONE_GPU, POLICIES["fifo"](None), wanted)
    node.broker = cast(Broker, broker)
    return node


def test_two_on_one_slot_are_noticed() -> None:
    with pytest.raises(SimulationError, match="GPU 0 has 2 holders"):
        _careless(Careless(), [_job(Phase(GPU, 1), size=1)] * 2).run()


def test_the_brokers_timer_is_virtual_too() -> None:
    assert _careless(Careless(later=7.0), [_job(Phase(CPU, 1), Phase(GPU, 1))]).run().makespan == 9.0


def test_who_waits_for_ever_is_noticed() -> None:
    careless = Careless(later=1.0)
    careless.asked = _Forgetful()
    with pytest.raises(SimulationError, match="1 clients wait for ever"):
        _careless(careless, [_job(Phase(GPU, 1))]).run()


class _Forgetful(list[int]):
    def append(self, value: int) -> None:
        pass


# --- the other tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", cost.SETTINGS)
def test_the_cost_of_a_decision_is_measured(setting: str) -> None:
    point = cost.measure(40, "fifo", setting, rounds=1, cycles=40)
    messages = point["cycle_us"] / point["decision_us"]
    assert point["decision_us"] > 0
    assert messages == pytest.approx(2) if setting == "beside" else 2 < messages <= 4


def test_the_summary_of_costs_takes_the_worst() -> None:
    points = [
        {"setting": setting, "policy": policy, "clients": clients, "decision_us": us, "cycle_us": 2 * us}
        for setting, policy, clients, us in [
            ("beside", "a", 100, 10.0), ("beside", "a", 1000, 20.0), ("beside", "b", 100, 20.0),
            ("beside", "b", 1000, 25.0), ("swap", "a", 100, 10.0), ("swap", "a", 1000, 30.0),
        ]
    ]  # fmt: skip
    assert cost.summary(points) == {"decisions_per_s": 20_000.0, "cost_growth": 3.0}
    points[3] |= {"decision_us": None, "cycle_us": None}
    assert cost.summary(points) == {"decisions_per_s": None, "cost_growth": None}


def test_a_pair_that_never_pauses_is_best_left_alone() -> None:
    took = {quantum: quanta.seconds("never", "fifo", quantum, float(24 << 30)) for quantum in (10.0, 1e6)}
    assert took[1e6] == pytest.approx(quanta.serial("never"))
    assert took[10.0] > took[1e6]


def test_first_come_first_served_starves_nobody() -> None:
    found = starvation.measure("fifo", float(24 << 30), horizon=300.0, check=True)
    assert found["leases"] > 0
    assert not found["still_waits"]
    assert found["longest_s"] < 60
    assert 0 < found["share"] + found["favoured_share"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mix", "nope"], "'nope' is none of alphafold2"),
        (["--policy", "fifo,nope"], "'nope' is none of"),
        (["--sizes", "10"], "at least two numbers"),
        (["--sizes", "10,x"], "not a list of numbers"),
        (["--length", "0"], "above 0"),
        (["--clients", "0"], "at least 1"),
    ],
)
def test_wrong_options_are_refused_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        simulate.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
