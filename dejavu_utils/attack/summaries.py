"""Tidy tables behind the figures: scores, splits, curves and probe accuracies, each with its
interval and n.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from dejavu_utils.attack import scoring
from dejavu_utils.data.scenes import bayes_accuracy

SETTING = ["criterion", "rho", "epoch", "layer", "k", "attacked"]
# What a probe shows: its name in a figure, and the shares that it is the sum or difference of, each
# with its n.
PROBES = {
    "held_out": ("held-out accuracy", [("held_out", "n_held_out")]),
    "gap": ("train - held-out gap", [("held_out", "n_held_out"), ("train", "n_train")]),
    "fresh_gap": (
        "gap of a probe that saw neither",
        [("member", "n_train"), ("non_member", "n_held_out")],
    ),
}


def _groups(table: pd.DataFrame) -> Iterator[tuple[dict, pd.DataFrame]]:
    for values, group in table.groupby(SETTING, sort=False, dropna=False):
        yield dict(zip(SETTING, values, strict=True)) | {"seeds": group["seed"].nunique()}, group


def scores(
    table: pd.DataFrame,
    percents: Sequence[float],
    rankings: tuple[str, ...] = ("own", "paired"),
    top: int = 1,
    resamples: int = 2000,
    rounding: str = "up",
) -> pd.DataFrame:
    """Return a row per setting, p and ranking: déjà vu score, interval, target and reference
    accuracy, n; seeds pooled.

    `table` is what `references.two_model` returns, of as many pairs, epochs and layers as wanted.
    `top` 5 counts a guess as right when the class is among the five with the most votes;
    `rounding` says how many images the top p % are (`scoring.top_count`).
    """
    rows = [
        setting | row
        for setting, group in _groups(table)
        for ranking in rankings
        for row in scoring.curve(group, percents, ranking, top, resamples, rounding=rounding)
    ]
    return pd.DataFrame(rows)


def readable(table: pd.DataFrame, value: str = "score", ends: str = "") -> pd.DataFrame:
    """Return a table to look at: `value` and its interval as one text (or "too few"), other numbers
    rounded.
    """
    texts = [scoring.interval_text(row, value, ends) for row in table.to_dict("records")]
    shown = table.assign(**{value: texts}).drop(columns=[f"{ends}low", f"{ends}high"])
    return shown.round(3)


def shares(table: pd.DataFrame, resamples: int = 2000) -> pd.DataFrame:
    """Return a row per setting: the four-way split with intervals, and the ratio memorized /
    misrepresented.
    """
    return pd.DataFrame(
        [
            setting | scoring.four_way(group, resamples=resamples)
            for setting, group in _groups(table)
        ]
    )


def probe_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per criterion, rho, epoch and quantity: mean over encoders and seeds with a 95 %
    interval.

    From two seeds on the interval is the t-interval over seeds; with one it is the binomial one of
    the images judged. `views`: augmented views of each image that the probe trained on, 0 none.
    """
    rows = []
    for (criterion, rho, epoch), group in table.groupby(
        ["criterion", "rho", "epoch"], sort=False, dropna=False
    ):
        by_seed = group.groupby("seed")[list(PROBES)].mean()
        judged = int(group.groupby("seed")["n_held_out"].first().sum())
        for name, (text, shares) in PROBES.items():
            variance = sum((group[p] * (1 - group[p])).mean() / group[n].mean() for p, n in shares)
            row = {"criterion": criterion, "rho": rho, "epoch": epoch, "quantity": text}
            row |= interval(by_seed[name].to_numpy(), variance, "mean", "")
            row |= {"views": group["views"].iloc[0]} if "views" in group else {}
            rows.append(row | {"seeds": len(by_seed), "n_held_out": judged})
    return pd.DataFrame(rows)


def interval(
    values: np.ndarray, variance: float, name: str, ends: str | None = None
) -> dict[str, float]:
    """Return {name: mean of one number per seed} and its 95 % interval, under <ends>low and
    <ends>high ("<name>_").

    From two seeds on it is the t-interval; for one, that of the `variance` of the images judged.
    """
    ends = f"{name}_" if ends is None else ends
    mean, low, high = values[0], values[0] - 1.96 * variance**0.5, values[0] + 1.96 * variance**0.5
    if len(values) > 1:
        mean, low, high = (scoring.over_seeds(values)[key] for key in ("mean", "low", "high"))
    return {name: mean, f"{ends}low": low, f"{ends}high": high}


def curve(
    table: pd.DataFrame,
    percents: Sequence[float] = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100),
    resamples: int = 1000,
    rounding: str = "up",
) -> pd.DataFrame:
    """Return accuracies over p with their intervals and the chance level: the table of
    `plots.over_p`.
    """
    out = scores(table, percents, rankings=("own",), resamples=resamples, rounding=rounding)
    return out.assign(chance=1 / table["label"].nunique())


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
    known = known[several].copy()
    known["bayes"] = [bayes_accuracy(rho, classes) for rho in known["rho"]]
    return known


def differences(table: pd.DataFrame, epochs: list[int], rounding: str = "up") -> pd.DataFrame:
    """Return a row per criterion and rho for each paired difference of déjà vu scores over all
    examples, with interval.

    projector - backbone at the end; at the projector the last checkpoint minus the untrained and
    minus the first trained one, the 20 % most confident minus all, and the criterion minus the
    supervised baseline, which is attacked at its projector and by its logits.
    """
    rows, last = [], epochs[-1]
    baseline = table[(table["criterion"] == "supervised") & (table["epoch"] == last)]
    for (criterion, rho), group in table.groupby(["criterion", "rho"], sort=False, dropna=False):
        at = {(layer, epoch): one for (layer, epoch), one in group.groupby(["layer", "epoch"])}
        end = at["projector", last]
        against = {
            "projector - backbone": at.get(("backbone", last)),
            "last - untrained": at.get(("projector", 0)),
            "last - first trained": at.get(("projector", epochs[1] if len(epochs) > 2 else None)),
            "p = 20 % - all": end,
        }
        if criterion != "supervised":
            same = first_rho(baseline, rho).groupby("layer")
            against |= {
                f"- supervised ({layer})": one
                for layer, one in same
                if layer in ("projector", "logits")
            }
        for what, other in against.items():
            if other is not None:
                p = (20, 100) if other is end else 100
                rows.append(
                    {"criterion": criterion, "rho": rho, "what": what}
                    | scoring.difference(end, other, p=p, rounding=rounding)
                )
    return pd.DataFrame(rows)


def criteria(log: pd.DataFrame, probes: pd.DataFrame) -> pd.DataFrame:
    """Return a row per criterion: what a linear probe gains by training, and what the training
    took.

    `log` is `pairs.losses`, `probes` is `references.probes` of the same pairs at all epochs.
    `held_out` accuracy at the end, `untrained` before, `gain` their difference with its 95 %
    interval (over seeds; with one seed, of the images judged); at the end `gap` and `fresh_gap`, of
    the probe that saw neither side; the loss of the first and last epoch, `images_per_second` of
    one encoder (median over epochs) and `minutes` for one encoder.
    """
    rows = []
    for criterion, judged in probes.groupby("criterion", sort=False):
        by_seed = judged.groupby(["seed", "epoch"])["held_out"].mean().unstack("epoch")
        before, after = by_seed.iloc[:, 0], by_seed.iloc[:, -1]
        n, lines = (
            int(judged.groupby("seed")["n_held_out"].first().sum()),
            log[log["criterion"] == criterion],
        )
        loss = lines.groupby("epoch")["loss"].mean()
        variance = sum(share.mean() * (1 - share.mean()) for share in (after, before)) / n
        rows.append(
            {
                "criterion": criterion,
                "held_out": after.mean(),
                "untrained": before.mean(),
                **interval((after - before).to_numpy(), variance, "gain"),
                **judged[judged["epoch"] == judged["epoch"].max()][["gap", "fresh_gap"]].mean(),
                "n": n,
                "seeds": len(by_seed),
                "first_loss": loss.iloc[0],
                "last_loss": loss.iloc[-1],
                "images_per_second": (lines["images"] / lines["seconds"]).median(),
                "minutes": lines["seconds"].sum() / 60 / lines["name"].nunique(),
            }
        )
    return pd.DataFrame(rows)
