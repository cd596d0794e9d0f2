"""A second attribute: the vote within the class is exact, the label alone is worth chance, planted
memory is found.
"""

import dataclasses
import functools
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from dejavu_utils.attack import attributes, inference, scoring
from dejavu_utils.data.images import Images
from dejavu_utils.models import pairs
from dejavu_utils.models.encoders import Encoder

pytestmark = pytest.mark.usefixtures("any_number")

PARAMS = {
    "dataset": "scenes",
    "epochs": [0],
    "recipe": {"encoder": "small4", "projector": "8-8", "batch": 8, "size": 16},
    "sizes": {"classes": 3, "attacked": 8, "shared": 0, "public": 10, "probe": 20, "control": 8},
    "crop": {"kind": "periphery", "min_side": 8},
}


class Untrained(pairs.Pair):
    """A pair whose encoders were never trained, and so need no training."""

    def encoder(self, model, epoch):
        return fresh("AB".index(model))


@functools.cache
def fresh(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder("small4", "8-8", 16).eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Untrained(**vars(pairs.one(PARAMS, tmp_path_factory.mktemp("runs"), "vicreg", 0.2, 0)))


def case(seed=0, n=60, public=120, classes=4, count=2, width=6):
    """Return random embeddings, ids, classes and attribute values of a, b and public: nothing is
    remembered.
    """
    rng, sizes = np.random.default_rng(seed), {"a": n, "b": n, "public": public}
    return SimpleNamespace(
        embeddings={
            part: {model: torch.from_numpy(rng.normal(size=(m, width))).float() for model in "AB"}
            for part, m in sizes.items()
        },
        ids={part: np.array([f"{part}{i:04d}" for i in range(m)]) for part, m in sizes.items()},
        labels={part: np.arange(m) % classes for part, m in sizes.items()},
        values={part: rng.integers(0, count, m) for part, m in sizes.items()},
    )


def run(one, k=5):
    parts = {
        name: attributes.Part(
            one.embeddings[name], one.ids[name], one.labels[name], one.values[name]
        )
        for name in ("a", "b", "public")
    }
    return attributes.within_class(parts, k)


def score(rows, **options):
    """Return the score with classes, not values, as what is resampled from fifty of them on."""
    return scoring.score(rows.assign(label=rows["class"]), **options)


def plant(one, side, model, right=True):
    """Make the embedding of every crop under `model` that of a public image of its class with its
    value (or not).
    """
    for i, (label, value) in enumerate(zip(one.labels[side], one.values[side], strict=True)):
        same = (one.labels["public"] == label) & ((one.values["public"] == value) == right)
        one.embeddings[side][model][i] = one.embeddings["public"][model][np.flatnonzero(same)[0]]


@pytest.mark.parametrize("k,count", [(1, 2), (5, 2), (6, 2), (7, 3)])
def test_vote_is_the_naive_one(k, count):
    """One crop at a time: distances to its class's public images, votes, ties to the nearer, then
    the lower value.
    """
    one = case(count=count)
    rows = run(one, k).set_index(["id", "role"])
    for side, target in inference.TARGETS.items():
        for role, model in (("target", target), ("reference", "AB".replace(target, ""))):
            for i, name in enumerate(one.ids[side]):
                mates = np.flatnonzero(one.labels["public"] == one.labels[side][i])
                gap = (
                    (one.embeddings["public"][model][mates] - one.embeddings[side][model][i])
                    .double()
                    .square()
                    .sum(1)
                )
                near = np.argsort(gap.numpy())[:k]
                votes = {
                    value: [float(gap[j]) for j in near if one.values["public"][mates[j]] == value]
                    for value in range(count)
                }
                best = min((-len(far), np.mean(far), value) for value, far in votes.items() if far)[
                    2
                ]
                row = rows.loc[(name, role)]
                assert row["prediction"] == best and row["label"] == one.values[side][i]
                shares = [len(far) / k for far in votes.values() if far]
                assert row["confidence"] == pytest.approx(sum(p * math.log(p) for p in shares))
                assert row["class"] == one.labels[side][i] and row["correct"] == (
                    best == row["label"]
                )


def test_only_images_of_the_true_class_vote():
    one, far = case(), case()
    other = far.labels["public"] != 0
    far.values["public"] = np.where(other, 1 - far.values["public"], far.values["public"])
    for model in "AB":
        far.embeddings["public"][model][other] += 100
    rows, changed = (
        table[table["class"] == 0].reset_index(drop=True) for table in (run(one), run(far))
    )
    pd.testing.assert_frame_equal(rows, changed)


def test_planted_memory_is_found():
    one = case()
    for side, target in inference.TARGETS.items():
        plant(one, side, target)
        plant(one, side, "AB".replace(target, ""), right=False)
    rows = run(one, k=1)
    row = score(rows, resamples=50)
    assert (row["score"], row["low"], row["high"], row["target"], row["reference"]) == (
        1,
        1,
        1,
        1,
        0,
    )
    assert row["n"] == 120 and 0.3 < rows["chance"].mean() < 0.7


def test_memory_of_shuffled_attributes_is_no_memory():
    """The planted case with the attributes of the attacked images shuffled within their class:
    score 0, accuracy .5.
    """
    one, rng = case(n=400, public=400), np.random.default_rng(0)
    for side, target in inference.TARGETS.items():
        plant(one, side, target)
        for label in range(4):
            rows = np.flatnonzero(one.labels[side] == label)
            one.values[side][rows] = rng.permutation(one.values[side][rows])
    row = score(run(one, k=1), level=0.999, resamples=500)
    assert row["low"] < 0 < row["high"] and row["target_low"] < 0.5 < row["target_high"]


def test_label_alone_is_worth_chance():
    """A crop that gives its class away entirely, and nothing else: both models get what the
    commonest value gets.
    """
    one = case(n=400, public=200)
    for part, by in one.embeddings.items():
        for model in by:
            by[model] = torch.nn.functional.one_hot(torch.as_tensor(one.labels[part])).float()
    rows = run(one, k=49)
    row = score(rows, resamples=50)
    assert row["score"] == row["low"] == row["high"] == 0
    common = {
        label: np.bincount(one.values["public"][one.labels["public"] == label]).argmax()
        for label in range(4)
    }
    guess = [common[label] for label in rows["class"]]
    assert (
        rows["chance"].mean() == pytest.approx((rows["label"] == guess).mean())
        and 0.4 < rows["chance"].mean() < 0.6
    )


def test_tied_commonest_values_are_half_right():
    one = case(public=80)
    one.values["public"] = np.arange(80) // 4 % 2
    assert set(run(one)["chance"]) == {0.5}


def test_identities():
    rows = run(case(count=3))
    shares = scoring.four_way(rows, resamples=10)
    assert score(rows, resamples=10)["score"] == pytest.approx(
        shares["memorized"] - shares["misrepresented"]
    )
    assert (rows.groupby("id").size() == 2).all() and len(rows) == 240
    same = case()
    for by in same.embeddings.values():
        by["B"] = by["A"]
    row = score(run(same), resamples=20)
    assert row["score"] == row["low"] == row["high"] == 0


def test_order_of_images_changes_nothing():
    one, other, rng = case(), case(), np.random.default_rng(0)
    for part in ("a", "b", "public"):
        order = rng.permutation(len(one.ids[part]))
        other.embeddings[part] = {model: x[order] for model, x in one.embeddings[part].items()}
        for name in ("ids", "labels", "values"):
            getattr(other, name)[part] = getattr(one, name)[part][order]
    pd.testing.assert_frame_equal(run(one), run(other))


def test_from_fifty_classes_on_true_classes_are_drawn():
    one = case(n=300, public=600, classes=60)
    rows = run(one)
    rows["correct"] = (rows["class"] % 3 == 0) & (
        rows["role"] == "target"
    )  # a class is right as a whole
    wide, narrow = score(rows), score(rows.assign(**{"class": 0}))
    assert wide["score"] == narrow["score"] and wide["high"] - wide["low"] > 1.5 * (
        narrow["high"] - narrow["low"]
    )


def test_a_class_with_too_few_public_images_is_named():
    one = case(public=121)
    one.labels["public"] = np.r_[np.arange(120) % 3, 3]  # one public image of class 3
    with pytest.raises(ValueError, match="class 3 has 1 public images; expected more than k = 1"):
        run(one, k=1)


@pytest.mark.parametrize("attribute", ["shade", "colour", "size"])
def test_a_table_of_a_pair_that_scores(pair, attribute):
    rows = attributes.infer(pair, 0, 3, attribute)
    row = scoring.score(rows, resamples=50, level=0.999)
    assert row["n"] == len(rows) / 2 > 30 and row["low"] <= 0 <= row["high"]
    assert (
        set(rows["label"]) == {0, 1}
        and set(rows["class"]) == {0, 1, 2}
        and set(rows["attribute"]) == {attribute}
    )
    if attribute == "shade":
        truth = dict(zip(pair.parts["a"].ids, pair.parts["a"].attributes["shade"], strict=True))
        own = rows[rows["direction"] == "a"]
        assert [truth[name] for name in own["id"]] == list(own["label"])


def test_computed_twice_the_same_and_read_the_third_time(pair, monkeypatch):
    first = attributes.infer(pair, 0, 4)
    again = attributes.infer.__wrapped__(pair, 0, 4)
    pd.testing.assert_frame_equal(first, again, check_dtype=False)
    monkeypatch.setattr(attributes, "within_class", lambda *a: pytest.fail("computed again"))
    pd.testing.assert_frame_equal(first, attributes.infer(pair, 0, 4))


def test_pictures_whose_object_is_not_known_neither_vote_nor_are_attacked(pair, tmp_path):
    """A third of every part lose their boxes; corner crops need none. The others' table is that of
    the others alone.
    """

    def without(images, drop):
        kept = images.subset(np.arange(len(images)) % 3 > 0)
        boxes = [box[:0] if i % 3 == 0 else box for i, box in enumerate(images.boxes)]
        return kept if drop else dataclasses.replace(images, boxes=boxes)

    tables = []
    for drop in (True, False):
        parts = {name: without(images, drop) for name, images in pair.parts.items()}
        own = vars(pair) | {
            "parts": parts,
            "crop": {"kind": "corner"},
            "folder": tmp_path / str(drop),
        }
        tables.append(attributes.infer(Untrained(**own), 0, 3, "size"))
    pd.testing.assert_frame_equal(*tables, atol=1e-12)
    assert len(tables[0]) == 2 * 2 * 16


def test_unknown_attribute_names_what_there_is(pair):
    for ask in (
        lambda: attributes.infer(pair, 0, 3, "weight"),
        lambda: attributes.readable(pair, 0, "weight"),
    ):
        with pytest.raises(
            ValueError, match='attribute "weight"; expected one of family, shade, colour, size'
        ):
            ask()


def test_a_probe_reads_what_can_be_read_and_not_what_cannot(pair):
    rng, parts = np.random.default_rng(0), {}
    for name, images in pair.parts.items():
        noise = {"told": images.labels % 2, "noise": rng.integers(0, 2, len(images))}
        parts[name] = dataclasses.replace(images, attributes=noise)
    other = Untrained(**vars(pair) | {"parts": parts})
    told, noise = (attributes.readable(other, 0, name) for name in ("told", "noise"))
    assert (
        list(told["model"]) == ["A", "B"]
        and (told["accuracy"] == 1).all()
        and (told["n"] == 60).all()
    )
    assert ((noise["low"] < 0.5) & (noise["high"] > 0.35)).all() and (
        noise["high"] - noise["low"] > 0.2
    ).all()
    probe = dataclasses.replace(
        parts["probe"], attributes={"told": np.full(len(parts["probe"]), -1)}
    )
    halved = attributes.readable(
        Untrained(**vars(pair) | {"parts": parts | {"probe": probe}}), 0, "told"
    )
    assert (halved["accuracy"] == 1).all() and (halved["n"] == len(parts["public"]) // 2).all()


def pictures(colours, boxes, labels=None, side=20):
    """Return grey pictures whose boxes are filled with a colour; the boxes of one picture are drawn
    in order.
    """
    pixels = torch.full((len(boxes), 3, side, side), 128, dtype=torch.uint8)
    for i, (colour, own) in enumerate(zip(colours, boxes, strict=True)):
        for x0, y0, x1, y1 in own:
            pixels[i, :, y0:y1, x0:x1] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    n = len(boxes)
    return Images(
        ids=np.array([f"i{i}" for i in range(n)]),
        labels=np.zeros(n, int) if labels is None else labels,
        boxes=[np.array(own, np.float32).reshape(-1, 4) for own in boxes],
        classes=("one", "two"),
        sizes=np.full((n, 2), side),
        pixels=pixels,
    )


def test_colour_and_size_of_the_object():
    red, blue = (200, 60, 40), (40, 60, 200)
    small, large = (2, 3, 6, 7), (1, 1, 15, 15)
    images = pictures([red, blue, red, blue], [[small], [small], [small, large], [large]])
    found = attributes.of_objects(images, images)
    assert found["colour"].tolist() == [1, 0, 1, 0] and found["size"].tolist() == [0, 0, 1, 1]


def test_nothing_outside_the_box_is_looked_at():
    red, blue = (200, 60, 40), (40, 60, 200)
    images = pictures([red, blue], [[(4, 4, 10, 10)], [(4, 4, 10, 10)]])
    outside = torch.ones(20, 20, dtype=torch.bool)
    outside[4:10, 4:10] = False
    # Around the red box all is blue, and around the blue one red.
    around = torch.tensor([blue, red], dtype=torch.uint8)[:, :, None, None]
    other = dataclasses.replace(images, pixels=torch.where(outside, around, images.pixels))
    found = attributes.of_objects(other, other)
    assert found["colour"].tolist() == [1, 0]
    for name, values in attributes.of_objects(images, images).items():
        assert np.array_equal(values, found[name])


def test_the_median_is_the_public_sets_and_the_classes_own():
    red, blue = (200, 60, 40), (40, 60, 200)
    sides = [4, 6, 8, 10, 5, 7, 9, 11]
    public = pictures([red] * 8, [[(1, 1, 1 + s, 1 + s)] for s in sides], np.repeat([0, 1], 4))
    assert [
        attributes.of_objects(public, public)["size"][public.labels == c].mean() for c in (0, 1)
    ] == [0.5, 0.5]
    asked = pictures(
        [blue] * 2, [[(1, 1, 8, 8)]] * 2, np.array([0, 1])
    )  # side 7: between 6 and 8, and 7 itself
    assert attributes.of_objects(asked, public)["size"].tolist() == [0, 0]
    asked = pictures([blue] * 2, [[(1, 1, 9, 9)]] * 2, np.array([0, 1]))
    assert attributes.of_objects(asked, public)["size"].tolist() == [1, 0]


def test_pictures_without_a_usable_box_are_unknown():
    red = (200, 60, 40)
    images = pictures(
        [red] * 5,
        [[], [(1, 1, 5, 5)], [(1, 1, 9, 9)], [(0, 0, 20, 20)], [(1, 1, 5, 5)]],
        np.array([0, 0, 0, 0, 1]),
    )
    assert attributes.of_objects(images, images)["size"].tolist() == [-1, 0, 1, -1, 0]
    public = images.subset([1, 2])
    assert attributes.of_objects(images, public)["size"].tolist() == [-1, 0, 1, -1, -1]
