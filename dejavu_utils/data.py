"""Pictures with labels and boxes: `Images`, and their split into A, B, shared, public X, probe and
control.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dejavu_utils import manifests, store
from dejavu_utils.resampling import resample

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("a", "b", "shared", "public", "probe", "control")
WORKERS = min(8, os.cpu_count() or 1)


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
        columns = (
            self.ids,
            self.labels,
            self.boxes,
            self.sizes,
            self.pixels,
            *self.attributes.values(),
        )
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
        """The sha256 of classes, ids, labels, boxes and pixels (of lazy ones: of the files'
        checksums or sizes).
        """
        total = hashlib.sha256("\n".join([*self.classes, "", *self.ids]).encode())
        counts = np.array([len(boxes) for boxes in self.boxes], np.int64)
        flat = [np.asarray(boxes, np.float32).tobytes() for boxes in self.boxes]
        pixels = (
            self.pixels.contiguous().numpy()
            if isinstance(self.pixels, Tensor)
            else self.pixels.stamps
        )
        for part in (
            np.asarray(self.labels, np.int64).tobytes(),
            counts.tobytes(),
            b"".join(flat),
            pixels.data,
        ):
            total.update(part)
        return total.hexdigest()

    @property
    def stacked(self) -> Tensor | None:
        """All pixels as one uint8 tensor (n, 3, h, w), or None where sizes differ."""
        if isinstance(self.pixels, Tensor):
            return self.pixels
        same = len(self) > 0 and (self.sizes == self.sizes[0]).all()
        return torch.stack(threads(self.pixels.__getitem__, range(len(self)))) if same else None

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
        half = (rects[:, 2:] - rects[:, :2]).amin(1, keepdim=True) * keep / 2
        centre = (rects[:, :2] + rects[:, 2:]) / 2
        rects = torch.cat([centre - half, centre + half], 1)
        if isinstance(self.pixels, Tensor):
            jobs = range(0, len(self), 256)
            done = [_sample(self.pixels[i : i + 256], rects[i : i + 256], size) for i in jobs]
        else:
            done = threads(
                lambda i: _sample(self.pixels[i][None], rects[i : i + 1], size), range(len(self))
            )
        return torch.cat(done) if done else torch.zeros(0, 3, size, size, dtype=torch.uint8)


def _sample(pixels: Tensor, rects: Tensor, size: int) -> Tensor:
    """Return `rects` of same-size pictures resampled and rounded to uint8; what lies around them is
    cut first.
    """
    x0, y0 = rects[:, :2].amin(0).floor().long().tolist()
    x1, y1 = rects[:, 2:].amax(0).ceil().long().tolist()
    shift = torch.tensor([x0, y0, x0, y0])
    return (
        resample(pixels[..., y0:y1, x0:x1], rects - shift, size)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
    )


def threads(work: Callable, items: Sequence, chunk: int = 8) -> list:
    """Return [work(item) for item in items], computed by a few threads: decoding and inflating free
    the interpreter.
    """
    chunks = [items[i : i + chunk] for i in range(0, len(items), chunk)]
    with ThreadPoolExecutor(WORKERS) as pool:
        return [
            result
            for part in pool.map(lambda part: [work(item) for item in part], chunks)
            for result in part
        ]


def read(
    name: str, folder: str | Path | None = None, **options: int | float | str | None
) -> Images:
    """Return a data set by the name of its manifest, as `Images`.

    "scenes" is made from `options` (see `scenes.make`); every other is looked for in `folder`
    ($DEJAVU_DATA, else data/), which may also be the data set itself, and read with the options of
    `readers.load`. FileNotFoundError says how to get a data set that is missing.
    """
    entry = manifests.read(name)
    if entry["layout"] == "scenes":
        from dejavu_utils import scenes

        return scenes.make(**options)
    from dejavu_utils import readers

    return readers.load(entry, manifests.locate(entry, folder), **options)


def write_skipped(images: Images, path: str | Path) -> None:
    """Write the pictures that could not be read, and why, as a table (name, reason) to `path`, e.g.
    skipped.csv.
    """
    import pandas as pd

    store.write_table(path, pd.DataFrame(images.skipped, columns=["name", "reason"]))


def _unusable(boxes: np.ndarray, size: np.ndarray) -> str:
    """Return why a picture with these boxes cannot be attacked; empty if it can."""
    if len(boxes) == 0:
        return "no box"
    if (boxes[:, 2:] <= boxes[:, :2]).any():
        return "zero area"
    return "whole image" if ((boxes[:, :2] <= 0) & (boxes[:, 2:] >= size)).all(1).any() else ""


def attackable(images: Images) -> tuple[np.ndarray, dict[str, int]]:
    """Return which pictures can be attacked, bool (n,), and how many cannot by reason.

    Out are pictures with no box, with a box of zero area, and with a box that covers all of the
    picture: there is then no background to infer from, or no telling where it is. Paper §3; whether
    a crop is large enough is up to `crops`.
    """
    reasons = [
        _unusable(boxes, size) for boxes, size in zip(images.boxes, images.sizes, strict=True)
    ]
    good = np.array([not reason for reason in reasons], bool)
    return good, {
        reason: reasons.count(reason) for reason in ("no box", "zero area", "whole image")
    }


def _check_sizes(images: Images, sizes: dict, rule: str) -> dict[str, int]:
    """Return all sizes, those not given as 0 and `classes` as a number; ValueError if they make no
    sense.
    """
    known = dict.fromkeys(("classes", "attacked", *PARTS[2:]), 0)
    bad = [
        name
        for name, value in sizes.items()
        if name not in known or type(value) is not int or value < 0
    ]
    if bad or rule not in RULES:
        raise ValueError(
            f"partition: sizes {sizes}, rule {rule!r}; expected whole numbers >= 0 for "
            f"{', '.join(known)}, and a rule of {', '.join(RULES)}."
        )
    there = len(images.classes)
    if sizes.get("classes", 0) > there:
        raise ValueError(
            f"partition: {sizes['classes']} classes wanted, the data set has {there}. "
            "Lower sizes.classes or read more classes."
        )
    return known | sizes | {"classes": sizes.get("classes") or there}


def _enough(found: int, needed: int, name: str, what: str, why: str) -> None:
    if found < needed:
        raise ValueError(
            f'partition: class "{name}" has {found} {what}, {needed} are needed ({why}). '
            "Lower the sizes, take other classes, or read more images."
        )


def _disjoint(order: list[int], good: np.ndarray, sizes: dict, name: str) -> dict[str, list[int]]:
    """Return the parts of one class, all disjoint and of exactly the sizes asked for.

    A and B come from the front of the order, alternately, the others from its end: more attacked
    images contain the fewer, and X, probe and control stay the same while there are enough.
    """
    n, control = sizes["attacked"], sizes["control"]
    boxed = [i for i in order if good[i]]
    _enough(
        len(boxed),
        2 * n + control,
        name,
        "attackable images (usable box)",
        "2 x attacked + control",
    )
    parts = {
        "a": boxed[0 : 2 * n : 2],
        "b": boxed[1 : 2 * n : 2],
        "control": boxed[len(boxed) - control :],
    }
    taken = set().union(*parts.values())
    rest = [i for i in reversed(order) if i not in taken]
    others = ("public", "probe", "shared")
    _enough(
        len(rest),
        sum(sizes[part] for part in others),
        name,
        "images left",
        "public + probe + shared",
    )
    left = iter(rest)
    return parts | {part: list(itertools.islice(left, sizes[part])) for part in others}


def _paper(order: list[int], good: np.ndarray, sizes: dict, name: str) -> dict[str, list[int]]:
    """Return the parts of one class by the paper's ImageNet rule (released code), with n = attacked
    + shared.

    h = min(half of the boxed images, n) each are attacked in A and B, n - h images without a usable
    box are in both, X is the rest. `public` 0 keeps all of X, else so many. Ours: control is set
    aside first, probe is taken out of X.
    """
    n, control = sizes["attacked"] + sizes["shared"], sizes["control"]
    boxed, plain = [i for i in order if good[i]], [i for i in order if not good[i]]
    _enough(
        len(boxed), min(n, 1) * 2 + control, name, "attackable images (usable box)", "2 + control"
    )
    end = len(boxed) - control
    h = min(end // 2, n)
    _enough(
        len(plain), n - h, name, "images without a usable box", f"attacked + shared - {h} boxed"
    )
    rest = sorted(boxed[2 * h : end] + plain[n - h :], key=order.index)
    _enough(len(rest), sizes["public"] + sizes["probe"], name, "images left", "public + probe")
    probe, rest = rest[: sizes["probe"]], rest[sizes["probe"] :]
    return {
        "a": boxed[:h],
        "b": boxed[h : 2 * h],
        "shared": plain[: n - h],
        "control": boxed[end:],
        "probe": probe,
        "public": rest[: sizes["public"] or len(rest)],
    }


RULES = {"disjoint": _disjoint, "paper": _paper}


def partition(images: Images, sizes: dict, seed: int, rule: str = "disjoint") -> pd.DataFrame:
    """Return who belongs where, a DataFrame sorted by id: id, label, part (a, b, shared, public,
    probe or control).

    `sizes`: `classes` (the first so many; 0 all) and images per class: `attacked` (in each of A and
    B alone), `shared` (in both), `public` (X), `probe`, `control` (attackable, in neither); what is
    left over is in no part. Set A is a + shared, B is b + shared. Each class is ordered by the
    sha256 of (seed, id), so the split depends on nothing but seed and ids. ValueError names the
    class that is too small. Paper §3; `rule` "paper" is its own ImageNet rule.
    """
    import pandas as pd

    sizes, (good, _), rows = _check_sizes(images, sizes, rule), attackable(images), []
    rank = [hashlib.sha256(f"{seed}/partition/{name}".encode()).digest() for name in images.ids]
    for label in range(sizes["classes"]):
        order = sorted(np.flatnonzero(images.labels == label).tolist(), key=rank.__getitem__)
        found = RULES[rule](order, good, sizes, images.classes[label])
        rows += [(str(images.ids[i]), label, part) for part in PARTS for i in found[part]]
    return pd.DataFrame(sorted(rows), columns=["id", "label", "part"])


def partition_hash(frame: pd.DataFrame) -> str:
    """Return the sha256 of a partition table: of its lines "id label part", sorted."""
    rows = zip(frame["id"], frame["label"], frame["part"], strict=True)
    return hashlib.sha256(
        "\n".join(sorted(f"{i}\t{label}\t{part}" for i, label, part in rows)).encode()
    ).hexdigest()


def parts(images: Images, frame: pd.DataFrame) -> dict[str, Images]:
    """Return {part: Images} for the six parts of a partition table, each sorted by id; other
    classes are dropped.
    """
    place = {name: i for i, name in enumerate(images.ids.tolist())}
    missing = [name for name in frame["id"] if name not in place]
    if missing:
        raise ValueError(
            f"parts: {len(missing)} ids of the partition are not in the data set, e.g. "
            f"{missing[0]}. "
            "It was made for other images: make the partition again."
        )
    classes = images.classes[: int(frame["label"].max()) + 1] if len(frame) else images.classes
    rows = {part: sorted(frame["id"][frame["part"] == part]) for part in PARTS}
    return {
        part: replace(images.subset([place[i] for i in ids]), classes=classes)
        for part, ids in rows.items()
    }


def distinct(images: Images, threshold: float) -> np.ndarray:
    """Return which pictures to keep, bool (n,), so that no two resemble each other more than
    `threshold`.

    Resemblance is the correlation of 16-px thumbnails, 1 for a copy; of two that are too alike the
    later id goes.
    """
    from dejavu_utils import knn

    if not len(images):
        return np.ones(0, bool)
    small = images.squares(16).flatten(1).double()
    small = torch.nn.functional.normalize(small - small.mean(1, keepdim=True), dim=1)
    keep = np.ones(len(images), bool)
    near, columns = knn.search(small.float(), small.float(), min(10, len(images)))
    for row, column in torch.nonzero(
        1 - near / 2 > threshold
    ).tolist():  # |x - y|^2 = 2 - 2 correlation
        other = int(columns[row, column])
        if other < row and keep[other]:
            keep[row] = False
    return keep
