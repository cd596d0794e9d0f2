"""Reconstruction: from a background crop's representation to a picture, under target and reference
(the paper's §5).

The encoder embeds the crop; a decoder that was trained on public pictures, and on nothing else,
samples pictures that have this representation. A classifier that knows neither encoder nor decoder
says what they show.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dejavu_utils import store
from dejavu_utils.attack import crops, inference, knn, references
from dejavu_utils.data import datasets
from dejavu_utils.data.images import Images, threads
from dejavu_utils.models import pairs, train
from dejavu_utils.reconstruct import classifier, decoder

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

# What each representation of a condition is taken from: the crop itself, or the mean over the
# crop's nearest public images.
CONDITIONS = {
    "projector": {"projector": "crop"},  # the headline: no neighbour helps
    "backbone": {"backbone": "crop"},
    "both": {"backbone": "neighbours", "projector": "crop"},  # the paper's
}
NEAREST = "nearest"  # no decoder: the nearest public image itself
LAYERS = ("projector", "backbone")


@dataclass(frozen=True)
class Reconstructor:
    """A pair of encoders at one epoch, a decoder for each, and the classifier that reads what they
    sample.
    """

    pair: pairs.Pair
    epoch: int
    decoders: dict  # {"A", "B"} -> train.Job
    classifier: classifier.Classifier
    sampling: dict  # steps, guidance, samples, neighbours

    def jobs(self) -> list[train.Job]:
        """Return what `launch.fit_all` must have trained before anything can be sampled."""
        return [*self.decoders.values(), self.classifier.job]


def prepare(
    pair: pairs.Pair, epoch: int, folder: Path, options: dict, sampling: dict, device: str = "cpu"
) -> Reconstructor:
    """Return the decoders and the classifier of a pair whose encoders are trained; they are not
    trained yet.

    `options`: epochs, batch, lr (per 256 images), size (px), extra (scenes a class that are made
    beside X), classifier_epochs, and any of `decoder.NET`; `sampling`: steps, guidance, samples (of
    each image), neighbours (that are averaged). ValueError if X holds an image of A, B, the shared
    part or the control set.
    """
    _check_public(pair.parts)
    changed = {name: value for name, value in options.items() if name in decoder.NET}
    recipe = dataclasses.replace(
        pair.jobs["A"].recipe,
        criterion="rcdm",
        engine="decoder",
        size=options["size"],
        batch=options["batch"],
        lr=options["lr"],
        optimizer="adamw",
        constants=decoder.NET | changed,
        processes=1,
        nodes=1,
    )
    jobs = {}
    for model in ("A", "B"):
        source = _public_set(pair, model, epoch, options, folder / "pixels", device)
        key = store.key(
            pixels=store.verify(source)["sha256"],  # equal bytes, equal decoder, whoever wrote them
            recipe=recipe,
            epochs=options["epochs"],
            code=store.code_version(decoder.__name__),
        )
        where = folder / "decoders" / f"{pair.setting['criterion']}-{key}"
        seed = f"{pair.setting['seed']}/decoder"
        jobs[model] = train.Job(str(source), str(where), recipe, [options["epochs"]], seed, device)
    reader = classifier.make(pair, options["size"], options["classifier_epochs"], folder, device)
    return Reconstructor(pair, epoch, jobs, reader, sampling)


def _check_public(parts: dict) -> None:
    """Raise ValueError if an image of the public set is in a training set or is attacked: a decoder
    would know it.
    """
    public = set(parts["public"].ids.tolist())
    for name in ("a", "b", "shared", "control"):
        if both := public & set(parts[name].ids.tolist()):
            raise ValueError(
                f"reconstruct: {len(both)} images of the public set are also in {name}, e.g. "
                f"{min(both)}; expected none: a decoder learns from X alone. Partition again."
            )


def _public_set(
    pair: pairs.Pair, model: str, epoch: int, options: dict, folder: Path, device: str
) -> Path:
    """Return the file that decoder A (B) learns from: pixels and labels of X, and of extra scenes,
    and their representations under encoder A (B).
    """
    public = pair.parts["public"]
    key = store.key(
        images=public.digest,
        encoder=Path(pair.jobs[model].folder).name,
        epoch=epoch,
        size=options["size"],
        extra=options["extra"],
        code=store.code_version(references.__name__),
    )
    path = folder / f"public-{key}.safetensors"

    def write() -> None:
        parts = [public]
        if (
            options["extra"] and "shade" in public.attributes
        ):  # only of scenes there are always more
            parts.append(_extra_scenes(pair, options["extra"]))

        tensors = {
            "pixels": torch.cat([images.squares(options["size"]) for images in parts]),
            "labels": torch.from_numpy(np.concatenate([images.labels for images in parts])),
        }
        encoder = {model: pair.encoder(model, epoch)}
        found = [
            references.embed_images(encoder, images, pair.size(), LAYERS, device=device)
            for images in parts
        ]
        for layer in LAYERS:
            tensors[layer] = torch.cat([each[layer][model] for each in found])
        store.write_tensors(path, tensors, pair.setting | {"epoch": epoch, "images": "public"})

    store.once(path, write)
    return path


def _extra_scenes(pair: pairs.Pair, per_class: int) -> Images:
    """Return scenes of the same kind as X, but of a seed of their own: in no set of the pair."""
    return datasets.read(
        "scenes",
        classes=len(pair.parts["public"].classes),
        per_class=per_class,
        rho=pair.setting["rho"],
        seed=f"{pair.setting['seed']}/decoder",
    )


def representations(
    reconstructor: Reconstructor,
    condition: str,
    images: Images,
    rects: np.ndarray,
    model: str,
    device: str = "cpu",
) -> decoder.Representations:
    """Return {layer: (n, d)}: what the decoder of `model` is given for the rectangles `rects` (n,
    4) of `images`; `condition` is a name in CONDITIONS.
    """
    crop, bank, nearest = _nearest(reconstructor, images, rects, model, device)
    given = {}
    for layer, source in CONDITIONS[condition].items():
        given[layer] = crop[layer] if source == "crop" else bank[layer][nearest].mean(1)
    return given


def _nearest(
    reconstructor: Reconstructor, images: Images, rects: np.ndarray, model: str, device: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return the crops' representations {layer: (n, d)}, the public set's with its pixels, and the
    crops' nearest public images (n, k), at the projector.
    """
    pair = reconstructor.pair
    encoder = {model: pair.encoder(model, reconstructor.epoch)}
    found = references.embed_images(encoder, images, pair.size(), LAYERS, rects, device)
    crop = {layer: by_model[model] for layer, by_model in found.items()}
    bank = store.read_tensors(reconstructor.decoders[model].pixels)[0]

    k = reconstructor.sampling["neighbours"]
    nearest = knn.search(crop["projector"].to(device), bank["projector"], k)[1].cpu()
    return crop, bank, nearest


def pictures(
    reconstructor: Reconstructor,
    condition: str,
    images: Images,
    rects: np.ndarray,
    model: str,
    samples: int = 1,
    device: str = "cpu",
) -> Tensor:
    """Return pictures uint8 (n, samples, 3, s, s) from the rectangles `rects` (n, 4) of `images`
    under encoder `model`.

    `condition` is a name in CONDITIONS, or "nearest" (one picture each, whatever `samples`);
    ValueError names them.
    """
    return drawing(reconstructor, condition, images, rects, model, samples, device)()


def drawing(
    reconstructor: Reconstructor,
    condition: str,
    images: Images,
    rects: np.ndarray,
    model: str,
    samples: int,
    device: str,
) -> Callable[[], Tensor]:
    """Return a function that returns what `pictures` does. All that it needs is in memory, so that
    several may draw side by side.
    """
    known = [*CONDITIONS, NEAREST]
    if condition not in known:
        raise ValueError(
            f'reconstruct.pictures: condition "{condition}"; expected one of {", ".join(known)}.'
        )
    if condition == NEAREST:
        _, bank, nearest = _nearest(reconstructor, images, rects, model, device)
        return lambda: bank["pixels"][nearest[:, 0]][:, None]

    job = reconstructor.decoders[model]
    return functools.partial(
        decoder.sample,
        decoder.load(job),
        representations(reconstructor, condition, images, rects, model, device),
        samples,
        reconstructor.sampling["steps"],
        reconstructor.sampling["guidance"],
        reconstructor.pair.setting["seed"],
        device,
        precision=job.recipe.precision,
    )


def table(
    reconstructor: Reconstructor,
    condition: str,
    attacked: str = "attacked",
    device: str = "cpu",
) -> pd.DataFrame:
    """Return what the classifier says of the reconstructions: a row per image and role, for
    `attack.score`.

    Columns as in `references.two_model`, and `class` and `attribute`: 1 where they are read rightly
    (the attribute within the true class; NaN where there is none). `attacked="control"` takes
    images of neither set, "whole" the same ones not cropped: what could be read at best.
    """
    return references.cached_table(
        reconstructor.pair,
        "reconstruct",
        functools.partial(_table, reconstructor, condition, attacked, device),
        __name__,
        epoch=reconstructor.epoch,
        condition=condition,
        jobs=[Path(job.folder).name for job in reconstructor.jobs()],
        attacked=attacked,
        crop=reconstructor.pair.crop,
        sampling=reconstructor.sampling,
    )


def _table(
    reconstructor: Reconstructor, condition: str, attacked: str, device: str
) -> pd.DataFrame:
    import pandas as pd

    pair = reconstructor.pair
    scores, targets, attributes = {}, {}, []
    for side, images in references.attacked_sets(pair, attacked).items():
        rects, keep = crops.background(images, pair.crop)
        if attacked == "whole":
            rects = whole(images)
        images, rects = images.subset(keep), rects[keep]
        targets[side] = images
        scores[side] = {}
        probabilities = _read_both(reconstructor, condition, images, rects, device)
        for model, values in probabilities.items():
            scores[side][model] = values.sum(2).clamp(min=1e-12).log()  # (n, classes)
            role = "target" if inference.TARGETS[side] == model else "reference"
            right = classifier.attribute_right(values, images)
            columns = {"id": images.ids, "direction": side, "role": role, "attribute": right}
            attributes.append(pd.DataFrame(columns))

    ids = {side: images.ids for side, images in targets.items()}
    labels = {side: images.labels for side, images in targets.items()}
    classes = len(pair.parts["public"].classes)
    found = inference.label_inference(scores, None, None, ids, labels, 1, classes)
    keys = ["id", "direction", "role"]
    found = found.merge(pd.concat(attributes), on=keys, validate="one_to_one")
    found["class"] = found["correct"].astype(float)
    about = {"epoch": reconstructor.epoch, "condition": condition, "attacked": attacked}
    return found.assign(**pair.setting, **about)


def whole(images: Images) -> np.ndarray:
    """Return the rectangles (n, 4) that leave nothing out."""
    return np.c_[0 * images.sizes, images.sizes]


def _read_both(
    reconstructor: Reconstructor, condition: str, images: Images, rects: np.ndarray, device: str
) -> dict[str, Tensor]:
    """Return {model: probabilities (n, classes, values)}, the mean over an image's samples."""
    samples = reconstructor.sampling["samples"]
    # Encoders and decoders are read before: it takes a process, which a thread must not start.
    drawings = [
        drawing(reconstructor, condition, images, rects, model, samples, device) for model in "AB"
    ]
    both = threads(lambda draw: draw(), drawings, workers=2, chunk=1)

    probabilities = {}
    for model, sampled in zip("AB", both, strict=True):
        found = reconstructor.classifier.read(sampled.flatten(0, 1), device)
        probabilities[model] = found.unflatten(0, sampled.shape[:2]).mean(1)
    return probabilities


def gallery(
    reconstructor: Reconstructor,
    ids: list[str],
    condition: str = "projector",
    samples: int = 3,
    device: str = "cpu",
) -> list[dict]:
    """Return a row per id for `plots.gallery`: crop, image, name, and lists of (picture, name).

    "target" and "reference" hold what was sampled, named by what the classifier reads;
    "nearest target" and "nearest reference" the nearest public image and its label.
    """
    pair = reconstructor.pair
    rows = []
    for name in ids:
        side = "a" if name in pair.parts["a"].ids else "b"
        one = pair.parts[side].subset(pair.parts[side].ids == name)
        rects, _ = crops.background(one, pair.crop)
        size = reconstructor.classifier.job.recipe.size
        row = {
            "crop": one.squares(size, rects)[0],
            "image": one.squares(size)[0],
            "name": one.classes[one.labels[0]],
        }
        for role, model in zip(("target", "reference"), "AB" if side == "a" else "BA", strict=True):
            sampled = pictures(reconstructor, condition, one, rects, model, samples, device)[0]
            names = [one.classes[i] for i in reconstructor.classifier.classes(sampled, device)]
            row[role] = list(zip(sampled, names, strict=True))

            _, bank, nearest = _nearest(reconstructor, one, rects, model, device)
            first = nearest[0, 0]
            row[f"nearest {role}"] = [(bank["pixels"][first], one.classes[bank["labels"][first]])]
        rows.append(row)
    return rows
