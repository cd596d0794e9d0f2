"""Reconstruction: from a background crop's representation to a picture, under target and reference
(the paper's §5).

The encoder embeds the crop; a decoder that was trained on the public set X, and on nothing else,
draws pictures that have this representation. If the encoder remembers the image, the right object
comes back, under the reference it does not. A *judge*, a classifier that knows neither encoder and
was trained on other images, reads what was drawn.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dejavu_utils import store
from dejavu_utils.attack import crops, inference, knn, references, scoring
from dejavu_utils.data.images import Images, threads
from dejavu_utils.models import pairs, train
from dejavu_utils.reconstruct import decoder, judge

if TYPE_CHECKING:
    import pandas as pd

# What each part of a condition is made of. "crop": the crop itself; "aligned": the crop, moved and
# scaled so that crops of public images have the moments of public images; "neighbours": the mean
# over the crop's nearest public images.
CONDITIONS = {
    "projector": {"projector": "crop"},  # the headline: no neighbour helps
    "projector, aligned": {"projector": "aligned"},
    "backbone": {"backbone": "crop"},
    "both": {"backbone": "neighbours", "projector": "crop"},  # the paper's
    "both, matched": {"backbone": "neighbours", "projector": "neighbours"},
}
WITHOUT = ("mean", "medoid")  # pictures made of the neighbours' own, without a decoder
MEASURES = ("class", "attribute", "ssim", "colour", "feature")


@dataclass(frozen=True)
class Bench:
    """A pair of encoders at one epoch with what reads them: a decoder for each, and the judge."""

    pair: pairs.Pair
    epoch: int
    decoders: dict  # {"A", "B"} -> train.Job
    judge: judge.Judge
    sampling: dict  # steps, guidance, samples, neighbours

    def jobs(self) -> list[train.Job]:
        """Return what `launch.fit_all` must have trained before anything can be drawn."""
        return [*self.decoders.values(), self.judge.job]


def bench(
    pair: pairs.Pair, epoch: int, folder: Path, how: dict, sampling: dict, device: str = "cpu"
) -> Bench:
    """Return the decoders and the judge of a pair whose encoders are trained; they are not trained
    yet.

    `how`: epochs, batch, lr (per 256 images), size (px), judge_epochs, and any of `decoder.NET`;
    `sampling`: steps, guidance, samples (of each image), neighbours (that are averaged). ValueError
    if X holds an image of A or B.
    """
    _check_public(pair.parts)
    own = pair.jobs["A"].recipe
    constants = decoder.NET | {name: value for name, value in how.items() if name in decoder.NET}
    recipe = dataclasses.replace(
        own,
        criterion="rcdm",
        engine="decoder",
        size=how["size"],
        batch=how["batch"],
        lr=how["lr"],
        optimizer="adamw",
        constants=constants,
        processes=1,
        nodes=1,
    )
    code, found = store.code_version(decoder.__name__), {}
    for model in ("A", "B"):
        source = _public_set(pair, model, epoch, how["size"], folder / "pixels", device)
        learned = store.verify(source)["sha256"]  # equal bytes, equal decoder, whoever wrote them
        key = store.key(pixels=learned, recipe=recipe, epochs=how["epochs"], code=code)
        found[model] = train.Job(
            str(source),
            str(folder / "decoders" / f"{pair.setting['criterion']}-{key}"),
            recipe,
            [how["epochs"]],
            f"{pair.setting['seed']}/decoder",
            device,
        )
    return Bench(
        pair,
        epoch,
        found,
        judge.make(pair, how["size"], how["judge_epochs"], folder, device),
        sampling,
    )


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
    pair: pairs.Pair, model: str, epoch: int, size: int, folder: Path, device: str
) -> Path:
    """Return the file that decoder A (B) learns from: pixels of X and their representations under
    encoder A (B).
    """
    public, layers = pair.parts["public"], ("projector", "backbone")
    key = store.key(
        images=public.digest,
        encoder=Path(pair.jobs[model].folder).name,
        epoch=epoch,
        size=size,
        code=store.code_version(references.__name__),
    )
    path = folder / f"public-{key}.safetensors"

    def write() -> None:
        encoder = {model: pair.encoder(model, epoch)}
        found = references.embed_images(encoder, public, pair.size(), layers, device=device)
        tensors = {layer: found[layer][model] for layer in layers}
        tensors["pixels"] = public.squares(size)
        store.write_tensors(path, tensors, pair.setting | {"epoch": epoch, "images": "public"})

    store.once(path, write)
    return path


def draw(
    bench: Bench,
    condition: str,
    images: Images,
    rects: np.ndarray,
    model: str,
    samples: int = 1,
    device: str = "cpu",
) -> Tensor:
    """Return pictures uint8 (n, samples, 3, s, s) from the rectangles `rects` (n, 4) of `images`
    under encoder `model`.

    `condition` is a name in CONDITIONS or WITHOUT (one picture each, whatever `samples`);
    ValueError names them.
    """
    if condition not in (*CONDITIONS, *WITHOUT):
        raise ValueError(
            f'reconstruct.draw: condition "{condition}"; expected one of '
            f"{', '.join((*CONDITIONS, *WITHOUT))}."
        )
    encoder, layers = {model: bench.pair.encoder(model, bench.epoch)}, ("projector", "backbone")
    size, k = bench.pair.size(), bench.sampling["neighbours"]
    found = references.embed_images(encoder, images, size, layers, rects, device)
    crop, bank = (
        {layer: by[model] for layer, by in found.items()},
        store.read_tensors(bench.decoders[model].pixels)[0],
    )
    nearest = knn.search(crop["projector"].to(device), bank["projector"], k)[1].cpu()
    if condition in WITHOUT:
        return _without(bank, nearest, condition)[:, None]
    given = {}
    for part, source in CONDITIONS[condition].items():
        given[part] = bank[part][nearest].mean(1) if source == "neighbours" else crop[part]
        if source == "aligned":
            given[part] = _aligned(bench, encoder, part, crop[part], bank[part], device)
    how = {name: bench.sampling[name] for name in ("steps", "guidance")}
    return decoder.sample(
        decoder.load(bench.decoders[model]),
        given,
        samples,
        seed=bench.pair.setting["seed"],
        device=device,
        precision=bench.decoders[model].recipe.precision,
        **how,
    )


def _without(bank: dict, nearest: Tensor, which: str) -> Tensor:
    """Return the mean of the neighbours' pictures, or the picture of the medoid, the one nearest to
    the others.
    """
    if which == "mean":
        return torch.stack([bank["pixels"][row].float().mean(0).round() for row in nearest]).to(
            torch.uint8
        )
    points = bank["projector"][nearest]
    return bank["pixels"][
        nearest.gather(1, torch.cdist(points, points).sum(2).argmin(1, keepdim=True))[:, 0]
    ]


def _aligned(
    bench: Bench, encoder: dict, layer: str, crop: Tensor, known: Tensor, device: str
) -> Tensor:
    """Return the crops' representations in the moments of whole pictures, both measured on the
    public set.
    """
    public, (model,) = bench.pair.parts["public"], encoder
    rects, keep = crops.background(public, bench.pair.crop)
    crops_of = public.subset(np.flatnonzero(keep))
    like = references.embed_images(
        encoder, crops_of, bench.pair.size(), (layer,), rects[keep], device
    )[layer][model]
    return (crop - like.mean(0)) / like.std(0).clamp(min=1e-6) * known.std(0) + known.mean(0)


def table(
    bench: Bench, condition: str, attacked: str = "attacked", device: str = "cpu"
) -> pd.DataFrame:
    """Return what the judge reads off the reconstructions: a row per image and role, for
    `attack.score` and `summary`.

    Columns as in `references.two_model`, and of each image's reconstructions against the image:
    `class`, `attribute` (read rightly within the true class; NaN where there is none), `ssim` and
    `colour` (CIE 1976 difference of the mean colours) of the object's box, `feature` (1 - cosine of
    the judge's features to those of the object alone). `attacked="control"` takes images of neither
    set, "whole" the same ones not cropped: what could be read at best.
    """
    make = functools.partial(_table, bench, condition, attacked, device)
    jobs = [Path(job.folder).name for job in bench.jobs()]
    return references.cached_table(
        bench.pair,
        "reconstruct",
        make,
        __name__,
        epoch=bench.epoch,
        condition=condition,
        jobs=jobs,
        attacked=attacked,
        crop=bench.pair.crop,
        sampling=bench.sampling,
    )


def _table(bench: Bench, condition: str, attacked: str, device: str) -> pd.DataFrame:
    import pandas as pd

    scores, targets, measured = {}, references.attacked_sets(bench.pair, attacked), []
    for side, images in targets.items():
        rects, keep = crops.background(images, bench.pair.crop)
        rects = np.c_[0 * images.sizes, images.sizes] if attacked == "whole" else rects
        targets[side] = images = images.subset(np.flatnonzero(keep))
        work = functools.partial(
            draw,
            bench,
            condition,
            images,
            rects[keep],
            samples=bench.sampling["samples"],
            device=device,
        )
        drawn = dict(
            zip("AB", threads(lambda model, work=work: work(model=model), "AB", 1), strict=True)
        )
        scores[side] = {}
        for model, pictures in drawn.items():
            scores[side][model], columns = judge.measure(bench.judge, pictures, images, device)
            role = "target" if inference.TARGETS[side] == model else "reference"
            measured.append(
                pd.DataFrame({"id": images.ids, "direction": side, "role": role} | columns)
            )
    found = inference.label_inference(
        scores,
        None,
        None,
        {side: images.ids for side, images in targets.items()},
        {side: images.labels for side, images in targets.items()},
        1,
        len(bench.pair.parts["public"].classes),
    )
    found = found.merge(pd.concat(measured), on=["id", "direction", "role"], validate="one_to_one")
    return found.assign(
        **bench.pair.setting,
        epoch=bench.epoch,
        condition=condition,
        attacked=attacked,
        **{"class": found["correct"].astype(float)},
    )


def summary(tables: pd.DataFrame, resamples: int = 2000) -> pd.DataFrame:
    """Return a row per condition, set (attacked or control) and measure: target, reference, score,
    intervals, n.

    `tables` are those of `table`, of any number of pairs. score is target - reference: positive is
    memory for class, attribute and ssim, negative for the distances colour and feature.
    """
    import pandas as pd

    rows = []
    for (condition, attacked), group in tables.groupby(["condition", "attacked"], sort=False):
        for measure in (name for name in MEASURES if group[name].notna().all()):
            row = scoring.score(group.assign(correct=group[measure]), resamples=resamples)
            rows.append({"condition": condition, "attacked": attacked, "measure": measure} | row)
    return pd.DataFrame(rows).drop(columns=["p", "ranking", "top", "mcnemar"])


def choose(infer: pd.DataFrame, count: int, how: str, seed: int = 0) -> list[str]:
    """Return ids for the gallery by the paper's ranking of the k-NN attack: "memorized",
    "correlated" or "random".

    `infer` is the table of `references.two_model`. Memorized: only the target is right, largest
    difference of confidences first. Correlated: both are right, largest smaller confidence first.
    Nothing else decides, in particular nothing that was drawn.
    """
    if how != "correlated":
        return references.choose(infer, count, how, seed)
    wide = infer[infer["layer"] == "projector"].pivot(
        index="id", columns="role", values=["correct", "confidence"]
    )
    both = wide["correct"].astype(bool).all(axis=1)
    least = wide["confidence"].astype(float).min(axis=1)
    return list(least[both].sort_values(ascending=False, kind="stable").index[:count])


def gallery(
    bench: Bench,
    ids: list[str],
    condition: str = "projector",
    samples: int = 4,
    device: str = "cpu",
) -> list[dict]:
    """Return a row per id for `plots.reconstructions`: crop, image, name, and per role what was
    drawn and found.

    row["target"] and row["reference"] hold "drawn" and "nearest", lists of (picture, name of what
    it shows): what the judge reads off a drawing, the label of a public image.
    """
    near, rows = references.neighbours(bench.pair, bench.epoch, ids, 2), []
    for name, row in zip(ids, near, strict=True):
        side = "a" if name in bench.pair.parts["a"].ids else "b"
        one = bench.pair.parts[side].subset(np.flatnonzero(bench.pair.parts[side].ids == name))
        rects = crops.background(one, bench.pair.crop)[0]
        for role, model in zip(("target", "reference"), "AB" if side == "a" else "BA", strict=True):
            drawn = draw(bench, condition, one, rects, model, samples, device)[0]
            names = [
                one.classes[label] for label in bench.judge.read(drawn, device)[0].sum(2).argmax(1)
            ]
            row[role] = {"nearest": row[role], "drawn": list(zip(drawn, names, strict=True))}
        rows.append(row)
    return rows


def redrawn(
    bench: Bench, count: int, condition: str = "projector", samples: int = 6, device: str = "cpu"
) -> list[dict]:
    """Return rows for `plots_reconstruction.samples`: whole control pictures, one a class, redrawn
    by decoder A.

    No encoder, decoder or judge was trained on them. Keys: image, name, drawn ([(picture, what is
    read)]).
    """
    control = bench.pair.parts["control"]
    some = control.subset(np.unique(control.labels, return_index=True)[1][:count])
    drawn = draw(bench, condition, some, np.c_[0 * some.sizes, some.sizes], "A", samples, device)
    told = (
        bench.judge.read(drawn.flatten(0, 1), device)[0]
        .sum(2)
        .argmax(1)
        .reshape(len(some), samples)
    )
    return [
        {
            "image": image,
            "name": some.classes[label],
            "drawn": [
                (picture, some.classes[kind]) for picture, kind in zip(pictures, kinds, strict=True)
            ],
        }
        for image, label, pictures, kinds in zip(
            some.squares(drawn.shape[-1]), some.labels, drawn, told, strict=True
        )
    ]


def cost(bench: Bench, pictures: int = 8, device: str = "cpu") -> pd.DataFrame:
    """Return the time of sampling: a row for this bench's sampler and one for 1,000 steps of DDPM
    (the paper's).

    Columns: sampler, steps, seconds (of one picture, drawn in a batch of `pictures`).
    """
    import pandas as pd

    net, rows = decoder.load(bench.decoders["A"]), []
    bank = store.read_tensors(bench.decoders["A"].pixels)[0]
    part = decoder.PARTS[net.constants["conditions"][0]]
    given = {name: bank[name][:pictures] for name in part}
    for solver, steps in (("dpm++", bench.sampling["steps"]), ("ddpm", net.constants["timesteps"])):
        once = functools.partial(
            decoder.sample,
            net,
            given,
            device=device,
            solver=solver,
            precision=bench.decoders["A"].recipe.precision,
        )
        once(steps=2)  # the first call builds kernels
        began = time.perf_counter()
        once(steps=steps)
        rows.append(
            {"sampler": solver, "steps": steps, "seconds": (time.perf_counter() - began) / pictures}
        )
    return pd.DataFrame(rows)
