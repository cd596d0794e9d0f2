"""The scores of an audit: of members, of held-out images, and members minus held-out.

A reference may be weaker or stronger than the encoder even where nothing is remembered. The score
of held-out images is that offset, so what counts is the difference: members minus held-out.

Where owners are known, bootstraps draw owners, each with all of its pictures, instead of pictures:
those of one owner are not independent (Cameron, Gelbach, Miller 2008, doi 10.1162/rest.90.3.414).
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from dejavu_utils.attack import scoring
from dejavu_utils.audit import evidence

DIFFERENCE = "members minus held-out"
TOP_P = (100, 20)
# Below so many owners no interval is given. In simulations (600 a case; a share of .5 of what is
# left to luck is an owner's) the interval misses 0 in 9 % at 10 owners a set, in 6 % at 20 of equal
# size, and in 8 % at 20 and more of which a few have most of the pictures.
FEWEST_OWNERS = 20


class Sums(NamedTuple):
    """Sums over the images of a set, each (1 + resamples,), the data itself first.

    With t whether the target is right and b the reference's probability of the truth: n, t, b,
    t * b and b * b.
    """

    n: np.ndarray
    right: np.ndarray
    probability: np.ndarray
    product: np.ndarray
    square: np.ndarray


def sums(rows: pd.DataFrame, seed: int, resamples: int) -> Sums:
    """Return the sums of a set, and of its bootstrap resamples. Where `rows` name owners, these are
    drawn, not images; else, from 50 classes on, classes.
    """
    values = ["correct", "probability"]
    by_owner = "owner" in rows
    about = ["label", "id", "owner"] if by_owner else ["label", "id"]
    wide = rows.pivot(index=about, columns="role", values=values).astype(float)
    right = wide["correct", "target"].to_numpy()
    probability = wide["probability", "reference"].to_numpy()
    n = len(right)
    terms = np.stack(
        [np.ones(n), right, probability, right * probability, probability * probability], axis=1
    )  # (n, 5)

    drawn_by = wide.index.get_level_values("owner" if by_owner else "label").to_numpy()
    if by_owner or len(np.unique(drawn_by)) >= scoring.CLUSTER_FROM:
        terms = np.stack([terms[drawn_by == unit].sum(0) for unit in np.unique(drawn_by)])

    units = len(terms)
    random = np.random.default_rng([seed, n])
    drawn = random.multinomial(units, np.full(units, 1 / units), resamples)  # (resamples, units)
    weights = np.concatenate([np.ones((1, units)), drawn])
    return Sums(*(weights @ terms).T)


def members_minus_held_out(
    members: pd.DataFrame, held_out: pd.DataFrame, level: float = 0.95, resamples: int = 2000
) -> dict[str, float]:
    """Return the target's accuracy on members minus that on held-out images, with its bootstrap
    interval.

    0 is expected where the members were not trained on. The difference is adjusted for the
    reference, which reduces its variance (a control variate): on the held-out images a line is
    fitted through "the target is right" over the reference's probability of the truth, and read at
    the members' mean probability. Both sets are resampled, and the line is fitted anew in each
    resample. Keys: score, low, high, target, reference (the accuracy expected without memory), n,
    held_out (their numbers), and `owners` if they are known: those of the set with fewer.
    """
    own = sums(members, 0, resamples)
    other = sums(held_out, 1, resamples)

    # the line of the held-out images, by least squares; flat where the reference says one thing
    spread = other.n * other.square - other.probability * other.probability
    slope = np.divide(
        other.n * other.product - other.right * other.probability,
        spread,
        out=np.zeros_like(spread),
        where=spread > 1e-9 * other.n * other.n,
    )
    lead = own.probability / own.n - other.probability / other.n
    expected = other.right / other.n + slope * lead

    row = scoring.bounds(own.right / own.n - expected, "score", "", level)
    row["target"] = float(own.right[0] / own.n[0])
    row["reference"] = float(expected[0])
    row["n"] = members["id"].nunique()
    row["held_out"] = held_out["id"].nunique()
    return row | owners_of(members, held_out)


def owners_of(*sets: pd.DataFrame) -> dict[str, int]:
    """Return {"owners": how many the set with fewest has}, or {} where none are known."""
    counts = [rows["owner"].nunique() for rows in sets if "owner" in rows]
    return {"owners": min(counts)} if counts else {}


def sure(row: dict) -> dict:
    """Return a row of scores, its interval NaN where it is of too few images, or of too few
    owners.
    """
    few = fewest(row) < scoring.FEWEST or row.get("owners", np.inf) < FEWEST_OWNERS
    return row | {"low": np.nan, "high": np.nan} if few else row


def scores(rows: pd.DataFrame, top_p: tuple[float, ...] = TOP_P) -> pd.DataFrame:
    """Return the scores of `evidence.table`, a row per layer, reading and p %, with intervals.

    `reading`: "members" and "held-out" (target minus reference), and "members minus held-out" (p =
    100). Where a set has too few images or owners for an interval, low and high are NaN.
    """
    found = []
    for layer in rows["layer"].unique():
        sets = {name: evidence.part(rows, layer, which=name) for name in rows["set"].unique()}
        at_layer = [
            {"layer": layer, "reading": name} | sure(row | owners_of(one))
            for name, one in sets.items()
            for row in scoring.curve(one, top_p)
        ]
        if len(sets) == 2:
            row = sure(members_minus_held_out(sets["members"], sets["held-out"]))
            at_layer.append({"layer": layer, "reading": DIFFERENCE, "p": 100} | row)
        found += sorted(at_layer, key=lambda row: -row["p"])
    return pd.DataFrame(found)


def fewest(row: dict) -> int:
    """Return the number of images that limits a row's interval: that of the smaller set."""
    held_out = row.get("held_out", np.nan)
    return int(np.nanmin([row["n"], held_out]))


def interval_text(row: dict, form: str = "+.3f") -> str:
    """Return "+0.062 [+0.041, +0.083]" of a row of `scores`, or "+0.062, too few (n = 33)"."""
    return scoring.interval_text({"p": 100} | row | {"n": fewest(row)}, form=form)


def by_class(rows: pd.DataFrame, classes: tuple[str, ...], resamples: int = 500) -> pd.DataFrame:
    """Return a row per class, the highest score first: n, score with interval, and how many images
    of each kind.
    """
    found = []
    for label, group in rows.groupby("label"):
        split = scoring.four_way(group, resamples=0)
        counts = {name: round(split[name] * split["n"]) for name in scoring.CELLS}
        row = scoring.score(group, resamples=resamples) | owners_of(group)
        found.append({"class": classes[label]} | counts | sure(row))
    columns = ["class", "n", "score", "low", "high", "target", "reference", *scoring.CELLS]
    order = ["score", "n"]
    return pd.DataFrame(found)[columns].sort_values(order, ascending=False, kind="stable")


def by_owner(members: pd.DataFrame, held_out: pd.DataFrame, owners: pd.Series) -> pd.DataFrame:
    """Return a row per owner of members, the most pictures first: owner, n, and members minus
    held-out for that owner's pictures, with its interval from 50 pictures on. That is about this
    one: its pictures are drawn, not owners.

    `owners`: id -> owner, "" for none; pictures without one are in no row.
    """
    owner_of = members["id"].map(owners)
    found = []
    for owner, group in members[owner_of != ""].groupby(owner_of):
        row = members_minus_held_out(group.drop(columns="owner", errors="ignore"), held_out)
        found.append(sure(row) | {"owner": owner})
    columns = ["owner", "n", "score", "low", "high", "target", "reference", "held_out"]
    order = pd.DataFrame(found, columns=columns)
    return order.sort_values(["n", "owner"], ascending=[False, True], ignore_index=True)
