"""Sizes, simulated GPUs and places: what is written comes back, what cannot be is refused in one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acb import config
from acb.config import ConfigError, SimulatedSpec, format_size, parse_simulated, parse_size

sizes = st.integers(1, (1 << 60) - 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 1 << 20),
        ("1B", 1),
        ("10GiB", 10 << 30),
        ("10gib", 10 << 30),
        ("512M", 512 << 20),
        ("1.5 GB", 1_500_000_000),
        (" 2 TiB ", 2 << 40),
        ("0.5K", 512),
        ("1kB", 1000),
        ("1152921504606846975", (1 << 60) - 1),
        ("0.000000001GB", 1),
        ("0." + "3" * 30 + "KiB", 341),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "GiB", "10 G i B", "-1", "+5", "0", "0GiB", "0.4B", "1e3", "1.GiB", ".5GiB", "1,5GiB", "10XB",
        "inf", "nan", "9" * 400 + "T", "9" * 5000, "0x10", "1152921504606846976", "1048576TiB", "٣GiB", "1_000",
        "10GiBs", "1.5.5G", "10\nGiB GiB",
    ],
)  # fmt: skip
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)
    assert caught.value.status == 2
    assert "\n" not in str(caught.value)
    assert "such as 10GiB" in str(caught.value)


@pytest.mark.parametrize("text", ["10Gb", "1 Mb", "5Kb", "5Gib", "2TIb"])
def test_what_may_be_bits_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"may be bits or bytes; sizes are in bytes: write [GMKT][iI]?B$"):
        parse_size(text)
    assert parse_size(text.lower()) == parse_size(text[:-1] + "B")  # batch systems write bytes so


@given(sizes)
def test_an_exact_size_comes_back(size: int) -> None:
    assert parse_size(format_size(size, exact=True)) == size


@given(st.integers(1, 1 << 59))
def test_a_size_for_people_is_near_and_short(size: int) -> None:
    text = format_size(size)
    assert len(text) <= 12
    assert abs(parse_size(text) - size) <= 0.06 * size


@given(st.text())
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        assert 0 < parse_size(text) < 1 << 60
    except ConfigError:
        pass


specs = st.builds(
    SimulatedSpec,
    st.lists(st.sampled_from([1 << 20, 1 << 30]) | sizes, min_size=1, max_size=64).map(tuple),
    st.none() | sizes,
    st.none() | st.floats(0, 1, exclude_min=True, allow_nan=False),
)


@given(specs)
def test_a_description_of_simulated_gpus_comes_back(spec: SimulatedSpec) -> None:
    assert parse_simulated(str(spec)) == spec


def test_simulated_gpus_are_read() -> None:
    assert parse_simulated("1x2GiB") == ((2 << 30,), None, None)
    assert parse_simulated("4 X 16GiB, bandwidth=20GiB/s,speed=.5") == ((16 << 30,) * 4, 20 << 30, 0.5)
    mixed = parse_simulated("2x16GiB + 1x8GiB+1x8GiB,speed=0.5")
    assert mixed == ((16 << 30, 16 << 30, 8 << 30, 8 << 30), None, 0.5)
    assert str(mixed) == "2x16GiB+2x8GiB,speed=0.5"


def test_simulated_gpus_are_described() -> None:
    def words(text: str) -> str:
        return config.describe_simulated(parse_simulated(text).capacities)

    assert words("1x2GiB") == "1 simulated GPU of 2GiB"
    assert words("3x512MiB") == "3 simulated GPUs of 512MiB"
    assert words("2x16GiB+1x8GiB+10x1GiB") == "2 simulated GPUs of 16GiB, 1 of 8GiB and 10 of 1GiB"


def test_too_many_simulated_gpus_are_refused() -> None:
    assert len(parse_simulated("60x1GiB+4x2GiB").capacities) == config.MAX_GPUS
    with pytest.raises(ConfigError, match="are 65 simulated GPUs; there can be 64 at most"):
        parse_simulated("60x1GiB+5x2GiB")


@pytest.mark.parametrize(
    "text",
    [
        "", "2GiB", "x2GiB", "0x1GiB", "65x1GiB", "1x", "1x0", "-1x1GiB", "1.5x1GiB", "1x1GiB,", "1x1GiB,speed=0",
        "1x1GiB,speed=1.1", "1x1GiB,speed=-1", "1x1GiB,speed=nan", "1x1GiB,speed=", "1x1GiB,bandwidth=", "1x1GiB,x=1",
        "9" * 5000 + "x1GiB", "1x1GiB;speed=1", "1x1GiB+", "+1x1GiB", "1x1GiB+2GiB", "1x1GiB+0x1GiB",
        "1x1GiB,speed=1+1x2GiB",
    ],
)  # fmt: skip
def test_what_is_no_description_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_simulated(text)
    assert caught.value.status == 2
    assert "\n" not in str(caught.value)


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No setting of the machine's."""
    for name in ("ACB_RUNTIME_DIR", "XDG_RUNTIME_DIR", "ACB_SOCKET", "SLURM_JOB_ID", "PJM_JOBID"):
        monkeypatch.delenv(name, raising=False)
    directory = tmp_path / "rt"
    monkeypatch.setenv("ACB_RUNTIME_DIR", str(directory))
    return directory


def test_everything_lies_in_the_runtime_directory(places: Path) -> None:
    assert config.socket_path() == places / "broker.sock"
    assert config.pid_path() == places / "broker.pid"
    assert config.env_path() == places / "broker.env"
    spec = parse_simulated("2x1GiB,bandwidth=5MiB,speed=0.25")
    assert config.simulated_dir(spec) == places / "simulated-2x1GiB-bandwidth-5MiB-speed-0.25"
    assert config.simulated_dir(parse_simulated("2x1GiB+1x2GiB")) == places / "simulated-2x1GiB-1x2GiB"
    assert places.stat().st_mode & 0o777 == 0o700


def test_descriptions_of_any_length_have_directories_of_their_own(places: Path) -> None:
    sizes = "+".join(f"1x{n}KiB" for n in range(1, 64))
    first, second = parse_simulated(f"{sizes}+1x1GiB"), parse_simulated(f"{sizes}+1x2GiB")
    directories = {config.simulated_dir(spec) for spec in (first, second)}
    assert len(directories) == 2
    for directory in directories:
        directory.mkdir()


@pytest.mark.parametrize(("name", "value", "suffix"), [
    ("SLURM_JOB_ID", "12", "-12"),
    ("PJM_JOBID", "34", "-34"),
    ("SLURM_JOB_ID", "../../etc", "-.._.._etc"),
    ("SLURM_JOB_ID", "", ""),
])  # fmt: skip
def test_jobs_have_files_of_their_own(
    places: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, suffix: str
) -> None:
    monkeypatch.setenv(name, value)
    assert config.socket_path() == places / f"broker{suffix}.sock"
    assert config.simulated_dir(parse_simulated("1x1GiB")).name == f"simulated-1x1GiB{suffix}"


def test_the_place_is_the_users_own_by_default(places: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ACB_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    assert config.runtime_dir() == tmp_path / "run" / "acb"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert config._runtime_path() == Path(f"/tmp/acb-{os.getuid()}")


def test_relative_directories_mean_the_same_for_everybody(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places.parent)
    monkeypatch.setenv("ACB_RUNTIME_DIR", "here/../rt")
    assert config.socket_path() == places / "broker.sock"


def test_a_chosen_socket_is_used_as_it_is(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACB_SOCKET", "/somewhere/else.sock")
    assert config.socket_path() == Path("/somewhere/else.sock")
    assert not places.exists()
    monkeypatch.setenv("ACB_SOCKET", "/" + "x" * 107)
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        config.socket_path()


@given(st.lists(st.integers(1, 1 << 59), max_size=config.MAX_GPUS))
def test_a_pool_is_read_as_it_was_written(sizes: list[int]) -> None:
    assert config.parse_pool(config.format_pool(sizes)) == sizes


@pytest.mark.parametrize("text", ["", "2x", "x5", "2x5GiB", "2x5+", "100x5", "2x5,speed=1"])
def test_a_pool_of_another_release_is_none(text: str) -> None:
    assert config.parse_pool(text) == []
