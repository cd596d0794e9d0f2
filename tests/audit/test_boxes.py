"""Boxes that are elsewhere than the objects are noticed from the pictures themselves."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from dejavu_utils.audit import audit
from dejavu_utils.data.images import Images
from dejavu_utils.models.external import External

COLOURS = np.array([[230, 30, 30], [30, 230, 30], [30, 30, 230], [230, 230, 30]])
RIGHT = (22, 8, 34, 20)  # where the objects are, px
WRONG = {"beside": (4, 8, 16, 20), "swapped": (8, 22, 20, 34), "corner": (0, 28, 10, 40)}


class Brightest(nn.Module):
    """A trunk that sees the colour of an object wherever it is: the most saturated pixels' mean."""

    def forward(self, x):
        spread = x.amax(1) - x.amin(1)  # (n, h, w)
        weight = (spread > 2.5).float()[:, None]
        found = (x * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1)
        return found + 1e-3 * x.mean((2, 3))


def pictures(seed, box, n=120, seen=True):
    """Return grey noise of 40 px with a coloured square at RIGHT, and boxes that say `box`."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % len(COLOURS)
    pixels = np.repeat(random.integers(90, 160, (n, 1, 40, 40)), 3, axis=1)
    x0, y0, x1, y1 = RIGHT
    if seen:
        pixels[:, :, y0:y1, x0:x1] = COLOURS[labels][:, :, None, None]
    pixels += random.integers(-9, 10, pixels.shape)
    return Images(
        np.array([f"{seed}-{i:03d}" for i in range(n)]),
        labels,
        [np.array([box], np.float32)] * n,
        ("red", "green", "blue", "yellow"),
        np.full((n, 2), 40),
        torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)),
    )


def audited(box, seen=True):
    sets = [pictures(seed, box, seen=seen) for seed in (1, 2, 3)]
    encoder = External(Brightest(), name="colours")
    return audit.run(encoder, *sets, k=5, size=40, crop={"min_side": 6})


def test_right_boxes_give_no_warning():
    found = audited(RIGHT)
    assert found.warning == "" and "look wrong" not in found.html()


@pytest.mark.parametrize("where", WRONG)
def test_wrong_boxes_are_noticed(where):
    found = audited(WRONG[where])
    assert "boxes look wrong as a whole" in found.warning
    assert found.warning in found.html() and found.warning == found.summary()["warning"]
    assert json.dumps(found.summary())


def test_an_encoder_that_recognises_nothing_blames_no_boxes():
    assert audited(WRONG["beside"], seen=False).warning == ""


def test_corners_are_not_judged_by_boxes():
    sets = [pictures(seed, WRONG["beside"]) for seed in (1, 2, 3)]
    found = audit.run(External(Brightest(), name="c"), *sets, size=40, crop={"kind": "corner"})
    assert found.case.boxed == 0 and found.warning == ""
