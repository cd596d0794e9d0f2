"""Other measures of memorization on the same encoders, from augmented views of an image: alignment,
similarity and UnitMem, the table of all of them, and their resamples.

All are the larger the more an encoder takes an image for one of its training images.

`alignment`: how close an image stays to its views (SSLMem, Wang et al., arXiv 2401.12233).
`similarity`: how alike its views are to each other (EncoderMI's threshold attack, Liu et al., arXiv
2108.11023).
`unit_mem`: is a unit there for a single image (UnitMem, Wang et al., arXiv 2409.19069, section 5)?
"""

from collections.abc import Callable
from itertools import chain

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dejavu_utils.attack import references, scoring, view_embeddings
from dejavu_utils.data.images import Images
from dejavu_utils.models import views as augment
from dejavu_utils.models.encoders import Encoder, embed
from dejavu_utils.models.pairs import Pair

STATISTICS = ("confidence", "correct", "alignment", "similarity")
GAPS = tuple(f"{name}_gap" for name in STATISTICS)
BySet = dict[tuple[str, str], Tensor]  # {(set, model): (n, ...)}
HALVES = 200  # random halves of the images, for the standard error of a measure of a set
# Views are drawn under these names, which the published numbers were drawn with.
BY_IMAGE, BY_SET = "companions", "label free"


def alignment(images: Tensor, views: Tensor) -> Tensor:
    """Return minus the mean distance between the unit embeddings of images (n, d) and of their
    views (views, n, d): float64 (n,), in [-2, 0].
    """
    image = normalize(images.double(), dim=1)  # (n, d)
    view = normalize(views.double(), dim=2)  # (views, n, d)
    distance = torch.linalg.vector_norm(view - image, dim=2)  # (views, n)
    return -distance.mean(0)


def similarity(views: Tensor) -> Tensor:
    """Return the mean cosine of all pairs of views of an image, from embeddings (views, n, d):
    float64 (n,), in [-1, 1]; NaN of one view.
    """
    count = len(views)
    total = normalize(views.double(), dim=2).sum(0)  # (n, d)
    # The squared norm of a sum of unit vectors: 1 for each, and the cosines of all ordered pairs.
    return (total.square().sum(1) - count) / (count * (count - 1))


def unit_mem(activations: Tensor) -> Tensor:
    """Return UnitMem of each unit (d,), in [0, 1], from mean activations over an image's views
    (n, d).

    (max - rest) / (max + rest), with `max` the largest activation and `rest` the mean of the other
    images'. That is the form as described in the paper. Ours besides: a unit that never fires has
    0. It grows with n, so only sets of one size are compared. ValueError unless n >= 2 and no
    activation is negative.
    """
    n = len(activations)
    if n < 2 or (activations < 0).any():
        raise ValueError(
            f"measures.unit_mem: activations {tuple(activations.shape)}; expected two images or "
            "more, and no activation below 0."
        )
    largest = activations.amax(0)  # (d,)
    rest = (activations.sum(0) - largest) / (n - 1)
    total = largest + rest
    return torch.where(total > 0, (largest - rest) / total, torch.zeros_like(total))


@references.cached("statistics")
def statistics(
    pair: Pair,
    epoch: int,
    k: int,
    views: int = 10,
    attacked: str = "attacked",
    device: str = "cpu",
) -> pd.DataFrame:
    """Return a row per attacked image and encoder, with STATISTICS and GAPS of each, at the
    projector.

    `confidence` and `correct` are the attack's, on the background crop; a gap is the same minus its
    value under the other encoder: for a training image, target minus reference. Other columns: id,
    label, direction (the image's set), model ("A" or "B"), member (was that model trained on it),
    criterion, rho, seed, epoch, k, views, attacked. The `views` of an image, in turn the
    training's first and second, are the same for both encoders. With `attacked="control"` neither
    model was trained on the images, and `member` is what the control pretends. ValueError below 2
    views.
    """
    if views < 2:
        raise ValueError(
            f"measures.statistics: views = {views}; expected at least 2, to compare with each "
            "other."
        )
    guesses = references.at_layer(pair, epoch, k, attacked=attacked, device=device)
    rows = guesses[["id", "label", "direction", "role", "confidence", "correct"]]
    rows = rows.assign(member=rows["role"] == "target").drop(columns="role")
    by_a = rows["member"] == (rows["direction"] == "a")
    rows["model"] = np.where(by_a, "A", "B")

    seen = _of_views(pair, epoch, rows["id"], views, attacked, device)
    rows = rows.merge(seen, on=["id", "model"], validate="one_to_one")
    rows = rows.sort_values(["direction", "id", "model"], ignore_index=True)
    values = rows[list(STATISTICS)].to_numpy(float).reshape(-1, 2, len(STATISTICS))  # image, model
    other = values[:, ::-1]
    rows[list(GAPS)] = (values - other).reshape(len(rows), -1)
    return rows.assign(**pair.setting, epoch=epoch, k=k, views=views, attacked=attacked)


def _of_views(
    pair: Pair, epoch: int, ids: pd.Series, views: int, attacked: str, device: str
) -> pd.DataFrame:
    """Return id, model, alignment and similarity of the images with these ids."""
    tables = []
    for side, images in references.attacked_sets(pair, attacked).items():
        some = images.subset(np.isin(images.ids, ids))
        drawn = _draws(pair, some, views, f"{BY_IMAGE} {side}")
        for model in "AB":
            aligned, alike, _ = _seen(pair, pair.encoder(model, epoch), some, drawn, device)
            rows = pd.DataFrame({"id": some.ids, "model": model})
            tables.append(rows.assign(alignment=aligned.numpy(), similarity=alike.numpy()))
    return pd.concat(tables)


def _draws(pair: Pair, images: Images, views: int, purpose: str) -> list[augment.Draw]:
    return view_embeddings.draws(pair, images, views, purpose, ("first", "second"))


def _seen(
    pair: Pair, encoder: Encoder, images: Images, drawn: list[augment.Draw], device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return alignment (n,) and similarity (n,) at the projector, and the backbone's mean
    activations over views (n, d), float64.
    """
    layers = ("projector", "backbone")
    aligned, alike, active = [], [], []
    for rows, pixels in view_embeddings.sources(pair, images):
        part = [each.part(rows) for each in drawn]
        views = view_embeddings.embed_views(encoder, pixels, part, pair.size(), layers, device)
        whole = images.subset(np.arange(len(images))[rows]).squares(pair.size())
        embedded = embed(encoder, whole, layers, device=device)["projector"]  # (n, d)

        aligned.append(alignment(embedded, views["projector"]))
        alike.append(similarity(views["projector"]))
        # Behind a ReLU no activation is negative; of a ViT, negative ones count as 0.
        active.append(views["backbone"].double().clamp(min=0).mean(0))
    return torch.cat(aligned), torch.cat(alike), torch.cat(active)


@references.cached("by_set")
def by_set(
    pair: Pair, epoch: int, views: int = 10, attacked: str = "attacked", device: str = "cpu"
) -> pd.DataFrame:
    """Return mean alignment (projector) and mean UnitMem (units of the backbone) of a pair, which
    need no label: a row each with target, reference, difference, its standard `error` over images.

    `target`: of encoders on their own images; `reference`: on as many that only the other encoder
    was trained on. `n` counts both sets. `attacked="control"`: halves of the images that no encoder
    saw stand in for both sets, and the true difference is 0.
    """
    sets = references.attacked_sets(pair, attacked)
    fewer = min(len(images) for images in sets.values())
    aligned: BySet = {}
    active: BySet = {}
    for side, images in sets.items():
        some = images.subset(np.arange(fewer))
        drawn = _draws(pair, some, views, f"{BY_SET} {side}")
        for model in "AB":
            found = _seen(pair, pair.encoder(model, epoch), some, drawn, device)
            aligned[side, model], _, active[side, model] = found

    seed = pair.setting["seed"]
    by_alignment = contrast(aligned, Tensor.mean, seed)
    by_unit_mem = contrast(active, lambda rows: unit_mem(rows).mean(), seed)
    rows = [
        {"measure": "alignment", "layer": "projector"} | by_alignment,
        {"measure": "UnitMem", "layer": "backbone"} | by_unit_mem,
    ]
    table = pd.DataFrame(rows).assign(**pair.setting, n=2 * fewer)
    return table.assign(epoch=epoch, views=views, attacked=attacked)


def contrast(values: BySet, measure: Callable[[Tensor], Tensor], seed: int = 0) -> dict[str, float]:
    """Return target, reference, difference and its standard error over images.

    `values[set, model]` (n, ...) of sets "a" and "b" under models "A" and "B"; `measure` makes one
    number of the rows of a set. The error is the standard deviation over random halves of the
    images (the delete-half jackknife): a bootstrap would draw images twice, which spoils a maximum.
    """
    n = len(values["a", "A"])

    def own_and_other(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
        own_a = measure(values["a", "A"][a])
        own_b = measure(values["b", "B"][b])
        other_a = measure(values["a", "B"][a])
        other_b = measure(values["b", "A"][b])
        return float(own_a + own_b) / 2, float(other_a + other_b) / 2

    everything = np.arange(n)
    target, reference = own_and_other(everything, everything)
    random = np.random.default_rng([seed, n])
    differences = []
    for _ in range(HALVES):
        a = random.choice(n, n // 2, replace=False)
        b = random.choice(n, n // 2, replace=False)
        own, other = own_and_other(a, b)
        differences.append(own - other)
    return {
        "target": target,
        "reference": reference,
        "difference": target - reference,
        "error": float(np.std(differences, ddof=1)),
    }


def resampled(
    table: pd.DataFrame,
    statistic: Callable[[pd.DataFrame], np.ndarray],
    resamples: int = 500,
    seed: int = 0,
) -> np.ndarray:
    """Return `statistic` of a table, then of its bootstrap resamples: (1 + resamples, ...), for
    `scoring.bounds`.

    `table` is of `statistics`, of as many seeds as wanted. Images are drawn with replacement within
    direction and seed, each with its rows of both encoders; from `scoring.CLUSTER_FROM` classes on,
    classes are drawn. ValueError with images of one set alone: nobody can tell them apart.
    """
    if table["direction"].nunique() < 2:
        raise ValueError(
            "measures.resampled: images of one set only; expected those of a and of b, to tell "
            "them apart."
        )
    ordered = table.sort_values(["direction", "seed", "id", "model"])
    roles = np.where(ordered["member"], "target", "reference")
    strata = scoring.stratify(ordered.assign(role=roles))
    drawn = [
        chain.from_iterable(scoring.bootstrap_weights(stratum, resamples, seed))
        for stratum in strata
    ]
    found = []
    for counts in zip(*drawn, strict=True):  # (n,) of each stratum: how often an image is drawn
        both = np.repeat(np.concatenate(counts), 2)  # an image's rows under A and B
        rows = np.repeat(np.arange(len(ordered)), both)
        found.append(statistic(ordered.iloc[rows].reset_index(drop=True)))
    return np.stack(found)
