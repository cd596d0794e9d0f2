"""Beyond the label: does a background crop reveal more of the object than its class?

An attribute (of scenes the pictograph's shade; of real pictures colour and size of the object) is
voted for by the nearest public images of the crop's *true class* alone. So the label, however well
the crop gives it away, is worth chance, and what the target infers above the reference is memory of
that very object. All attacked images are scored: picking the memorized ones picks by the models'
own guesses, and so by what they can see.
"""

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest

from dejavu_utils.attack import inference, probe, references, scoring
from dejavu_utils.data import split
from dejavu_utils.data.images import Images
from dejavu_utils.models.pairs import Pair

OBJECT = ("colour", "size")


@references.cached("beyond")
def table(
    pair: Pair,
    epoch: int,
    k: int,
    attribute: str = "shade",
    layer: str = "projector",
    device: str = "cpu",
    attacked: str = "attacked",
) -> pd.DataFrame:
    """Return the attack on an attribute within the true class: a row per image and role, for
    `score`.

    Columns as in `references.two_model`, but `label` and `prediction` are the attribute's values,
    `class` is the true class, and `chance` whether the commonest public value of the class, all
    that the label tells, is right. `attribute` is a name in `Images.attributes` or in OBJECT;
    ValueError names what there is.
    """
    parts = {
        side: references.cropped(images, pair.crop)
        for side, images in references.attacked_sets(pair, attacked).items()
    } | {"public": (pair.parts["public"], None)}
    found, parts, values = _embedded(pair, epoch, attribute, parts, layer, device)
    ids, labels = (
        {name: getattr(images, what) for name, images in parts.items()}
        for what in ("ids", "labels")
    )
    rows = within(found, ids, labels, values, k)
    return rows.assign(
        **pair.setting, epoch=epoch, layer=layer, k=k, attacked=attacked, attribute=attribute
    )


def _embedded(
    pair: Pair, epoch: int, attribute: str, parts: dict, layer: str, device: str
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Images], dict[str, np.ndarray]]:
    """Return {part: {model: embeddings}}, {part: Images}, {part: values} of the pictures whose
    attribute is known.

    `parts` is {part: (Images, rectangles)}; no rectangles are whole pictures.
    """
    encoders, found, kept = {model: pair.encoder(model, epoch) for model in "AB"}, {}, {}
    values = _values(attribute, {name: images for name, (images, _) in parts.items()})
    for name, (images, rects) in parts.items():
        known = values[name] >= 0
        kept[name], values[name] = images.subset(known), values[name][known]
        rects = rects if rects is None else rects[known]
        found[name] = references.embed_images(
            encoders,
            kept[name],
            pair.size(),
            (layer,),
            rects,
            device,
            keep=inference.Rules(**pair.rules).keep,
        )[layer]
    return found, kept, values


def within(embeddings: dict, ids: dict, labels: dict, values: dict, k: int) -> pd.DataFrame:
    """Return `table`'s rows from arrays: embeddings[part][model] (n, d), ids, labels (classes) and
    values of each part.

    Parts are "a", "b" and "public", models "A" and "B", values ints from 0. Classes with images in
    both a and b are attacked. ValueError where one has k public images or fewer: all of them would
    vote, whatever the crop.
    """
    tables, count = [], 1 + max(int(np.max(each)) for each in values.values())
    for label in np.intersect1d(labels["a"], labels["b"]):
        rows = {part: np.flatnonzero(each == label) for part, each in labels.items()}
        if len(rows["public"]) <= k:
            raise ValueError(
                f"beyond.within: class {label} has {len(rows['public'])} public images; expected "
                "more "
                f"than k = {k}, or all vote, whatever the crop. Lower k or enlarge the public set."
            )
        at = {
            part: {model: x[rows[part]] for model, x in by.items()}
            for part, by in embeddings.items()
        }
        names, truth = (
            {part: each[rows[part]] for part, each in of.items()} for of in (ids, values)
        )
        found = inference.label_inference(at, at["public"], truth["public"], names, truth, k, count)
        votes = np.bincount(truth["public"], minlength=count)
        common = (votes == votes.max()) / (votes == votes.max()).sum()
        tables.append(found.assign(**{"class": label}, chance=common[found["label"]]))
    return pd.concat(tables).sort_values(
        ["direction", "role", "id"], ascending=[True, False, True], ignore_index=True
    )


def score(table: pd.DataFrame, **options: float | str) -> dict:
    """Return `attack.score` of a `table`, with `chance`: the accuracy of one who knows the label
    and nothing else.

    As in every score, true classes (not values) are resampled from attack.CLUSTER_FROM classes on.
    """
    keys = ["direction"] + ["seed"] * ("seed" in table)
    chance = float(table.groupby(keys)["chance"].mean().mean())
    return {**scoring.score(table.assign(label=table["class"]), **options), "chance": chance}


def readable(
    pair: Pair, epoch: int, attribute: str = "shade", layer: str = "backbone", device: str = "cpu"
) -> pd.DataFrame:
    """Return how well a linear probe reads the attribute from full images whose class it is told: a
    row per encoder.

    Trained on the public set, judged on the probe set: accuracy with its 95 % interval (low, high),
    n, attribute. What cannot be read from a full image (below .8) cannot be expected from a crop.
    Where no attribute of the probe set is known, as in ImageNet, whose validation set has no boxes,
    half of the public set takes its place.
    """
    sets = {name: pair.parts[name] for name in ("public", "probe")}
    if (_values(attribute, sets)["probe"] < 0).all():
        half = np.arange(len(sets["public"])) % 2 == 0
        sets = {"public": sets["public"].subset(half), "probe": sets["public"].subset(~half)}
    whole = {name: (images, None) for name, images in sets.items()}
    found, parts, values = _embedded(pair, epoch, attribute, whole, layer, device)
    told = {
        name: torch.nn.functional.one_hot(torch.as_tensor(images.labels), len(images.classes))
        for name, images in parts.items()
    }
    rows, n, count = [], len(values["probe"]), 1 + max(int(each.max()) for each in values.values())
    for model in "AB":
        sets = [
            each
            for name in parts
            for each in (torch.cat([found[name][model], told[name]], 1), values[name])
        ]
        right = probe.linear_probe(*sets, count)["test"]
        low, high = binomtest(round(right * n), n).proportion_ci(method="wilson")
        rows.append(
            {
                "model": model,
                "accuracy": right,
                "low": low,
                "high": high,
                "n": n,
                "attribute": attribute,
            }
        )
    return pd.DataFrame(rows).assign(**pair.setting, epoch=epoch, layer=layer)


def _values(attribute: str, parts: dict) -> dict[str, np.ndarray]:
    """Return {part: values (n,)} of an attribute, -1 where unknown; ValueError if there is no such
    attribute.
    """
    there = [*parts["public"].attributes, *OBJECT]
    if attribute not in there:
        raise ValueError(f'beyond: attribute "{attribute}"; expected one of {", ".join(there)}.')
    if attribute in OBJECT:
        return {
            name: object_attributes(images, parts["public"])[attribute]
            for name, images in parts.items()
        }
    return {name: np.asarray(images.attributes[attribute]) for name, images in parts.items()}


def object_attributes(images: Images, public: Images | None = None) -> dict[str, np.ndarray]:
    """Return {"colour", "size"} of the object, the largest box: ints (n,), 1 above its class's
    median in `public`.

    colour: mean red minus mean blue in the middle of the box (1: warmer); size: the box's share of
    the picture. So either splits every class in halves. -1 where a picture could not be attacked
    (no box, box of zero area, box that is the whole picture), or nothing like it of its class is in
    `public`, by default the images themselves.
    """
    own, found = _measures(images), {}
    public, known = (images, own) if public is None else (public, _measures(public))
    for name in OBJECT:
        median = (
            pd.Series(known[name]).groupby(public.labels).median().reindex(images.labels).to_numpy()
        )
        found[name] = np.where(np.isfinite(own[name] + median), own[name] > median, -1)
    return found


def _measures(images: Images) -> dict[str, np.ndarray]:
    """Return colour, in levels of 255, and size, a share, of the largest box of every picture; NaN
    without one.
    """
    good = split.attackable(images)[0]
    largest = [
        box[(box[:, 2:] - box[:, :2]).prod(1).argmax()] if ok else (0, 0, *size)
        for box, ok, size in zip(images.boxes, good, images.sizes, strict=True)
    ]
    largest = np.clip(np.array(largest, float), 0, np.tile(images.sizes, 2))
    inner = images.squares(8, largest, keep=0.5)  # the rim of a box shows what is behind the object
    mean = inner.double().mean((2, 3)).numpy()
    share = (largest[:, 2:] - largest[:, :2]).prod(1) / images.sizes.prod(1)
    return {
        "colour": np.where(good, mean[:, 0] - mean[:, 2], np.nan),
        "size": np.where(good, share, np.nan),
    }
