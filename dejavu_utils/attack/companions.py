"""Other measures of memorization on the same encoders, beside the déjà vu attack: what each of them
sees.

Statistics of an image under one encoder, all the larger the more they take it for a training image:
`confidence`, `correct`: of the attack on its background crop (`references.two_model`); `alignment`:
minus the mean distance between the unit embeddings of the image and of its views (SSLMem: Wang et
al., arXiv 2401.12233); `similarity`: the mean cosine of all pairs of its views (EncoderMI's
threshold attack: Liu et al., arXiv 2108.11023). A `_gap` is the same minus its value under the
other encoder: for a training image, target minus reference.
"""

import math
from collections.abc import Callable, Sequence
from itertools import chain, combinations

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch.nn.functional import normalize

from dejavu_utils.attack import references, scoring, summaries
from dejavu_utils.data.images import Images
from dejavu_utils.models import pairs, train
from dejavu_utils.models import views as augment
from dejavu_utils.models.encoders import Encoder, embed

STATISTICS = ("confidence", "correct", "alignment", "similarity")
GAPS = tuple(f"{name}_gap" for name in STATISTICS)


@references.cached("companions")
def table(
    pair: pairs.Pair,
    epoch: int,
    k: int,
    views: int = 10,
    layer: str = "projector",
    device: str = "cpu",
    attacked: str = "attacked",
) -> pd.DataFrame:
    """Return a row per attacked image and encoder, with STATISTICS and GAPS of each.

    Other columns: id, label, direction (the image's set), model ("A" or "B"), member (was that
    model trained on it), criterion, rho, seed, epoch, layer, k, views, attacked. The `views` of an
    image are alike for both encoders: drawn by the augmentation of their training, in turn as its
    first and its second view. ValueError below 2 views. With `attacked="control"` neither model was
    trained on the images, and `member` is what the control pretends.
    """
    if views < 2:
        raise ValueError(
            f"companions.table: views = {views}; expected at least 2, to compare with each other."
        )
    found = references.at_layer(pair, epoch, k, layer, attacked, device)
    rows = found[["id", "label", "direction", "role", "confidence", "correct"]]
    member = rows["role"] == "target"
    rows = rows.assign(
        model=np.where(member == (rows["direction"] == "a"), "A", "B"), member=member
    )
    rows = rows.drop(columns="role").sort_values(
        ["direction", "id", "model"], kind="stable", ignore_index=True
    )
    sets = {
        side: images.subset(np.isin(images.ids, rows["id"]))  # sorted by id, as every part is
        for side, images in references.attacked_sets(pair, attacked).items()
    }
    seen = np.concatenate(
        [_seen(pair, epoch, side, sets[side], views, layer, device) for side in sorted(sets)]
    )
    rows[["alignment", "similarity"]] = seen.reshape(len(rows), 2)
    each = (
        rows[list(STATISTICS)].to_numpy(float).reshape(-1, 2, len(STATISTICS))
    )  # image, model, statistic
    rows[list(GAPS)] = (each - each[:, ::-1]).reshape(len(rows), -1)
    return rows.assign(
        **pair.setting, epoch=epoch, layer=layer, k=k, views=views, attacked=attacked
    )


def _seen(
    pair: pairs.Pair, epoch: int, side: str, images: Images, views: int, layer: str, device: str
) -> np.ndarray:
    """Return alignment and similarity (n, 2 models, 2) of images, from pixels as the training had
    them.
    """
    size, square, native = pair.size(), round(pair.size() * 8 / 7), pairs.equal_sized(pair.parts)
    sizes = torch.as_tensor(images.sizes if native else np.full((len(images), 2), square))
    augmentation = augment.Views(**pair.jobs["A"].recipe.views)
    kinds = [kind for _, kind in augment.plan(augmentation, size)[:2]]
    rng = train.stream(pair.setting["seed"], f"companions {side}")
    drawn = [augment.draw(kinds[i % 2], sizes, augmentation, size, rng) for i in range(views)]
    encoders, found = [pair.encoder(model, epoch) for model in ("A", "B")], []
    for start in range(0, len(images), 512):
        rows = slice(start, start + 512)
        part = images.subset(np.arange(len(images))[rows])
        pixels, whole = part.stacked if native else part.squares(square), part.squares(size)
        found.append(
            np.stack(
                [
                    consistency(
                        encoder, whole, pixels, [each.part(rows) for each in drawn], layer, device
                    )
                    for encoder in encoders
                ],
                1,
            )
        )
    return np.concatenate(found)


@torch.inference_mode()
def consistency(
    encoder: Encoder,
    whole: torch.Tensor,
    pixels: torch.Tensor,
    drawn: list[augment.Draw],
    layer: str,
    device: str = "cpu",
) -> np.ndarray:
    """Return alignment, in [-2, 0], and similarity, in [-1, 1], of n images under one encoder:
    float64 (n, 2).

    `whole` uint8 (n, 3, s, s): the images as they are embedded; `pixels` uint8 (n, 3, H, W): what
    their views are cut from; `drawn`: two views or more of each image (`views.draw`). The encoder
    is left in evaluation mode.
    """
    encoder.eval()
    anchor = normalize(embed(encoder, whole, (layer,), device=device)[layer].to(device).double())
    total, distance, pixels = (
        torch.zeros_like(anchor),
        torch.zeros_like(anchor[:, 0]),
        pixels.to(device),
    )
    for each in drawn:
        there = augment.Draw(*(None if values is None else values.to(device) for values in each))
        view = augment.view(pixels, whole.shape[-1], there).contiguous(
            memory_format=torch.channels_last
        )
        unit = normalize(encoder.layers(view)[layer].double())
        total += unit
        distance += torch.linalg.vector_norm(unit - anchor, dim=1)
    v = len(drawn)  # |sum of v unit vectors|^2 = v + the cosines of all ordered pairs
    cosine = (total.square().sum(1) - v) / (v * (v - 1))
    return torch.stack([-distance / v, cosine], 1).cpu().numpy()


def summary(
    table: pd.DataFrame, probes: pd.DataFrame | None = None, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Return a row per statistic: how well it tells the images that an encoder was trained on from
    the others.

    `auc` with its 95 % interval (low, high), mean over encoders and seeds, chance .5; `encoders`
    that it needs; n images; seeds. `probes` (`references.probes` of the same encoders) adds the
    train - held-out gaps of linear probes as `value`, `value_low`, `value_high`: one number per
    encoder, so their auc is NaN.
    """
    names, seeds = [*GAPS, *STATISTICS], table["seed"].nunique()
    found = _bootstrap(table, names, _auc, resamples, seed)
    rows = [
        {
            "statistic": name,
            "encoders": 1 + (name in GAPS),
            **scoring.bounds(values, "auc", "", n=len(table) // 2),
            "n": len(table) // 2,
            "seeds": seeds,
        }
        for name, values in zip(names, found, strict=True)
    ]
    for gap in [] if probes is None else summaries.probe_rows(probes).to_dict("records"):
        if "gap" in gap["quantity"]:
            rows.append(
                {
                    "statistic": f"probe: {gap['quantity']}",
                    "encoders": 1,
                    "auc": math.nan,
                    "value": gap["mean"],
                    "value_low": gap["low"],
                    "value_high": gap["high"],
                    "n": gap["n_held_out"],
                    "seeds": gap["seeds"],
                }
            )
    return pd.DataFrame(rows)


def correlations(
    table: pd.DataFrame, columns: Sequence[str] = GAPS, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return a row per pair of statistics: Spearman's rank correlation over the training images
    under their target.

    Columns one, two, correlation, low, high (95 %), n, seeds. Ranked within direction and seed,
    then averaged; NaN where a statistic is the same for all images.
    """
    found = _bootstrap(table, list(columns), _spearman, resamples, seed)
    rows = [
        {
            "one": one,
            "two": two,
            **scoring.bounds(values, "correlation", "", n=len(table) // 2),
            "n": len(table) // 2,
        }
        for (one, two), values in zip(combinations(columns, 2), found, strict=True)
    ]
    return pd.DataFrame(rows).assign(seeds=table["seed"].nunique())


def atypical(
    table: pd.DataFrame,
    dejavu_table: pd.DataFrame,
    control: tuple[pd.DataFrame, pd.DataFrame] | None = None,
    share: float = 0.1,
    resamples: int = 2000,
    seed: int = 0,
) -> dict:
    """Return the déjà vu score of the images with the largest alignment gap minus that of those
    with the smallest.

    SSLMem takes the former for memorized, and finds them atypical. Without any memory the
    difference can be above 0: an image may be easier for one of two encoders in both ways. So
    `control`, (table, dejavu_table) of the control images, adds net, net_low and net_high: the
    difference minus theirs. The `share` at either end is taken within direction and seed. Keys:
    difference, low, high, top, bottom, n (at each end). `dejavu_table` is `references.two_model`'s.
    """
    top, bottom, n = _ends(table, dejavu_table, share, resamples, seed)
    row = scoring.bounds(top - bottom, "difference", "", n=n) | {
        "top": float(top[0]),
        "bottom": float(bottom[0]),
        "n": n,
    }
    if control is not None:
        high, low, fewer = _ends(*control, share, resamples, seed)
        row |= scoring.bounds((top - bottom) - (high - low), "net", n=min(n, fewer))
    return row


def _ends(
    table: pd.DataFrame, dejavu_table: pd.DataFrame, share: float, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the déjà vu scores (1 + resamples,) of either end, resampled apart, and how many
    images each is.
    """
    own = table[table["member"]].sort_values(["alignment_gap", "id"], kind="stable")
    strata, ends = own.groupby(["direction", "seed"]), []
    count = np.ceil(share * strata["id"].transform("size") - 1e-9)
    for chosen in (own[strata.cumcount(ascending=False) < count], own[strata.cumcount() < count]):
        part = dejavu_table.merge(chosen[["id", "seed"]], on=["id", "seed"])
        if len(part) != 2 * len(chosen):
            raise ValueError(
                f"companions.atypical: {len(part)} rows of the attack on {len(chosen)} images; "
                "expected "
                "each under target and reference. Pass the attack of the same encoders, at one "
                "layer."
            )
        ends.append(np.subtract(*scoring.accuracies(part, resamples, seed)))
    return *ends, len(chosen)


def _bootstrap(
    table: pd.DataFrame,
    columns: list[str],
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    resamples: int,
    seed: int,
) -> np.ndarray:
    """Return the mean over encoders and seeds of `measure`, (m, 1 + resamples): the data itself,
    then the resamples.

    Images, or from attack.CLUSTER_FROM classes on classes, are drawn within direction, the same for
    both encoders.
    """
    ordered, found = table.sort_values(["direction", "id"], kind="stable"), []
    for _, run in ordered.assign(role=np.where(ordered["member"], "target", "reference")).groupby(
        "seed"
    ):
        if run["direction"].nunique() < 2:
            raise ValueError(
                "companions: images of one set only; expected those of a and of b, to tell them "
                "apart."
            )
        sides = [
            (one[columns].to_numpy(float).T, one["member"].to_numpy())
            for _, one in run.groupby("model")
        ]
        strata = scoring.stratify(run, 1, "own")
        each = [
            chain.from_iterable(scoring.bootstrap_weights(stratum, resamples, seed))
            for stratum in strata
        ]
        drawn = (
            np.repeat(np.arange(sum(map(len, rows))), np.concatenate(rows))
            for rows in zip(*each, strict=True)
        )
        found.append(
            [
                np.mean([measure(values[:, rows], member[rows]) for values, member in sides], 0)
                for rows in drawn
            ]
        )
    return np.mean(found, 0).T


def _auc(values: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Return the chance (m,) that a member's value is above a non-member's, ties counting half."""
    own = member.sum()
    return (rankdata(values, axis=1)[:, member].sum(1) - own * (own + 1) / 2) / (
        own * (~member).sum()
    )


def _spearman(values: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Return the rank correlation of every two statistics among the members, in the order of
    `combinations`.
    """
    with np.errstate(invalid="ignore"):  # 0 / 0 where a statistic is constant
        return np.corrcoef(rankdata(values[:, member], axis=1))[np.triu_indices(len(values), 1)]
