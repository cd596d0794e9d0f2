"""Other measures on the same encoders: naive oracles, planted activations, pairs that remember
nothing.
"""

import dataclasses
import functools
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binom

from dejavu_utils.attack import measures, references, view_embeddings
from dejavu_utils.models import pairs, train
from dejavu_utils.models import views as augment
from dejavu_utils.models.encoders import Encoder, embed

pytestmark = pytest.mark.usefixtures("any_number")

PARAMS = {
    "dataset": "scenes",
    "epochs": [0],
    "recipe": {"encoder": "small4", "projector": "8-8", "batch": 8, "size": 16},
    "sizes": {"classes": 3, "attacked": 8, "shared": 0, "public": 8, "probe": 6, "control": 16},
    "crop": {"kind": "periphery", "min_side": 8},
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
    return measures.statistics(Untrained(**vars(pair)), 0, 3, views=4)


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
        for name in (*measures.STATISTICS, *measures.GAPS):
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
    both = found[list(measures.GAPS)].to_numpy(float).reshape(-1, 2, 4)
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
    whole = embed(fresh(0), pixels, ("projector",))["projector"]
    seen = view_embeddings.embed_views(fresh(0), pixels, [drawn] * 3, 16, ("projector",))
    np.testing.assert_allclose(measures.alignment(whole, seen["projector"]), [0] * n, atol=1e-6)
    np.testing.assert_allclose(measures.similarity(seen["projector"]), [1] * n, atol=1e-6)


def test_pictures_of_mixed_sizes_become_squares_as_in_training(pair):
    parts = dict(pair.parts)
    sizes = parts["b"].sizes.copy()
    sizes[0] = 47
    parts["b"] = dataclasses.replace(parts["b"], sizes=sizes)
    mixed, native = (
        measures.statistics.__wrapped__(Untrained(**vars(pair) | more), 0, 3, 2)
        for more in ({"parts": parts}, {})
    )
    assert np.isfinite(mixed[list(measures.STATISTICS)].astype(float)).all(None)
    a = [each[each["direction"] == "a"] for each in (mixed, native)]
    assert (a[0]["confidence"].to_numpy() == a[1]["confidence"].to_numpy()).all()
    assert (a[0]["similarity"].to_numpy() != a[1]["similarity"].to_numpy()).any()


def test_one_encoder_twice_has_no_gap(pair, tmp_path):
    same = measures.statistics(Twins(**vars(pair) | {"folder": tmp_path}), 0, 3, views=3)
    assert (same[list(measures.GAPS)] == 0).all(None)


def test_control_images_are_members_in_name_only(pair, found):
    rows = measures.statistics(Untrained(**vars(pair)), 0, 3, views=4, attacked="control")
    assert set(rows["id"]) <= set(pair.parts["control"].ids) and set(rows["attacked"]) == {
        "control"
    }
    assert set(rows["direction"]) == {"a", "b"} and np.isfinite(rows["alignment"]).all()


def test_computed_twice_the_same_and_read_the_third_time(pair, found, monkeypatch):
    again = measures.statistics.__wrapped__(Untrained(**vars(pair)), 0, 3, 4)
    pd.testing.assert_frame_equal(again, found, check_dtype=False)
    monkeypatch.setattr(measures, "similarity", lambda *a: pytest.fail("computed again"))
    pd.testing.assert_frame_equal(
        measures.statistics(Untrained(**vars(pair)), 0, 3, views=4), found
    )


def means(rows):
    """Return the means of two statistics: what is resampled here."""
    return rows[["alignment", "similarity"]].mean().to_numpy()


def test_the_first_row_is_the_data_and_every_resample_draws_images_within_their_set():
    one = planted(n=30, seeds=(0, 1))
    one["similarity"] = (one["direction"] == "a").astype(float)  # the same in every resample
    found = measures.resampled(one, means, resamples=50)
    assert found.shape == (51, 2) and found[0] == pytest.approx(means(one))
    assert (found[:, 1] == 0.5).all() and found[1:, 0].std() > 0
    single = measures.resampled(one, lambda rows: rows.groupby("model").size().to_numpy(), 20)
    assert (single == 120).all()  # both rows of an image come together


def test_intervals_miss_the_truth_as_often_as_they_may():
    """40 tables of noise: members differ from others by nothing, and a 95 % interval misses that in
    one of twenty.
    """

    def lead(rows):
        values, member = rows["alignment"].to_numpy(), rows["member"].to_numpy()
        return values[member].mean() - values[~member].mean()

    missed = 0
    for seed in range(40):
        found = measures.resampled(planted(n=40, seeds=(seed,)), lead, 60)
        low, high = np.quantile(found[1:], [0.025, 0.975])
        missed += not low <= 0 <= high
    assert 0 < missed <= binom.ppf(0.999, 40, 0.06)


def test_resamples_depend_on_the_seed_and_on_the_images_alone():
    one = planted(n=15)
    shuffled = one.sample(frac=1, random_state=0)
    want = measures.resampled(one, means, 20)
    np.testing.assert_allclose(measures.resampled(shuffled, means, 20), want, atol=1e-12)
    assert (measures.resampled(one, means, 20, seed=1)[1:] != want[1:]).any()


def test_from_fifty_classes_on_classes_are_drawn():
    """A statistic that a class shares: drawing images pretends that each of them is news."""
    one = planted(n=240, classes=60)
    one["similarity"] = np.random.default_rng(0).normal(size=60)[one["label"]]
    spread = [
        measures.resampled(one.assign(label=labels), means, 200)[1:, 1].std()
        for labels in (one["label"], one["label"] % 49)
    ]
    assert spread[0] > 1.5 * spread[1]


def test_errors_name_what_is_wrong(pair, found):
    with pytest.raises(ValueError, match="views = 1; expected at least 2"):
        measures.statistics(pair, 0, 3, views=1)
    with pytest.raises(ValueError, match="Select one criterion, epoch, layer"):
        measures.resampled(pd.concat([found, found.assign(epoch=1)]), means)
    with pytest.raises(ValueError, match="images of one set only"):
        measures.resampled(found[found["direction"] == "a"], means)


def test_unit_mem_of_three_images_and_two_units_by_hand():
    """Unit 1: 6 against the mean of 1 and 3: (6 - 2) / (6 + 2). Unit 2 fires for one."""
    activations = torch.tensor([[1.0, 0.0], [6.0, 0.0], [3.0, 5.0]], dtype=torch.float64)
    assert measures.unit_mem(activations).tolist() == [0.5, 1.0]


def test_units_that_answer_alike_or_never_have_none():
    assert measures.unit_mem(torch.ones(4, 2)).tolist() == [0, 0]
    assert measures.unit_mem(torch.zeros(4, 2)).tolist() == [0, 0]
    for wrong in (torch.ones(1, 2), -torch.ones(3, 2)):
        with pytest.raises(ValueError, match="two images or more"):
            measures.unit_mem(wrong)


def test_unit_mem_equals_a_loop_in_float64():
    activations = torch.rand(30, 7, generator=torch.Generator().manual_seed(0)).double()
    found = measures.unit_mem(activations)
    for unit in range(7):
        mu = activations[:, unit].tolist()
        best = max(range(30), key=mu.__getitem__)
        rest = sum(value for i, value in enumerate(mu) if i != best) / 29
        assert found[unit].item() == pytest.approx((mu[best] - rest) / (mu[best] + rest), abs=1e-12)


def test_a_table_of_two_measures_is_the_same_again_and_without_gap_for_one_encoder_twice(pair):
    found = measures.by_set.__wrapped__(Untrained(**vars(pair)), 0, 4)
    again = measures.by_set.__wrapped__(Untrained(**vars(pair)), 0, 4)
    pd.testing.assert_frame_equal(found, again)
    assert list(found["measure"]) == ["alignment", "UnitMem"] and (found["n"] == 48).all()
    assert found.loc[0, "target"] < 0 < found.loc[1, "target"] < 1
    assert (found["error"] > 0).all()
    # Own and other images differ, and the encoder does not: what is left is exactly nothing.
    same = measures.by_set.__wrapped__(Twins(**vars(pair)), 0, 4)
    np.testing.assert_allclose(same["difference"], 0, atol=1e-12)


def test_a_control_judges_images_of_neither_set(pair):
    found = measures.by_set.__wrapped__(Untrained(**vars(pair)), 0, 2, "control")
    assert (found["n"] == 48).all() and (found["attacked"] == "control").all()


def test_a_table_is_kept_and_every_number_of_views_has_its_own(pair, tmp_path):
    where = dataclasses.replace(Untrained(**vars(pair)), folder=tmp_path)
    pd.testing.assert_frame_equal(measures.by_set(where, 0, 2), measures.by_set(where, 0, 2))
    measures.by_set(where, 0, 3)
    assert len(list(tmp_path.glob("by_set-0000-*.parquet"))) == 2


def activations(seed, n=100, units=40, boost=0.0):
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


def measured(found):
    values = {(side, model): x for side, by in found.items() for model, x in by.items()}
    return measures.contrast(values, lambda rows: measures.unit_mem(rows).mean())


def test_planted_units_are_found_and_noise_is_not(monkeypatch):
    monkeypatch.setattr(measures, "HALVES", 60)
    sure = measured(activations(0, boost=5.0))
    assert sure["difference"] > 5 * sure["error"] and sure["target"] > sure["reference"]
    misses = 0
    for seed in range(60):
        row = measured(activations(seed))
        misses += abs(row["difference"]) > 1.96 * row["error"]
    assert misses <= 9  # 3 expected; more than 9 of 60 in one of 1,000 sets of tests
