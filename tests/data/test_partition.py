"""The split into A, B, shared, X, probe and control: exact sizes, disjoint, deterministic, and the
paper's own rule.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dejavu_utils.data import datasets, manifests, scenes
from dejavu_utils.data.images import Images
from dejavu_utils.data.split import PARTS, attackable, partition, partition_hash, parts

REAL = Path(os.environ.get("DEJAVU_DATA", "-"))
SIZES = {"classes": 3, "attacked": 4, "shared": 3, "public": 6, "probe": 2, "control": 2}


def make(per_class=30, classes=3, boxed=0.8):
    """Images without content; a share `boxed` of each class, spread over the ids, has a usable
    box.
    """
    labels = np.repeat(np.arange(classes), per_class)
    whole = [np.array([[0, 0, 8, 8]], np.float32), np.zeros((0, 4), np.float32)]
    good = [7 * i % per_class < boxed * per_class for i in range(per_class)] * classes
    boxes = [
        np.array([[1, 1, 4, 4]], np.float32) if ok else whole[i % 2] for i, ok in enumerate(good)
    ]
    ids = np.array([f"{label}-{i % per_class:04d}" for i, label in enumerate(labels)])
    pixels = torch.arange(len(ids), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    return Images(
        ids, labels, boxes, tuple("abcdefghij"[:classes]), np.full((len(ids), 2), 8), pixels
    )


def by_part(frame):
    return {part: frame["id"][frame["part"] == part].tolist() for part in PARTS}


@pytest.mark.parametrize("rule", ["disjoint", "paper"])
def test_parts_are_disjoint_attackable_and_of_the_size_asked_for(rule):
    images = make(boxed=0.5)
    frame = partition(images, SIZES, 0, rule)
    assert (
        frame["id"].is_unique
        and frame["id"].is_monotonic_increasing
        and set(frame["part"]) <= set(PARTS)
    )
    good = dict(zip(images.ids, attackable(images)[0], strict=True))
    assert all(good[name] for name in frame["id"][frame["part"].isin(["a", "b", "control"])])
    counts = frame.groupby(["label", "part"]).size().unstack(fill_value=0)
    h = int(counts["a"].min())
    expected = SIZES if rule == "disjoint" else SIZES | {"attacked": h, "shared": 7 - h}
    assert (
        rule == "disjoint" or h == 6
    )  # 15 boxed images, 2 of them set aside: 6 for A and 6 for B, 1 for both
    for part in PARTS:
        wanted = expected["attacked"] if part in "ab" else expected[part]
        assert (counts.get(part, np.zeros(3)) == wanted).all(), part


def test_it_depends_on_seed_and_ids_only():
    images = make()
    frame = partition(images, SIZES, 0)
    order = np.random.default_rng(1).permutation(len(images))
    assert partition(images.subset(order), SIZES, 0).equals(frame)
    assert not partition(images, SIZES, 1)["part"].equals(frame["part"])
    hashes = {partition_hash(partition(images, SIZES, seed)) for seed in range(5)}
    assert len(hashes) == 5
    assert partition_hash(frame.sample(frac=1, random_state=0)) == partition_hash(frame)
    fewer = partition(images, SIZES | {"classes": 2}, 0)
    assert fewer.equals(frame[frame["label"] < 2].reset_index(drop=True))


def test_sets_of_a_size_sweep_are_nested_and_public_stays():
    images = make(per_class=60)
    small, large = (by_part(partition(images, SIZES | {"attacked": n}, 0)) for n in (4, 8))
    assert set(small["a"]) < set(large["a"]) and set(small["b"]) < set(large["b"])
    for part in ("public", "probe", "control"):
        assert small[part] == large[part]


def test_parts_returns_images():
    images = make()
    frame = partition(images, SIZES | {"classes": 2, "control": 0}, 0)
    sets = parts(images, frame)
    assert (
        tuple(sets) == PARTS
        and len(sets["control"]) == 0
        and sets["control"].squares(4).shape == (0, 3, 4, 4)
    )
    assert sets["a"].ids.tolist() == by_part(frame)["a"] and sets["a"].classes == ("a", "b")
    assert (
        sets["a"].pixels[:, 0, 0, 0].tolist()
        == np.flatnonzero(np.isin(images.ids, sets["a"].ids)).tolist()
    )
    with pytest.raises(ValueError, match="[0-9]+ ids of the partition are not in the data set"):
        parts(images.subset(np.arange(5)), frame)


def test_the_papers_rule_is_the_papers():
    """The released code's construction: halves of the boxed images, shared ones fill up to n, X is
    the rest.
    """
    images = make(per_class=40, classes=1, boxed=0.5)
    good = dict(zip(images.ids.tolist(), attackable(images)[0], strict=True))
    for n in (5, 10, 14):
        sets = by_part(partition(images, {"attacked": n}, 0, "paper"))
        h = min(sum(good.values()) // 2, n)
        assert len(sets["a"]) == len(sets["b"]) == h and len(sets["shared"]) == n - h
        assert (
            not any(good[name] for name in sets["shared"])
            and not sets["probe"]
            and not sets["control"]
        )
        assert len(sets["public"]) == 40 - 2 * h - (n - h)
        again = by_part(partition(images, {"attacked": 0, "shared": n}, 0, "paper"))
        assert again == sets  # n is attacked + shared
    first = by_part(partition(images, {"attacked": 14, "public": 6, "probe": 4}, 0, "paper"))
    assert (
        set(first["public"]) < set(sets["public"])
        and len(first["public"]) == 6
        and len(first["probe"]) == 4
    )
    assert not set(first["probe"]) & set(first["public"])


def test_errors_name_the_class_found_and_needed():
    images = make(per_class=20, boxed=0.3)
    with pytest.raises(
        ValueError, match=r'class "a" has 6 attackable images \(usable box\), 10 are needed'
    ):
        partition(images, SIZES, 0)
    with pytest.raises(ValueError, match=r'class "a" has 14 images left, 40 are needed'):
        partition(images, SIZES | {"attacked": 2, "public": 35}, 0)
    with pytest.raises(
        ValueError, match='class "a" has 14 images without a usable box, 27 are needed'
    ):
        partition(images, {"attacked": 30}, 0, "paper")
    with pytest.raises(ValueError, match='class "a" has 0 attackable'):
        partition(make(boxed=0), {"attacked": 3}, 0, "paper")
    with pytest.raises(ValueError, match="4 classes wanted, the data set has 3"):
        partition(images, SIZES | {"classes": 4}, 0)
    for sizes, rule in (
        ({"attack": 3}, "disjoint"),
        ({"attacked": -1}, "disjoint"),
        ({"attacked": 1.5}, "disjoint"),
        ({"attacked": True}, "disjoint"),
        (SIZES, "other"),
    ):
        with pytest.raises(ValueError, match="expected whole numbers >= 0"):
            partition(images, sizes, 0, rule)


def check_golden(name, images):
    split = manifests.read(name)["split"]
    frame = partition(images, split["sizes"], split["seed"], split["rule"])
    assert partition_hash(frame) == split["hash"]


def test_golden_split_of_scenes():
    check_golden("scenes", scenes.make(classes=10, per_class=50))


def test_golden_hash_of_a_small_table():
    """Written down once: the hash and the order of the split must not change with versions of
    anything.
    """
    assert partition_hash(partition(make(), SIZES, 7)) == (
        "edef569e973a74809301fb0f0098dd577980fc176c52104f83c4a868c9c89634"
    )


@pytest.mark.skipif(
    not (REAL / "oxford-pets-3class.zip").exists(),
    reason="set DEJAVU_DATA: no oxford-pets-3class.zip",
)
def test_golden_split_of_pets():
    check_golden("pets", datasets.read("pets"))


@pytest.mark.skipif(
    not (REAL / "tiny-imagenet-50.zip").exists(), reason="set DEJAVU_DATA: no tiny-imagenet-50.zip"
)
def test_golden_split_of_tiny_imagenet_50():
    images = datasets.read("tiny_imagenet_50")
    assert len(images) == 25_000 and images.skipped == []
    assert attackable(images)[1] == {"no box": 0, "zero area": 144, "whole image": 1614}
    check_golden("tiny_imagenet_50", images)
