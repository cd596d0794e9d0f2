"""The two-model test end to end on tiny scenes: sets stay apart, tables pair up, the gallery is
honest.
"""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import seaborn.objects as so
import torch

import dejavu_utils as dv
from dejavu_utils import store
from dejavu_utils.attack import references, scoring, summaries, view_embeddings
from dejavu_utils.data.images import Images
from dejavu_utils.models import launch, views
from dejavu_utils.models import pairs as build

PARAMS = {
    "seeds": [0],
    "dataset": "scenes",
    "rhos": [0.2, 0.0],
    "criteria": ["vicreg", "simclr"],
    "epochs": [0, 1, 2],
    "sizes": {"classes": 4, "attacked": 12, "shared": 4, "public": 20, "probe": 10, "control": 12},
    "k": 5,
    "recipe": {
        "views": {"grey": 0.2, "solarize": 0.2},
        "encoder": "small4",
        "projector": "16-16-16",
        "batch": 16,
    },
    "crop": {"kind": "periphery", "min_side": 8},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = build.make(PARAMS, tmp_path_factory.mktemp("runs"))
    launch.fit_all(build.jobs(made), workers=1)
    return made


@pytest.fixture(scope="module")
def tables(pairs):
    return pd.concat(
        [references.two_model(pair, epoch, 5) for pair in pairs for epoch in (0, 1, 2)]
    )


def test_every_criterion_at_the_first_rho_and_the_first_at_the_others(pairs):
    found = [(pair.setting["criterion"], pair.setting["rho"]) for pair in pairs]
    assert found == [("vicreg", 0.2), ("simclr", 0.2), ("vicreg", 0.0)]


def test_no_id_is_in_two_parts(pairs):
    ids = np.concatenate([images.ids for images in pairs[0].parts.values()])
    assert len(ids) == len(set(ids)) == 4 * (2 * 12 + 4 + 20 + 10 + 12)


def test_encoders_share_the_shared_part_and_nothing_else(pairs):
    stored = [store.read_tensors(pairs[0].jobs[model].pixels)[0] for model in "AB"]
    rows = [{tuple(image.flatten().tolist()) for image in each["pixels"]} for each in stored]
    assert len(rows[0] & rows[1]) == 16 and len(rows[0]) == len(rows[1]) == 64
    own, shared = pairs[0].parts["a"], pairs[0].parts["shared"]
    assert stored[0]["labels"].tolist() == [*own.labels, *shared.labels]


def test_both_sets_are_trained_on_the_same_kind_of_pixels(pairs, tmp_path):
    """One picture of another size in B, and A must not keep its native pixels while B gets
    squares.
    """
    parts, recipe = dict(pairs[0].parts), pairs[0].jobs["A"].recipe
    sizes = parts["b"].sizes.copy()
    sizes[0] = 47
    parts["b"] = dataclasses.replace(parts["b"], sizes=sizes)
    paths = [build.training_set(parts, model, recipe, tmp_path, 0) for model in "AB"]
    assert {store.read_tensors(path)[0]["pixels"].shape[-1] for path in paths} == {
        round(32 * 8 / 7)
    }


def test_a_pair_differs_in_seed_and_images_only(pairs):
    a, b = pairs[0].jobs["A"], pairs[0].jobs["B"]
    assert (
        a.recipe == b.recipe and a.epochs == b.epochs and a.seed != b.seed and a.pixels != b.pixels
    )


def test_table_has_every_image_under_both_models(tables):
    one = tables.query(
        "criterion == 'vicreg' and rho == 0.2 and epoch == 2 and layer == 'projector'"
    )
    assert (one.groupby("id").size() == 2).all() and set(one["role"]) == {"target", "reference"}


def test_table_is_read_the_second_time(pairs, monkeypatch):
    first = references.two_model(pairs[0], 2, 5)
    monkeypatch.setattr(
        references, "embed_images", lambda *a, **options: pytest.fail("computed again")
    )
    pd.testing.assert_frame_equal(first, references.two_model(pairs[0], 2, 5))


def test_score_is_memorized_minus_misrepresented(tables):
    scores = summaries.scores(tables, [100], resamples=10)
    shares = summaries.shares(tables, resamples=10)
    assert len(scores) == len(shares) == 3 * 3 * 2
    assert np.abs(scores["score"] - (shares["memorized"] - shares["misrepresented"])).max() < 1e-12


def test_control_set_covers_zero(pairs, any_number):
    table = references.two_model(pairs[0], 2, 5, attacked="control").query("layer == 'projector'")
    row = scoring.score(table, level=0.999)
    assert row["low"] <= 0 <= row["high"] and row["n"] == 48


def test_differences_and_truth(tables):
    rows = summaries.differences(tables, [0, 1, 2])
    assert set(rows["what"]) == {
        "projector - backbone",
        "last - untrained",
        "last - first trained",
        "p = 20 % - all",
    }
    curve = summaries.curve(
        tables.query("epoch == 2 and layer == 'projector'"), percents=(100,), resamples=10
    )
    truth = summaries.truth(curve, 4)
    assert truth.set_index("rho")["bayes"].to_dict() == {0.2: pytest.approx(0.4), 0.0: 0.25}


def test_probes_never_use_the_public_set(pairs, monkeypatch):
    seen, squares = set(), Images.squares

    def watched(images, *arguments):
        seen.update(images.ids)
        return squares(images, *arguments)

    monkeypatch.setattr(Images, "squares", watched)
    row = references.probes.__wrapped__(pairs[0], 2)
    assert seen and not seen & set(pairs[0].parts["public"].ids)
    assert (row["n_held_out"] == 4 * (10 + 12)).all()
    assert row[["train", "held_out", "member", "non_member", "knn"]].stack().between(0, 1).all()
    assert np.allclose(row["gap"], row["train"] - row["held_out"])


def test_gallery_choice_is_the_papers_ranking(tables):
    one = tables.query("criterion == 'vicreg' and rho == 0.2 and epoch == 2")
    chosen = references.choose(one, 5)
    wide = one.query("layer == 'projector'").set_index(["id", "role"])
    lead = [
        wide.loc[(i, "target"), "confidence"] - wide.loc[(i, "reference"), "confidence"]
        for i in chosen
    ]
    assert lead == sorted(lead, reverse=True)
    assert all(
        wide.loc[(i, "target"), "correct"] and not wide.loc[(i, "reference"), "correct"]
        for i in chosen
    )
    assert (
        references.choose(one, 5, how="random") == references.choose(one, 5, how="random") != chosen
    )


def test_gallery_rows(pairs, tables):
    ids = references.choose(
        tables.query("criterion == 'vicreg' and rho == 0.2 and epoch == 2"), 3, how="random"
    )
    rows = references.neighbours(pairs[0], 2, ids, k=3)
    assert len(rows) == 3 and all(len(row["target"]) == len(row["reference"]) == 3 for row in rows)
    assert rows[0]["crop"].shape == (3, 32, 32)


def test_recipe_changes_for_one_criterion_go_over_those_for_all():
    changes = {"lr": 0.3, "views": {"flip": 0.0}, "simclr": {"lr": 0.1, "views": {"grey": 0.0}}}
    assert build.recipe("vicreg", changes).lr == 0.3 and build.recipe("simclr", changes).lr == 0.1
    views = build.recipe("simclr", changes).views
    assert (views["flip"], views["grey"], views["scale_min"]) == (0.0, 0.0, 0.04)
    assert build.recipe("dino", {}).views["local"] > 0  # what the criterion itself changes
    assert build.recipe("dino", {"views": {"local": 0}}).views["local"] == 0


def test_recipe_for_another_engine_has_its_criteria_and_constants():
    changes = {
        "engine": "vissl",
        "encoder": "resnet50",
        "constants": {"epsilon": 0.05, "temperature": 0.1},
    }
    assert build.recipe("swav", changes).constants == {"epsilon": 0.05, "temperature": 0.1}
    assert (
        build.recipe("dino", changes).views.get("local", 0) == 0
    )  # what was tuned for our own engine stays away
    with pytest.raises(ValueError, match='criterion "vicreg" is not known to the engine "vissl"'):
        build.recipe("vicreg", changes)
    with pytest.raises(ValueError, match='engine "lightning" is not known'):
        build.recipe("simclr", {"engine": "lightning"})


def test_supervised_logits_are_attacked_without_neighbours(tmp_path):
    one = build.one(PARAMS, tmp_path, "supervised", 0.2, 0)
    launch.fit_all(build.jobs([one]), workers=1)
    table = references.two_model(one, 2, 5)
    assert list(table["layer"].unique()) == ["projector", "backbone", "logits"]
    side = one.parts["a"]
    rects, keep = references.crops.background(side, one.crop)
    crops = side.subset(keep).squares(32, rects[keep])
    scores = references.embed(one.encoder("A", 2), crops, ("logits",))["logits"]
    rows = table.query("layer == 'logits' and direction == 'a' and role == 'target'").set_index(
        "id"
    )
    assert (rows.loc[side.ids[keep], "prediction"].to_numpy() == scores.argmax(1).numpy()).all()


def test_embedding_in_chunks_equals_embedding_at_once(pairs):
    encoders, images = {"A": pairs[0].encoder("A", 1)}, pairs[0].parts["probe"]
    one, many = (
        references.embed_images(encoders, images, 32, ("projector",), chunk=chunk)["projector"]["A"]
        for chunk in (1000, 7)
    )
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-5)


def test_recipe_gives_each_criterion_its_own_constants():
    changes = {"constants": {"temperature": 0.5, "invariance": 10.0}}
    assert build.recipe("simclr", changes).constants == {"temperature": 0.5}
    assert build.recipe("vicreg", changes).constants == {"invariance": 10.0}
    with pytest.raises(ValueError, match="temprature belongs to no criterion"):
        build.recipe("simclr", {"constants": {"temprature": 1.0}})
    with pytest.raises(ValueError, match='criterion "simclear" is not known to the engine "own"'):
        build.recipe("simclear", {})


def test_probe_rows_interval_over_seeds_and_over_images():
    row = {
        "criterion": "vicreg",
        "rho": 0.2,
        "epoch": 1,
        "n_train": 100,
        "n_held_out": 100,
        "train": 0.9,
        "gap": 0.3,
        "held_out": 0.6,
        "member": 0.6,
        "non_member": 0.6,
        "fresh_gap": 0.0,
    }
    one = (
        summaries.probe_rows(pd.DataFrame([row | {"seed": 0}]))
        .set_index("quantity")
        .loc["held-out accuracy"]
    )
    assert one["high"] - one["mean"] == pytest.approx(1.96 * math.sqrt(0.24 / 100))
    two = pd.DataFrame([row | {"seed": s, "held_out": 0.6 + 0.02 * s} for s in range(3)])
    many = summaries.probe_rows(two).set_index("quantity").loc["held-out accuracy"]
    assert many["mean"] == pytest.approx(0.62)
    assert many["high"] - many["mean"] == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-3)


def test_criteria_table_gains_over_seeds_and_over_images(run_cells):
    log = pd.DataFrame(
        {
            "criterion": "byol",
            "rho": 0.2,
            "name": ["x", "x"],
            "epoch": [1, 2],
            "loss": [4.0, 1.0],
            "seconds": [2.0, 1.0],
            "images": [100, 100],
        }
    )
    row = {"criterion": "byol", "rho": 0.2, "n_held_out": 100, "gap": 0.3, "fresh_gap": 0.01}
    probes = pd.DataFrame(
        [
            row | {"seed": s, "epoch": e, "held_out": 0.5 + (0.1 + 0.01 * s) * e}
            for s in range(3)
            for e in (0, 1)
        ]
    )

    def table(probes):
        given = {"pd": pd, "so": so, "dv": dv, "log": log, "probes": probes, "rhos": [0.2]}
        given |= {"epochs": [0, 1], "criteria": ["byol"]}
        return run_cells("01_training", ["table", "gain"], **given)["table"].iloc[0]

    many = table(probes)
    assert (many["gap"], many["fresh_gap"]) == (pytest.approx(0.3), pytest.approx(0.01))
    assert (many["gain"], many["n"], many["seeds"]) == (pytest.approx(0.11), 300, 3)
    assert many["gain_high"] - many["gain"] == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-3)
    assert (many["images_per_second"], many["minutes"]) == (75, pytest.approx(0.05))
    one = table(probes[probes["seed"] == 0])
    assert one["gain_high"] - one["gain"] == pytest.approx(1.96 * math.sqrt((0.24 + 0.25) / 100))


def test_augmented_probes_are_judged_on_the_images_and_see_the_same_views_every_time(pairs):
    plain = references.probes.__wrapped__(pairs[0], 2, augment=False)
    found = references.probes.__wrapped__(pairs[0], 2, augment=True, views=3)
    again = references.probes.__wrapped__(pairs[0], 2, augment=True, views=3)
    pd.testing.assert_frame_equal(found, again)
    same = ["model", "knn", "n_train", "n_held_out"]
    pd.testing.assert_frame_equal(found[same], plain[same])
    assert (found["train"] != plain["train"]).any() and found["train"].between(0, 1).all()
    assert (found["gap"] == found["train"] - found["held_out"]).all()


def test_views_that_are_the_images_themselves_give_the_plain_probe(pairs, monkeypatch):
    """The whole picture as the only view: not cut, not mirrored, colours as they are."""
    still = views.Views(flip=0.0, jitter=0.0, grey=0.0, blur=0.0, solarize=0.0)
    plain = references.probes.__wrapped__(pairs[0], 2, augment=False)

    def whole(pair, images, count, purpose, kinds=("second",)):
        sizes = torch.as_tensor(images.sizes)
        drawn = views.draw("second", sizes, still, pair.size(), torch.Generator())
        return [drawn._replace(rects=torch.cat([0 * sizes, sizes], 1).float())] * count

    monkeypatch.setattr(view_embeddings, "draws", whole)
    found = references.probes.__wrapped__(pairs[0], 2, augment=True, views=2)
    numbers = ["train", "held_out", "gap", "member", "non_member", "fresh_gap"]
    np.testing.assert_allclose(found[numbers], plain[numbers], atol=0.03)


def test_a_pair_is_attacked_by_its_rules(pairs):
    papers = {"ties": "lowest class", "confidence": "logit", "keep": 0.5, "rounding": "down"}
    ours = references.two_model(pairs[0], 2, 5)
    found = references.two_model(dataclasses.replace(pairs[0], rules=papers), 2, 5)
    assert (found["id"] == ours["id"]).all() and (found["confidence"] != ours["confidence"]).any()
    same = references.two_model(dataclasses.replace(pairs[0], rules={"keep": 1.0}), 2, 5)
    pd.testing.assert_frame_equal(same, ours)
