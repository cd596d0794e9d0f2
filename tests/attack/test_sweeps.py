"""Sweeps without training: which attacks they ask for, and rows that equal the attack done
alone.
"""

import pytest

from dejavu_utils.attack import references, scoring, sweeps
from dejavu_utils.models import launch
from dejavu_utils.models import pairs as build

PARAMS = {
    "seeds": [0],
    "dataset": "scenes",
    "rhos": [0.2],
    "criteria": ["simclr"],
    "epochs": [0, 1],
    "sizes": {"classes": 4, "attacked": 12, "shared": 0, "public": 20, "probe": 5, "control": 5},
    "recipe": {"encoder": "small4", "projector": "16-16-16", "batch": 16},
    "crop": {
        "kind": "periphery",
        "rule": "paper",
        "min_side": 8,
        "fraction": 0.3,
        "corner": "lower-left",
    },
}
WANTED = {
    "layer": ["projector", "block1", "backbone"],
    "k": [1, 5],
    "fraction": [0.3],
    "min_side": [4, 12],
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = build.make(PARAMS, tmp_path_factory.mktemp("runs"))
    launch.fit_all(build.jobs(made), workers=1)
    return made


def test_rows_equal_the_attack_done_alone(pairs):
    table = sweeps.attacks(pairs, 1, 5, WANTED)
    found = (
        sweeps.scores(table, resamples=20)
        .query("top == 1 and p == 100")
        .set_index(["sweep", "value"])
    )
    assert list(found.index) == [
        ("layer", "projector"),
        ("layer", "block1"),
        ("layer", "backbone"),
        ("k", "1"),
        ("k", "5"),
        ("min_side", "4"),
        ("min_side", "12"),
        ("fraction", "0.3"),
    ]
    block = references.two_model(pairs[0], 1, 5, layers=("block1",))
    assert found.loc[("layer", "block1"), "score"] == scoring.score(block, resamples=20)["score"]
    assert found.loc[("k", "5"), "score"] == found.loc[("layer", "projector"), "score"]
    assert (
        found.loc[("min_side", "4"), "n"] > found.loc[("min_side", "12"), "n"]
    )  # fewer images have a large crop
    corner = references.two_model(
        pairs[0], 1, 5, layers=("projector",), crop=PARAMS["crop"] | {"kind": "corner"}
    )
    assert found.loc[("fraction", "0.3"), "score"] == scoring.score(corner, resamples=20)["score"]


def test_top5_is_not_below_top1(pairs):
    found = sweeps.scores(sweeps.attacks(pairs, 1, 5, {"k": [5]}), resamples=20).set_index(
        ["top", "p"]
    )
    assert found.loc[(5, 100), "target"] >= found.loc[(1, 100), "target"]


def test_classes_average_to_the_whole(pairs):
    table = references.two_model(pairs[0], 1, 5, layers=("projector",))
    found = sweeps.per_class(table, pairs[0].parts["public"].classes, resamples=20)
    assert len(found) == 4 and found["n"].sum() == scoring.score(table, resamples=20)["n"]
    assert list(found["score"]) == sorted(found["score"], reverse=True)


def test_unknown_sweep_names_what_there_is():
    with pytest.raises(
        ValueError, match="crop_size is not known; there are layer, k, min_side, fraction"
    ):
        sweeps.variants({"k": 5, "crop": {}}, {"crop_size": [1]})
