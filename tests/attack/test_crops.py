"""Crops show no pixel of any box, follow the published rule, and resample without looking beyond
their edge.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dejavu_utils.attack import crops
from dejavu_utils.data.resampling import resample


def covered(boxes, width, height):
    """Return the (height, width) grid of pixels that any box touches."""
    grid = np.zeros((height, width), dtype=bool)
    x, y = np.arange(width), np.arange(height)
    for x0, y0, x1, y1 in boxes:
        across, down = (
            np.maximum(x, x0) < np.minimum(x + 1, x1),
            np.maximum(y, y0) < np.minimum(y + 1, y1),
        )
        grid |= down[:, None] & across
    return grid


def empty(grid, rect):
    x0, y0, x1, y1 = rect
    return not grid[y0:y1, x0:x1].any()


def shorter(rect):
    x0, y0, x1, y1 = rect
    return min(x1 - x0, y1 - y0)


def naive_paper(boxes, width, height):
    """Return the published rule's best shorter side, on a grid: columns between box edges, vertical
    runs of each.
    """
    grid = covered(boxes, width, height)
    edges = sorted({0, width, *(int(b[0]) for b in boxes), *(int(b[2]) for b in boxes)})
    best = 0
    for x0, x1 in zip(edges[:-1], edges[1:], strict=True):
        run = 0
        for y in range(height):
            run = 0 if grid[y, x0:x1].any() else run + 1
            best = max(best, min(x1 - x0, run))
    return best


def boxes_at_random(random, width=24, height=18, whole=True):
    """Return one to four random boxes, partly outside the image."""
    corner = random.uniform(-3, [width, height], (random.integers(1, 5), 2))
    size = random.uniform(1, [width / 2, height / 2], corner.shape)
    boxes = np.concatenate([corner, corner + size], 1)
    return boxes.round() if whole else boxes


@pytest.mark.parametrize(
    "boxes, expected",
    [
        (
            [[40, 30, 60, 70]],
            (0, 0, 40, 100),
        ),  # the widest of left, right, above, below: left first, both 40 wide
        ([[10, 30, 60, 70]], (60, 0, 100, 100)),  # right
        ([[10, 50, 90, 80]], (10, 0, 90, 50)),  # above: only as wide as the box's own column
        ([[10, 20, 90, 50]], (10, 50, 90, 100)),  # below
        ([[0, 30, 55, 100]], (55, 0, 100, 100)),  # a box at the edge
        ([[0, 0, 100, 40]], (0, 40, 100, 100)),  # a box as wide as the image
        ([[-20, -5, 130, 40]], (0, 40, 100, 100)),  # reaching beyond it: clamped
        (
            [[10, 60, 30, 90], [70, 60, 90, 90]],
            (30, 0, 70, 100),
        ),  # the column between them, not the strip above
        ([[10, 60, 30, 90], [20, 10, 40, 50]], (40, 0, 100, 100)),  # overlapping columns
        (
            [[0, 0, 50, 30], [0, 70, 50, 100], [50, 10, 100, 90]],
            (0, 30, 50, 70),
        ),  # the gap between two boxes of a column
        ([[0, 0, 100, 100]], None),
        ([], None),
        ([[120, 0, 140, 10]], None),
        ([[5, 5, 5, 9]], None),
    ],
)
def test_the_published_rule_on_hand_cases(boxes, expected):
    assert crops.periphery(boxes, 100, 100, 10) == expected


def test_a_strip_above_two_boxes_is_cut():
    boxes = [[0, 60, 45, 100], [55, 60, 100, 100]]
    assert crops.periphery(boxes, 100, 100, 40) == (0, 0, 45, 60)
    assert crops.periphery(boxes, 100, 100, 50) is None


def test_min_side_is_strict():
    assert crops.periphery([[100, 0, 300, 300]], 300, 300, 100) is None
    assert crops.periphery([[101, 0, 300, 300]], 300, 300, 100) == (0, 0, 101, 300)


def test_a_partly_covered_pixel_belongs_to_the_box():
    assert crops.periphery([[40.2, 0, 90.7, 100]], 100, 100, 5) == (0, 0, 40, 100)
    assert crops.periphery([[9.5, 0, 60.1, 100]], 100, 100, 5) == (61, 0, 100, 100)


def test_the_rule_against_brute_force_on_random_boxes():
    random = np.random.default_rng(0)
    for trial in range(300):
        whole = trial % 2 == 0
        boxes = boxes_at_random(random, whole=whole)
        grid = covered(boxes, 24, 18)
        found = crops.periphery(boxes, 24, 18, 0)
        if not grid.any() or grid.all():
            assert found is None
            continue
        assert empty(grid, found)
        assert 0 <= found[0] < found[2] <= 24 and 0 <= found[1] < found[3] <= 18
        if whole:
            inside = boxes.clip(0, [24, 18, 24, 18])
            inside = inside[(inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])]
            assert shorter(found) == naive_paper(inside, 24, 18)


@pytest.mark.parametrize(
    "corner, expected",
    [
        ("lower-left", (0, 70, 60, 100)),
        ("lower-right", (140, 70, 200, 100)),
        ("upper-left", (0, 0, 60, 30)),
        ("upper-right", (140, 0, 200, 30)),
    ],
)
def test_corner(corner, expected):
    assert crops.corner(200, 100, 0.3, corner) == expected
    assert crops.corner(200, 100, 1.0, corner) == (0, 0, 200, 100)


def images(*boxes, size=(64, 64)):
    return SimpleNamespace(
        boxes=[np.array(b, np.float32).reshape(-1, 4) for b in boxes],
        sizes=[size] * len(boxes),
        ids=[f"image {i}" for i in range(len(boxes))],
    )


def test_background_keeps_only_images_with_a_crop():
    rects, keep = crops.background(
        images([[30, 10, 60, 50]], [[1, 1, 63, 63]], []), {"min_side": 16}
    )
    assert keep.tolist() == [True, False, False]
    assert rects.tolist() == [[0, 0, 30, 64], [0, 0, 0, 0], [0, 0, 0, 0]]
    rects, keep = crops.background(
        images([[30, 10, 60, 50]], []), {"kind": "corner", "fraction": 0.5}
    )
    assert keep.all() and rects.tolist() == [[0, 32, 32, 64]] * 2
    rects, keep = crops.background(images(), {})
    assert rects.shape == (0, 4) and keep.shape == (0,)


def test_background_asserts_that_no_crop_meets_a_box(monkeypatch):
    monkeypatch.setattr(crops, "periphery", lambda *_: (0, 0, 31, 64))
    with pytest.raises(AssertionError, match="image 0"):
        crops.background(images([[30, 10, 60, 50]]), {})


@pytest.mark.parametrize(
    "crop, text",
    [
        ({"kind": "centre"}, "centre"),
        ({"minside": 3}, "keys .'minside'.*; expected keys among"),
        ({"kind": "corner", "corner": "left"}, "corner 'left'"),
        ({"kind": "corner", "fraction": 0}, "fraction 0"),
    ],
)
def test_bad_crops_are_one_clear_error(crop, text):
    with pytest.raises(ValueError, match=text):
        crops.background(images([[30, 10, 60, 50]]), crop)


@pytest.mark.parametrize("box", [[5, 5, 4, 9], [0, float("nan"), 4, 9]])
def test_an_impossible_box_is_an_error(box):
    with pytest.raises(ValueError, match="expected x0 <= x1"):
        crops.periphery([box], 64, 64, 1)


@pytest.mark.parametrize("size", [5, 16, 48])
def test_resample_equals_cutting_then_antialiased_interpolation(size):
    random = np.random.default_rng(size)
    pixels = torch.randint(
        0, 256, (12, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)
    )
    start = random.integers(0, 30, (12, 2))
    rects = np.concatenate([start, start + random.integers(1, 10, (12, 2))], 1)
    rects[0] = (0, 0, 50, 40)
    flip = torch.arange(12) % 2 == 1
    found = resample(pixels, torch.from_numpy(rects), size, flip)
    for i, (x0, y0, x1, y1) in enumerate(rects):
        expected = torch.nn.functional.interpolate(
            pixels[i : i + 1, :, y0:y1, x0:x1].double(),
            (size, size),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )[0]
        expected = expected.flip(-1) if flip[i] else expected
        torch.testing.assert_close(found[i].double(), expected, atol=2e-3, rtol=0)


def test_noise_inside_the_boxes_never_changes_a_crop():
    random = np.random.default_rng(1)
    everything = images(*[boxes_at_random(random, 64, 64, whole=i % 2 == 0) for i in range(60)])
    clean = torch.from_numpy(random.integers(0, 256, (60, 3, 64, 64), dtype=np.uint8))
    noisy = clean.clone()
    for i, boxes in enumerate(everything.boxes):
        hidden = torch.from_numpy(covered(boxes, 64, 64))
        noisy[i][:, hidden] = torch.from_numpy(
            random.integers(0, 256, (3, int(hidden.sum())), dtype=np.uint8)
        )
    rects, keep = crops.background(everything, {"min_side": 4})
    assert keep.sum() > 30
    rects = torch.from_numpy(rects)[keep]
    for size in (7, 32, 64):
        left, right = (resample(pixels[keep], rects, size) for pixels in (clean, noisy))
        assert torch.equal(left, right)
    assert not torch.equal(
        resample(clean, torch.tensor([[0, 0, 64, 64]] * 60), 32),
        resample(noisy, torch.tensor([[0, 0, 64, 64]] * 60), 32),
    )


def test_a_constant_image_stays_constant():
    found = resample(
        torch.full((2, 3, 9, 11), 7.0), torch.tensor([[0.0, 0, 11, 9], [2.3, 1.1, 7.9, 8.2]]), 6
    )
    torch.testing.assert_close(found, torch.full((2, 3, 6, 6), 7.0))
