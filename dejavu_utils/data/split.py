"""The split of a data set into A, B, shared, public X, probe and control."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from dejavu_utils.data.images import Images

if TYPE_CHECKING:
    import pandas as pd
PARTS = ("a", "b", "shared", "public", "probe", "control")


def _unusable(boxes: np.ndarray, size: np.ndarray) -> str:
    """Return why a picture with these boxes cannot be attacked; empty if it can."""
    if len(boxes) == 0:
        return "no box"

    start, stop = boxes[:, :2], boxes[:, 2:]
    if (stop <= start).any():
        return "zero area"

    covers = (start <= 0) & (stop >= size)  # (m, 2)
    return "whole image" if covers.all(1).any() else ""


def attackable(images: Images) -> tuple[np.ndarray, dict[str, int]]:
    """Return which pictures can be attacked, bool (n,), and how many cannot by reason.

    Out are pictures with no box, with a box of zero area, and with a box that covers all of the
    picture: there is then no background to infer from, or no telling where it is. Paper §3; whether
    a crop is large enough is up to `crops`.
    """
    pictures = zip(images.boxes, images.sizes, strict=True)
    reasons = [_unusable(boxes, size) for boxes, size in pictures]
    good = np.array([reason == "" for reason in reasons], bool)
    counts = {reason: reasons.count(reason) for reason in ("no box", "zero area", "whole image")}
    return good, counts


def _check_sizes(images: Images, sizes: dict, rule: str) -> dict[str, int]:
    """Return all sizes, those not given as 0 and `classes` as a number; ValueError if they make no
    sense.
    """
    known = dict.fromkeys(("classes", "attacked", *PARTS[2:]), 0)
    named = all(name in known for name in sizes)
    counted = all(type(value) is int and value >= 0 for value in sizes.values())
    if not named or not counted or rule not in RULES:
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
    attacked = 2 * sizes["attacked"]
    control = sizes["control"]
    boxed = [i for i in order if good[i]]
    what = "attackable images (usable box)"
    _enough(len(boxed), attacked + control, name, what, "2 x attacked + control")
    parts = {
        "a": boxed[0:attacked:2],
        "b": boxed[1:attacked:2],
        "control": boxed[len(boxed) - control :],
    }

    taken = set().union(*parts.values())
    rest = [i for i in reversed(order) if i not in taken]
    others = ("public", "probe", "shared")
    needed = sum(sizes[part] for part in others)
    _enough(len(rest), needed, name, "images left", " + ".join(others))
    left = iter(rest)
    for part in others:
        parts[part] = list(itertools.islice(left, sizes[part]))
    return parts


def _paper(order: list[int], good: np.ndarray, sizes: dict, name: str) -> dict[str, list[int]]:
    """Return the parts of one class by the paper's ImageNet rule (released code), with n = attacked
    + shared.

    h = min(half of the boxed images, n) each are attacked in A and B, n - h images without a usable
    box are in both, X is the rest. `public` 0 keeps all of X, else so many. Ours: control is set
    aside first, probe is taken out of X.
    """
    n = sizes["attacked"] + sizes["shared"]
    control = sizes["control"]
    boxed = [i for i in order if good[i]]
    plain = [i for i in order if not good[i]]
    what = "attackable images (usable box)"
    _enough(len(boxed), min(n, 1) * 2 + control, name, what, "2 + control")

    end = len(boxed) - control
    h = min(end // 2, n)
    what = "images without a usable box"
    _enough(len(plain), n - h, name, what, f"attacked + shared - {h} boxed")

    rest = sorted(boxed[2 * h : end] + plain[n - h :], key=order.index)
    probe = sizes["probe"]
    _enough(len(rest), sizes["public"] + probe, name, "images left", "public + probe")
    public = sizes["public"] or len(rest) - probe
    return {
        "a": boxed[:h],
        "b": boxed[h : 2 * h],
        "shared": plain[: n - h],
        "control": boxed[end:],
        "probe": rest[:probe],
        "public": rest[probe : probe + public],
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

    sizes = _check_sizes(images, sizes, rule)
    good, _ = attackable(images)
    rank = [hashlib.sha256(f"{seed}/partition/{name}".encode()).digest() for name in images.ids]

    rows = []
    for label in range(sizes["classes"]):
        members = np.flatnonzero(images.labels == label).tolist()
        order = sorted(members, key=rank.__getitem__)
        found = RULES[rule](order, good, sizes, images.classes[label])
        for part in PARTS:
            rows += [(str(images.ids[i]), label, part) for i in found[part]]
    return pd.DataFrame(sorted(rows), columns=["id", "label", "part"])


def partition_hash(frame: pd.DataFrame) -> str:
    """Return the sha256 of a partition table: of its lines "id label part", sorted."""
    rows = zip(frame["id"], frame["label"], frame["part"], strict=True)
    lines = sorted(f"{name}\t{label}\t{part}" for name, label, part in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


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

    classes = images.classes
    if len(frame):
        classes = classes[: int(frame["label"].max()) + 1]

    found = {}
    for part in PARTS:
        ids = sorted(frame["id"][frame["part"] == part])
        rows = [place[name] for name in ids]
        found[part] = replace(images.subset(rows), classes=classes)
    return found


def distinct(images: Images, threshold: float) -> np.ndarray:
    """Return which pictures to keep, bool (n,), so that no two resemble each other more than
    `threshold`.

    Resemblance is the correlation of 16-px thumbnails, 1 for a copy; of two that are too alike the
    later id goes.
    """
    from sklearn.neighbors import NearestNeighbors

    if not len(images):
        return np.ones(0, bool)

    small = images.squares(16).flatten(1).double()  # (n, 768)
    centred = small - small.mean(1, keepdim=True)
    small = torch.nn.functional.normalize(centred, dim=1)

    search = NearestNeighbors(n_neighbors=min(10, len(images)), algorithm="brute").fit(small)
    distances, columns = search.kneighbors(small)  # (n, 10)
    correlation = 1 - distances**2 / 2  # |x - y|^2 = 2 - 2 correlation

    keep = np.ones(len(images), bool)
    for row, column in np.argwhere(correlation > threshold).tolist():
        other = int(columns[row, column])
        if other < row and keep[other]:
            keep[row] = False
    return keep
