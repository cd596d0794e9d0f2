"""The numbers of an attack: déjà vu score with its interval, four-way split, paired differences.

All take a table of guesses as `inference` makes it. A column `seed` may pool several runs.
Direction and seed together are a *stratum*: its images are ranked and resampled by themselves, and
strata weigh the same, so a score is the mean over directions (paper section 4, symmetrised).
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest, t

CELLS = ("memorized", "correlated", "misrepresented", "unassociated")
CLUSTER_FROM = 50  # from so many classes on, the bootstrap draws classes rather than images
CHUNK = 1 << 21  # resampled weights held at a time
ROUNDINGS = ("up", "down")
# Below so many images no interval is given. In simulations (4,000 tables a case; 5 to 50 % of the
# images tell target and reference apart, in ten cases equally often or not) the 95 % bootstrap
# misses the true score in up to 45 % of tables of 16 images, 19 % at 34, 13 % at 40, and from 50 on
# in 4 to 9 %. Two untrained encoders are a case of 5 %, for any number.
FEWEST = 50


class Stratum(NamedTuple):
    """The images of one direction and seed, sorted by id. Row 0 is the target, row 1 the
    reference.
    """

    hits: np.ndarray  # (2, n) 0 or 1: right or not
    confidence: np.ndarray  # (2, n)
    cluster: np.ndarray  # (n,) int: what the bootstrap draws, an image, its owner or its class
    stream: int  # of its random numbers


def stratify(table: pd.DataFrame) -> list[Stratum]:
    """Return the strata of a table, target and reference joined by id; ValueError if they do not
    pair up.
    """
    keys = ["direction", "seed"] if "seed" in table else ["direction"]
    _check(table, keys)

    by_owner = "owner" in table
    about = ["id", "label", "owner"] if by_owner else ["id", "label"]
    rows = table.set_index([*keys, *about, "role"])[["correct", "confidence"]]
    wide = rows.unstack("role")  # a row per image, sorted by id
    if len(table) != 2 * len(wide):
        raise ValueError(
            f"attack: {(table['role'] == 'target').sum()} target and "
            f"{(table['role'] == 'reference').sum()} reference rows of {len(wide)} images, ids "
            "not the same; expected every image under both models."
        )

    by_class = table["label"].nunique() >= CLUSTER_FROM
    strata = []

    for name, part in wide.groupby(level=keys):
        hits = part["correct"][["target", "reference"]].to_numpy(float).T  # (2, n)
        confidence = part["confidence"][["target", "reference"]].to_numpy(float).T

        cluster = np.arange(len(part))
        if by_owner or by_class:
            drawn = part.index.get_level_values("owner" if by_owner else "label")
            cluster = np.unique(drawn, return_inverse=True)[1]

        # The stream depends on the images and the seed, not on the name "a" or "b": swapping names
        # changes nothing.
        ids = part.index.get_level_values("id")
        text = "\n".join(map(str, [*ids, *name[1:]]))
        digest = hashlib.sha256(text.encode()).digest()
        stream = int.from_bytes(digest[:8], "little")

        strata.append(Stratum(hits, confidence, cluster, stream))

    return strata


def _check(table: pd.DataFrame, keys: list[str]) -> None:
    """Raise ValueError unless a table has one row per image, role and stratum."""
    repeated = table.duplicated([*keys, "role", "id"]).sum()
    if repeated or not len(table):
        raise ValueError(
            f"attack: {repeated} of {len(table)} rows repeat an image; expected one row per "
            "image, role, direction and seed. Select one criterion, epoch, layer and crop first."
        )

    if not np.isfinite(table["confidence"].to_numpy(float)).all():
        raise ValueError("attack: a confidence is NaN or infinite; expected nats.")


def bootstrap_weights(stratum: Stratum, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each image is drawn, (r, n) at a time: first the data itself (all ones), then
    the resamples.
    """
    n = len(stratum.cluster)
    units = int(stratum.cluster.max()) + 1
    random = np.random.default_rng([seed, stratum.stream])
    yield np.ones((1, n), dtype=np.int64)

    step = max(1, CHUNK // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = random.integers(0, units, (rows, units))
        drawn += units * np.arange(rows)[:, None]  # each resample counts in a range of its own
        counts = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)
        yield counts if units == n else counts[:, stratum.cluster]


def top_count(n: int | np.ndarray, p: float, rounding: str = "up") -> np.float64 | np.ndarray:
    """Return how many of n examples are the top p %: p n / 100, rounded up, or down as in the
    paper's code; at least 1. ValueError unless 0 < p <= 100.
    """
    if not 0 < p <= 100 or rounding not in ROUNDINGS:
        raise ValueError(
            f"attack: p = {p}, rounding = {rounding!r}; expected a percentage: 0 < p <= 100, and "
            f"one of {ROUNDINGS}."
        )
    exact = np.asarray(n) * p / 100
    whole = np.ceil(exact - 1e-9) if rounding == "up" else np.floor(exact + 1e-9)
    return np.maximum(1, whole)


def _ranked(
    hits: np.ndarray,
    confidence: np.ndarray,
    weights: np.ndarray,
    shares: Sequence[float],
    rounding: str = "up",
) -> np.ndarray:
    """Return the accuracy (len(shares), r) on the top p % of every weighted sample (r, n),
    re-ranked in each.

    Images of equal confidence form one group; the group at the boundary counts in part, at its own
    mean accuracy.
    """
    order = np.argsort(-confidence, kind="stable")
    new_group = np.diff(confidence[order], prepend=np.inf) != 0
    starts = np.flatnonzero(new_group)

    ordered = weights[:, order]
    sizes = np.add.reduceat(ordered, starts, axis=1)  # (r, groups)
    right = np.add.reduceat(ordered * hits[order], starts, axis=1)
    mean = right / np.maximum(sizes, 1)
    before = np.cumsum(sizes, axis=1) - sizes

    accuracies = []
    for p in shares:
        wanted = top_count(weights.sum(1), p, rounding)
        taken = np.clip(wanted[:, None] - before, 0, sizes)
        found = right if p == 100 else taken * mean  # whole groups: counts without rounding
        accuracies.append(found.sum(1) / wanted)

    return np.stack(accuracies)


def _accuracies(
    strata: list[Stratum],
    shares: Sequence[float],
    resamples: int,
    seed: int,
    rounding: str = "up",
) -> np.ndarray:
    """Return the mean over strata of target and reference accuracy (shares, 2, 1 + resamples);
    column 0 is the data.
    """
    total = 0
    for stratum in strata:
        chunks = []
        for weights in bootstrap_weights(stratum, resamples, seed):
            roles = [
                _ranked(hits, confidence, weights, shares, rounding)
                for hits, confidence in zip(stratum.hits, stratum.confidence, strict=True)
            ]
            chunks.append(np.stack(roles, axis=1))  # (shares, 2, r)
        total = total + np.concatenate(chunks, axis=2)

    return total / len(strata)


def bounds(
    values: np.ndarray,
    name: str,
    ends: str | None = None,
    level: float = 0.95,
    n: float = math.inf,
) -> dict[str, float]:
    """Return {name: the value of the data itself, values[0]} and the percentile interval of the
    resamples, values[1:].

    Its keys are <ends>low and <ends>high, "<name>_" if `ends` is not given. They are NaN without
    resamples, and where the value is over `n` < FEWEST images: too few for an interval.
    """
    ends = f"{name}_" if ends is None else ends
    low = high = math.nan
    if len(values) > 1 and n >= FEWEST:
        low, high = np.quantile(values[1:], [(1 - level) / 2, (1 + level) / 2])
    return {name: float(values[0]), f"{ends}low": float(low), f"{ends}high": float(high)}


def interval_text(row: Mapping, value: str = "score", ends: str = "", form: str = "+.3f") -> str:
    """Return "+0.062 [+0.041, +0.083]" of a row with `value`, <ends>low, <ends>high and n, or
    "+0.062, too few (n = 33)" where there is no interval. Of the top p % that are scored n counts.
    """
    text = f"{row[value]:{form}}"
    low = row[f"{ends}low"]
    high = row[f"{ends}high"]
    if math.isfinite(low) and math.isfinite(high):
        return f"{text} [{low:{form}}, {high:{form}}]"

    n = int(row.get("scored", top_count(row["n"], row.get("p", 100))))
    return f"{text}, too few (n = {n})" if n < FEWEST else f"{text}, no interval"


def scored(strata: list[Stratum], p: float, rounding: str = "up") -> int:
    """Return how many images the top p % of all strata are."""
    return sum(int(top_count(len(stratum.cluster), p, rounding)) for stratum in strata)


def accuracies(table: pd.DataFrame, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Return the accuracy of target and reference over all examples (2, 1 + resamples); column 0 is
    the data itself.
    """
    return _accuracies(stratify(table), [100], resamples, seed)[0]


def matched(one: pd.DataFrame, two: pd.DataFrame) -> tuple[list[Stratum], list[Stratum]]:
    """Return the strata of two tables of the same images, which are resampled alike; ValueError if
    they are not.
    """
    left = stratify(one)
    right = stratify(two)
    if [stratum.stream for stratum in left] != [stratum.stream for stratum in right]:
        raise ValueError(
            "attack: the tables do not judge the same images and seeds. Attack the same sets."
        )
    return left, right


def curve(
    table: pd.DataFrame,
    shares: Iterable[float],
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    rounding: str = "up",
) -> list[dict]:
    """Return one `score` row per percentage in `shares`, all from the same resamples (list of
    dicts).
    """
    shares = list(shares)
    strata = stratify(table)
    accuracies = _accuracies(strata, shares, resamples, seed, rounding)  # (shares, 2, 1 + r)

    rows = []
    for p, (target, reference) in zip(shares, accuracies, strict=True):
        row = {"p": p, "n": len(table) // 2, "level": level, "resamples": resamples}

        n = scored(strata, p, rounding)
        row |= bounds(target - reference, "score", "", level, n)
        row |= bounds(target, "target", level=level, n=n)
        row |= bounds(reference, "reference", level=level, n=n)
        rows.append(row)

    return rows


def score(
    table: pd.DataFrame,
    p: float = 100,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    rounding: str = "up",
) -> dict:
    """Return the déjà vu score at p %: target accuracy - reference accuracy, with
    percentile-bootstrap intervals.

    Keys: score, low, high; target, target_low, target_high; reference, reference_low,
    reference_high; n (images), p, level, resamples. Each model is judged on its own most confident
    examples, as in the paper. The bootstrap is stratified and ranks anew in every resample; it
    draws owners where the table has a column `owner`, else classes from 50 on, else images.
    `rounding`: see `top_count`.
    ValueError if the table is not one row per image, role, direction and seed.
    """
    return curve(table, [p], resamples, seed, level, rounding)[0]


def four_way(
    table: pd.DataFrame, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> dict:
    """Return the shares memorized, correlated, misrepresented, unassociated, each with _low and
    _high, and their ratio.

    memorized: only the target is right; correlated: both; misrepresented: only the reference;
    unassociated: neither. `ratio` = memorized / misrepresented by counts (`memorized_count`,
    `misrepresented_count`), interval: exact binomial given their sum, or the bootstrap's where
    classes are drawn. memorized - misrepresented = score at p = 100, exactly.
    """
    strata = stratify(table)
    shares = 0  # mean over strata (4, 1 + resamples)
    counts = 0  # sum over strata

    for stratum in strata:
        target, reference = stratum.hits
        cells = [
            target > reference,
            target * reference == 1,
            target < reference,
            target + reference == 0,
        ]
        cells = np.stack(cells, axis=1).astype(float)  # (n, 4)

        chunks = [weights @ cells for weights in bootstrap_weights(stratum, resamples, seed)]
        found = np.concatenate(chunks).T  # (4, 1 + resamples)
        counts = counts + found
        shares = shares + found / found.sum(0) / len(strata)

    n = len(table) // 2
    row = {"n": n, "level": level, "resamples": resamples}
    for name, values in zip(CELLS, shares, strict=True):
        row |= bounds(values, name, level=level, n=n)

    memorized, _, misrepresented, _ = counts
    row["memorized_count"] = int(memorized[0])
    row["misrepresented_count"] = int(misrepresented[0])

    ratio, low, high = odds(row["memorized_count"], row["misrepresented_count"], level)
    row |= {"ratio": ratio, "ratio_low": low, "ratio_high": high}
    if table["label"].nunique() >= CLUSTER_FROM:
        row |= bounds((memorized + 0.5) / (misrepresented + 0.5), "ratio", level=level, n=n)
        row["ratio"] = ratio

    return row


def odds(wins: int, losses: int, level: float = 0.95) -> tuple[float, float, float]:
    """Return wins / losses and its exact interval, from the Clopper-Pearson interval of wins among
    wins + losses.

    Infinite where losses = 0; (NaN, 0, infinity) where both are 0.
    """
    if wins + losses == 0:
        return math.nan, 0.0, math.inf

    share = binomtest(wins, wins + losses).proportion_ci(level, method="exact")
    low = _odds_of(float(share.low))
    high = _odds_of(float(share.high))
    return (wins / losses if losses else math.inf), low, high


def _odds_of(share: float) -> float:
    """Return share / (1 - share), infinity of 1."""
    return math.inf if share >= 1 else share / (1 - share)


def difference(
    one: pd.DataFrame,
    two: pd.DataFrame,
    p: float | tuple[float, float] = 100,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    rounding: str = "up",
) -> dict:
    """Return score(one) - score(two) with its interval, both resampled with the same images (paired
    by id).

    For example projector - backbone, or last epoch - first. `p` may be two percentages, one for
    each table: `difference(table, table, p=(20, 100))`. Keys: difference, low, high, one, two, n,
    and `scored`, how many images the smaller p is of. ValueError if the ids differ.
    """
    p_one, p_two = p if isinstance(p, tuple) else (p, p)
    strata, others = matched(one, two)

    target, reference = _accuracies(strata, [p_one], resamples, seed, rounding)[0]
    left = target - reference  # (1 + resamples,)
    target, reference = _accuracies(others, [p_two], resamples, seed, rounding)[0]
    right = target - reference

    n = scored(strata, min(p_one, p_two), rounding)
    row = bounds(left - right, "difference", "", level, n)
    row |= {"one": float(left[0]), "two": float(right[0]), "n": len(one) // 2, "scored": n}
    return row


def over_seeds(values: Sequence[float] | np.ndarray, level: float = 0.95) -> dict:
    """Return mean, low, high (t-interval over seeds), sd and n of one number per seed; NaN bounds
    for one seed.
    """
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(
            f"attack.over_seeds: {numbers.tolist()}; expected at least one finite number, one per "
            "seed."
        )

    n = len(numbers)
    mean = float(numbers.mean())
    sd = float(numbers.std(ddof=1)) if n > 1 else math.nan
    quantile = float(t.ppf((1 + level) / 2, max(1, n - 1)))
    half = quantile * sd / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "sd": sd, "n": n}
