"""The workloads as ordinary programs on the CPU: their files, their determinism, their errors."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

WORKLOADS = Path(__file__).resolve().parents[2] / "benchmarks" / "workloads"
TWO_PROTEINS = ">one\nMADIKVYTSNTCVFCKAAKQYFNENN\n>two with a remark\nmqifvktltgktitlevepsdtienv*\n"
SMALL_FOLD = ["--layers", "1", "--width", "64", "--search-filters", "default", "--relax-steps", "50"]
SMALL_TRAIN = ["--width", "32", "--layers", "1", "--length", "24", "--batch", "4", "--log-every", "2"]

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}

pytestmark = pytest.mark.timeout(300)


def needs(*modules: str) -> pytest.MarkDecorator:
    """Skip where a package is missing, without the seconds that importing it would take."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_fold = needs("torch", "transformers", "pyhmmer", "openmm")
needs_fold_jax = needs("jax", "pyhmmer", "openmm")
needs_train = needs("torch", "pyhmmer")
needs_detect = needs("torch", "transformers", "cv2", "skvideo")


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a workload, `start("fold", "--seed", 1)`, as a person would, without a GPU; none outlives the test."""
    started = []

    def call(program: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(WORKLOADS / f"{program}.py"), *map(str, arguments)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, env=os.environ | NO_GPU, **pipes)  # type: ignore[call-overload]
        started.append(process)
        return process  # type: ignore[no-any-return]

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a workload that must succeed and return its output."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return output


REFUSALS = """
import contextlib, importlib, io, json, sys
results = []
for program, arguments in json.loads(sys.argv[1]):
    main = importlib.import_module(program).main
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(arguments)
        except SystemExit as leaving:
            status = leaving.code
    results.append((status, errors.getvalue()))
print(json.dumps(results))
"""


def check_refused(*cases: tuple[str, str, list[str]]) -> None:
    """Check cases of program, message and arguments: status 2 and one line on stderr that contains the message.

    All run in one process, since importing the frameworks takes most of the time.
    """
    calls = json.dumps([(program, arguments) for program, _, arguments in cases])
    command = [sys.executable, "-c", REFUSALS, calls]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=WORKLOADS, env=os.environ | NO_GPU)
    assert done.returncode == 0, done.stderr
    for (program, wanted, arguments), (status, errors) in zip(cases, json.loads(done.stdout), strict=True):
        assert (status, len(errors.splitlines())) == (2, 1), (arguments, status, errors)
        assert errors.startswith(f"{program}.py: error: "), errors
        assert wanted in errors, (arguments, errors)


def summary(out: Path) -> dict[str, Any]:
    """Read a summary and check what all of them promise."""
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    assert found["wall_s"] > 0
    assert {step["kind"] for step in found["steps"]} == {"cpu", "gpu"}
    for kind in ("cpu", "gpu"):
        total = sum(step["seconds"] for step in found["steps"] if step["kind"] == kind)
        assert found[f"{kind}_s"] == pytest.approx(total, abs=0.05)
    assert found["cpu_s"] + found["gpu_s"] <= found["wall_s"] + 0.01
    assert not list(out.glob("*.part*"))
    return found


def backbone(path: Path) -> list[dict[str, tuple[float, float, float]]]:
    """Parse a PDB file by its fixed columns: one dictionary of atoms a residue."""
    residues: list[dict[str, tuple[float, float, float]]] = []
    lines = path.read_text().splitlines()
    assert all(len(line) == 80 for line in lines)
    assert [line.split()[0] for line in lines[-2:]] == ["TER", "END"]
    atoms = [line for line in lines if line.startswith("ATOM  ")]
    for serial, line in enumerate(atoms, start=1):
        assert int(line[6:11]) == serial
        assert 0 <= float(line[60:66]) <= 100
        if int(line[22:26]) > len(residues):
            residues.append({})
        position = float(line[30:38]), float(line[38:46]), float(line[46:54])
        residues[-1][line[12:16].strip()] = position
    assert all(list(residue) == ["N", "CA", "C", "O"] for residue in residues)
    return residues


def check_fold(out: Path, program: str) -> None:
    """Check the files of a run over TWO_PROTEINS."""
    found = summary(out)
    assert found["program"] == program
    assert [entry["name"] for entry in found["proteins"]] == ["one", "two"]
    shapes = []
    for entry in found["proteins"]:
        relaxed = backbone(out / f"{entry['name']}_relaxed.pdb")
        assert len(relaxed) == entry["residues"] == 26
        assert len(backbone(out / f"{entry['name']}_unrelaxed.pdb")) == 26
        if entry["violations"] == 0:
            for left, right in itertools.pairwise(relaxed):
                assert math.dist(left["C"], right["N"]) == pytest.approx(1.329, abs=0.11)
        assert entry["energy_after_kj_mol"] < entry["energy_before_kj_mol"]
        alignment = (out / f"{entry['name']}.afa").read_text().split("\n")
        assert {len(row) for row in alignment[1::2]} <= {26}
        shapes.append(relaxed)
    assert shapes[0] != shapes[1]  # the structure depends on the sequence
    # 'one' is the start of a protein of the set, so the search must find that one at least.
    assert found["proteins"][0]["homologs"] >= 1


def same_bytes(first: Path, second: Path) -> bool:
    """Say whether all result files of two runs are the same."""
    names = sorted(path.name for path in first.glob("*.[pa][df][ba]"))
    assert names
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@needs_fold
def test_fold_writes_the_same_structures_when_two_run_at_once(tmp_path: Path, start: Start) -> None:
    (tmp_path / "in.fasta").write_text(TWO_PROTEINS)
    outs = [tmp_path / "a", tmp_path / "b"]
    runs = [start("fold", tmp_path / "in.fasta", "--out", out, "--device", "cpu", *SMALL_FOLD) for out in outs]
    outputs = [finish(process) for process in runs]
    assert "2 structures" in outputs[0]
    check_fold(outs[0], "fold")
    assert same_bytes(*outs)


@needs_fold_jax
def test_fold_jax_writes_the_same_structures_when_two_run_at_once(tmp_path: Path, start: Start) -> None:
    (tmp_path / "in.fasta").write_text(TWO_PROTEINS)
    outs = [tmp_path / "a", tmp_path / "b"]
    runs = [start("fold_jax", tmp_path / "in.fasta", "--out", out, *SMALL_FOLD) for out in outs]
    outputs = [finish(process) for process in runs]
    assert "2 structures" in outputs[0]
    check_fold(outs[0], "fold_jax")
    assert same_bytes(*outs)


@needs_train
def test_training_resumes_bit_by_bit_and_refuses_what_it_cannot_resume(tmp_path: Path, start: Start) -> None:
    import torch

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    through = start("train", "--out", whole, "--steps", 7, *SMALL_TRAIN)
    finish(start("train", "--out", parts, "--steps", 3, *SMALL_TRAIN))
    # Who prepares the batches must not matter either.
    output = finish(start("train", "--out", parts, "--steps", 7, "--resume", "--workers", 1, *SMALL_TRAIN))
    assert "from step 3 to 7" in output
    finish(through)
    one, two = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, parts))
    assert (one["step"], one["losses"]) == (two["step"], two["losses"])
    assert len(summary(parts)["losses"]) == 7
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    for parameter, state in one["optimizer"]["state"].items():
        assert all(torch.equal(state[name], two["optimizer"]["state"][parameter][name]) for name in state)

    (tmp_path / "checkpoint.pt").write_bytes((parts / "checkpoint.pt").read_bytes()[:1000])
    (tmp_path / "short.fasta").write_text(">a\nMKVL\n")
    resume = ["--resume", *SMALL_TRAIN, "--out"]
    check_refused(
        ("train", "there is no checkpoint", [*resume, str(tmp_path / "new")]),
        ("train", "or damaged", [*resume, str(tmp_path)]),
        ("train", "was made with --width 32, not 64", [*resume, str(parts), "--width", "64"]),
        ("train", "beyond --steps 1", [*resume, str(parts), "--steps", "1"]),
        ("train", "nothing to learn from", ["--out", str(tmp_path), "--database", str(tmp_path / "short.fasta")]),
        ("train", "0 is out of range: at least 1", ["--steps", "0"]),
        ("train", "nan is out of range", ["--rate", "nan"]),
    )


@needs_detect
def test_detect_writes_an_annotated_video_of_the_same_frames(tmp_path: Path, start: Start) -> None:
    import cv2

    small = ["--frames", "12", "--batch", "5", "--layers", "1", "--width", "64", "--device", "cpu"]
    assert "frames a second" in finish(start("detect", "--out", tmp_path, *small))
    found = summary(tmp_path)
    assert (found["frames"], found["frames_per_second"] > 0) == (12, True)
    detections = json.loads((tmp_path / "detections.json").read_text())
    assert (len(detections), sum(map(len, detections))) == (12, found["detections"])
    assert found["detections"] > 0
    for detection in (entry for frame in detections for entry in frame):
        left, top, right, bottom = detection["box"]
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 272
        assert 0 < detection["score"] <= 1
        assert 0 <= detection["margin"] <= detection["score"]
    video = cv2.VideoCapture(str(tmp_path / "annotated.mp4"))
    frames = 0
    while True:
        decoded, frame = video.read()
        if not decoded:
            break
        assert frame.shape == (272, 640, 3)
        frames += 1
    video.release()
    assert frames == 12


@needs_fold
@needs_detect
def test_fold_and_detect_refuse_bad_input_in_one_line(tmp_path: Path) -> None:
    files = {
        "empty": "",
        "prose": "no sequence here",
        "digits": ">a\nMKV1\n",
        "short": ">a\nM\n",
        "long": ">a\n" + "M" * 1023,
        "twins": ">a b\nMKVL\n>a c\nMKVL\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    path = {name: str(tmp_path / name) for name in [*files, "bytes", "missing"]}
    check_refused(
        ("fold", "missing: No such file", [path["missing"]]),
        ("fold", "is empty", [path["empty"]]),
        ("fold", "must begin with a line such as '>NAME'", [path["prose"]]),
        ("fold", "'1' at residue 4", [path["digits"]]),
        ("fold", "at least 2 are needed", [path["short"]]),
        ("fold", "at most 1022", [path["long"]]),
        ("fold", "two sequences are named 'a'", [path["twins"]]),
        ("fold", "no text", [path["bytes"]]),
        ("fold", "--width 100 is not a multiple of 64", ["--width", "100"]),
        ("fold", "sees no CUDA device", ["--device", "cuda"]),
        ("fold", "cannot create the output directory", ["--device", "cpu", "--out", path["short"]]),
        ("fold", "invalid choice: 'tpu'", ["--device", "tpu"]),
        ("fold", "-1 is out of range", ["--seed", "-1"]),
        ("detect", "no such file", [path["missing"]]),
        ("detect", "is not a video", [path["prose"]]),
        ("detect", "sees no CUDA device", ["--device", "cuda"]),
        ("detect", "0 is out of range", ["--frames", "0"]),
    )


@needs_fold_jax
def test_fold_jax_refuses_bad_input_in_one_line(tmp_path: Path, start: Start) -> None:
    (tmp_path / "set").write_text("garbage")
    (tmp_path / "in.fasta").write_text(TWO_PROTEINS)
    bad_set = [str(tmp_path / "in.fasta"), "--database", str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    check_refused(
        ("fold_jax", "No such file", ["nowhere.fasta"]),
        ("fold_jax", "JAX has no such device here", ["--device", "cuda"]),
        ("fold_jax", "cannot read the protein set", bad_set + SMALL_FOLD),
        ("fold_jax", "'much' is not a whole number", ["--layers", "much"]),
    )
    refused = start("fold_jax", "nowhere.fasta")
    output, errors = refused.communicate(timeout=240)
    assert (refused.returncode, output) == (2, "")  # the exit status of the process, not only main's result
    assert len(errors.splitlines()) == 1


@needs("torch", "jax")
def test_the_workloads_know_nothing_of_acb() -> None:
    for source in WORKLOADS.glob("*.py"):
        imports = [line for line in source.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
        assert not [line for line in imports if "acb" in line], source.name


@pytest.fixture
def workload_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a module of the workloads as their programs do, and forget it afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(WORKLOADS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if (WORKLOADS / f"{name}.py").exists():
            del sys.modules[name]


@needs("pyhmmer")
def test_the_search_finds_a_family_and_aligns_it_to_the_query(workload_modules: Any, tmp_path: Path) -> None:
    fasta, homology = workload_modules("fasta"), workload_modules("homology")
    protein = next(p for p in fasta.read_fasta(WORKLOADS / "proteins.fasta") if p.name == "HG003687_137")
    alignment = homology.Database(fasta.bundled_proteins()).search(protein)
    assert alignment.targets == 2122
    assert alignment.rows.shape == (len(alignment.names), len(protein))
    assert (alignment.rows[0] == protein.types()).all()
    itself = next(i for i, name in enumerate(alignment.names) if name.startswith("938293.PRJEB85.HG003687_137/"))
    assert (alignment.rows[itself] == alignment.rows[0]).all()
    assert len(alignment.names) > 4  # its family: glutaredoxins and their like
    profile = alignment.profile()
    assert profile.sum(axis=1) == pytest.approx(1.0)
    assert (profile[range(len(protein)), protein.types()] > 0).all()


@needs("openmm")
def test_relaxation_mends_a_torn_chain(workload_modules: Any) -> None:
    import numpy as np

    torn = np.random.default_rng(1).uniform(-8, 8, (12, 4, 3))
    sure = np.full(12, 90.0)
    first = workload_modules("relax").relax(torn, sure, seed=3, steps=500)
    assert first.violations == 0
    assert first.energy_after < first.energy_before
    again = workload_modules("relax").relax(torn, sure, seed=3, steps=500)
    assert (again.backbone == first.backbone).all()


@needs_fold_jax
def test_weights_of_another_seed_give_another_structure(workload_modules: Any) -> None:
    import numpy as np

    evoformer = workload_modules("evoformer")
    size = evoformer.Size(layers=1, width=64, blocks=1)
    features = evoformer.pad(np.arange(18, dtype=np.int32)[None], 2, 20)
    shapes = [np.asarray(evoformer.predict(evoformer.initialise(size, seed), *features)[0]) for seed in (1, 1, 2)]
    assert (shapes[0] == shapes[1]).all()
    assert np.abs(shapes[0] - shapes[2]).max() > 1
    wider = evoformer.pad(np.arange(18, dtype=np.int32)[None], 3, 32)
    padded = np.asarray(evoformer.predict(evoformer.initialise(size, 1), *wider)[0])
    assert padded[:18] == pytest.approx(shapes[0][:18], abs=0.05)  # padding does not count


@needs("torch", "pyhmmer")
def test_a_batch_depends_on_its_number_alone(workload_modules: Any) -> None:
    import torch

    module, fasta = workload_modules("masked_proteins"), workload_modules("fasta")
    proteins = fasta.read_fasta(fasta.bundled_proteins()[1])
    batches = module.MaskedProteins(proteins, batch=8, length=40, seed=5)
    later = batches[3]
    assert not torch.equal(batches[2][0], later[0])
    for one, two in zip(batches[3], later, strict=True):
        assert torch.equal(one, two)
    tokens, targets = later
    guessed = targets != module.MaskedProteins.IGNORED
    assert 0 < guessed.sum() < guessed.numel() * 0.3
    assert (targets[guessed] < module.MaskedProteins.UNKNOWN).all()
    assert (tokens[guessed] == module.MaskedProteins.MASK).float().mean() > 0.5


@needs("torch")
def test_a_repeat_has_no_complexity(workload_modules: Any) -> None:
    import numpy as np

    module = workload_modules("masked_proteins")
    repeat, rich = np.zeros(30, dtype=np.int64), np.arange(20)
    assert (module.complexity(repeat) == 0).all()
    assert (module.complexity(rich) > 3).all()
    assert module.complexity(np.array([4])).tolist() == [0]
