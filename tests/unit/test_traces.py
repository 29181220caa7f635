"""Phase traces: jobs are scaled as they say, and the bounds are bounds."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import scenes, traces
from benchmarks.traces import Phase

TARGETS = [[Phase("cpu", 2.0), Phase("gpu", 1.0), Phase("cpu", 1.0)], [Phase("cpu", 4.0), Phase("gpu", 3.0)]]

made = st.lists(
    st.lists(st.builds(Phase, st.sampled_from(["gpu", "cpu"]), st.floats(0.01, 10)), min_size=1, max_size=8),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("mix", sorted(traces.GPU_SHARE))
def test_every_mix_has_a_recorded_trace(mix: str) -> None:
    assert mix in traces.mixes()
    targets = traces.load(mix)
    assert len(targets) >= 20
    for target in targets:
        assert {phase.kind for phase in target} == {"gpu", "cpu"}
        assert all(phase.seconds > 0 for phase in target)


def test_a_job_has_the_length_and_the_gpu_share_that_were_asked_for() -> None:
    for job in traces.jobs(TARGETS, 3, seconds=10.0, share=0.4, length=7, seed=1):
        assert traces.total(job) == pytest.approx(10.0)
        assert traces.total(job, "gpu") == pytest.approx(4.0)


def test_phases_of_one_kind_keep_their_proportions() -> None:
    (job,) = traces.jobs(TARGETS, 1, seconds=10.0, share=0.4, length=2, seed=0)
    assert sorted(phase.seconds for phase in job if phase.kind == "gpu") == pytest.approx([1.0, 3.0])


def test_jobs_differ_in_order_and_are_the_same_for_the_same_seed() -> None:
    targets = traces.load("alphafold2")
    first, second = traces.jobs(targets, 2, 10.0, 0.345, 32, seed=5)
    assert first != second
    assert [first, second] == traces.jobs(targets, 2, 10.0, 0.345, 32, seed=5)
    assert first not in traces.jobs(targets, 2, 10.0, 0.345, 32, seed=6)


def test_neighbouring_cpu_phases_are_one() -> None:
    for job in traces.jobs(TARGETS, 2, 10.0, 0.4, 9, seed=0):
        assert all(one.kind != other.kind for one, other in itertools.pairwise(job))


def test_a_trace_without_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="without targets"):
        traces.jobs([], 1, 1.0, 0.5, 1, 0)


def test_a_summary_becomes_one_target_an_item() -> None:
    summary = {
        "steps": [
            {"name": "build", "kind": "cpu", "seconds": 9.0},
            {"name": "search", "kind": "cpu", "seconds": 2.0, "item": "a"},
            {"name": "align", "kind": "cpu", "seconds": 0.5, "item": "a"},
            {"name": "predict", "kind": "gpu", "seconds": 1.0, "item": "a"},
            {"name": "search", "kind": "cpu", "seconds": 3.0, "item": "b"},
            {"name": "predict", "kind": "gpu", "seconds": 1.5, "item": "b"},
            {"name": "decode", "kind": "cpu", "seconds": 0.1, "item": "the end"},
        ]
    }
    assert traces.convert(summary) == [
        [Phase("cpu", 2.5), Phase("gpu", 1.0)],
        [Phase("cpu", 3.0), Phase("gpu", 1.5)],
    ]


def test_the_bound_names_what_sets_it() -> None:
    job = [Phase("cpu", 2.0), Phase("gpu", 1.0)]
    assert traces.bound([job] * 4, 1, cores=4) == (4.0, "GPU time")
    assert traces.bound([job] * 4, 4, cores=2) == (4.0, "CPU time")
    assert traces.bound([job] * 2, 2, cores=2) == (3.0, "longest job")


def test_one_after_the_other_takes_the_next_free_gpu() -> None:
    assert traces.sequential([3.0, 1.0, 1.0], 1) == 5.0
    assert traces.sequential([3.0, 1.0, 1.0], 2) == 3.0


def test_first_come_first_served_waits_for_the_gpu() -> None:
    job = [Phase("cpu", 1.0), Phase("gpu", 2.0), Phase("cpu", 1.0)]
    assert traces.first_come([job], 1) == 4.0
    assert traces.first_come([job, job], 1) == 6.0
    assert traces.first_come([job, job], 2) == 4.0
    assert traces.first_come([job, job], 1, swap=0.5) == 6.5


@given(made, st.integers(1, 3))
def test_no_schedule_beats_the_bound_and_none_is_worse_than_one_after_the_other(
    jobs: list[traces.Job], gpus: int
) -> None:
    makespan = traces.first_come(jobs, gpus)
    assert makespan >= traces.bound(jobs, gpus, cores=len(jobs)).seconds - 1e-6
    assert makespan <= sum(map(traces.total, jobs)) + 1e-6


def test_the_memory_takes_its_share_of_a_phase_to_swap() -> None:
    job = [Phase("gpu", 0.1), Phase("cpu", 1.0), Phase("gpu", 0.3)]
    nbytes = scenes.memory([job, job])
    assert 2 * nbytes / scenes.BANDWIDTH == pytest.approx(scenes.SWAP_SHARE * 0.2, rel=1e-3)


@pytest.mark.parametrize(("jobs", "gpus"), [(1, 1), (4, 1), (16, 4)])
def test_the_gpus_hold_all_programs_or_one(jobs: int, gpus: int) -> None:
    fits = scenes.cards(scenes.Setting(jobs, gpus, "fifo", False), 1000)
    swaps = scenes.cards(scenes.Setting(jobs, gpus, "fifo", True), 1000)
    assert len(fits.capacities) == len(swaps.capacities) == gpus
    assert min(fits.capacities) >= 1.1 * 1000 * jobs / gpus
    assert 1.1 * 1000 <= min(swaps.capacities) <= max(swaps.capacities) < 2 * 1000


def test_a_gpu_that_nobody_wants_is_not_lost() -> None:
    uses = [[0.0, 0.0, 1.0], [0.5, 1.2, 2.0], [3.0, 3.1, 4.0]]  # asked, got, left
    assert scenes.idle_while_wanted(uses) == pytest.approx([0.2, 0.1])
