"""A second attribute of the object, inferred from a background crop whose class is known: does the
crop reveal more of the object than its class?

The attribute (of scenes the pictograph's shade; of real pictures colour and size of the object) is
voted for by the nearest public images of the crop's *true class* alone. So the label, however well
the crop gives it away, is worth chance, and what the target infers above the reference is memory of
that very object. All attacked images are scored: picking the memorized ones picks by the models'
own guesses, and so by what they can see.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from torch import Tensor

from dejavu_utils.attack import inference, probe, references
from dejavu_utils.data import split
from dejavu_utils.data.images import Images
from dejavu_utils.models.pairs import Pair

OBJECT = ("colour", "size")  # attributes of any picture with a box
# {name: (images, their rectangles (n, 4), or None for whole pictures)}
Sets = dict[str, tuple[Images, np.ndarray | None]]


class Part(NamedTuple):
    """Images of one set whose attribute is known, in their order."""

    embeddings: dict[str, Tensor]  # {model: (n, d)}, of crops or of whole pictures
    ids: np.ndarray  # (n,)
    labels: np.ndarray  # (n,) ints: the true class
    values: np.ndarray  # (n,) ints from 0: the attribute

    def of_class(self, label: int) -> Part:
        """Return the images of one class."""
        rows = np.flatnonzero(self.labels == label)
        embeddings = {model: x[rows] for model, x in self.embeddings.items()}
        return Part(embeddings, self.ids[rows], self.labels[rows], self.values[rows])


@references.cached("attribute")
def infer(
    pair: Pair,
    epoch: int,
    k: int,
    attribute: str = "shade",
    device: str = "cpu",
) -> pd.DataFrame:
    """Return the attack on an attribute within the true class, at the projector: a row per image
    and role.

    Columns as in `references.two_model`, but `label` and `prediction` are the attribute's values,
    `class` is the true class, and `chance` whether the commonest public value of the class, all
    that the label tells, is right. `attribute` is a name in `Images.attributes` or in OBJECT;
    ValueError names what there is, and a class with too few public images.
    """
    sets: Sets = {"public": (pair.parts["public"], None)}
    for side in "ab":
        sets[side] = references.cropped(pair.parts[side], pair.crop)
    parts = _embedded(pair, epoch, attribute, sets, "projector", device)
    rows = within_class(parts, k)
    return rows.assign(**pair.setting, epoch=epoch, k=k, attribute=attribute)


def within_class(parts: dict[str, Part], k: int) -> pd.DataFrame:
    """Return the rows of `infer` from the parts "a", "b" and "public", under models "A" and "B".

    Classes with images in both a and b are attacked. ValueError where one has k public images or
    fewer: all of them would vote, whatever the crop.
    """
    count = 1 + max(int(part.values.max()) for part in parts.values())
    tables = []
    for label in np.intersect1d(parts["a"].labels, parts["b"].labels):
        own = {name: part.of_class(label) for name, part in parts.items()}
        public = own["public"]
        if len(public.ids) <= k:
            raise ValueError(
                f"attributes.within_class: class {label} has {len(public.ids)} public images; "
                f"expected more than k = {k}, or all vote, whatever the crop. Lower k or enlarge "
                "the public set."
            )
        crops = {side: own[side].embeddings for side in "ab"}
        ids = {side: own[side].ids for side in "ab"}
        values = {side: own[side].values for side in "ab"}
        found = inference.label_inference(
            crops, public.embeddings, public.values, ids, values, k, count
        )
        votes = np.bincount(public.values, minlength=count)
        commonest = votes == votes.max()
        chance = commonest / commonest.sum()  # (count,): of several commonest, each in part
        tables.append(found.assign(**{"class": label}, chance=chance[found["label"]]))
    order = {"by": ["direction", "role", "id"], "ascending": [True, False, True]}
    return pd.concat(tables).sort_values(**order, ignore_index=True)


def readable(pair: Pair, epoch: int, attribute: str = "shade", device: str = "cpu") -> pd.DataFrame:
    """Return how well a linear probe of the backbone reads the attribute from full images whose
    class it is told: a row per encoder.

    Trained on the public set, judged on the probe set: accuracy with its 95 % interval (low, high),
    n, attribute. What cannot be read from a full image (below .8) cannot be expected from a crop.
    Where no attribute of the probe set is known, as in ImageNet, whose validation set has no boxes,
    half of the public set takes its place.
    """
    public, held_out = pair.parts["public"], pair.parts["probe"]
    if (_values(attribute, held_out, public) < 0).all():
        half = np.arange(len(public)) % 2 == 0
        public, held_out = public.subset(half), public.subset(~half)
    sets: Sets = {"public": (public, None), "probe": (held_out, None)}
    parts = _embedded(pair, epoch, attribute, sets, "backbone", device)
    train, test = parts["public"], parts["probe"]

    n = len(test.values)
    count = 1 + max(int(part.values.max()) for part in parts.values())
    rows = []
    for model in "AB":
        x, z = (_with_class(part, model, len(public.classes)) for part in (train, test))
        accuracy = probe.linear_probe(x, train.values, z, test.values, count)["test"]
        low, high = binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
        rows.append({"model": model, "accuracy": accuracy, "low": low, "high": high, "n": n})
    return pd.DataFrame(rows).assign(**pair.setting, epoch=epoch, attribute=attribute)


def _with_class(part: Part, model: str, classes: int) -> Tensor:
    """Return embeddings and the true class, one-hot, side by side: (n, d + classes)."""
    told = torch.nn.functional.one_hot(torch.as_tensor(part.labels), classes)
    return torch.cat([part.embeddings[model], told], 1)


def _embedded(
    pair: Pair, epoch: int, attribute: str, sets: Sets, layer: str, device: str
) -> dict[str, Part]:
    """Return the parts of sets, without the pictures whose attribute is not known."""
    encoders = {model: pair.encoder(model, epoch) for model in "AB"}
    keep = inference.Rules(**pair.rules).keep
    parts = {}
    for name, (images, rects) in sets.items():
        values = _values(attribute, images, sets["public"][0])
        known = values >= 0
        kept = images.subset(known)
        where = None if rects is None else rects[known]
        found = references.embed_images(
            encoders, kept, pair.size(), (layer,), where, device, keep=keep
        )
        parts[name] = Part(found[layer], kept.ids, kept.labels, values[known])
    return parts


def _values(attribute: str, images: Images, public: Images) -> np.ndarray:
    """Return an attribute (n,), -1 where unknown; ValueError if there is no such attribute."""
    if attribute in OBJECT:
        return of_objects(images, public)[attribute]
    if attribute not in public.attributes:
        known = ", ".join([*public.attributes, *OBJECT])
        raise ValueError(f'attributes: attribute "{attribute}"; expected one of {known}.')
    return images.attributes[attribute]


def of_objects(images: Images, public: Images) -> dict[str, np.ndarray]:
    """Return {"colour", "size"} of the object, the largest box: ints (n,), 1 above the median of
    its class in `public`.

    colour: mean red minus mean blue in the middle of the box (1: warmer); size: the box's share of
    the picture. So either splits every class in halves. -1 where a picture could not be attacked
    (no box, box of zero area, box that is the whole picture), or nothing like it of its class is in
    `public`.
    """
    own, known = _of_largest_box(images), _of_largest_box(public)
    found = {}
    for name in OBJECT:
        by_class = known[name].groupby(public.labels).median()
        median = by_class.reindex(images.labels).to_numpy()  # (n,)
        measurable = np.isfinite(own[name].to_numpy() + median)
        found[name] = np.where(measurable, own[name] > median, -1)
    return found


def _of_largest_box(images: Images) -> pd.DataFrame:
    """Return colour, in levels of 255, and size, a share, of the largest box of every picture; NaN
    without one.
    """
    attackable = split.attackable(images)[0]
    largest = []
    for boxes, usable, size in zip(images.boxes, attackable, images.sizes, strict=True):
        areas = _areas(boxes)
        largest.append(boxes[areas.argmax()] if usable else (0, 0, *size))
    corners = np.tile(images.sizes, 2)  # (n, 4): width, height, width, height
    largest = np.clip(np.array(largest, float), 0, corners)  # (n, 4)

    middle = images.squares(
        8, largest, keep=0.5
    )  # the rim of a box shows what is behind the object
    colour = middle.double().mean((2, 3)).numpy()  # (n, 3)
    share = _areas(largest) / images.sizes.prod(1)
    values = pd.DataFrame({"colour": colour[:, 0] - colour[:, 2], "size": share})
    values[~attackable] = np.nan
    return values


def _areas(boxes: np.ndarray) -> np.ndarray:
    """Return the areas (n,) of boxes (n, 4)."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)
