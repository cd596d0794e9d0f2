"""Reconstruction end to end on tiny scenes: who may be seen by whom, planted memory is found,
chance is not.
"""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from dejavu_utils import plots_reconstruction, store
from dejavu_utils.attack import crops, references, scoring
from dejavu_utils.models import launch
from dejavu_utils.models import pairs as build
from dejavu_utils.reconstruct import decoder, judge, sample

PARAMS = {
    "seeds": [0],
    "dataset": "scenes",
    "rhos": [0.2],
    "criteria": ["vicreg"],
    "epochs": [0],
    "sizes": {"classes": 3, "attacked": 10, "shared": 2, "public": 16, "probe": 10, "control": 10},
    "k": 5,
    "recipe": {"encoder": "small4", "projector": "16-16-16", "batch": 16},
    "crop": {"kind": "periphery", "rule": "paper", "min_side": 8},
}
HOW = {
    "epochs": 1,
    "batch": 16,
    "lr": 0.01,
    "size": 16,
    "judge_epochs": 1,
    "channels": [8, 8],
    "timesteps": 60,
}
SAMPLING = {"steps": 2, "guidance": 1.0, "samples": 2, "neighbours": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def bench(folder):
    (pair,) = build.make(PARAMS, folder)
    launch.fit_all(build.jobs([pair]), workers=1)
    made = sample.bench(pair, 0, folder, HOW, SAMPLING)
    launch.fit_all(made.jobs(), workers=1)
    return made


@pytest.fixture(scope="module")
def table(bench):
    return sample.table(bench, "projector")


def _rects(bench, side="a"):
    return crops.background(bench.pair.parts[side], bench.pair.crop)


def test_decoders_learn_from_the_public_set_alone(bench):
    public = bench.pair.parts["public"]
    for model in "AB":
        stored = store.read_tensors(bench.decoders[model].pixels)[0]
        assert torch.equal(stored["pixels"], public.squares(16))
        own = references.embed_images(
            {model: bench.pair.encoder(model, 0)}, public, 32, ("projector", "backbone")
        )
        assert all(torch.equal(stored[layer], own[layer][model]) for layer in own)
    assert bench.decoders["A"].folder != bench.decoders["B"].folder
    assert bench.decoders["A"].seed == bench.decoders["B"].seed, "alike in all but the encoder"


@pytest.mark.parametrize("part", ["a", "b", "shared", "control"])
def test_a_public_image_in_another_set_is_refused(bench, folder, part):
    parts = dict(bench.pair.parts)
    parts["public"] = dataclasses.replace(parts["public"], ids=parts["public"].ids.copy())
    parts["public"].ids[3] = parts[part].ids[0]
    pair = dataclasses.replace(bench.pair, parts=parts)
    with pytest.raises(
        ValueError,
        match=f"1 images of the public set are also in {part}, e.g. {parts[part].ids[0]}",
    ):
        sample.bench(pair, 0, folder, HOW, SAMPLING)


def test_the_judge_sees_no_picture_of_any_set(bench):
    stored = store.read_tensors(bench.judge.job.pixels)[0]
    seen = {row.numpy().tobytes() for row in stored["pixels"]}
    for images in bench.pair.parts.values():
        assert not seen & {
            row.numpy().tobytes() for row in images.squares(stored["pixels"].shape[-1])
        }
    assert sorted(set(stored["labels"].tolist())) == list(range(6)), "three classes, light and dark"


def test_every_attacked_image_appears_once_under_each_model(bench, table):
    ids = np.concatenate([bench.pair.parts[side].ids[_rects(bench, side)[1]] for side in "ab"])
    for role in ("target", "reference"):
        assert sorted(table.loc[table["role"] == role, "id"]) == sorted(ids)
    assert table[["ssim", "colour", "feature", "attribute", "class"]].notna().all().all()
    assert set(table["attribute"]) <= {0.0, 1.0}
    control, whole = (sample.table(bench, "projector", which) for which in ("control", "whole"))
    assert list(control["id"]) == list(whole["id"]) and not control["ssim"].equals(whole["ssim"])
    assert set(control["id"]) <= set(bench.pair.parts["control"].ids) and not set(
        control["id"]
    ) & set(ids)


def _elsewhere(bench, folder):
    """Return the bench with its tables in another folder, where none is made yet."""
    return dataclasses.replace(bench, pair=dataclasses.replace(bench.pair, folder=folder))


def test_a_table_is_the_same_when_made_again_and_when_read(bench, table, tmp_path):
    again = sample.table(_elsewhere(bench, tmp_path), "projector")
    pd.testing.assert_frame_equal(again, table)
    pd.testing.assert_frame_equal(sample.table(bench, "projector"), table)


def test_planted_memory_is_found_and_nothing_where_there_is_none(bench, monkeypatch, tmp_path):
    """The target draws the picture itself, the reference another one: the measures must say so."""

    def planted(bench, condition, images, rects, samples, device, model):
        own = "A" if set(images.ids) & set(bench.pair.parts["a"].ids) else "B"
        pictures = images.squares(16)
        return (pictures if model == own else pictures.roll(1, 0))[:, None]

    monkeypatch.setattr(sample, "draw", planted)
    found = sample.table(_elsewhere(bench, tmp_path / "planted"), "projector")
    target = found[found["role"] == "target"]
    np.testing.assert_allclose(target["ssim"], 1)
    np.testing.assert_allclose(target["colour"], 0, atol=1e-6)
    by = sample.summary(found, resamples=200).set_index("measure")
    assert by.loc["ssim", "low"] > 0 and by.loc["colour", "high"] < 0
    monkeypatch.setattr(
        sample,
        "draw",
        lambda bench, condition, images, rects, samples, device, model: images.squares(16)[:, None],
    )
    same = sample.table(_elsewhere(bench, tmp_path / "same"), "projector")
    assert (sample.summary(same, resamples=50)["score"] == 0).all()


def test_class_is_the_score_of_the_attack(bench, table):
    row = sample.summary(table, resamples=100).set_index("measure").loc["class"]
    found = scoring.score(table, resamples=100)
    assert [row[name] for name in ("score", "low", "high", "n")] == [
        found[n] for n in ("score", "low", "high", "n")
    ]


@pytest.mark.parametrize("condition", [*sample.CONDITIONS, *sample.WITHOUT])
def test_every_condition_draws(bench, condition):
    images, (rects, keep) = bench.pair.parts["a"], _rects(bench)
    some = images.subset(np.flatnonzero(keep)[:2])
    drawn = sample.draw(bench, condition, some, rects[keep][:2], "A", 3)
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (2, 1 if condition in sample.WITHOUT else 3, 3, 16, 16)


def test_an_unknown_condition_is_named(bench):
    images, (rects, _) = bench.pair.parts["a"], _rects(bench)
    with pytest.raises(
        ValueError,
        match='condition "proj"; expected one of projector, projector, aligned, backbone',
    ):
        sample.draw(bench, "proj", images, rects, "A")


def test_conditions_are_made_of_what_they_say(bench, monkeypatch):
    told, images, (rects, keep) = {}, bench.pair.parts["a"], _rects(bench)
    images, rects = images.subset(np.flatnonzero(keep)[:3]), rects[keep][:3]
    monkeypatch.setattr(decoder, "sample", lambda net, given, *rest, **options: told.update(given))
    sample.draw(bench, "both", images, rects, "B")
    encoder = {"B": bench.pair.encoder("B", 0)}
    crop = references.embed_images(encoder, images, 32, ("projector",), rects)["projector"]["B"]
    bank = store.read_tensors(bench.decoders["B"].pixels)[0]
    nearest = torch.cdist(crop.double(), bank["projector"].double()).argsort(1)[:, :3]
    assert torch.equal(told["projector"], crop)
    torch.testing.assert_close(told["backbone"], bank["backbone"][nearest].mean(1))
    sample.draw(bench, "both, matched", images, rects, "B")
    torch.testing.assert_close(told["projector"], bank["projector"][nearest].mean(1))


def test_aligned_crops_have_the_moments_of_pictures(bench, monkeypatch):
    told, public = {}, bench.pair.parts["public"]
    rects, keep = crops.background(public, bench.pair.crop)
    own = public.subset(np.flatnonzero(keep))
    monkeypatch.setattr(decoder, "sample", lambda net, given, *rest, **options: told.update(given))
    sample.draw(bench, "projector, aligned", own, rects[keep], "A")
    known = store.read_tensors(bench.decoders["A"].pixels)[0]["projector"]
    found = told["projector"]
    torch.testing.assert_close(found.mean(0), known.mean(0), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.std(0), known.std(0), atol=1e-4, rtol=1e-3)


def test_mean_and_medoid_of_the_neighbours(bench):
    images, (rects, keep) = bench.pair.parts["a"], _rects(bench)
    images, rects = images.subset(np.flatnonzero(keep)[:3]), rects[keep][:3]
    encoder = {"A": bench.pair.encoder("A", 0)}
    crop = references.embed_images(encoder, images, 32, ("projector",), rects)["projector"]["A"]
    bank = store.read_tensors(bench.decoders["A"].pixels)[0]
    nearest = torch.cdist(crop.double(), bank["projector"].double()).argsort(1)[:, :3]
    mean, medoid = (
        sample.draw(bench, name, images, rects, "A")[:, 0] for name in ("mean", "medoid")
    )
    for i, near in enumerate(nearest):
        pictures, points = bank["pixels"][near], bank["projector"][near]
        assert torch.equal(mean[i], pictures.float().mean(0).round().to(torch.uint8))
        middle = torch.cdist(points, points).sum(1).argmin()
        assert torch.equal(medoid[i], pictures[middle])


def test_the_gallery_is_chosen_by_the_attack_s_confidence():
    rows = [
        ("m1", 1, 0, -1.0, -2.0),
        ("m2", 1, 0, -1.0, -3.0),
        ("c1", 1, 1, -0.5, -2.0),
        ("c2", 1, 1, -1.0, -1.0),
        ("c3", 1, 1, -0.1, -2.5),
        ("n", 0, 1, 0.0, 0.0),
    ]
    infer = pd.DataFrame(
        [
            {
                "id": name,
                "role": role,
                "correct": bool(hit),
                "confidence": nats,
                "layer": "projector",
            }
            for name, *hits, one, two in rows
            for role, hit, nats in zip(("target", "reference"), hits, (one, two), strict=True)
        ]
    )
    assert sample.choose(infer, 2, "memorized") == ["m2", "m1"]
    assert sample.choose(infer, 2, "correlated") == ["c2", "c1"]
    drawn = sample.choose(infer, 3, "random")
    assert drawn == sample.choose(infer, 3, "random") and len(set(drawn)) == 3


def test_object_boxes_are_where_the_object_is(bench):
    images = bench.pair.parts["a"]
    for box, (x0, y0, x1, y1) in zip(images.boxes, judge.object_boxes(images, 16), strict=True):
        np.testing.assert_allclose([x0, y0, x1, y1], box[0] / 3, rtol=1e-6)
    wide = dataclasses.replace(
        images, sizes=np.tile([96, 48], (len(images), 1))
    )  # the middle of a wide picture
    expected = np.clip((images.boxes[0][0] - [24, 0, 24, 0]) / 3, 0, 16)
    np.testing.assert_allclose(judge.object_boxes(wide, 16)[0, [1, 3]], expected[[1, 3]])


def test_the_judge_s_own_accuracy_is_that_of_its_reading(bench):
    control = bench.pair.parts["control"]
    rows = judge.accuracy(bench.judge, control).set_index("reads")
    seen, _ = bench.judge.read(control.squares(16))
    torch.testing.assert_close(seen.sum((1, 2)), torch.ones(len(control)).double())
    right = (seen.sum(2).argmax(1).numpy() == control.labels).mean()
    assert rows.loc["class", "accuracy"] == right and rows.loc["class", "n"] == len(control)
    assert (
        rows.loc["attribute", "low"]
        <= rows.loc["attribute", "accuracy"]
        <= rows.loc["attribute", "high"]
    )


def test_cost_and_gallery(bench, table):
    rows = sample.cost(dataclasses.replace(bench), 2)
    assert rows["steps"].tolist() == [2, 60] and (rows["seconds"] > 0).all()
    assert rows["seconds"][1] > 5 * rows["seconds"][0]
    ids = list(table["id"].drop_duplicates()[:2])
    shown = sample.gallery(bench, ids, samples=2)
    assert [len(row["target"]["drawn"]) for row in shown] == [2, 2]
    figure = plots_reconstruction.reconstructions(shown)
    titles = [axis.get_title() for axis in figure.axes]
    assert {row["name"] for row in shown} <= set(titles)
    assert len(figure.axes) == 2 * (2 + 2 * (2 + 2))
