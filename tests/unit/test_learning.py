"""What is learned of programs: percentiles, when they are believed, and the file that keeps them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acb.broker.history import History
from acb.broker.learning import COMMANDS, ENOUGH, PROGRAMS, SAMPLES, Profile, Programs, Samples


@given(st.lists(st.floats(0, 1e6), max_size=150), st.floats(0, 100))
def test_percentiles_are_those_of_the_last_samples(values: list[float], percent: float) -> None:
    samples = Samples(values)
    last = sorted(values[-SAMPLES:])
    assert list(samples) == values[-SAMPLES:]
    found = samples.percentile(percent)
    if len(last) < ENOUGH:
        assert found is None
    else:
        assert found in last
        assert sum(value <= found for value in last) >= percent / 100 * len(last)
        assert sum(value < found for value in last) <= percent / 100 * len(last)


def test_a_client_goes_by_its_own_samples_once_it_has_enough() -> None:
    program = Profile()
    for seconds in (1.0, 1.0, 1.0):
        Profile(program).phase(seconds)
    client = Profile(program)
    assert client.phase_seconds() == 1.0
    for seconds in (5.0, 5.0, 5.0):
        client.phase(seconds)
    assert client.phase_seconds() == 5.0
    assert Profile(program).phase_seconds() == 5.0  # the 90th percentile of six


def test_runs_whose_peaks_differ_say_nothing_of_the_next() -> None:
    program = Profile()
    for peak in (100, 105, 102):
        Profile(program, "a").settled(peak)
    assert Profile(program, "a").peak_bytes() == 105
    Profile(program, "a").settled(300)
    assert Profile(program, "a").peak_bytes() is None


def test_another_command_line_may_need_more() -> None:
    program = Profile()
    for _ in range(ENOUGH):
        Profile(program, "small").settled(100)
    assert Profile(program, "small").peak_bytes() == 100
    assert Profile(program, "large").peak_bytes() is None


def test_command_lines_that_ended_long_ago_are_forgotten() -> None:
    program = Profile()
    for number in range(COMMANDS + 1):
        for _ in range(ENOUGH):
            Profile(program, str(number)).settled(number)
            Profile(program, "always").settled(7)
    assert Profile(program, "0").peak_bytes() is None
    assert Profile(program, str(COMMANDS)).peak_bytes() == COMMANDS
    assert Profile(program, "always").peak_bytes() == 7
    assert len(program.peaks) == COMMANDS


def test_swaps_are_learned_a_byte() -> None:
    profile = Profile()
    for _ in range(3):
        profile.swapped(1000, 2.0)
        profile.swapped(0, 9.0)
    assert profile.swap_seconds(5000) == pytest.approx(10.0)


def test_programs_seen_least_recently_are_forgotten() -> None:
    programs = Programs()
    for number in range(PROGRAMS + 5):
        programs[f"p{number}"].phase(1)
        programs["always"].phase(1)
    kept = programs.to_json()
    assert len(kept) == PROGRAMS
    assert "always" in kept
    assert "p0" not in kept


def test_what_was_learned_outlives_the_broker(tmp_path: Path) -> None:
    file = tmp_path / "state" / "programs.json"
    first = History(file)
    for _ in range(3):
        Profile(first.programs["fold"], "a").settled(500)
        first.programs["fold"].phase(1.0)
        first.programs["fold"].gap(3.0)
    first.client_ended()
    first.save()
    second = History(file)
    assert Profile(second.programs["fold"], "a").peak_bytes() == 500
    assert second.programs["fold"].share() == 0.25
    assert [path.name for path in file.parent.iterdir()] == ["programs.json"]


def test_two_brokers_keep_what_each_has_learned(tmp_path: Path) -> None:
    file = tmp_path / "programs.json"
    one, other = History(file), History(file)
    one.programs["a"].phase(1.0)
    one.client_ended()
    one.save()
    other.programs["b"].phase(2.0)
    other.client_ended()
    other.save()
    assert set(json.loads(file.read_text())) == {"a", "b"}


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"a": 3}', '{"a": {"phases": ["x", -1, 1e300]}}', "[" * 100_000, '{"a": {"peaks": [1]}}']
)
def test_a_file_that_makes_no_sense_costs_nothing(tmp_path: Path, content: str) -> None:
    file = tmp_path / "programs.json"
    file.write_text(content)
    history = History(file)
    assert history.programs["a"].phase_seconds() is None
    history.client_ended()
    history.save()
    assert isinstance(json.loads(file.read_text()), dict)


def test_a_place_that_cannot_be_written_is_logged_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "programs.json"
    history = History(place)
    history.check()
    said = capfd.readouterr().err
    assert f"cannot be kept in {place}" in said
    assert "Not a directory; set ACB_STATE_DIR" in said
    for _ in range(2):
        history.client_ended()
        history.save()
    assert capfd.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_written_now_is_written_later(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "state" / "programs.json"
    history = History(place)
    history.check()
    assert capfd.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []
    history.programs["a"].phase(1.0)
    history.client_ended()
    place.parent.touch()
    history.save()
    assert "cannot be kept" in capfd.readouterr().err
    place.parent.unlink()
    history.save()
    assert set(json.loads(place.read_text())) == {"a"}


def test_without_a_home_directory_nothing_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    History(None).check()
    assert "there is no home directory; set ACB_STATE_DIR" in capfd.readouterr().err


def test_samples_stay_in_order_however_they_come() -> None:
    chance = random.Random(1)
    samples = Samples()
    for _ in range(500):
        samples.add(chance.choice([0.0, 1.0, 1.0, chance.random()]))
        assert samples._sorted == sorted(samples)
