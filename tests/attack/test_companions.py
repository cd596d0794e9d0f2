"""Other measures on the same encoders: naive oracles, what they must be where nothing or everything
is remembered.
"""

import dataclasses
import functools
import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from dejavu_utils.attack import companions, references
from dejavu_utils.models import pairs, train
from dejavu_utils.models import views as augment
from dejavu_utils.models.encoders import Encoder, embed

pytestmark = pytest.mark.usefixtures("any_number")

PARAMS = {
    "dataset": "scenes",
    "epochs": [0],
    "recipe": {"encoder": "small4", "projector": "8-8", "batch": 8, "size": 16},
    "sizes": {"classes": 3, "attacked": 8, "shared": 0, "public": 8, "probe": 6, "control": 8},
    "crop": {"kind": "periphery", "rule": "paper", "min_side": 8},
}


@functools.cache
def fresh(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder("small4", "8-8", 16).eval()


class Untrained(pairs.Pair):
    """A pair whose encoders were never trained, and so need no training."""

    def encoder(self, model, epoch):
        return fresh(10 * epoch + "AB".index(model))


class Twins(pairs.Pair):
    """A pair whose encoders are one and the same."""

    def encoder(self, model, epoch):
        return fresh(epoch)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return pairs.one(PARAMS, tmp_path_factory.mktemp("runs"), "vicreg", 0.2, 0)


@pytest.fixture(scope="module")
def found(pair):
    return companions.table(Untrained(**vars(pair)), 0, 3, views=4)


def planted(n=20, seeds=(0,), classes=4, **columns):
    """Return a table of 2 n images a seed; a column is `f(member, rng)` of all its rows, else
    noise.
    """
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        one = pd.DataFrame(
            [
                (f"{side}{i:04d}", i % classes, side, model, (side == "a") == (model == "A"))
                for side in "ab"
                for i in range(n)
                for model in "AB"
            ],
            columns=["id", "label", "direction", "model", "member"],
        )
        for name in (*companions.STATISTICS, *companions.GAPS):
            member = one["member"].to_numpy()
            one[name] = columns[name](member, rng) if name in columns else rng.normal(size=len(one))
        rows.append(one.assign(seed=seed, correct=rng.random(len(one)) < 0.5))
    return pd.concat(rows, ignore_index=True)


def test_a_row_for_every_image_and_encoder(pair, found):
    assert (found.groupby("id")["model"].agg("".join) == "AB").all()
    assert (found["member"] == (found["direction"].str.upper() == found["model"])).all()
    for side in "ab":
        assert set(found[found["direction"] == side]["id"]) <= set(pair.parts[side].ids)
    assert len(found) > 2 * 30 and set(found["epoch"]) == {0} and set(found["views"]) == {4}


def test_the_gap_is_target_minus_reference_of_the_attack(pair, found):
    attacked = references.two_model(Untrained(**vars(pair)), 0, 3).query("layer == 'projector'")
    wide = attacked.pivot(index="id", columns="role", values=["confidence", "correct"]).astype(
        float
    )
    own = found[found["member"]].set_index("id")
    for name in ("confidence", "correct"):
        lead = wide[name, "target"] - wide[name, "reference"]
        np.testing.assert_array_equal(own[f"{name}_gap"].astype(float), lead.loc[own.index])


def test_gaps_of_one_image_are_opposite_under_the_other_encoder(found):
    both = found[list(companions.GAPS)].to_numpy(float).reshape(-1, 2, 4)
    np.testing.assert_array_equal(both[:, 0], -both[:, 1])
    assert (np.abs(both[:, 0]).max(0) > 0).all()


def test_alignment_and_similarity_are_what_two_loops_find(pair, found):
    """One image, one view, one pair of views at a time, from the same draws."""
    images, recipe = pair.parts["a"], pair.jobs["A"].recipe
    ids = list(found[found["direction"] == "a"]["id"].unique())
    images = images.subset([list(images.ids).index(name) for name in ids])
    rng, how = train.stream(0, "companions a"), augment.Views(**recipe.views)
    sizes = torch.as_tensor(images.sizes)
    drawn = [
        augment.draw(kind, sizes, how, 16, rng) for kind in ("first", "second", "first", "second")
    ]
    for model in "AB":
        encoder = Untrained(**vars(pair)).encoder(model, 0)
        for i in (0, 5, len(ids) - 1):
            whole = embed(encoder, images.subset([i]).squares(16), ("projector",))["projector"][
                0
            ].double()
            with torch.no_grad():
                seen = [
                    encoder(augment.view(images.pixels[i : i + 1], 16, each.part(slice(i, i + 1))))[
                        0
                    ].double()
                    for each in drawn
                ]
            unit = [x / x.norm() for x in seen]
            alignment = -np.mean([float((x - whole / whole.norm()).norm()) for x in unit])
            similarity = np.mean([float(x @ y) for x, y in itertools.combinations(unit, 2)])
            row = found[(found["id"] == ids[i]) & (found["model"] == model)].iloc[0]
            assert row["alignment"] == pytest.approx(alignment, abs=1e-5)
            assert row["similarity"] == pytest.approx(similarity, abs=1e-5)


def test_views_that_are_the_image_itself_are_perfectly_consistent(pair):
    images, n = pair.parts["a"].subset(np.arange(4)), 4
    pixels = images.squares(16)
    none = augment.Views(scale_min=1.0, flip=0.0, jitter=0.0, grey=0.0, blur=0.0, solarize=0.0)
    drawn = augment.draw(
        "first", torch.full((n, 2), 16), none, 16, torch.Generator().manual_seed(0)
    )
    drawn = drawn._replace(rects=torch.tensor([[0, 0, 16, 16]] * n))
    values = companions.consistency(fresh(0), pixels, pixels, [drawn] * 3, "projector")
    np.testing.assert_allclose(values, [[0, 1]] * n, atol=1e-6)


def test_pictures_of_mixed_sizes_become_squares_as_in_training(pair):
    parts = dict(pair.parts)
    sizes = parts["b"].sizes.copy()
    sizes[0] = 47
    parts["b"] = dataclasses.replace(parts["b"], sizes=sizes)
    mixed, native = (
        companions.table.__wrapped__(Untrained(**vars(pair) | more), 0, 3, 2)
        for more in ({"parts": parts}, {})
    )
    assert np.isfinite(mixed[list(companions.STATISTICS)].astype(float)).all(None)
    a = [each[each["direction"] == "a"] for each in (mixed, native)]
    assert (a[0]["confidence"].to_numpy() == a[1]["confidence"].to_numpy()).all()
    assert (a[0]["similarity"].to_numpy() != a[1]["similarity"].to_numpy()).any()


def test_one_encoder_twice_has_no_gap_and_no_auc(pair, tmp_path):
    same = companions.table(Twins(**vars(pair) | {"folder": tmp_path}), 0, 3, views=3)
    assert (same[list(companions.GAPS)] == 0).all(None)
    rows = companions.summary(same, resamples=20).query("encoders == 2")
    assert (rows[["auc", "low", "high"]] == 0.5).all(None)


def test_control_images_are_members_in_name_only(pair, found):
    rows = companions.table(Untrained(**vars(pair)), 0, 3, views=4, attacked="control")
    assert set(rows["id"]) <= set(pair.parts["control"].ids) and set(rows["attacked"]) == {
        "control"
    }
    assert set(rows["direction"]) == {"a", "b"} and np.isfinite(rows["alignment"]).all()


def test_every_layer_has_its_own_table(pair, found):
    other = companions.table(Untrained(**vars(pair)), 0, 3, views=2, layer="block1")
    assert set(other["layer"]) == {"block1"} and not np.allclose(
        other["alignment"], found["alignment"]
    )
    with pytest.raises(ValueError, match='layer "block9" is not in this encoder'):
        companions.table(Untrained(**vars(pair)), 0, 3, layer="block9")


def test_computed_twice_the_same_and_read_the_third_time(pair, found, monkeypatch):
    again = companions.table.__wrapped__(Untrained(**vars(pair)), 0, 3, 4)
    pd.testing.assert_frame_equal(again, found, check_dtype=False)
    monkeypatch.setattr(companions, "consistency", lambda *a: pytest.fail("computed again"))
    pd.testing.assert_frame_equal(companions.table(Untrained(**vars(pair)), 0, 3, views=4), found)


def test_auc_and_correlation_are_those_of_the_libraries():
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score

    tied = {
        "confidence": lambda member, rng: rng.integers(0, 5, len(member)) + member,
        "alignment_gap": lambda member, rng: rng.integers(0, 3, len(member)),
    }
    one = planted(**tied, seeds=(0, 1))
    auc = companions.summary(one, resamples=0).set_index("statistic")["auc"]
    for name in companions.STATISTICS:
        want = np.mean(
            [
                roc_auc_score(part["member"], part[name])
                for _, part in one.groupby(["seed", "model"])
            ]
        )
        assert auc[name] == pytest.approx(want, abs=1e-12)
    names = ("confidence", "alignment_gap", "correct")
    for row in companions.correlations(one, names, resamples=0).itertuples():
        want = np.mean(
            [
                spearmanr(part[row.one], part[row.two]).statistic
                for _, part in one[one["member"]].groupby(["seed", "model"])
            ]
        )
        assert row.correlation == pytest.approx(want, abs=1e-12)


def test_what_is_remembered_is_told_apart_and_what_is_not_is_chance():
    sure = planted(similarity=lambda member, rng: member + rng.random(len(member)) / 2)
    rows = companions.summary(sure, resamples=50).set_index("statistic")
    assert tuple(rows.loc["similarity", ["auc", "low", "high", "n", "seeds"]]) == (1, 1, 1, 40, 1)
    assert rows.loc["alignment", "low"] < 0.5 < rows.loc["alignment", "high"]


def test_intervals_miss_the_truth_as_often_as_they_may():
    """40 tables of noise: the truth is .5 and 0, and a 95 % interval misses it in one of twenty."""
    from scipy.stats import binom

    missed = np.zeros(2)
    for seed in range(40):
        one = planted(n=40, seeds=(seed,))
        auc = companions.summary(one, resamples=80).set_index("statistic").loc["alignment"]
        rank = companions.correlations(one, ("alignment", "similarity"), resamples=80).iloc[0]
        missed += [not auc["low"] <= 0.5 <= auc["high"], not rank["low"] <= 0 <= rank["high"]]
    assert missed.max() <= binom.ppf(0.999, 40, 0.06) and missed.sum() > 0


def test_order_of_rows_and_names_of_sets_change_nothing():
    one = planted(n=15)
    shuffled = one.sample(frac=1, random_state=0)
    swapped = one.assign(
        direction=one["direction"].map({"a": "b", "b": "a"}),
        model=one["model"].map({"A": "B", "B": "A"}),
    )
    want = companions.summary(one, resamples=50)
    for other in (shuffled, swapped):
        pd.testing.assert_frame_equal(companions.summary(other, resamples=50), want, atol=1e-12)
    assert not want.equals(companions.summary(one, resamples=50, seed=1))


def test_from_fifty_classes_on_classes_are_drawn():
    """A statistic that a class shares: drawing images pretends that each of them is news."""
    shared = np.random.default_rng(0).normal(size=240)
    one = planted(n=240, classes=60)
    one["similarity"] = shared[4 * one["label"] + 2 * (one["direction"] == "a") + one["member"]]
    wide, narrow = (
        companions.summary(one.assign(label=labels), resamples=200)
        .set_index("statistic")
        .loc["similarity"]
        for labels in (one["label"], one["label"] % 49)
    )
    assert wide["auc"] == narrow["auc"]
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])


def test_probe_gaps_stand_beside_as_numbers_without_an_auc(found):
    probes = pd.DataFrame(
        {
            "model": ["A", "B"],
            "train": [0.9, 0.8],
            "held_out": [0.6, 0.7],
            "gap": [0.3, 0.1],
            "member": 0.6,
            "non_member": 0.5,
            "fresh_gap": 0.1,
            "n_train": 24,
            "n_held_out": 18,
            "criterion": "vicreg",
            "rho": 0.2,
            "seed": 0,
            "epoch": 0,
        }
    )
    rows = companions.summary(found, probes, resamples=5).set_index("statistic")
    row = rows.loc["probe: train - held-out gap"]
    assert np.isnan(row["auc"]) and row["value"] == pytest.approx(0.2) and row["n"] == 18
    assert row["value_low"] < 0.2 < row["value_high"]
    assert rows["auc"].notna().sum() == 8 and rows["value"].notna().sum() == 2


def attack_of(table, hit):
    """Return a two-model table of the same images: `hit(row)` gives the target's and the
    reference's hit.
    """
    rows = [
        {
            "id": row.id,
            "label": row.label,
            "direction": row.direction,
            "seed": row.seed,
            "role": role,
            "correct": right,
            "correct5": right,
            "confidence": 0.0,
        }
        for row in table[table["member"]].itertuples()
        for role, right in zip(("target", "reference"), hit(row), strict=True)
    ]
    return pd.DataFrame(rows)


def test_atypical_images_when_they_are_memorized_more():
    one = planted(n=30, seeds=(0, 1))
    own = one[one["member"]]
    last = {
        key: part.nlargest(3, "alignment_gap")["id"].tolist()
        for key, part in own.groupby(["seed", "direction"])
    }
    found = companions.atypical(
        one, attack_of(one, lambda row: (row.id in last[row.seed, row.direction], False))
    )
    assert found == {"difference": 1, "low": 1, "high": 1, "top": 1, "bottom": 0, "n": 12}


def test_atypical_images_when_they_are_not():
    one, rng = planted(n=60), np.random.default_rng(0)
    found = companions.atypical(one, attack_of(one, lambda row: rng.random(2) < 0.4), share=0.25)
    assert found["low"] < 0 < found["high"] and found["n"] == 30


def test_what_the_control_set_shows_as_well_is_subtracted():
    """Images easier for the target in both ways, without any memory: a difference, but none above
    the control set's.
    """

    def easy(one, rng):
        lead = dict(zip(one[one["member"]]["id"], one[one["member"]]["alignment_gap"], strict=True))
        return attack_of(
            one, lambda row: (rng.random() < 0.5 + lead[row.id] / 5, rng.random() < 0.5)
        )

    sets = [planted(n=200, seeds=(seed,)) for seed in (0, 1)]
    both = [(one, easy(one, np.random.default_rng(seed))) for seed, one in enumerate(sets)]
    found = companions.atypical(*both[0], control=both[1], share=0.25)
    control = companions.atypical(*both[1], share=0.25)
    assert found["low"] > 0 and found["net_low"] < 0 < found["net_high"]
    assert found["net"] == pytest.approx(found["difference"] - control["difference"])
    assert found["net_high"] - found["net_low"] > found["high"] - found["low"]


def test_errors_name_what_is_wrong(pair, found):
    with pytest.raises(ValueError, match="views = 1; expected at least 2"):
        companions.table(pair, 0, 3, views=1)
    with pytest.raises(ValueError, match="Select one criterion, epoch, layer"):
        companions.summary(pd.concat([found, found.assign(epoch=1)]))
    with pytest.raises(ValueError, match="images of one set only"):
        companions.summary(found[found["direction"] == "a"])
    one = planted(n=30)
    lost = one[one["member"]].nlargest(1, "alignment_gap")["id"].iloc[0]
    attacked = attack_of(one, lambda row: (True, False))
    attacked = attacked[attacked["id"] != lost]
    with pytest.raises(ValueError, match="10 rows of the attack on 6 images"):
        companions.atypical(one, attacked)
