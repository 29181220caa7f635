"""What the parts of benchmarks.gpu make of what they have measured: agreement of outputs, frames a second, spread."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.gpu_parts import agreement, video
from benchmarks.overhead import _median_within

ATOM = "ATOM      1  {:<4}{} A{:4}    {:8.3f}{:8.3f}{:8.3f}  1.00{:6.2f}           {}  "


def pdb(*coordinates: float, atom: str = "N", residue: str = "ALA", number: int = 1, confidence: float = 50) -> bytes:
    line = ATOM.format(atom, residue, number, *coordinates, confidence, atom[0])
    return (line + "\nTER\nEND\n").encode()


def test_structures_agree_bit_for_bit_or_within_the_files_last_digits() -> None:
    one = {"a_unrelaxed.pdb": pdb(1, 2, 3), "a_relaxed.pdb": pdb(1, 2, 3)}
    assert agreement.structures(one, dict(one)) == 0.0
    assert agreement.structures(one, one | {"a_unrelaxed.pdb": pdb(1.001, 2, 3)}) == agreement.SPREAD
    assert agreement.structures(one, one | {"a_relaxed.pdb": pdb(9, 2, 3)}) == agreement.SPREAD
    assert agreement.structures(one, one | {"a_unrelaxed.pdb": pdb(1.002, 1.998, 3)}) == agreement.SPREAD
    assert agreement.structures(one, one | {"a_unrelaxed.pdb": pdb(1.003, 2, 3)}) is None
    assert agreement.structures(one, {"a_unrelaxed.pdb": pdb(1, 2, 3)}) is None
    assert agreement.structures({}, {}) is None


@pytest.mark.parametrize("change", [{"atom": "CB"}, {"residue": "TRP"}, {"number": 9}, {"confidence": 10}])
def test_structures_differ_whose_atoms_or_confidences_do(change: dict[str, Any]) -> None:
    one, other = ({"a_unrelaxed.pdb": pdb(1, 2, 3, **changes)} for changes in ({}, change))
    assert agreement.structures(one, other) is None


def test_structures_agree_where_confidences_differ_by_their_last_digits() -> None:
    one, other = ({"a_unrelaxed.pdb": pdb(1, 2, 3, confidence=c)} for c in (50, 50.02))
    assert agreement.structures(one, other) == agreement.SPREAD


def found(score: float, left: int = 1, frames: int = 2, kind: int = 5, margin: float = 0.1) -> dict[str, bytes]:
    detection = {"box": [left, 2, 3, 4], "score": score, "class": kind, "margin": margin}
    return {"detections.json": json.dumps([[detection], []][:frames]).encode(), "annotated.mp4": b"%f" % score}


def test_detections_agree_where_only_the_last_digits_of_scores_differ() -> None:
    assert agreement.detections(found(0.5), found(0.5)) == 0.0
    assert agreement.detections(found(0.5), found(0.5001)) == agreement.SCORE
    assert agreement.detections(found(0.5), found(0.51)) is None
    assert agreement.detections(found(0.5), found(0.5, left=0)) is None
    assert agreement.detections(found(0.5), found(0.5, frames=1)) is None
    assert agreement.detections({}, {}) is None


def test_detections_agree_in_their_class_unless_another_is_as_likely() -> None:
    assert agreement.detections(found(0.5), found(0.5, kind=6)) is None
    assert agreement.detections(found(0.5, margin=0.001), found(0.5, kind=6)) is None
    assert agreement.detections(found(0.5, margin=0.001), found(0.5, kind=6, margin=0.001)) == agreement.SCORE


def test_detections_differ_when_a_frame_has_one_more() -> None:
    both: Any = json.loads(found(0.5)["detections.json"])
    more = {"detections.json": json.dumps([both[0] * 2, []]).encode()}
    assert agreement.detections(found(0.5), more) is None


def trained(*losses: float, checkpoint: bytes = b"") -> dict[str, bytes]:
    return {"losses.json": json.dumps(losses).encode(), "checkpoint.pt": checkpoint}


def test_training_runs_agree_by_their_checkpoints_or_by_every_loss() -> None:
    assert agreement.training(trained(3, 2), trained(3, 2)) == 0.0
    assert agreement.training(trained(3, 2), trained(3, 2.001, checkpoint=b"x")) == agreement.LOSS
    assert agreement.training(trained(3, 2), trained(3, 2.1)) is None
    assert agreement.training(trained(3, 2), trained(3)) is None
    assert agreement.training(trained(3, 2), trained(3, float("nan"))) is None
    assert agreement.training({"checkpoint.pt": b"a"}, {"checkpoint.pt": b"b"}) is None


def test_frames_a_second_are_of_the_time_in_which_all_streams_were_at_work() -> None:
    fast = [(float(n), n + 1.0) for n in range(4)]  # 10 frames a second, from 0 to 4
    slow = [(2.0, 4.0), (4.0, 6.0)]  # 5 frames a second, from 2 to 6
    assert video._rates([fast]) == [video.BATCH]
    assert video._rates([fast, slow]) == [video.BATCH, video.BATCH / 2]
    assert video._rates([fast, [(5.0, 6.0)]]) == [0.0, 0.0]


@pytest.mark.parametrize("count", [1, 2, 5, 8, 40, 1000])
def test_the_median_lies_within_its_bounds(count: int) -> None:
    low, high = _median_within(count)
    assert 0 <= low <= (count - 1) / 2 <= high < count
    if count == 40:  # the exact interval by the binomial distribution: the 14th to the 27th sample
        assert (low, high) == (13, 26)
