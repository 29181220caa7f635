"""The benchmarks run and report; how fast things are is no business of a test."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_parts import PARTS

ROOT = Path(__file__).parents[2]


def figures(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What a benchmark writes to its JSON file, and what it prints."""
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", *arguments, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    assert {"cpu", "cores", "python"} <= found["machine"].keys()
    return found, done.stdout


def test_the_handover_is_compared_with_a_round_trip(tmp_path: Path) -> None:
    found, printed = figures(tmp_path, "benchmarks.handover", "--rounds", "6")
    assert found["handover_us"] > 0
    assert found["roundtrip_us"] > 0
    assert found["ratio"] == found["handover_us"] / found["roundtrip_us"]
    assert found["rounds"] == 6
    assert found["rested"]["rounds"] == 2
    for name in ("handover", "roundtrip"):
        spread = found[f"{name}_percentiles_us"]
        assert spread["min"] <= spread["p10"] <= spread["p50"] <= spread["p90"] <= spread["p99"] <= spread["max"]
    assert "simulated" in printed
    assert "at most 3" in printed


def test_a_benchmark_refuses_an_impossible_number_of_rounds() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.handover", "--rounds", "0"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "at least 1" in done.stderr


def test_the_overheads_are_fractions_or_missing_by_name(tmp_path: Path) -> None:
    found, printed = figures(tmp_path, "benchmarks.overhead", "--repeats", "1")
    assert found["startup_ratio"] > 0
    assert 0 < found["import_miss_ns"] < 1e9
    assert 0 < found["open_gate_ns"] < 1e9
    for framework, name in (("torch", "torch_step_overhead"), ("jax", "jax_call_overhead")):
        installed = importlib.util.find_spec(framework) is not None
        assert isinstance(found[name], float) if installed else found[name] is None
    assert "at most 1.5" in printed


def test_the_simulation_runs_every_table(tmp_path: Path) -> None:
    small = ["--clients", "12", "--gpus", "10", "--length", "0.02", "--sizes", "4,8"]
    found, printed = figures(tmp_path, "benchmarks.simulate", "--mix", "mixed", "--policy", "fifo", *small)
    assert found["decisions_per_s"] > 0
    assert found["cost_growth"] > 0
    [run] = found["runs"]
    assert 0 < run["efficiency"] < 1 + 1e-9
    assert (run["clients"], run["gpus"], run["failed"]) == (12, 10, 0)
    assert {point["clients"] for point in found["cost"]} == {4, 8}
    assert {line["pair"] for line in found["quantum"]} == {"half", "never"}
    assert found["starvation"][0]["policy"] == "fifo"
    assert "virtual time" in printed
    tables = printed[: printed.index("The broker's core in virtual time")]
    assert "GPU busy" in tables
    assert max(map(len, tables.splitlines())) <= 120
    assert "…" not in tables


def test_the_throughput_is_told_in_rows(tmp_path: Path) -> None:
    file, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    command = [sys.executable, "-m", "benchmarks.throughput", "--quick", "--json", str(file), "--picture", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "simulated" in done.stdout
    assert "promised" not in done.stdout  # which is of more jobs than these
    assert done.stdout.splitlines()[-1].startswith("on ")
    assert picture.stat().st_size > 0
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    kinds = {(row["jobs"], row["policy"], row["swapping"]) for row in rows}
    assert kinds == {(n, policy, s) for n in (1, 2) for policy in ("sequential", "none", "fifo") for s in (False, True)}
    for row in rows:
        assert row["gpus"] == 1
        assert row["bound"] >= 0.99
        if row["policy"] == "none" and row["jobs"] == 2 and row["swapping"]:
            assert (row["out_of_memory"], row["speedup"], row["efficiency"]) == (1, None, None)
        else:
            assert row["finished"] == row["jobs"]
            assert row["speedup"] > 0
            assert 0 < row["efficiency"] <= 1.01
        assert not row["failures"]
        assert row["violations"] == 0
        swapped = row["policy"] == "fifo" and row["swapping"] and row["jobs"] > 1
        assert not swapped or row["evacuations"] > 0


def test_the_quantum_table_is_told_in_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.throughput", "--quantum-table", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    fixed, own = json.loads(file.read_text())
    assert (fixed["quantum"], own["quantum"]) == (0.1, None)
    assert fixed["evacuations"] > own["evacuations"]
    assert fixed["finished"] == own["finished"] == 2


def test_throughput_refuses_what_it_cannot_run_in_one_line() -> None:
    for wrong in (["--policies", "magic"], ["--jobs", "0"], ["--json", "/nowhere/x.json"], ["--seconds", "0"]):
        command = [sys.executable, "-m", "benchmarks.throughput", *wrong]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1].startswith("python -m benchmarks.throughput: error: argument")


def test_the_gpu_benchmark_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.glob("gpu-*.json")
    parts = json.loads(file.read_text())["parts"]
    assert list(parts) == list(PARTS)
    assert {part["status"] for part in parts.values()} == {"skipped"}
    assert all(part["reason"] for part in parts.values())


def on_a_simulated_gpu(tmp_path: Path, only: str) -> dict[str, dict[str, Any]]:
    """What a quick run of some parts writes to its JSON file, none of which may have failed."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--simulate", "--quick", "--out", str(tmp_path), "--only", only]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "simulated" in done.stdout
    [file] = tmp_path.glob("gpu-*.json")
    figures: dict[str, Any] = json.loads(file.read_text())
    assert figures["simulated"] is True
    parts: dict[str, dict[str, Any]] = figures["parts"]
    assert list(parts) == only.split(",")
    for part in parts.values():
        assert part["status"] == "done", part
        assert "failed" not in {row["kind"] for row in part["rows"]}
    return parts


def test_the_gpu_benchmark_on_a_simulated_gpu_finds_nothing_wrong(tmp_path: Path) -> None:
    for part in on_a_simulated_gpu(tmp_path, "torch,jax").values():
        assert {row["kind"] for row in part["rows"]} == {"measured", "passed"}


def test_the_gpu_benchmark_hands_over_with_and_without_copying(tmp_path: Path) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("not installed: torch")
    part = on_a_simulated_gpu(tmp_path, "handover")["handover"]
    assert {row["kind"] for row in part["rows"]} == {"measured", "passed"}
    alone, stays, moves = (part["figures"][name] for name in ("lease alone", "data stays", "data moves"))
    for figures in (alone, stays):
        assert figures["ratio"] == figures["handover_us"] / figures["roundtrip_us"]
        assert figures["handover_percentiles_us"]["p50"] <= figures["handover_percentiles_us"]["p90"]
    assert stays["evacuations"] == 0
    assert moves["evacuations"] >= len(moves["seconds"]) > 3
    assert moves["ratio"] > 0


def test_the_gpu_benchmark_weighs_the_hooks(tmp_path: Path) -> None:
    part = on_a_simulated_gpu(tmp_path, "overhead")["overhead"]
    for framework, count in (("torch", 2), ("jax", 2)):
        if importlib.util.find_spec(framework) is None:
            assert [row["remark"] for row in part["rows"] if row["question"] == framework] == [
                f"not installed: {framework}"
            ]
            continue
        name = "PyTorch" if framework == "torch" else "JAX"
        found = [figures for question, figures in part["figures"].items() if name in question]
        assert len(found) == count
        for figures in found:
            assert figures["overhead_low"] <= figures["overhead"] <= figures["overhead_high"]
            assert figures["plain_us"] > 0


def test_the_gpu_benchmark_moves_programs_by_a_simulated_driver(tmp_path: Path) -> None:
    parts = on_a_simulated_gpu(tmp_path, "driver,graphs")
    assert [row["question"] for row in parts["driver"]["rows"] if row["kind"] == "skipped"] == ["probe"]
    assert [row["question"] for row in parts["graphs"]["rows"] if row["kind"] == "skipped"] == ["a captured CUDA graph"]
    figures = parts["driver"]["figures"]
    assert figures["64 MiB"]["freed"] >= figures["64 MiB"]["bytes"] == 64 << 20
    assert {"64 MiB together"} <= set(figures)
    passed = [row["question"] for row in parts["graphs"]["rows"] if row["kind"] == "passed"]
    assert "evacuation is refused by name" in passed
    assert "the driver suspends the program" in passed


def test_the_gpu_benchmark_compares_a_training_run_with_itself(tmp_path: Path) -> None:
    part = on_a_simulated_gpu(tmp_path, "training")["training"]
    assert part["figures"]["equal"] is part["figures"]["steady"] is True
    assert part["figures"]["evacuations"] == 10
    assert {row["kind"] for row in part["rows"]} == {"passed"}


def test_the_gpu_benchmark_skips_by_name_what_it_has_no_time_for(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--simulate", "--quick", "--out", str(tmp_path), "--limit", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    [file] = tmp_path.glob("gpu-*.json")
    parts = json.loads(file.read_text())["parts"]
    assert list(parts) == list(PARTS)
    for part in parts.values():
        assert part["status"] == "skipped"
        assert part["reason"].endswith("s of 1 s are left") or part["reason"].startswith("not installed"), part
