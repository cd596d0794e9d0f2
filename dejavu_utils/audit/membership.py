"""Membership inference: can one statistic of an image tell members from held-out images?

The block that other audit tools report: ROC, AUC, the true-positive rate at low false-positive
rates (Carlini et al., arXiv 2112.03570), and a lower bound of the empirical epsilon (Jagielski et
al., arXiv 2006.07709). Statistics and their sign (larger means member) are fixed in advance.
"""

import math

import numpy as np
import pandas as pd
from scipy.stats import binomtest, bootstrap, mannwhitneyu
from sklearn.metrics import roc_auc_score, roc_curve

from dejavu_utils.audit.evidence import Found, part
from dejavu_utils.audit.subject import Subject

LEVEL = 0.95
RATES = (0.1, 0.01, 0.001)  # false-positive rates
RESAMPLES = 1000
STATISTICS = {
    "deja_vu": "the encoder's votes for the true class minus the reference's probability of it",
    "alignment_gap": "similarity minus that under the reference",
    "similarity": "cosine of the embeddings of crop and whole picture",
    "norm": "length of the whole picture's embedding",
}


def statistics(case: Subject, inferred: Found, rows: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return a row per attacked image, members first: id, member (bool), and the STATISTICS, all at
    the judged layer; and `owner` where owners are known.

    The reference of the alignment gap is the second model, or else the untrained network. Without
    `rows` (of `evidence.table`), as where there are no labels, there is no `deja_vu`.
    """
    layer = case.layers[0]
    other = "untrained" if case.reference is None else "reference"
    parts = []
    for name, images in case.attacked.items():
        columns = {"id": images.ids, "member": name == "members"}
        owners = case.owners(images)
        if owners is not None:
            columns["owner"] = owners
        if rows is not None:
            own = part(rows, layer, which=name)
            wide = own.pivot(index="id", columns="role", values="probability").loc[images.ids]
            columns["deja_vu"] = (wide["target"] - wide["reference"]).to_numpy()
        target = inferred[name, layer, "target"]
        columns["alignment_gap"] = target["alignment"] - inferred[name, layer, other]["alignment"]
        columns["similarity"] = target["alignment"]
        columns["norm"] = target["norm"]
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def summary(found: pd.DataFrame, level: float = LEVEL) -> pd.DataFrame:
    """Return a row per statistic of `statistics` and false-positive rate of RATES.

    `auc`, `auc_low`, `auc_high` (bootstrap); `fpr` that is asked for and `fpr_found`, the largest
    not above it; `tpr` there, with `tpr_low`, `tpr_high` (Clopper-Pearson); `epsilon`, a lower
    bound that holds for all rows together at `level` (Bonferroni); n, held_out. Rates below 1 /
    held_out have threshold above all held-out images, and show little.
    """
    member = found["member"].to_numpy()
    names = [name for name in STATISTICS if name in found]
    tests = len(names) * len(RATES)
    rows = []
    for name in names:
        score = found[name].to_numpy(float)
        area = _area_of(found, name, level)
        about = {"statistic": name, "auc": area["auc"]}
        about |= {"auc_low": area["low"], "auc_high": area["high"]}
        false, true, _ = roc_curve(member, score, drop_intermediate=False)
        for rate in RATES:
            at = np.flatnonzero(false <= rate)[-1]
            hits = round(true[at] * member.sum())
            errors = round(false[at] * (~member).sum())
            counts = (hits, int(member.sum()), errors, int((~member).sum()))
            rows.append(about | {"fpr": rate} | at_threshold(*counts, tests, level))
    return pd.DataFrame(rows)


def at_threshold(
    hits: int, members: int, errors: int, held_out: int, tests: int = 1, level: float = LEVEL
) -> dict[str, float]:
    """Return what one threshold shows: `hits` of the members and `errors` of the held-out images
    lie above it.

    The bound of epsilon is log(lower end of TPR / upper end of FPR), or 0: each end errs with
    (1 - level) / 2 / tests.
    """
    tpr = binomtest(hits, members)
    fpr = binomtest(errors, held_out)
    interval = tpr.proportion_ci(level, method="exact")
    both = 1 - (1 - level) / tests
    surely = tpr.proportion_ci(both, method="exact").low
    at_most = fpr.proportion_ci(both, method="exact").high
    return {
        "fpr_found": errors / held_out,
        "tpr": hits / members,
        "tpr_low": float(interval.low),
        "tpr_high": float(interval.high),
        "epsilon": max(0.0, math.log(surely / at_most)) if surely > 0 else 0.0,
        "n": members,
        "held_out": held_out,
    }


def auc(
    members: np.ndarray,
    held_out: np.ndarray,
    level: float = LEVEL,
    owners: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, float]:
    """Return the area under the ROC curve with its bootstrap interval: auc, low, high. With the
    `owners` of members and held-out images, these are drawn, each with all of its images.
    """
    member = np.repeat([True, False], [len(members), len(held_out)])
    area = roc_auc_score(member, np.concatenate([members, held_out]))
    if owners is not None:
        areas = _areas(members, held_out, *map(_weights, owners))
        low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
        return {"auc": float(area), "low": float(low), "high": float(high)}
    drawn = bootstrap(
        (members, held_out),
        _area,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=100,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = drawn.confidence_interval
    return {"auc": float(area), "low": float(low), "high": float(high)}


def _weights(owners: np.ndarray) -> np.ndarray:
    """Return how often each image is drawn, (RESAMPLES, n), where owners are."""
    names, of = np.unique(owners, return_inverse=True)
    random = np.random.default_rng([0, len(owners), len(names)])
    drawn = random.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    return drawn[:, of]


def _areas(
    members: np.ndarray, held_out: np.ndarray, weights: np.ndarray, others: np.ndarray
) -> np.ndarray:
    """Return the area under the ROC curve (r,) of members and held-out images that are there
    `weights` (r, n) and `others` (r, m) times.
    """
    order = np.argsort(held_out)
    below = np.searchsorted(held_out[order], members, "left")  # (n,)
    up_to = np.searchsorted(held_out[order], members, "right")
    count = np.cumsum(others[:, order], axis=1)
    count = np.pad(count, ((0, 0), (1, 0)))  # (r, 1 + m): of the lowest so many
    beaten = (count[:, below] + count[:, up_to]) / 2  # (r, n): ties count half
    return (weights * beaten).sum(1) / (weights.sum(1) * others.sum(1))


def _area_of(found: pd.DataFrame, name: str, level: float) -> dict[str, float]:
    """Return `auc` of a column of a table with `member`, and perhaps `owner`."""
    member = found["member"].to_numpy()
    score = found[name].to_numpy(float)
    owners = None
    if "owner" in found:
        owner = found["owner"].to_numpy()
        owners = (owner[member], owner[~member])
    return auc(score[member], score[~member], level, owners)


def over_chance(found: pd.DataFrame, name: str, level: float = LEVEL) -> dict[str, float]:
    """Return AUC - 0.5 of the column `name` of a table with `member` (bool), with its bootstrap
    interval: score, low, high, n, held_out. Where it has a column `owner`, owners are drawn, and
    `owners` is how many the set with fewer has.
    """
    area = _area_of(found, name, level)
    members = int(found["member"].sum())
    row = {
        "score": area["auc"] - 0.5,
        "low": area["low"] - 0.5,
        "high": area["high"] - 0.5,
        "n": members,
        "held_out": len(found) - members,
    }
    if "owner" in found:
        row["owners"] = int(found.groupby("member")["owner"].nunique().min())
    return row


def _area(members: np.ndarray, held_out: np.ndarray, axis: int = -1) -> np.ndarray:
    pairs = members.shape[axis] * held_out.shape[axis]
    found = mannwhitneyu(members, held_out, axis=axis, method="asymptotic")
    return found.statistic / pairs


def as_csv(found: pd.DataFrame) -> pd.DataFrame:
    """Return id, score, member (1 or 0) of the déjà vu statistic, or without labels of the
    alignment gap: what other audit tools read. The id begins with the set: both may have a 1.png.
    """
    score = found["deja_vu"] if "deja_vu" in found else found["alignment_gap"]
    which = found["member"].map({True: "members/", False: "held-out/"})
    columns = {"id": which + found["id"], "score": score, "member": found["member"].astype(int)}
    return pd.DataFrame(columns)
