"""`Images`: pictures with labels and boxes, and their squares."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dejavu_utils.data.resampling import resample
from dejavu_utils.limited import GIB, LIMIT_GIB

WORKERS = min(8, os.cpu_count() or 1)
BYTES_A_PIXEL = 32  # that decoding a picture and cutting a square of it takes, at most


@dataclass(frozen=True, eq=False)
class Images:
    """n labelled pictures. Readers return them sorted by id, whatever the order of the files.

    `ids` str (n,) unique; `labels` int64 (n,), indices into `classes`; `boxes` n arrays float32 (m,
    4), x0, y0, x1, y1 in px of the picture itself, half-open; `sizes` (n, 2) width, height in px;
    `pixels` uint8, a tensor (n, 3, h, w) or `lazy.Lazy`; `attributes` more labels, each (n,);
    `skipped` (name, reason) of pictures that could not be read.
    """

    ids: np.ndarray
    labels: np.ndarray
    boxes: list
    classes: tuple[str, ...]
    sizes: np.ndarray
    pixels: Any
    attributes: dict = field(default_factory=dict)
    skipped: list = field(default_factory=list)

    def __post_init__(self) -> None:
        columns = [self.ids, self.labels, self.boxes, self.sizes, self.pixels]
        columns += self.attributes.values()
        lengths = {len(column) for column in columns}
        if len(lengths) > 1:
            raise ValueError(
                f"Images: columns of different lengths {sorted(lengths)}; expected one row per "
                "picture."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, index: np.ndarray | Sequence[int]) -> Images:
        """Return the pictures at `index` (positions or a mask), in that order."""
        index = np.arange(len(self))[np.asarray(index)] if len(index) else np.zeros(0, np.int64)
        lazy = not isinstance(self.pixels, Tensor)
        pixels = self.pixels.subset(index) if lazy else self.pixels[torch.from_numpy(index)]
        attributes = {name: values[index] for name, values in self.attributes.items()}
        return replace(
            self,
            ids=self.ids[index],
            labels=self.labels[index],
            boxes=[self.boxes[i] for i in index],
            sizes=self.sizes[index],
            pixels=pixels,
            attributes=attributes,
        )

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 of classes, ids, labels, boxes and pixels (of lazy ones: of the
        hashes of their files).
        """
        names = "\n".join([*self.classes, "", *self.ids])
        counts = np.array([len(boxes) for boxes in self.boxes], np.int64)
        lazy = not isinstance(self.pixels, Tensor)
        pixels = self.pixels.digests if lazy else self.pixels.contiguous().numpy()

        total = hashlib.sha256(names.encode())
        total.update(np.asarray(self.labels, np.int64).tobytes())
        total.update(counts.tobytes())
        for boxes in self.boxes:
            total.update(np.asarray(boxes, np.float32).tobytes())
        total.update(pixels.tobytes() if lazy else pixels.data)
        return total.hexdigest()

    @property
    def stacked(self) -> Tensor | None:
        """All pixels as one uint8 tensor (n, 3, h, w), or None where sizes differ."""
        if isinstance(self.pixels, Tensor):
            return self.pixels
        if len(self) == 0 or (self.sizes != self.sizes[0]).any():
            return None
        return torch.stack(threads(self.pixels.__getitem__, range(len(self))))

    def squares(
        self, size: int, rects: np.ndarray | Tensor | None = None, keep: float = 1.0
    ) -> Tensor:
        """Return the centre square of each picture, or of its rectangle (n, 4) of `rects`: uint8
        (n, 3, size, size).

        `keep` is the share of the shorter side that stays: 1 all of it, 0.875 the paper's
        Resize(256), CenterCrop(224) (§4). No pixel outside the rectangle is looked at.
        """
        rects = np.c_[0 * self.sizes, self.sizes] if rects is None else rects
        rects = torch.as_tensor(rects, dtype=torch.float64).reshape(-1, 4)
        if len(rects) != len(self):
            raise ValueError(
                f"Images.squares: {len(rects)} rectangles for {len(self)} pictures; expected one "
                "each."
            )

        start, stop = rects[:, :2], rects[:, 2:]
        half = (stop - start).amin(1, keepdim=True) * keep / 2
        centre = (start + stop) / 2
        rects = torch.cat([centre - half, centre + half], 1)

        if len(self) == 0:
            return torch.zeros(0, 3, size, size, dtype=torch.uint8)
        if isinstance(self.pixels, Tensor):
            tiles = zip(self.pixels.split(256), rects.split(256), strict=True)
            return torch.cat([_sample(pixels, part, size) for pixels, part in tiles])

        largest = int(self.sizes.prod(1).max())  # px
        fitting = int(LIMIT_GIB * GIB / (BYTES_A_PIXEL * largest))

        def one(i: int) -> Tensor:
            return _sample(self.pixels[i][None], rects[i : i + 1], size)

        return torch.cat(threads(one, range(len(self)), max(1, min(WORKERS, fitting))))


def _sample(pixels: Tensor, rects: Tensor, size: int) -> Tensor:
    """Return `rects` of same-size pictures resampled and rounded to uint8; what lies around them is
    cut first.
    """
    x0, y0 = rects[:, :2].amin(0).floor().long().tolist()
    x1, y1 = rects[:, 2:].amax(0).ceil().long().tolist()
    cut = pixels[..., y0:y1, x0:x1]
    shift = torch.tensor([x0, y0, x0, y0])
    squares = resample(cut, rects - shift, size)
    return squares.round().clamp(0, 255).to(torch.uint8)


def threads(work: Callable, items: Sequence, workers: int = WORKERS, chunk: int = 8) -> list:
    """Return [work(item) for item in items], computed by a few threads: decoding and inflating free
    the interpreter.
    """
    chunks = [items[i : i + chunk] for i in range(0, len(items), chunk)]

    def several(part: Sequence) -> list:
        return [work(item) for item in part]

    with ThreadPoolExecutor(workers) as pool:
        return [result for results in pool.map(several, chunks) for result in results]
