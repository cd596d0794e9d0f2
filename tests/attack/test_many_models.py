"""One-model and many-model references on tiny trained encoders: who learned from whom, and that
tables pair up.
"""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from dejavu_utils import store
from dejavu_utils.attack import many_model, one_model, references, scoring
from dejavu_utils.models import launch
from dejavu_utils.models import pairs as build

PARAMS = {
    "seeds": [0],
    "dataset": "scenes",
    "rhos": [0.2],
    "criteria": ["vicreg", "supervised"],
    "epochs": [0, 1],
    "k": 5,
    "sizes": {"classes": 3, "attacked": 8, "shared": 0, "public": 12, "probe": 4, "control": 8},
    "recipe": {"encoder": "small4", "projector": "8-8", "batch": 8, "size": 16},
    "crop": {"kind": "periphery", "min_side": 8},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = build.make(PARAMS, tmp_path_factory.mktemp("runs"))
    launch.fit_all(build.jobs(made), workers=1)
    return made


@pytest.fixture(scope="module")
def halves(pairs):
    made = many_model.halves(pairs[0], 8)
    launch.fit_all(build.jobs(made), workers=1)
    return made


@pytest.mark.parametrize("kind", one_model.KINDS)
def test_one_model_table_has_the_targets_rows_and_scores(pairs, kind):
    two = references.two_model(pairs[0], 1, 5).query("layer == 'projector'")
    one = one_model.table(pairs[0], 1, 5, kind)
    keys = ["direction", "id"]
    same = [
        each[each["role"] == "target"].sort_values(keys).reset_index(drop=True)[two.columns]
        for each in (two, one)
    ]
    pd.testing.assert_frame_equal(*same)
    assert (
        scoring.score(one, resamples=20)["n"]
        == scoring.four_way(one, resamples=20)["n"]
        == len(two) // 2
    )
    assert scoring.difference(one, two, resamples=20)["n"] == len(two) // 2
    bottom = -np.log(3) - 1e-9
    assert one[one["role"] == "reference"]["confidence"].between(bottom, 1e-9).all()


def test_no_image_is_judged_by_a_classifier_that_saw_it_and_control_images_teach_nobody(
    pairs, monkeypatch, tmp_path
):
    taught, asked = {}, {}
    pair = dataclasses.replace(pairs[0], folder=tmp_path)  # no table is there yet
    known = {}
    for side in "ab":
        images, rects = references.cropped(pair.parts[side], pair.crop)
        for name, crop in zip(images.ids, images.squares(16, rects), strict=True):
            known[crop.numpy().tobytes()] = (side, name)

    def spy(*_, **__):
        def fit(x, labels, classes, name):
            taught[name] = {known.get(one.numpy().tobytes()) for one in x}

            def judge(other):
                asked[name] = [known.get(one.numpy().tobytes()) for one in other]
                return np.full((len(other), classes), 1 / classes)

            return judge

        return fit

    monkeypatch.setattr(one_model, "network", spy)
    one_model.table(pair, 1, 5, "resnet")
    assert len(taught) == 4 and None not in set().union(*taught.values())
    for name, learned in taught.items():
        assert not learned & set(asked[name]) and len({side for side, _ in learned}) == 1
        assert None in asked[name]  # images of the control set are judged by every classifier
    everyone = [image for each in asked.values() for image in each if image]
    assert sorted(everyone) == sorted(known.values())


def test_all_criteria_share_one_table_of_classifiers(pairs, monkeypatch):
    one_model.table(pairs[0], 1, 5, "naive_bayes")
    monkeypatch.setattr(one_model, "naive_bayes", lambda *a: pytest.fail("classified again"))
    other = one_model.table(pairs[1], 1, 5, "naive_bayes")
    assert set(other["criterion"]) == {"supervised"}
    with pytest.raises(ValueError, match='kind "bayes"; expected one of resnet, naive_bayes'):
        one_model.table(pairs[0], 1, 5, "bayes")


def test_halves_train_on_half_of_both_sets_and_the_rest(pairs, halves):
    for i, pair in enumerate(halves):
        drawn = many_model.fold(pairs[0], i)
        pixels = [store.read_tensors(pair.jobs[model].pixels)[0]["pixels"] for model in "AB"]
        seen = [{one.numpy().tobytes() for one in each} for each in pixels]
        for side, fold in drawn.items():
            for half, picture in zip(fold, pairs[0].parts[side].stacked, strict=True):
                assert (
                    picture.numpy().tobytes() in seen[half]
                    and picture.numpy().tobytes() not in seen[1 - half]
                )
        assert len(seen[0]) == len(seen[1]) == 24
    folders = {job.folder for job in build.jobs([pairs[0], many_model.again(pairs[0], 1), *halves])}
    assert len(folders) == 2 + 2 + 8


def test_many_model_table_counts_who_saw_the_image(pairs, halves):
    table = many_model.table(pairs[0], halves, 1, 5)
    assert (table["encoders"] == 4).all() and table["id"].nunique() * 2 == len(table)
    name, side = table["id"].iloc[0], table["direction"].iloc[0]
    inside = []
    for i, pair in enumerate(halves):
        rows = (
            references.two_model(pair, 1, 5)
            .query("layer == 'projector' and id == @name")
            .set_index("role")
        )
        model = "AB"[many_model.fold(pairs[0], i)[side][list(pairs[0].parts[side].ids).index(name)]]
        inside.append(rows.loc["target" if model == side.upper() else "reference", "correct"])
    assert table.set_index(["id", "role"]).loc[(name, "target"), "correct"] == np.mean(inside)


def test_another_start_judges_the_same_images_and_pairs_up(pairs):
    again = many_model.again(pairs[0], 1)
    launch.fit_all(build.jobs([again]), workers=1)
    one, other = (references.at_layer(pair, 1, 5) for pair in (pairs[0], again))
    assert (one["confidence"] != other["confidence"]).any()
    assert scoring.difference(one, other, resamples=20)["n"] == len(one) // 2
    assert many_model.again(pairs[0], 0) is pairs[0]


def test_folds_of_a_class_are_even():
    ids, labels = np.array([f"i{i}" for i in range(60)]), np.repeat(np.arange(3), 20)
    fold = one_model.assign(ids, labels, 2, "0/half 1")
    assert (np.bincount(labels * 2 + fold) == 10).all()
    assert (fold != one_model.assign(ids, labels, 2, "0/half 2")).any()


@pytest.mark.parametrize("many", [2, 9])
def test_too_few_or_odd_encoders_are_an_error(pairs, many):
    with pytest.raises(
        ValueError, match=f"{many} encoders, 0 shared images; expected an even number from 8 on"
    ):
        many_model.halves(pairs[0], many)


def test_a_shared_part_is_an_error(pairs):
    shared = dataclasses.replace(
        pairs[0], parts=pairs[0].parts | {"shared": pairs[0].parts["probe"]}
    )
    with pytest.raises(ValueError, match="12 shared images"):
        many_model.halves(shared, 8)
