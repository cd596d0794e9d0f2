"""Do references agree? The score against each of them, and whether they call the same images
memorized.

Tables here are those of the attack with a column `reference`: "two-model" (the paper's), "start 1"
(two more encoders on the same sets), "resnet" and "naive_bayes" (one_model), "many-model";
`attacked` is "attacked", or "control" for images of neither set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from dejavu_utils.attack import many_model, one_model, references, scoring
from dejavu_utils.attack.scoring import bounds
from dejavu_utils.data import scenes
from dejavu_utils.models.pairs import Pair

if TYPE_CHECKING:
    from dejavu_utils.notebook import Progress

TWO, MANY = "two-model", "many-model"


def attacks(
    pairs: list[Pair],
    epoch: int,
    k: int,
    restarted: Sequence[tuple[int, Pair]] = (),
    halves: Sequence[Pair] = (),
    device: str = "cpu",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Return the attack at the projector of every pair against every reference, one table.

    `restarted`: (start, pair) of `many_model.again`, trained; `halves`: of `many_model.halves` of
    the first pair.
    """
    sets = ("attacked", "control") if len(pairs[0].parts["control"]) else ("attacked",)
    work = [
        (references.at_layer, pair, name, {})
        for name, pair in [(TWO, pair) for pair in pairs]
        + [(f"start {start}", pair) for start, pair in restarted]
    ]
    work += [
        (one_model.table, pair, kind, {"kind": kind}) for kind in one_model.KINDS for pair in pairs
    ]
    tables = []
    for i, (make, pair, name, more) in enumerate(work, 1):
        found = pd.concat(
            [make(pair, epoch, k, attacked=which, device=device, **more) for which in sets]
        )
        tables.append(found.assign(reference=name))
        if progress:
            progress.update(i)
    if halves:
        tables.append(
            many_model.table(pairs[0], halves, epoch, k, device=device).assign(reference=MANY)
        )
    return pd.concat(
        [one.astype(dict.fromkeys(many_model.SAID, float)) for one in tables], ignore_index=True
    )


def scores(table: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return a row per criterion and reference: the déjà vu score against it over all examples.

    `score`, `target`, `reference_accuracy`: as measured (of one-model tests the *plain* score).
    `minus_two_model`: that score minus the two-model score; both are resampled with the same
    images, so its interval is the paired one. `offset`: the score of the control images, which is
    there without any memory (absent without such images); of two encoders, which are alike, it is
    noise around 0. `member_difference`, of one-model tests: score minus offset, the member -
    non-member difference. In it the classifier nearly cancels: it says what one encoder does on its
    own images and on others, and little of what a crop reveals without memory.

    Intervals: low and high of the score, else `_low` and `_high`. The reference "bayes", on scenes
    alone, is the known accuracy from the background, which no model has to reach.
    """
    rows = []
    for (criterion, name), part in table.groupby(["criterion", "reference"], sort=False):
        own, control = _sets(part)
        row = {
            "criterion": criterion,
            "reference": name,
            "n": len(own) // 2,
            "seeds": own["seed"].nunique(),
        }
        right, rho = scoring.accuracies(own, resamples, seed), own["rho"].iloc[0]
        score = np.subtract(*right)  # (1 + resamples,): the data itself, then the resamples
        found = row | _numbers(*right, row["n"])

        if len(control):
            offset = np.subtract(*scoring.accuracies(control, resamples, seed))
            fewer = min(row["n"], len(control) // 2)
            found |= bounds(offset, "offset", n=len(control) // 2)
            if name in one_model.KINDS:
                found |= bounds(score - offset, "member_difference", n=fewer)
        if name != TWO:
            two = _sets(table[(table["criterion"] == criterion) & (table["reference"] == TWO)])[0]
            two = scoring.accuracies(two[two["seed"].isin(own["seed"])], resamples, seed)
            found |= bounds(score - np.subtract(*two), "minus_two_model", n=row["n"])
        rows.append(found)

        if name == TWO and np.isfinite(rho):
            known = np.full_like(right[0], scenes.bayes_accuracy(rho, own["label"].nunique()))
            rows.append(row | {"reference": "bayes"} | _numbers(right[0], known, row["n"]))
    return _with(pd.DataFrame(rows), "minus_two_model", "offset", "member_difference")


def _with(table: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Return the table with columns for these values and their intervals, empty where nothing could
    measure them.
    """
    wanted = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    return table.reindex(columns=[*table, *(name for name in wanted if name not in table)])


def _numbers(target: np.ndarray, reference: np.ndarray, n: int) -> dict[str, float]:
    """Return score with low and high, target and reference accuracy, of accuracies (1 +
    resamples,).
    """
    return bounds(target - reference, "score", "", n=n) | {
        "target": target[0],
        "reference_accuracy": reference[0],
    }


def _sets(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the rows of attacked and of control images."""
    return [table[table["attacked"] == which] for which in ("attacked", "control")]


def labels(table: pd.DataFrame, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Return how far every other reference agrees with the two-model test, image by image, seeds
    pooled.

    A row per criterion, reference and `what`: "memorized" (only the target is right; the tests
    share the target, unless it is another start's), or "reference" (the reference is right).
    `kappa` (Cohen's), `correlation` and `odds` (of the label where the other test gives it, over
    the odds where it does not; halves added), with intervals; shares `one` and `two`, n. Some
    images are easy for every model, so labels agree without any memory: `control_odds` says how
    much, and `net` is odds over control_odds. ValueError where the tests judge different images.
    """
    rows = []
    for (criterion, name), part in table.groupby(["criterion", "reference"], sort=False):
        if name in (TWO, MANY):
            continue
        first = table[(table["criterion"] == criterion) & (table["reference"] == TWO)]
        own, control = (
            _cells(*sides, resamples, seed) for sides in zip(_sets(first), _sets(part), strict=True)
        )
        for what, cells in own.items():
            row = {
                "criterion": criterion,
                "reference": name,
                "what": what,
                "seeds": part["seed"].nunique(),
            }
            rows.append(row | _agreement(cells))
            if control:
                there = _odds(control[what])
                n = int(min(cells[:, 0].sum(), control[what][:, 0].sum()))
                rows[-1] |= bounds(there, "control_odds", n=n)
                rows[-1] |= bounds(_odds(cells) / there, "net", n=n)
    return _with(pd.DataFrame(rows), "control_odds", "net")


def _cells(
    one: pd.DataFrame, two: pd.DataFrame, resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Return {what: (4, 1 + resamples)}: how many images have a label in both, one, two and
    neither; {} of none.
    """
    if not len(one) and not len(two):
        return {}
    counts = {"memorized": 0, "reference": 0}
    for pair in zip(*scoring.matched(one, two), strict=True):
        both = {
            "memorized": [each.hits[0] > each.hits[1] for each in pair],
            "reference": [each.hits[1] > 0 for each in pair],
        }
        drawn = np.concatenate(list(scoring.bootstrap_weights(pair[0], resamples, seed)))
        for what, (u, v) in both.items():
            counts[what] = (
                counts[what]
                + (drawn @ np.stack([u & v, u & ~v, ~u & v, ~u & ~v], 1).astype(float)).T
            )
    return counts


def _agreement(cells: np.ndarray) -> dict[str, float]:
    """Return kappa, correlation and odds of counts (4, 1 + resamples), with intervals; the label's
    shares and n.
    """
    total = cells.sum(0)
    both, one, two, neither = cells / total
    chance = (both + one) * (both + two) + (two + neither) * (one + neither)
    with np.errstate(invalid="ignore"):  # 0 / 0 where no image, or every one, has a label
        kappa = (both + neither - chance) / (1 - chance)
        spread = np.sqrt((both + one) * (both + two) * (two + neither) * (one + neither))
        correlation = (both * neither - one * two) / spread
    n = int(total[0])
    return {
        **bounds(kappa, "kappa", n=n),
        **bounds(correlation, "correlation", n=n),
        **bounds(_odds(cells), "odds", n=n),
        "one": (both + one)[0],
        "two": (both + two)[0],
        "n": n,
    }


def _odds(cells: np.ndarray) -> np.ndarray:
    both, one, two, neither = cells + 0.5
    return both * neither / (one * two)
