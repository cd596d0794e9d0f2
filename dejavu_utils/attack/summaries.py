"""Tidy tables behind the figures: scores, shares, differences and probe accuracies, each with its
interval and n.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from dejavu_utils.attack import scoring
from dejavu_utils.data.scenes import bayes_accuracy

SETTING = ["criterion", "rho", "epoch", "layer", "k", "attacked"]
PERCENTS = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
# What a probe shows: its column, its name in a figure, and the shares that it is the sum or
# difference of, each with the number of images that it is over.
QUANTITIES = (
    ("held_out", "held-out accuracy", {"held_out": "n_held_out"}),
    ("gap", "train - held-out gap", {"held_out": "n_held_out", "train": "n_train"}),
    (
        "fresh_gap",
        "gap of a probe that saw neither",
        {"member": "n_train", "non_member": "n_held_out"},
    ),
)


def _groups(table: pd.DataFrame) -> Iterator[tuple[dict, pd.DataFrame]]:
    """Yield every setting of the attack, with its number of seeds, and its rows."""
    for values, group in table.groupby(SETTING, sort=False, dropna=False):
        setting = dict(zip(SETTING, values, strict=True))
        yield setting | {"seeds": group["seed"].nunique()}, group


def scores(
    table: pd.DataFrame,
    percents: Sequence[float],
    resamples: int = 2000,
    rounding: str = "up",
) -> pd.DataFrame:
    """Return a row per setting and p: déjà vu score, interval, target and reference accuracy, n;
    seeds pooled.

    `table` is what `references.two_model` returns, of as many pairs, epochs and layers as wanted;
    `rounding` says how many images the top p % are (`scoring.top_count`).
    """
    rows = []
    for setting, group in _groups(table):
        for row in scoring.curve(group, percents, resamples=resamples, rounding=rounding):
            rows.append(setting | row)
    return pd.DataFrame(rows)


def curve(
    table: pd.DataFrame,
    percents: Sequence[float] = PERCENTS,
    resamples: int = 1000,
    rounding: str = "up",
) -> pd.DataFrame:
    """Return accuracies over p with their intervals and the chance level: the table of
    `plots.over_p`.
    """
    return scores(table, percents, resamples, rounding).assign(chance=1 / table["label"].nunique())


def shares(table: pd.DataFrame, resamples: int = 2000) -> pd.DataFrame:
    """Return a row per setting: the four-way split with intervals, and the ratio memorized /
    misrepresented.
    """
    rows = []
    for setting, group in _groups(table):
        rows.append(setting | scoring.four_way(group, resamples=resamples))
    return pd.DataFrame(rows)


def differences(table: pd.DataFrame, epochs: list[int], rounding: str = "up") -> pd.DataFrame:
    """Return a row per criterion and rho for each paired difference of déjà vu scores over all
    examples, with interval.

    projector - backbone at the end; at the projector the last checkpoint minus the untrained and
    minus the first trained one, the 20 % most confident minus all, and the criterion minus the
    supervised baseline, which is attacked at its projector and by its logits.
    """
    last = epochs[-1]
    baseline = table[table["criterion"] == "supervised"]
    rows = []
    for (criterion, rho), group in table.groupby(["criterion", "rho"], sort=False, dropna=False):
        end = _at(group, "projector", last)
        others = {
            "projector - backbone": _at(group, "backbone", last),
            "last - untrained": _at(group, "projector", 0),
        }
        if len(epochs) > 2:
            others["last - first trained"] = _at(group, "projector", epochs[1])
        others["p = 20 % - all"] = end
        if criterion != "supervised":
            same_rho = first_rho(baseline, rho)
            others["- supervised (logits)"] = _at(same_rho, "logits", last)
            others["- supervised (projector)"] = _at(same_rho, "projector", last)

        for what, other in others.items():
            if len(other):
                p = (20, 100) if other is end else 100
                found = scoring.difference(end, other, p=p, rounding=rounding)
                rows.append({"criterion": criterion, "rho": rho, "what": what} | found)
    return pd.DataFrame(rows)


def _at(table: pd.DataFrame, layer: str, epoch: int) -> pd.DataFrame:
    """Return the rows of a layer and an epoch."""
    return table[(table["layer"] == layer) & (table["epoch"] == epoch)]


def first_rho(table: pd.DataFrame, rho: float) -> pd.DataFrame:
    """Return the rows of the first rho, which every criterion has; on real pictures, where rho is
    missing, all rows.
    """
    return table if table["rho"].isna().all() else table[table["rho"] == rho]


def truth(curve: pd.DataFrame, classes: int) -> pd.DataFrame:
    """Return target, reference and Bayes accuracy per rho for a criterion trained at several; may
    be empty.
    """
    known = curve[curve["rho"].notna()]
    several = known.groupby("criterion")["rho"].transform("nunique") > 1
    bayes = [bayes_accuracy(rho, classes) for rho in known.loc[several, "rho"]]
    return known[several].assign(bayes=bayes)


def readable(table: pd.DataFrame, value: str = "score", ends: str = "") -> pd.DataFrame:
    """Return a table to look at: `value` and its interval as one text (or "too few"), other numbers
    rounded; of the top p % `n` is how many images those are.
    """
    rows = table.to_dict("records")
    texts = [scoring.interval_text(row, value, ends) for row in rows]
    shown = table.assign(**{value: texts}).drop(columns=[f"{ends}low", f"{ends}high"])
    if {"n", "p"} <= set(shown):
        shown["n"] = [int(scoring.top_count(row["n"], row["p"])) for row in rows]
    return shown.round(3)


def probe_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per criterion, rho, epoch and quantity: mean over encoders and seeds with a 95 %
    interval.

    From two seeds on the interval is the t-interval over seeds; with one it is the binomial one of
    the images judged. `views`: augmented views of each image that the probe trained on, 0 none.
    """
    keys = ["criterion", "rho", "epoch"]
    rows = []
    for values, group in table.groupby(keys, sort=False, dropna=False):
        seeds = group.groupby("seed")
        about = {"seeds": len(seeds), "n_held_out": int(seeds["n_held_out"].first().sum())}
        if "views" in group:
            about = {"views": group["views"].iloc[0]} | about
        for name, text, parts in QUANTITIES:
            row = dict(zip(keys, values, strict=True)) | {"quantity": text}
            row |= interval(seeds[name].mean().to_numpy(), _variance(group, parts), "mean", "")
            rows.append(row | about)
    return pd.DataFrame(rows)


def _variance(group: pd.DataFrame, parts: dict[str, str]) -> float:
    """Return the binomial variance of a sum or difference of shares {column: column of its n}."""
    variances = []
    for share, n in parts.items():
        variances.append((group[share] * (1 - group[share])).mean() / group[n].mean())
    return sum(variances)


def interval(
    values: np.ndarray, variance: float, name: str, ends: str | None = None
) -> dict[str, float]:
    """Return {name: mean of one number per seed} and its 95 % interval, under <ends>low and
    <ends>high ("<name>_").

    From two seeds on it is the t-interval; for one, that of the `variance` of the images judged.
    """
    ends = f"{name}_" if ends is None else ends
    if len(values) > 1:
        found = scoring.over_seeds(values)
        return {name: found["mean"], f"{ends}low": found["low"], f"{ends}high": found["high"]}
    half = 1.96 * variance**0.5
    return {name: values[0], f"{ends}low": values[0] - half, f"{ends}high": values[0] + half}
