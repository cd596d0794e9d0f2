"""Scores seed by seed, with t-intervals over the seeds and Cochran's Q: results/<name>/seeds.csv.

    .venv/bin/python results/seeds.py study

A claim about training needs new trainings, so its unit is the seed. The scores of single seeds are
in mitigation_seeds.csv, for the projector at the end of training of every criterion, and for some
checkpoints and layers of VICReg. Everything else was kept only as a mean over seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import chi2, norm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from dejavu_utils.attack.scoring import over_seeds  # noqa: E402  the path comes first

COLUMNS = ["criterion", "quantity", "mean", "low", "high", "sd", "n", "q", "p", "values"]


def heterogeneity(values: np.ndarray, variance: float) -> tuple[float, float]:
    """Return Cochran's Q and its p-value: do the values differ by more than images explain?

    `values` (seeds,); `variance` is what sampling images adds to one of them. All seeds have as
    many images, so their weights are equal.
    """
    residuals = values - values.mean()
    q = float((residuals**2).sum() / variance)
    return q, float(chi2.sf(q, len(values) - 1))


def image_variance(low: float, high: float, seeds: int) -> float:
    """Return what images add to the variance of one seed, from the 95 % interval of the mean."""
    standard_error = (high - low) / (2 * norm.ppf(0.975))
    return seeds * standard_error**2


def single(name: str, folder: Path = HERE) -> pd.DataFrame:
    """Return the scores of single seeds: criterion, quantity, seed, value; none if not kept.

    "score" is the projector's at the end of training; "- supervised (projector)" its difference
    from the baseline; "noise = 1.0" the change of the score by a setting of 04_mitigation.
    """
    path = folder / name / "mitigation_seeds.csv"
    if not path.exists():
        return pd.DataFrame(columns=["criterion", "quantity", "seed", "value"])
    table = pd.read_csv(path, dtype={"value": str})
    table = table.rename(columns={"knob": "setting"})  # its name in older tables
    key = ["criterion", "seed"]

    end = table[table["setting"] == "default"].set_index(key)["score"]
    baseline = end.xs("supervised") if "supervised" in end.index.levels[0] else None
    parts = [_long(end, "score")]
    if baseline is not None:
        others = end[end.index.get_level_values("criterion") != "supervised"]
        gap = others - baseline.loc[others.index.get_level_values("seed")].to_numpy()
        parts.append(_long(gap, "- supervised (projector)"))

    settings = table[table["setting"] != "default"]
    for (name, value), rows in settings.groupby(["setting", "value"], sort=False):
        scores = rows.set_index(key)["score"]
        change = scores - end.loc[scores.index]
        if change.abs().max() > 0:  # else the value is the default
            parts.append(_long(change, f"{name} = {value}"))

    # Two of these settings are differences that the claims are about.
    found = pd.concat(parts, ignore_index=True)
    first = min(settings.loc[settings["setting"] == "epoch", "value"], key=float, default="")
    for quantity, setting in (
        ("last - first trained", f"epoch = {first}"),
        ("projector - backbone", "layer = backbone"),
    ):
        part = found[found["quantity"] == setting]
        parts.append(part.assign(quantity=quantity, value=-part["value"]))
    return pd.concat(parts, ignore_index=True)


def _long(values: pd.Series, quantity: str) -> pd.DataFrame:
    long = values.rename("value").reset_index()
    return long.assign(quantity=quantity)[["criterion", "quantity", "seed", "value"]]


def summary(name: str, folder: Path = HERE) -> pd.DataFrame:
    """Return a row per criterion and quantity: t-interval over seeds, Q, the values by seed.

    Q needs an interval over images; it is missing where the table has none.
    """
    kept = single(name, folder)
    if kept.empty:
        return pd.DataFrame(columns=COLUMNS)
    images = _image_intervals(name, folder)
    rows = []
    for (criterion, quantity), group in kept.groupby(["criterion", "quantity"], sort=False):
        values = group.sort_values("seed")["value"].to_numpy()
        q = p = np.nan
        if (criterion, quantity) in images.index:
            low, high = images.loc[(criterion, quantity)]
            q, p = heterogeneity(values, image_variance(low, high, len(values)))

        row = {"criterion": criterion, "quantity": quantity, **over_seeds(values)}
        row |= {"q": q, "p": p, "values": " ".join(f"{value:.4f}" for value in values)}
        rows.append(row)
    return pd.DataFrame(rows)[COLUMNS]


def plain(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the score itself: tables of older runs hold a second ranking and the five
    most voted classes, too.
    """
    for column, value in (("ranking", "own"), ("top", 1)):
        if column in table:
            table = table[table[column] == value]
    return table


def _image_intervals(name: str, folder: Path) -> pd.DataFrame:
    """Return low and high over the images of all seeds, by criterion and quantity."""
    scores = plain(pd.read_csv(folder / name / "scores.csv"))
    rho = scores["rho"].iloc[0]
    scores = scores.query("layer == 'projector' and p == 100")
    scores = scores[(scores["epoch"] == scores["epoch"].max()) & (scores["rho"] == rho)]
    scores = scores.assign(quantity="score")

    steps = pd.read_csv(folder / name / "differences.csv")
    steps = steps[steps["rho"] == rho].rename(columns={"what": "quantity"})

    changes = pd.read_csv(folder / name / "mitigation.csv", dtype={"value": str})
    changes = changes.rename(columns={"knob": "setting"})
    changes = changes[(changes["over"] == "images") & (changes["score_change"] != 0)]
    changes = changes.assign(quantity=changes["setting"] + " = " + changes["value"])
    names = {"score_change_low": "low", "score_change_high": "high"}
    changes = changes[["criterion", "quantity", *names]].rename(columns=names)

    both = pd.concat([scores, steps, changes])
    return both.set_index(["criterion", "quantity"])[["low", "high"]]


def write(name: str) -> pd.DataFrame:
    """Write seeds.csv of a folder and return it; none where no single seeds were kept."""
    found = summary(name)
    if len(found):
        found.to_csv(HERE / name / "seeds.csv", index=False)
    return found


if __name__ == "__main__":
    print(write(sys.argv[1]).to_string(index=False))
