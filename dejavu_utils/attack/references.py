"""What the target is compared with. The paper's two-model test: encoders A and B, each the other's
reference (§3).
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from dejavu_utils import store
from dejavu_utils.attack import crops, inference, knn, probe, view_embeddings
from dejavu_utils.data import scenes
from dejavu_utils.data.images import Images, threads
from dejavu_utils.models.encoders import Encoder, embed
from dejavu_utils.models.pairs import Pair

Make = Callable[..., pd.DataFrame]  # computes a table
Embeddings = dict[str, dict[str, torch.Tensor]]  # {layer: {model: (n, d)}}


def cached_table(pair: Pair, name: str, make: Make, module: str, **parts: Any) -> pd.DataFrame:
    """Return the table that `make()` returns, read from disk if the same was made before.

    `module` is where `make` is defined: its code, and all that it imports, tell the table too.
    """
    encoders = [Path(job.folder).name for job in pair.jobs.values()]
    data = {part: images.digest for part, images in pair.parts.items()}
    own = store.key(encoders=encoders, data=data, code=store.code_version(module), **parts)
    path = pair.folder / f"{name}-{own}.parquet"
    meta = {"parameters": parts | pair.setting, "seed": pair.setting["seed"]}
    store.once(path, lambda: store.write_table(path, make(), meta))
    return store.read_table(path)


def cached(name: str) -> Callable[[Make], Make]:
    """Return a decorator of functions (pair, epoch, …) -> table, which makes each table once and
    then reads it.

    A table is told by the pair's encoders, images and rules, by all arguments but the device, by
    the crop (the pair's, if none is given) and by the code that the function's module depends on.
    It is on disk as <name>-<epoch>-<key>.
    """

    def decorate(make: Make) -> Make:
        @functools.wraps(make)
        def table(*arguments: Any, **options: Any) -> pd.DataFrame:
            bound = inspect.signature(make).bind(*arguments, **options)
            bound.apply_defaults()
            told = dict(bound.arguments)  # what tells this table from others
            pair = told.pop("pair")
            told.pop("device")
            told["crop"] = told.get("crop") or pair.crop
            told["rules"] = inference.Rules(**pair.rules)
            file = f"{name}-{told['epoch']:04d}"
            return cached_table(
                pair, file, lambda: make(**bound.arguments), make.__module__, **told
            )

        return table

    return decorate


@cached("attack")
def two_model(
    pair: Pair,
    epoch: int,
    k: int,
    layers: tuple[str, ...] | None = None,
    attacked: str = "attacked",
    crop: dict | None = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """Return the label-inference table of a pair at one epoch: one row per attacked image, model
    and layer.

    `layers` are projector and backbone if not given, and the logits of the supervised baseline,
    attacked directly. `attacked="control"` attacks images of a third set that neither encoder saw.
    Columns: those of `attack.label_inference`, then criterion, rho, seed, epoch, layer, k,
    attacked.
    """
    layers = layers or _usual_layers(pair)
    rules = inference.Rules(**pair.rules)
    public = pair.parts["public"]
    encoders = {model: pair.encoder(model, epoch) for model in "AB"}
    how = {"size": pair.size(), "layers": layers, "device": device, "keep": rules.keep}

    targets: dict[str, Images] = {}
    crops: dict[str, Embeddings] = {}
    for side, images in attacked_sets(pair, attacked).items():
        targets[side], rects = cropped(images, crop or pair.crop)
        crops[side] = embed_images(encoders, targets[side], rects=rects, **how)
    bank = embed_images(encoders, public, **how)
    ids = {side: images.ids for side, images in targets.items()}
    labels = {side: images.labels for side, images in targets.items()}

    tables = []
    for layer in layers:
        queries = {}
        for side, embedded in crops.items():  # the search runs where the queries are
            queries[side] = {model: x.to(device) for model, x in embedded[layer].items()}
        known = None if layer == "logits" else bank[layer]  # class scores answer directly
        table = inference.label_inference(
            queries, known, public.labels, ids, labels, k, len(public.classes), rules
        )
        about = {"epoch": epoch, "layer": layer, "k": k, "attacked": attacked}
        tables.append(table.assign(**pair.setting, **about))
    return pd.concat(tables, ignore_index=True)


def _usual_layers(pair: Pair) -> tuple[str, ...]:
    """Return projector and backbone, and the logits of the supervised baseline."""
    usual = ("projector", "backbone")
    return (*usual, "logits") if pair.setting["criterion"] == "supervised" else usual


def at_layer(
    pair: Pair,
    epoch: int,
    k: int,
    layer: str = "projector",
    attacked: str = "attacked",
    device: str = "cpu",
) -> pd.DataFrame:
    """Return the rows of `two_model` at one layer; the layers that it has by default are attacked
    together, once.
    """
    usual = layer in ("projector", "backbone", "logits")
    table = two_model(pair, epoch, k, None if usual else (layer,), attacked, device=device)
    return table[table["layer"] == layer]


def cropped(images: Images, crop: dict) -> tuple[Images, np.ndarray]:
    """Return the images that have a background crop, and where it is: (Images, px (n, 4))."""
    rects, keep = crops.background(images, crop)
    return images.subset(keep), rects[keep]


def embed_images(
    encoders: dict[str, Encoder],
    images: Images,
    size: int,
    layers: Sequence[str],
    rects: np.ndarray | None = None,
    device: str = "cpu",
    chunk: int = 4096,
    keep: float = 1.0,
) -> Embeddings:
    """Return {layer: {model: (n, d)}} for all images, or their rectangles (n, 4), under every
    encoder; of each the centre square, or with `keep` that share of its side.

    Pictures are decoded once for all encoders and `chunk` at a time, so that a public set need not
    fit into memory.
    """
    found: dict = {layer: {model: [] for model in encoders} for layer in layers}
    for start in range(0, len(images), chunk):
        rows = np.arange(start, min(start + chunk, len(images)))
        where = None if rects is None else rects[rows]
        pixels = images.subset(rows).squares(size, where, keep)
        for model, encoder in encoders.items():
            embedded = embed(encoder, pixels, layers, device=device)
            for layer in layers:
                found[layer][model].append(embedded[layer])
    for by_model in found.values():
        for model, parts in by_model.items():
            by_model[model] = torch.cat(parts)
    return found


def held_out(
    pair: Pair, encoders: dict[str, Encoder], layers: Sequence[str], device: str = "cpu"
) -> tuple[Embeddings, np.ndarray]:
    """Return {layer: {model: (n, d)}} and labels (n,) of the images that no encoder saw: the probe
    and control set.
    """
    keep = inference.Rules(**pair.rules).keep
    how = {"size": pair.size(), "layers": layers, "device": device, "keep": keep}
    sets = [pair.parts[part] for part in _held_out_parts(pair)]
    found = [embed_images(encoders, images, **how) for images in sets]

    joined: Embeddings = {layer: {} for layer in layers}
    for layer in layers:
        for model in encoders:
            joined[layer][model] = torch.cat([each[layer][model] for each in found])
    return joined, np.concatenate([images.labels for images in sets])


def _held_out_parts(pair: Pair) -> list[str]:
    """Return the names of the parts that no encoder saw and that have images."""
    return [part for part in ("probe", "control") if len(pair.parts[part])]


def attacked_sets(pair: Pair, which: str) -> dict[str, Images]:
    """Return {"a", "b"} -> Images: the images unique to each set, or the two halves of the control
    set.
    """
    if which == "attacked":
        return {"a": pair.parts["a"], "b": pair.parts["b"]}
    control = pair.parts["control"]
    even = np.arange(len(control)) % 2 == 0
    return {"a": control.subset(even), "b": control.subset(~even)}


@cached("probe")
def probes(
    pair: Pair,
    epoch: int,
    layer: str = "backbone",
    method: str = "lbfgs",
    augment: bool = True,
    views: int = 10,
    device: str = "cpu",
) -> pd.DataFrame:
    """Return what the conventional test sees: a row per encoder with probe accuracies and two gaps,
    at one epoch.

    `train`, `held_out`, `gap`: a linear probe trained on the encoder's own images, judged on them
    and on held-out ones (the paper's baseline): the probe and the control set, which no encoder
    saw. `member`, `non_member`, `fresh_gap`: a probe trained on half of the held-out images, judged
    on the encoder's own images and on the other half, so that the probe itself has seen neither.
    `knn`: k-NN accuracy. `method` "sgd" is the paper's recipe, "lbfgs" a fast one that needs no
    seed (see probe.linear_probe).

    With `augment` the probes train on `views` augmented views of each image, the training's second
    view as in the authors' code (crop, flip, jitter, grey, solarise, no blur), and are judged on
    the images as they are. The second probe has more images, and so as many fewer views of each.
    """
    encoders = {model: pair.encoder(model, epoch) for model in "AB"}
    classes = len(pair.parts["probe"].classes)
    seed = pair.setting["seed"]
    fit = functools.partial(probe.linear_probe, classes=classes, method=method, seed=seed)
    views = views if augment else 0
    fewer = 0
    if views:
        half = math.ceil(sum(len(pair.parts[part]) for part in _held_out_parts(pair)) / 2)
        fewer = min(views, max(1, round(views * len(pair.parts["a"]) / half)))

    def row(model: str) -> dict[str, Any]:
        encoder = encoders[model]
        x, labels, own_views = _own_set(pair, model, encoder, layer, views, device)
        held, held_labels = held_out(pair, {model: encoder}, (layer,), device)
        others = held[layer][model], held_labels
        held_views = _held_out_views(pair, encoder, layer, fewer, device) if views else None

        paper = fit(x, labels, *others, views=own_views)
        found = {"model": model, "train": paper["train"], "held_out": paper["test"]}
        found |= {"gap": paper["gap"]} | _fresh_gap(fit, (x, labels), others, held_views)
        found["knn"] = probe.knn_accuracy(x, labels, *others, classes=classes)
        return found | {"n_train": len(labels), "n_held_out": len(held_labels)}

    # Both encoders side by side. The limit of the fits themselves would be lifted by the first that
    # ends.
    with threadpool_limits(1, "blas"):
        rows = threads(row, list(encoders), workers=2, chunk=1)
    about = {"layer": layer, "method": method, "views": views}
    return pd.DataFrame(rows).assign(**pair.setting, epoch=epoch, **about)


def _own_set(
    pair: Pair, model: str, encoder: Encoder, layer: str, views: int, device: str
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor | None]:
    """Return features (n, d) and labels (n,) of the images unique to an encoder's training set, and
    `views` augmented views of them (views, n, d): None for none.
    """
    side = model.lower()
    images = pair.parts[side]
    keep = inference.Rules(**pair.rules).keep
    found = embed_images({model: encoder}, images, pair.size(), (layer,), device=device, keep=keep)
    seen = None
    if views:
        purpose = f"probe {side}"
        seen = _augmented(pair, encoder, layer, images, views, purpose, device)
    return found[layer][model], images.labels, seen


def _fresh_gap(
    fit: Callable[..., dict[str, float]],
    own: tuple[torch.Tensor, np.ndarray],
    others: tuple[torch.Tensor, np.ndarray],
    views: torch.Tensor | None,
) -> dict[str, float]:
    """Return the accuracies of a probe trained on half of the held-out images: "member" on the
    encoder's own images, "non_member" on the other half, and their difference.

    The mean over both halves. `views` (v, n, d) are of all held-out images.
    """
    features, labels = others
    first = np.arange(len(labels)) % 2 == 0
    member, non_member = [], []
    for half in (first, ~first):
        seen = None if views is None else views[:, half]
        judged = features[~half], labels[~half]
        found = fit(features[half], labels[half], *judged, extra=own, views=seen)
        member.append(found["extra"])
        non_member.append(found["test"])
    gap = np.mean(member) - np.mean(non_member)
    return {"member": np.mean(member), "non_member": np.mean(non_member), "fresh_gap": gap}


def _augmented(
    pair: Pair,
    encoder: Encoder,
    layer: str,
    images: Images,
    views: int,
    purpose: str,
    device: str,
) -> torch.Tensor:
    """Return augmented views of images (views, n, d); every encoder of the pair sees the same
    views.
    """
    drawn = view_embeddings.draws(pair, images, views, purpose)
    found = []
    for rows, pixels in view_embeddings.sources(pair, images):
        part = [each.part(rows) for each in drawn]
        seen = view_embeddings.embed_views(encoder, pixels, part, pair.size(), (layer,), device)
        found.append(seen[layer])
    return torch.cat(found, 1)


def _held_out_views(
    pair: Pair, encoder: Encoder, layer: str, views: int, device: str
) -> torch.Tensor:
    """Return augmented views (views, n, d) of the images that no encoder saw, in the order of
    `held_out`.
    """
    found = []
    for part in _held_out_parts(pair):
        images = pair.parts[part]
        found.append(_augmented(pair, encoder, layer, images, views, f"probe {part}", device))
    return torch.cat(found, 1)


def bayes(pair: Pair) -> float:
    """Return the known Bayes accuracy from the background alone; NaN on real pictures, where nobody
    knows it.
    """
    if not pair.parts["public"].ids[0].startswith("scene-"):
        return float("nan")
    return scenes.bayes_accuracy(pair.setting["rho"], len(pair.parts["public"].classes))


def choose(table: pd.DataFrame, count: int, how: str = "memorized", seed: int = 0) -> list[str]:
    """Return ids of attacked images to look at: the most confidently memorized, or a random draw
    (`how="random"`).

    The ranking is the paper's: the target's confidence minus the reference's, among images only the
    target gets right.
    """
    at_projector = table[table["layer"] == "projector"]
    wide = at_projector.pivot(index="id", columns="role", values=["correct", "confidence"])
    if how == "random":
        ids = wide.index.to_numpy()
        return list(np.random.default_rng(seed).choice(ids, count, replace=False))
    correct, confidence = wide["correct"].astype(bool), wide["confidence"].astype(float)
    lead = confidence["target"] - confidence["reference"]
    memorized = correct["target"] & ~correct["reference"]
    return list(lead[memorized].sort_values(ascending=False, kind="stable").index[:count])


def neighbours(pair: Pair, epoch: int, ids: list[str], k: int = 4) -> list[dict]:
    """Return a row per id for `plots.gallery`: crop, image, class and the k nearest public images
    under both models.
    """
    public, size = pair.parts["public"], pair.size()
    keep = inference.Rules(**pair.rules).keep
    known = public.squares(size, keep=keep)  # (m, 3, size, size)
    encoders = {model: pair.encoder(model, epoch) for model in "AB"}
    bank = {}
    for model, encoder in encoders.items():
        bank[model] = embed(encoder, known, ("projector",))["projector"]

    rows = []
    for name in ids:
        side = "a" if name in pair.parts["a"].ids else "b"
        target = inference.TARGETS[side]
        models = {"target": target, "reference": "B" if target == "A" else "A"}
        one = pair.parts[side].subset(np.flatnonzero(pair.parts[side].ids == name))
        crop = one.squares(size, crops.background(one, pair.crop)[0], keep)
        row = {"crop": crop[0], "image": one.squares(size)[0], "name": one.classes[one.labels[0]]}
        for role, model in models.items():
            query = embed(encoders[model], crop, ("projector",))["projector"]
            nearest = knn.search(query, bank[model], k)[1][0].numpy()  # (k,): rows of public
            row[role] = [(known[j], public.classes[public.labels[j]]) for j in nearest]
        rows.append(row)
    return rows
