"""Reconstruction end to end on tiny scenes: who may be seen by whom, planted memory is found,
chance is not.
"""

import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest
import torch

from dejavu_utils import plots, store
from dejavu_utils.attack import crops, references, scoring
from dejavu_utils.models import launch
from dejavu_utils.models import pairs as build
from dejavu_utils.reconstruct import classifier, sample

PARAMS = {
    "seeds": [0],
    "dataset": "scenes",
    "rhos": [0.2],
    "criteria": ["vicreg"],
    "epochs": [0],
    "sizes": {"classes": 3, "attacked": 10, "shared": 2, "public": 16, "probe": 10, "control": 10},
    "k": 5,
    "recipe": {"encoder": "small4", "projector": "16-16-16", "batch": 16},
    "crop": {"kind": "periphery", "min_side": 8},
}
HOW = {
    "epochs": 1,
    "batch": 16,
    "lr": 0.01,
    "size": 16,
    "extra": 4,
    "classifier_epochs": 1,
    "channels": [8, 8],
    "blocks": [1, 1],
}
SAMPLING = {"steps": 2, "guidance": 1.0, "samples": 2, "neighbours": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def reconstructor(folder):
    (pair,) = build.make(PARAMS, folder)
    launch.fit_all(build.jobs([pair]), workers=1)
    made = sample.prepare(pair, 0, folder, HOW, SAMPLING)
    launch.fit_all(made.jobs(), workers=1)
    return made


@pytest.fixture(scope="module")
def table(reconstructor):
    return sample.table(reconstructor, "projector")


def _rects(reconstructor, side="a"):
    return crops.background(reconstructor.pair.parts[side], reconstructor.pair.crop)


def test_decoders_learn_from_public_pictures_alone(reconstructor):
    """First X, then extra scenes, which are in no set; each with its own encoder's embeddings."""
    parts = reconstructor.pair.parts
    public = parts["public"]
    known = {row.numpy().tobytes() for images in parts.values() for row in images.squares(16)}
    for model in "AB":
        stored = store.read_tensors(reconstructor.decoders[model].pixels)[0]
        assert len(stored["pixels"]) == len(public) + 3 * 4
        assert torch.equal(stored["pixels"][: len(public)], public.squares(16))
        assert not known & {row.numpy().tobytes() for row in stored["pixels"][len(public) :]}
        own = references.embed_images(
            {model: reconstructor.pair.encoder(model, 0)}, public, 32, ("projector", "backbone")
        )
        for layer, by_model in own.items():
            assert torch.equal(stored[layer][: len(public)], by_model[model])
    assert reconstructor.decoders["A"].folder != reconstructor.decoders["B"].folder
    assert reconstructor.decoders["A"].seed == reconstructor.decoders["B"].seed, (
        "alike in all but the encoder"
    )


@pytest.mark.parametrize("part", ["a", "b", "shared", "control"])
def test_a_public_image_in_another_set_is_refused(reconstructor, folder, part):
    parts = dict(reconstructor.pair.parts)
    parts["public"] = dataclasses.replace(parts["public"], ids=parts["public"].ids.copy())
    parts["public"].ids[3] = parts[part].ids[0]
    pair = dataclasses.replace(reconstructor.pair, parts=parts)
    with pytest.raises(
        ValueError,
        match=f"1 images of the public set are also in {part}, e.g. {parts[part].ids[0]}",
    ):
        sample.prepare(pair, 0, folder, HOW, SAMPLING)


def test_the_classifier_sees_no_picture_of_any_set(reconstructor):
    stored = store.read_tensors(reconstructor.classifier.job.pixels)[0]
    seen = {row.numpy().tobytes() for row in stored["pixels"]}
    for images in reconstructor.pair.parts.values():
        assert not seen & {
            row.numpy().tobytes() for row in images.squares(stored["pixels"].shape[-1])
        }
    assert sorted(set(stored["labels"].tolist())) == list(range(6)), "three classes, light and dark"


def test_every_attacked_image_appears_once_under_each_model(reconstructor, table):
    ids = np.concatenate(
        [reconstructor.pair.parts[side].ids[_rects(reconstructor, side)[1]] for side in "ab"]
    )
    for role in ("target", "reference"):
        assert sorted(table.loc[table["role"] == role, "id"]) == sorted(ids)
    assert set(table["attribute"]) <= {0.0, 1.0} and table["class"].eq(table["correct"]).all()
    control, whole = (
        sample.table(reconstructor, "projector", which) for which in ("control", "whole")
    )
    assert list(control["id"]) == list(whole["id"]) and not control["confidence"].equals(
        whole["confidence"]
    )
    assert set(control["id"]) <= set(reconstructor.pair.parts["control"].ids) and not set(
        control["id"]
    ) & set(ids)


def _elsewhere(reconstructor, folder):
    """Return the reconstructor with its tables in another folder, where none is made yet."""
    return dataclasses.replace(
        reconstructor, pair=dataclasses.replace(reconstructor.pair, folder=folder)
    )


def test_a_table_is_the_same_when_made_again_and_when_read(reconstructor, table, tmp_path):
    again = sample.table(_elsewhere(reconstructor, tmp_path), "projector")
    pd.testing.assert_frame_equal(again, table)
    pd.testing.assert_frame_equal(sample.table(reconstructor, "projector"), table)


def test_planted_memory_is_found_and_nothing_where_there_is_none(
    reconstructor, monkeypatch, tmp_path
):
    """The target shows the picture itself, the reference another one, to a classifier that is
    always right: the score must say so.
    """
    known = {}
    for side in "ab":
        images = reconstructor.pair.parts[side]
        for picture, label in zip(images.squares(16), images.labels, strict=True):
            known[picture.numpy().tobytes()] = int(label)

    class Knows(classifier.Classifier):
        def read(self, pictures, device="cpu"):
            labels = [known[picture.numpy().tobytes()] for picture in pictures]
            return torch.eye(3).double()[labels][:, :, None].expand(-1, -1, 2)

    def planted(remembers, reconstructor, condition, images, rects, model, samples, device):
        own = "A" if set(images.ids) & set(reconstructor.pair.parts["a"].ids) else "B"
        pictures = images.squares(16)
        other = pictures[np.argsort(images.labels, kind="stable")].roll(len(images) // 2, 0)
        drawn = (pictures if model == own or not remembers else other)[:, None]
        return lambda: drawn

    def score(remembers, folder):
        monkeypatch.setattr(sample, "drawing", functools.partial(planted, remembers))
        oracle = Knows(reconstructor.classifier.job, 2)
        there = dataclasses.replace(_elsewhere(reconstructor, folder), classifier=oracle)
        return scoring.score(sample.table(there, "projector"), resamples=200)

    found, same = score(True, tmp_path / "planted"), score(False, tmp_path / "same")
    assert found["target"] == 1 and found["low"] > 0
    assert same["score"] == 0


@pytest.mark.parametrize("condition", [*sample.CONDITIONS, sample.NEAREST])
def test_every_condition_draws(reconstructor, condition):
    images, (rects, keep) = reconstructor.pair.parts["a"], _rects(reconstructor)
    some = images.subset(np.flatnonzero(keep)[:2])
    drawn = sample.pictures(reconstructor, condition, some, rects[keep][:2], "A", 3)
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (2, 1 if condition == sample.NEAREST else 3, 3, 16, 16)


def test_an_unknown_condition_is_named(reconstructor):
    images, (rects, _) = reconstructor.pair.parts["a"], _rects(reconstructor)
    with pytest.raises(
        ValueError,
        match='condition "proj"; expected one of projector, backbone, both, nearest',
    ):
        sample.pictures(reconstructor, "proj", images, rects, "A")


def test_conditions_are_made_of_what_they_say(reconstructor):
    images, (rects, keep) = reconstructor.pair.parts["a"], _rects(reconstructor)
    images, rects = images.subset(np.flatnonzero(keep)[:3]), rects[keep][:3]
    encoder = {"B": reconstructor.pair.encoder("B", 0)}
    layers = ("projector", "backbone")
    crop = references.embed_images(encoder, images, 32, layers, rects)
    bank = store.read_tensors(reconstructor.decoders["B"].pixels)[0]
    distance = torch.cdist(crop["projector"]["B"].double(), bank["projector"].double())
    nearest = distance.argsort(1)[:, :3]

    both = sample.representations(reconstructor, "both", images, rects, "B")
    assert torch.equal(both["projector"], crop["projector"]["B"])
    torch.testing.assert_close(both["backbone"], bank["backbone"][nearest].mean(1))
    alone = sample.representations(reconstructor, "backbone", images, rects, "B")
    assert alone.keys() == {"backbone"} and torch.equal(alone["backbone"], crop["backbone"]["B"])
    shown = sample.pictures(reconstructor, "nearest", images, rects, "B")
    assert torch.equal(shown[:, 0], bank["pixels"][nearest[:, 0]])


def test_the_classifiers_accuracy_is_that_of_its_reading(reconstructor):
    control = reconstructor.pair.parts["control"]
    rows = classifier.accuracy(reconstructor.classifier, control).set_index("reads")
    seen = reconstructor.classifier.read(control.squares(16))
    torch.testing.assert_close(seen.sum((1, 2)), torch.ones(len(control)).double())
    right = (seen.sum(2).argmax(1).numpy() == control.labels).mean()
    assert rows.loc["class", "accuracy"] == right and rows.loc["class", "n"] == len(control)
    assert (
        rows.loc["attribute", "low"]
        <= rows.loc["attribute", "accuracy"]
        <= rows.loc["attribute", "high"]
    )


def test_the_gallery_names_what_the_classifier_reads(reconstructor, table):
    ids = list(table["id"].drop_duplicates()[:2])
    rows = sample.gallery(reconstructor, ids, samples=2)
    for row in rows:
        pictures, names = zip(*row["target"], strict=True)
        read = reconstructor.classifier.classes(torch.stack(pictures))
        classes = reconstructor.pair.parts["a"].classes
        assert list(names) == [classes[i] for i in read]
        ((picture, name),) = row["nearest target"]
        known = store.read_tensors(reconstructor.decoders["A"].pixels)[0]
        where = (known["pixels"] == picture).flatten(1).all(1)
        assert name in {classes[i] for i in known["labels"][where]}
    figure = plots.gallery(rows, 2, plots.SAMPLED)
    titles = [axis.get_title() for axis in figure.axes]
    assert {row["name"] for row in rows} <= set(titles)
    assert len(figure.axes) == 2 * (2 + 2 * (2 + 1))
