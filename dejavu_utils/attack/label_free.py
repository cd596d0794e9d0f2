"""Measures of memorization that use no label: alignment of views (SSLMem), and UnitMem.

Label inference is the supervised baseline's own training loss, so it compares that baseline with
self-supervised criteria on unlike terms. These two ask both in the same way, in one forward pass
over augmented views. Each compares, like the attack, an encoder's own images with as many that only
the other encoder was trained on, and the roles are exchanged: target minus reference.

`alignment` (Wang et al., arXiv 2401.12233): minus the mean distance between the unit embeddings of
an image and of its views, at the projector.

`UnitMem` (Wang et al., arXiv 2409.19069, section 5): is a unit there for a single image? For each
unit, mu(x) is its mean activation over the augmented views of image x; over the images of a set it
is (max - rest) / (max + rest), with `max` the largest mu and `rest` the mean of the others. That is
the form as described there. Ours besides: units are those of the pooled backbone, whose activations
are not negative behind a ReLU (negative ones, of a ViT, count as 0), a unit that never fires has 0,
and a set's value is the mean over units. It grows with the number of images, so only sets of one
size are compared.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dejavu_utils.attack import references, scoring, view_embeddings
from dejavu_utils.data.images import Images
from dejavu_utils.models.encoders import Encoder, embed
from dejavu_utils.models.pairs import Pair

HALVES = 200  # random halves of the images, for the error
MEASURES = {"alignment": "projector", "UnitMem": "backbone"}  # and the layer of each

# {set: rows of its images} -> value of target and of reference
Statistic = Callable[[dict[str, np.ndarray]], tuple[float, float]]


def unit_mem(activations: Tensor) -> Tensor:
    """Return UnitMem of each unit (d,), in [0, 1], of mean activations (n, d) that are not
    negative; n >= 2.
    """
    n = len(activations)
    if n < 2 or (activations < 0).any():
        raise ValueError(
            f"label_free.unit_mem: activations {tuple(activations.shape)}; expected two images or "
            "more, and no activation below 0."
        )
    largest = activations.amax(0)  # (d,)
    rest = (activations.sum(0) - largest) / (n - 1)
    total = largest + rest
    return torch.where(total > 0, (largest - rest) / total, torch.zeros_like(total))


@references.cached("label_free")
def table(
    pair: Pair, epoch: int, views: int = 10, attacked: str = "attacked", device: str = "cpu"
) -> pd.DataFrame:
    """Return a row per measure of a pair: target, reference, difference, its standard `error` over
    images, n.

    `views` of each image, in turn the training's first and second, are the same for both encoders.
    `attacked="control"`: halves of the images that no encoder saw stand in for both sets, and the
    truth is 0.
    """
    encoders = {model: pair.encoder(model, epoch) for model in ("A", "B")}
    sets = references.attacked_sets(pair, attacked)
    fewer = min(map(len, sets.values()))
    sets = {side: images.subset(np.arange(fewer)) for side, images in sets.items()}

    aligned: dict[str, dict[str, Tensor]] = {}
    active: dict[str, dict[str, Tensor]] = {}
    for side, images in sets.items():
        aligned[side], active[side] = {}, {}
        for model, encoder in encoders.items():
            found = _seen(pair, encoder, side, images, views, device)
            aligned[side][model], active[side][model] = found

    statistics = {
        "alignment": lambda rows: _own_and_other(aligned, rows, torch.Tensor.mean),
        "UnitMem": lambda rows: _own_and_other(active, rows, lambda x: unit_mem(x).mean()),
    }
    rows = []
    for name, statistic in statistics.items():
        about = {"measure": name, "layer": MEASURES[name]}
        rows.append(about | contrast(statistic, fewer, pair.setting["seed"]) | {"n": 2 * fewer})
    return pd.DataFrame(rows).assign(**pair.setting, epoch=epoch, views=views, attacked=attacked)


def _seen(
    pair: Pair, encoder: Encoder, side: str, images: Images, views: int, device: str
) -> tuple[Tensor, Tensor]:
    """Return alignment (n,) and mean activations (n, d) of images under one encoder, float64."""
    projector, backbone = MEASURES.values()
    kinds = ("first", "second")
    drawn = view_embeddings.draws(pair, images, views, f"label free {side}", kinds)

    aligned, active = [], []
    for rows, pixels in view_embeddings.sources(pair, images):
        part = [each.part(rows) for each in drawn]
        seen = view_embeddings.embed_views(
            encoder, pixels, part, pair.size(), (projector, backbone), device
        )
        whole = images.subset(np.arange(len(images))[rows]).squares(pair.size())
        anchor = normalize(embed(encoder, whole, (projector,), device=device)[projector].double())

        unit = normalize(seen[projector].double(), dim=2)  # (views, n, d)
        aligned.append(-torch.linalg.vector_norm(unit - anchor, dim=2).mean(0))
        active.append(seen[backbone].double().clamp(min=0).mean(0))
    return torch.cat(aligned), torch.cat(active)


def _own_and_other(
    found: dict[str, dict[str, Tensor]],
    rows: dict[str, np.ndarray],
    measure: Callable[[Tensor], Tensor],
) -> tuple[float, float]:
    """Return the measure of encoders on their own images and on the other's, means over A and
    B.
    """
    at = {
        (side, model): float(measure(values[torch.from_numpy(rows[side])]))
        for side, by_model in found.items()
        for model, values in by_model.items()
    }
    own = (at["a", "A"] + at["b", "B"]) / 2
    other = (at["a", "B"] + at["b", "A"]) / 2
    return own, other


def contrast(statistic: Statistic, n: int, seed: int = 0, halves: int = HALVES) -> dict[str, float]:
    """Return target, reference, difference and its standard error over images, n in each set.

    The error is the standard deviation over random halves of the images (the delete-half
    jackknife). A bootstrap would draw images twice, which spoils a maximum.
    """
    everything = np.arange(n)
    target, reference = statistic({"a": everything, "b": everything})

    random = np.random.default_rng([seed, n])
    differences = []
    for _ in range(halves):
        rows = {side: random.choice(n, n // 2, replace=False) for side in "ab"}
        one, two = statistic(rows)
        differences.append(one - two)
    return {
        "target": target,
        "reference": reference,
        "difference": target - reference,
        "error": float(np.std(differences, ddof=1)),
    }


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Return a row per criterion, measure and kind of interval, from the tables of many pairs.

    `target`, `reference`, `difference` with low and high, and `minus_supervised`, the difference
    minus the supervised baseline's, with its own (NaN without that baseline). `over`: "images" of
    these encoders, or from two seeds on also "seeds", a t-interval, for new trainings. Intervals
    over images take two criteria as independent, which they are not: that of `minus_supervised` is
    wide rather than narrow.
    """
    rows = []
    for (attacked, measure), part in found.groupby(["attacked", "measure"], sort=False):
        kinds = ("images", "seeds") if part["seed"].nunique() > 1 else ("images",)
        baseline = part[part["criterion"] == "supervised"].set_index("seed").sort_index()
        for criterion, one in part.groupby("criterion", sort=False):
            one = one.set_index("seed").sort_index()
            about = {"attacked": attacked, "criterion": criterion, "measure": measure}
            about |= {"layer": one["layer"].iloc[0], **one[["target", "reference"]].mean()}
            for over in kinds:
                row = about | _interval(one["difference"], one["error"], over, one["n"].sum(), "")
                if len(baseline) and criterion != "supervised":
                    change = one["difference"] - baseline["difference"]
                    error = np.hypot(one["error"], baseline["error"])
                    row |= _interval(change, error, over, one["n"].sum(), "minus_supervised")
                rows.append(row | {"over": over, "n": one["n"].sum(), "seeds": len(one)})
    wanted = [f"minus_supervised{end}" for end in ("", "_low", "_high")]
    table = pd.DataFrame(rows)
    return table.reindex(columns=[*table, *(name for name in wanted if name not in table)])


def _interval(
    values: pd.Series, errors: pd.Series, over: str, n: int, name: str
) -> dict[str, float]:
    """Return the mean of one number a seed and its interval, as `difference`, low and high or under
    `name`.
    """
    keys = (name, f"{name}_low", f"{name}_high") if name else ("difference", "low", "high")
    if over == "seeds":
        found = scoring.over_seeds(values.to_numpy())
        return dict(zip(keys, (found["mean"], found["low"], found["high"]), strict=True))

    mean = float(values.mean())
    half = 1.96 * float(np.sqrt(np.square(errors).sum())) / len(values)
    if n < scoring.FEWEST:
        half = float("nan")
    return dict(zip(keys, (mean, mean - half, mean + half), strict=True))


def sentence(table: pd.DataFrame) -> str:
    """Return what a `summary` says of the claim that self-supervised criteria memorize more than
    the supervised baseline does: a count for each measure, with the intervals that it rests on.
    """
    rows = table[(table["attacked"] == "attacked") & table["minus_supervised"].notna()]
    if rows.empty:
        return "Nothing follows for P6: it needs the supervised baseline beside another criterion."

    over = "seeds" if (rows["over"] == "seeds").any() else "images"
    rows = rows[rows["over"] == over]
    parts = []
    for measure, part in rows.groupby("measure", sort=False):
        above = int((part["minus_supervised_low"] > 0).sum())
        below = int((part["minus_supervised_high"] < 0).sum())
        rest = len(part) - above - below
        parts.append(f"by {measure} {above} above it, {below} below, {rest} undecided")
    unit = "seeds" if over == "seeds" else "images of these encoders"
    count = rows["criterion"].nunique()
    criteria = "criterion is" if count == 1 else "criteria are"
    return (
        f"Without labels, {count} self-supervised {criteria} compared with the supervised baseline "
        f"(P6; 95 % intervals over {unit}): {'; '.join(parts)}."
    )
