"""Measures without labels: by hand, on planted activations, and on pairs that remember nothing."""

import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest
import torch

from dejavu_utils.attack import label_free, scoring
from dejavu_utils.models import pairs
from dejavu_utils.models.encoders import Encoder

PARAMS = {
    "dataset": "scenes",
    "epochs": [0],
    "recipe": {"encoder": "small4", "projector": "8-8", "batch": 8, "size": 16},
    "sizes": {"classes": 3, "attacked": 10, "shared": 0, "public": 4, "probe": 4, "control": 20},
    "crop": {"kind": "periphery", "rule": "paper", "min_side": 8},
}


@functools.cache
def fresh(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder("small4", "8-8", 16).eval()


class Untrained(pairs.Pair):
    def encoder(self, model, epoch):
        return fresh("AB".index(model))


class Twins(pairs.Pair):
    def encoder(self, model, epoch):
        return fresh(0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return pairs.one(PARAMS, tmp_path_factory.mktemp("runs"), "vicreg", 0.2, 0)


def test_unit_mem_of_three_images_and_two_units_by_hand():
    """Unit 1: 6 against the mean of 1 and 3: (6 - 2) / (6 + 2). Unit 2 fires for one."""
    activations = torch.tensor([[1.0, 0.0], [6.0, 0.0], [3.0, 5.0]], dtype=torch.float64)
    assert label_free.unit_mem(activations).tolist() == [0.5, 1.0]


def test_units_that_answer_alike_or_never_have_none():
    assert label_free.unit_mem(torch.ones(4, 2)).tolist() == [0, 0]
    assert label_free.unit_mem(torch.zeros(4, 2)).tolist() == [0, 0]
    for wrong in (torch.ones(1, 2), -torch.ones(3, 2)):
        with pytest.raises(ValueError, match="two images or more"):
            label_free.unit_mem(wrong)


def test_unit_mem_equals_a_loop_in_float64():
    activations = torch.rand(30, 7, generator=torch.Generator().manual_seed(0)).double()
    found = label_free.unit_mem(activations)
    for unit in range(7):
        mu = activations[:, unit].tolist()
        best = max(range(30), key=mu.__getitem__)
        rest = sum(value for i, value in enumerate(mu) if i != best) / 29
        assert found[unit].item() == pytest.approx((mu[best] - rest) / (mu[best] + rest), abs=1e-12)


def test_a_table_of_two_measures_is_the_same_again_and_without_gap_for_one_encoder_twice(pair):
    found = label_free.table.__wrapped__(Untrained(**vars(pair)), 0, 4)
    again = label_free.table.__wrapped__(Untrained(**vars(pair)), 0, 4)
    pd.testing.assert_frame_equal(found, again)
    assert list(found["measure"]) == ["alignment", "UnitMem"] and (found["n"] == 60).all()
    assert found.loc[0, "target"] < 0 < found.loc[1, "target"] < 1
    assert (found["error"] > 0).all()
    # Own and other images differ, and the encoder does not: what is left is exactly nothing.
    same = label_free.table.__wrapped__(Twins(**vars(pair)), 0, 4)
    np.testing.assert_allclose(same["difference"], 0, atol=1e-12)


def test_a_control_judges_images_of_neither_set(pair):
    found = label_free.table.__wrapped__(Untrained(**vars(pair)), 0, 2, "control")
    assert (found["n"] == 60).all() and (found["attacked"] == "control").all()


def test_a_table_is_kept_and_every_number_of_views_has_its_own(pair, tmp_path):
    where = dataclasses.replace(Untrained(**vars(pair)), folder=tmp_path)
    pd.testing.assert_frame_equal(label_free.table(where, 0, 2), label_free.table(where, 0, 2))
    label_free.table(where, 0, 3)
    assert len(list(tmp_path.glob("label_free-0000-*.parquet"))) == 2


def planted(seed, n=100, units=40, boost=0.0):
    """Return activations {set: {model: (n, units)}}: an encoder answers more strongly to the first
    of its own images, by `boost`; images of one set are alike for both encoders.
    """
    random = np.random.default_rng(seed)
    found = {}
    for side, own in (("a", "A"), ("b", "B")):
        image = random.lognormal(0, 0.3, (n, 1))
        found[side] = {}
        for model in "AB":
            values = image * random.lognormal(0, 0.4, (n, units))
            if model == own:
                values[np.arange(units) % n, np.arange(units)] *= 1 + boost
            found[side][model] = torch.from_numpy(values)
    return found


def measured(found, n=100):
    def statistic(rows):
        value = {
            (side, model): float(label_free.unit_mem(values[rows[side]]).mean())
            for side, by_model in found.items()
            for model, values in by_model.items()
        }
        own = value["a", "A"] + value["b", "B"]
        return own / 2, (value["a", "B"] + value["b", "A"]) / 2

    return label_free.contrast(statistic, n, halves=60)


def test_planted_units_are_found_and_noise_is_not():
    sure = measured(planted(0, boost=5.0))
    assert sure["difference"] > 5 * sure["error"] and sure["target"] > sure["reference"]
    misses = 0
    for seed in range(60):
        row = measured(planted(seed))
        misses += abs(row["difference"]) > 1.96 * row["error"]
    assert misses <= 9  # 3 expected; more than 9 of 60 in one of 1,000 sets of tests


def rows(criterion, values, error=0.01, measure="UnitMem", n=100):
    return pd.DataFrame(
        {
            "criterion": criterion,
            "measure": measure,
            "layer": "backbone",
            "attacked": "attacked",
            "target": 0.5,
            "reference": 0.4,
            "difference": values,
            "error": error,
            "n": n,
            "seed": range(len(values)),
        }
    )


def test_the_sentence_counts_what_the_table_shows():
    parts = [("supervised", [0.1]), ("vicreg", [0.2]), ("simclr", [0.05]), ("byol", [0.11])]
    table = label_free.summary(pd.concat([rows(*part) for part in parts]))
    row = table.set_index("criterion").loc["vicreg"]
    assert row["minus_supervised"] == pytest.approx(0.1)
    assert row["minus_supervised_low"] == pytest.approx(0.1 - 1.96 * 0.01 * 2**0.5)
    assert row["low"] == pytest.approx(0.2 - 1.96 * 0.01)
    text = label_free.sentence(table)
    assert "3 self-supervised criteria" in text and "over images of these encoders" in text
    assert "by UnitMem 1 above it, 1 below, 1 undecided" in text
    alone = label_free.summary(rows("vicreg", [0.2]))
    assert "needs the supervised baseline" in label_free.sentence(alone)


def test_from_two_seeds_on_the_interval_over_seeds_is_the_one_that_counts():
    values = {"supervised": [0.1, 0.1, 0.1], "vicreg": [0.2, 0.1, 0.3]}
    table = label_free.summary(pd.concat([rows(*one) for one in values.items()]))
    over = table[table["criterion"] == "vicreg"].set_index("over")
    t = scoring.over_seeds([0.2, 0.1, 0.3])
    assert over.loc["seeds", ["difference", "low", "high"]].tolist() == [
        t["mean"],
        t["low"],
        t["high"],
    ]
    assert over.loc["images", "low"] == pytest.approx(0.2 - 1.96 * 0.01 / 3**0.5)
    assert "over seeds" in label_free.sentence(table) and "1 undecided" in label_free.sentence(
        table
    )


def test_few_images_have_no_interval():
    table = label_free.summary(rows("vicreg", [0.2], n=40))
    assert np.isnan(table["low"].iloc[0]) and table["difference"].iloc[0] == 0.2
