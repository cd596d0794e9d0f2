"""The embedded data set: its truth is known, and nothing of the object leaks into the
background.
"""

import numpy as np
import pytest
import torch

from dejavu_utils.attack import crops
from dejavu_utils.data import scenes


@pytest.fixture(scope="module")
def images():
    return scenes.make(classes=10, per_class=40, rho=0.2, seed=7)


def test_same_arguments_same_pixels(images):
    again, other = scenes.make(10, 40, 0.2, 7), scenes.make(10, 40, 0.2, 8)
    assert torch.equal(images.pixels, again.pixels) and images.digest == again.digest
    assert not torch.equal(images.pixels, other.pixels)


def test_a_scene_does_not_depend_on_how_many_there_are(images):
    assert torch.equal(scenes.make(10, 5, 0.2, 7).pixels, images.pixels[:50])


def test_nothing_of_the_object_is_outside_its_box(images):
    bare = scenes.make(10, 40, 0.2, 7, objects=False)
    changed = (images.pixels != bare.pixels).any(1)
    for i, (x0, y0, x1, y1) in enumerate(np.concatenate(images.boxes).astype(int)):
        outside = changed[i].clone()
        outside[y0:y1, x0:x1] = False
        assert not outside.any()
        inside = changed[i, y0:y1, x0:x1]  # and the box is tight: the disc touches all four sides
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_crops_are_those_of_the_bare_background(images):
    """A crop of the composed picture has the same bits as the crop of the background alone."""
    bare = scenes.make(10, 40, 0.2, 7, objects=False)
    rects, keep = crops.background(images, {"kind": "periphery", "min_side": 8})
    use = np.flatnonzero(keep)
    composed, alone = (one.subset(use).squares(32, rects[use]) for one in (images, bare))
    assert torch.equal(composed, alone) and keep.mean() > 0.95


def test_backgrounds_never_repeat(images):
    bare = scenes.make(10, 40, 0.2, 7, objects=False).pixels.flatten(1).numpy()
    assert len(np.unique(bare, axis=0)) == len(bare)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_bayes_accuracy_is_what_the_known_family_attains(rho):
    """Guessing the family's own class, with the family known, is right as often as the closed form
    says.
    """
    rng = np.random.default_rng(0)
    n, classes = 200_000, 10
    label = rng.integers(classes, size=n)
    family = np.where(rng.random(n) < rho, label, rng.integers(classes, size=n))
    assert (family == label).mean() == pytest.approx(scenes.bayes_accuracy(rho, classes), abs=0.005)


def test_families_follow_rho():
    one = scenes.make(10, 100, 0.5, 3)
    share = (one.attributes["family"] == one.labels).mean()
    assert share == pytest.approx(scenes.bayes_accuracy(0.5, 10), abs=0.05)


def test_a_supervised_classifier_on_many_crops_stays_at_or_below_bayes():
    """The leak test: trained on 4,000 background crops with their labels, judged on 4,000 fresh
    ones.
    """
    from sklearn.ensemble import ExtraTreesClassifier

    def features(seed):
        one = scenes.make(10, 400, 0.3, seed)
        rects, keep = crops.background(one, {"kind": "periphery", "min_side": 8})
        use = np.flatnonzero(keep)
        square = one.subset(use).squares(12, rects[use]).float()
        return torch.cat([square.flatten(1), square.std((2, 3))], 1).numpy(), one.labels[use]

    (x, y), (z, t) = features(11), features(12)
    accuracy = (
        ExtraTreesClassifier(100, n_jobs=1, random_state=0).fit(x, y).predict(z) == t
    ).mean()
    bayes, error = scenes.bayes_accuracy(0.3, 10), (0.37 * 0.63 / len(t)) ** 0.5
    assert 0.15 < accuracy <= bayes + 3.3 * error, f"{accuracy:.3f} against Bayes {bayes:.3f}"


@pytest.mark.parametrize("wrong", [{"classes": 99}, {"rho": 1.5}, {"classes": 0}])
def test_bad_arguments(wrong):
    with pytest.raises(ValueError, match="scenes.make: expected"):
        scenes.make(**wrong)
