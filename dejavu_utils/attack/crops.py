"""Background crops: the rectangles that show no object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dejavu_utils.data.images import Images

Rect = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, half-open
KINDS = ("periphery", "corner")
CORNERS = ("lower-left", "lower-right", "upper-left", "upper-right")
CROP = {
    "kind": "periphery",
    "min_side": 16,
    "fraction": 0.3,
    "corner": "lower-left",
}


def periphery(
    boxes: np.ndarray | Sequence[Sequence[float]], width: int, height: int, min_side: int
) -> Rect | None:
    """Return the background crop x0, y0, x1, y1 (pixels, half-open) that no box reaches into, or
    None.

    `boxes` (m, 4) x0, y0, x1, y1. The published rule: columns between neighbouring box edges, the
    gaps that the boxes leave in each, and of those the one with the longest shorter side. A crop
    never spans two columns, so a strip above two boxes is cut. Ties: the leftmost, then the
    topmost. None when the shorter side is not above `min_side` (100 in the paper; strict: 100
    itself fails), and when no box lies in the image: the object is then unknown. Partly covered
    pixels belong to the box. ValueError on a box that ends before it starts or holds NaN.
    """
    solid = _pixels(boxes, width, height)
    if not solid:
        return None

    edges = {0, width}
    for left, _, right, _ in solid:
        edges |= {left, right}

    gaps = []
    for x0, x1 in pairwise(sorted(edges)):
        gaps += _gaps(solid, x0, x1, height)

    best = max(gaps, key=_shorter, default=None)  # the first of equals
    return best if best and _shorter(best) > min_side else None


def _pixels(boxes: np.ndarray | Sequence[Sequence[float]], width: int, height: int) -> list[Rect]:
    """Return the pixels that boxes touch, as whole rectangles inside the image; boxes that touch
    none are left out.
    """
    found = []
    for x0, y0, x1, y1 in np.asarray(boxes, dtype=np.float64).reshape(-1, 4).tolist():
        if not (x0 <= x1 and y0 <= y1):  # also False for NaN
            raise ValueError(
                f"crops.periphery: box {(x0, y0, x1, y1)}; expected x0 <= x1, y0 <= y1 in pixels."
            )

        left = max(0, math.floor(x0))
        top = max(0, math.floor(y0))
        right = min(width, math.ceil(x1))
        bottom = min(height, math.ceil(y1))

        empty = x0 == x1 or y0 == y1
        if left < right and top < bottom and not empty:
            found.append((left, top, right, bottom))

    return found


def _gaps(boxes: list[Rect], x0: int, x1: int, height: int) -> list[Rect]:
    """Return the empty rectangles of the column [x0, x1), as wide as it is: what its boxes leave of
    [0, height).
    """
    rows = [(top, bottom) for left, top, right, bottom in boxes if left < x1 and right > x0]
    rows.append((height, height))  # the lower edge of the image

    found = []
    y = 0  # above it, all is looked at
    for top, bottom in sorted(rows):
        if top > y:
            found.append((x0, y, x1, top))
        y = max(y, bottom)

    return found


def _shorter(rect: Rect) -> int:
    """Return the shorter side of a rectangle, in pixels."""
    x0, y0, x1, y1 = rect
    return min(x1 - x0, y1 - y0)


def corner(width: int, height: int, fraction: float = 0.3, corner: str = "lower-left") -> Rect:
    """Return the corner crop x0, y0, x1, y1: `fraction` of the width by `fraction` of the height,
    at least 1 pixel.

    Needs no boxes, and so may show a part of the object. The paper uses the lower left, 0.3 by
    default.
    """
    if corner not in CORNERS or not 0 < fraction <= 1:
        raise ValueError(
            f"crops.corner: corner {corner!r}, fraction {fraction}; expected one of {CORNERS} "
            "and 0 < fraction <= 1."
        )

    wide = max(1, int(fraction * width))
    high = max(1, int(fraction * height))
    x0 = 0 if corner.endswith("left") else width - wide
    y0 = 0 if corner.startswith("upper") else height - high
    return x0, y0, x0 + wide, y0 + high


def background(images: Images, crop: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the background crop of every image: rects (n, 4) int64 in native pixels, and keep (n,)
    bool.

    `images` has `boxes`, `sizes` (n, 2) width, height and `ids`. `crop` holds any of kind
    ("periphery" or "corner"), min_side, fraction, corner; CROP has the defaults. Where no periphery
    crop is large enough, or a corner has no pixel, keep is False and the rectangle 0. ValueError on
    an unknown key or kind; AssertionError if a periphery crop meets a box.
    """
    unknown = sorted(set(crop) - set(CROP))
    crop = {**CROP, **crop}
    if unknown or crop["kind"] not in KINDS:
        raise ValueError(
            f"crops.background: keys {unknown}, kind {crop['kind']!r}; expected keys "
            f"among {sorted(CROP)}, kind one of {KINDS}."
        )

    rects = np.zeros((len(images.boxes), 4), dtype=np.int64)
    keep = np.zeros(len(rects), dtype=bool)

    for i, boxes in enumerate(images.boxes):
        width, height = np.asarray(images.sizes[i]).tolist()

        if crop["kind"] == "corner":
            rect = corner(width, height, crop["fraction"], crop["corner"])
            if crop["fraction"] * min(width, height) < 1:  # a pixel would show more than that
                rect = None
        else:
            rect = periphery(boxes, width, height, crop["min_side"])
            if rect:
                _assert_empty(rect, boxes, images.ids[i])

        if rect:
            rects[i] = rect
            keep[i] = True

    return rects, keep


def _assert_empty(rect: Rect, boxes: np.ndarray, name: str) -> None:
    """Raise AssertionError if a rectangle meets any box; checked on the boxes as given, apart from
    how it was found.
    """
    left, top, right, bottom = rect
    for x0, y0, x1, y1 in np.asarray(boxes, dtype=np.float64).reshape(-1, 4):
        across = max(left, x0) < min(right, x1)
        down = max(top, y0) < min(bottom, y1)
        if across and down:
            raise AssertionError(
                f"crops.background: image {name}: crop {rect} meets box {(x0, y0, x1, y1)}"
            )
