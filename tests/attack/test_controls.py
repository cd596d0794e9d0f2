"""Negative and positive controls of the whole attack (paper.md's N1-N4 and E2), at 99.9 %
intervals.
"""

import importlib.util
from pathlib import Path

import pytest

from dejavu_utils.attack import scoring

spec = importlib.util.spec_from_file_location(
    "controls", Path(__file__).parent.with_name("controls.py")
)
controls = importlib.util.module_from_spec(spec)
spec.loader.exec_module(controls)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["untrained encoders", "permuted public labels"])
def test_nothing_to_find_is_not_found(name, seed):
    truth, make = controls.CONTROLS[name]
    row = scoring.score(make(seed), 100, level=0.999)
    assert row["low"] <= truth <= row["high"]
    assert row["high"] - row["low"] < 0.4, "an interval that covers everything proves nothing"


def test_the_same_encoder_twice_scores_exactly_zero():
    table = controls.CONTROLS["same encoder twice"][1](0)
    assert [scoring.score(table, p)["score"] for p in (5, 20, 100)] == [0.0, 0.0, 0.0]


def test_planted_memory_scores_one():
    row = scoring.score(controls.CONTROLS["planted memory (positive)"][1](0), 100)
    assert row["score"] == 1.0 and row["low"] == 1.0


def test_repeating_counts_the_misses():
    row = controls.repeat("planted memory (positive)", 3)
    assert row["interval misses"] == 0 and row["fits"] and row["repeats"] == 3
