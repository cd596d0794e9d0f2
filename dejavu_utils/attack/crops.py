"""Background crops: the rectangles that show no object."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dejavu_utils.data.images import Images

Rect = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, half-open
RULES = ("paper", "maximal")
CORNERS = ("lower-left", "lower-right", "upper-left", "upper-right")
CROP = {
    "kind": "periphery",
    "rule": "paper",
    "min_side": 16,
    "fraction": 0.3,
    "corner": "lower-left",
}


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
        left, top = max(0, int(np.floor(x0))), max(0, int(np.floor(y0)))
        right, bottom = min(width, int(np.ceil(x1))), min(height, int(np.ceil(y1)))
        if left < right and top < bottom and x0 < x1 and y0 < y1:
            found.append((left, top, right, bottom))
    return found


def _gaps(boxes: list[Rect], x0: int, x1: int, height: int) -> list[Rect]:
    """Return the empty rectangles of the column [x0, x1), as wide as it is: what its boxes leave of
    [0, height).
    """
    found, y = [], 0
    for top, bottom in sorted((box[1], box[3]) for box in boxes if box[0] < x1 and box[2] > x0):
        if top > y:
            found.append((x0, y, x1, top))
        y = max(y, bottom)
    return [*found, (x0, y, x1, height)] if y < height else found


def _shorter(rect: Rect) -> int:
    """Return the shorter side of a rectangle, in pixels."""
    return min(rect[2] - rect[0], rect[3] - rect[1])


def _sides(rect: Rect) -> tuple[int, int]:
    """Return the shorter side of a rectangle and its area."""
    return _shorter(rect), (rect[2] - rect[0]) * (rect[3] - rect[1])


def periphery(
    boxes: np.ndarray | Sequence[Sequence[float]],
    width: int,
    height: int,
    min_side: int,
    rule: str = "paper",
) -> Rect | None:
    """Return the background crop x0, y0, x1, y1 (pixels, half-open) that no box reaches into, or
    None.

    `boxes` (m, 4) x0, y0, x1, y1. "paper" is the published rule: columns between neighbouring box
    edges, the gaps that the boxes leave in each, and of those the one with the longest shorter
    side. A crop never spans two columns, so a strip above two boxes is cut. "maximal" takes the
    columns between any two edges, hence all maximal empty rectangles. Ties: larger area under
    "maximal", then the leftmost, then the topmost. None when the shorter side is not above
    `min_side` (100 in the paper; strict: 100 itself fails), and when no box lies in the image: the
    object is then unknown. Partly covered pixels belong to the box. ValueError on a box that ends
    before it starts or holds NaN.
    """
    if rule not in RULES:
        raise ValueError(f"crops.periphery: rule {rule!r}; expected one of {RULES}.")
    solid = _pixels(boxes, width, height)
    if not solid:
        return None
    edges = sorted({0, width, *(box[0] for box in solid), *(box[2] for box in solid)})
    columns = pairwise(edges) if rule == "paper" else combinations(edges, 2)
    size = _shorter if rule == "paper" else _sides
    best = None
    for x0, x1 in columns:
        for rect in _gaps(solid, x0, x1, height):
            if best is None or size(rect) > size(best):
                best = rect
    return best if best and _shorter(best) > min_side else None


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
    wide, high = max(1, int(fraction * width)), max(1, int(fraction * height))
    x0 = 0 if corner.endswith("left") else width - wide
    y0 = 0 if corner.startswith("upper") else height - high
    return x0, y0, x0 + wide, y0 + high


def _assert_empty(rect: Rect, boxes: np.ndarray, name: str) -> None:
    """Raise AssertionError if a rectangle meets any box; checked on the boxes as given, apart from
    how it was found.
    """
    for x0, y0, x1, y1 in np.asarray(boxes, dtype=np.float64).reshape(-1, 4):
        if max(rect[0], x0) < min(rect[2], x1) and max(rect[1], y0) < min(rect[3], y1):
            raise AssertionError(
                f"crops.background: image {name}: crop {rect} meets box {(x0, y0, x1, y1)}"
            )


def background(images: Images, crop: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the background crop of every image: rects (n, 4) int64 in native pixels, and keep (n,)
    bool.

    `images` has `boxes`, `sizes` (n, 2) width, height and `ids`. `crop` holds any of kind
    ("periphery" or "corner"), rule, min_side, fraction, corner; CROP has the defaults. Where no
    periphery crop is large enough, keep is False and the rectangle 0. ValueError on an unknown key
    or kind; AssertionError if a periphery crop meets a box.
    """
    unknown = sorted(set(crop) - set(CROP))
    crop = {**CROP, **crop}
    if unknown or crop["kind"] not in ("periphery", "corner"):
        raise ValueError(
            f"crops.background: keys {unknown}, kind {crop['kind']!r}; expected keys among "
            f'{sorted(CROP)}, kind "periphery" or "corner".'
        )
    rects = np.zeros((len(images.boxes), 4), dtype=np.int64)
    keep = np.zeros(len(rects), dtype=bool)
    for i, (boxes, (width, height)) in enumerate(
        zip(images.boxes, np.asarray(images.sizes).tolist(), strict=True)
    ):
        if crop["kind"] == "corner":
            rect = corner(width, height, crop["fraction"], crop["corner"])
        else:
            rect = periphery(boxes, width, height, crop["min_side"], crop["rule"])
            _assert_empty(rect or (0, 0, 0, 0), boxes, images.ids[i])
        if rect:
            rects[i], keep[i] = rect, True
    return rects, keep
