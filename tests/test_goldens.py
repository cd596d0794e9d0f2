"""The numbers of one small pair are those of the frozen code, bit for bit, on a machine that has
them frozen.
"""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent / "goldens" / "golden.py"


@pytest.fixture(scope="module")
def golden():
    spec = importlib.util.spec_from_file_location("golden", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_small_pair_has_the_frozen_numbers(golden, tmp_path):
    frozen = PATH.parent / f"{golden.machine()}.json"
    if not frozen.is_file():
        pytest.skip(
            "no golden results of this kind of processor: tests/goldens/golden.py freeze makes them"
        )
    old = json.loads(frozen.read_text())["small"]
    assert golden.differences(old, golden.small(tmp_path)) == []


def test_a_number_that_differs_is_named(golden):
    old = {"attack": {"correct": "a", "confidence": "b"}, "encoder": "c"}
    new = {"attack": {"correct": "a", "confidence": "x", "k": "y"}}
    assert golden.differences(old, new) == [
        "attack: confidence differs",
        "attack: k is new",
        "encoder is missing",
    ]


def test_times_are_no_numbers_to_compare_and_the_last_digit_is(golden):
    import pandas as pd

    one = pd.DataFrame({"score": [0.1], "seconds": [1.0]})
    other = pd.DataFrame({"score": [0.1], "seconds": [2.0]})
    later = pd.DataFrame({"score": [0.1 + 2e-17], "seconds": [2.0]})
    assert golden.columns(one) == golden.columns(other)
    assert golden.columns(one) != golden.columns(later)
