"""How often 95 % intervals hold the truth about new trainings, by simulation: results/coverage.csv.

    .venv/bin/python results/coverage.py        # about ten minutes on one core

Each simulated seed trains two criteria and attacks 300 images in each direction, as the study does.
What a criterion adds to the reference varies from seed to seed as much as measured. Three kinds of
interval are compared: Student's t over the seeds' scores, a percentile bootstrap of these few
scores, and the bootstrap of the images of all seeds pooled (`scoring.curve`, `scoring.difference`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import norm, t

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from dejavu_utils.attack import scoring  # noqa: E402  the path comes first
from results import seeds as measured_seeds  # noqa: E402

QUANTITIES = ("score", "score at p = 20 %", "difference of two criteria")
TOP = 0.2  # share of the most confident images


@dataclass(frozen=True)
class World:
    """What is true of the trainings that are simulated."""

    score: float  # mean over trainings, first criterion
    other_score: float  # the same, second criterion
    spread: float  # standard deviation of the score between seeds, without the images' part
    correlated: float  # share of images that both models name
    misrepresented: float  # share that only the reference names
    agreement: float  # share of images on which the two criteria answer alike
    target_shift: float  # how much more confident the target is where it is right
    reference_shift: float  # the same for the reference
    images: int = 300  # attacked images a direction


@dataclass(frozen=True)
class Guesses:
    """What the models say: (repeats, seeds, criteria, directions, roles, images)."""

    hits: np.ndarray
    confidence: np.ndarray


def measured(name: str = "study", folder: Path = HERE) -> World:
    """Return the world of results/<name>: VICReg and SimCLR at the end of training."""
    by_seed = measured_seeds.summary(name, folder)
    scores = by_seed[by_seed["quantity"] == "score"].set_index("criterion")

    # Cochran's Q gives the images' part of the variance: Q = (seeds - 1) * sd^2 / variance.
    total = scores["sd"] ** 2
    from_images = (scores["n"] - 1) * total / scores["q"]
    between = total.mean() - from_images.mean()

    shares = pd.read_csv(folder / name / "shares.csv")
    shares = shares[(shares["criterion"] == "vicreg") & (shares["rho"] == shares["rho"].iloc[0])]
    end = shares[shares["epoch"] == shares["epoch"].max()].iloc[0]

    table = measured_seeds.plain(pd.read_csv(folder / name / "scores.csv"))
    table = table.query("layer == 'projector'")
    table = table[(table["criterion"] == "vicreg") & (table["rho"] == table["rho"].iloc[0])]
    table = table[table["epoch"] == table["epoch"].max()].set_index("p")

    agreement = pd.read_csv(folder / name / "agreement.csv")
    again = agreement.query(
        "criterion == 'vicreg' and reference == 'start 1' and what == 'memorized'"
    )

    return World(
        score=float(scores.loc["vicreg", "mean"]),
        other_score=float(scores.loc["simclr", "mean"]),
        spread=float(np.sqrt(max(between, 0.0))),
        correlated=float(end["correlated"]),
        misrepresented=float(end["misrepresented"]),
        agreement=float(again["kappa" if "kappa" in again else "correlation"].iloc[0]),
        target_shift=confidence_shift(table.loc[100, "target"], table.loc[20, "target"]),
        reference_shift=confidence_shift(table.loc[100, "reference"], table.loc[20, "reference"]),
    )


def confidence_shift(accuracy: float, top_accuracy: float) -> float:
    """Return by how many standard deviations right guesses must be more confident, so that the top
    20 % are right at `top_accuracy`.
    """

    def top_share(threshold: float, shift: float) -> float:
        right = accuracy * norm.sf(threshold - shift)
        wrong = (1 - accuracy) * norm.sf(threshold)
        return right + wrong - TOP

    def excess(shift: float) -> float:
        threshold = brentq(top_share, -10, 10, args=(shift,))
        return accuracy * norm.sf(threshold - shift) / TOP - top_accuracy

    return brentq(excess, -3, 5)


def simulate(world: World, repeats: int, seeds: int, random: np.random.Generator) -> Guesses:
    """Return the guesses of `repeats` studies of so many seeds."""
    shape = (repeats, seeds, 2, 2, world.images)  # repeats, seeds, criteria, directions, images

    # One training draws one score; both of its directions share it.
    means = np.array([world.score, world.other_score])
    scores = random.normal(means, world.spread, (repeats, seeds, 2))
    memorized = np.maximum(scores + world.misrepresented, 0)[..., None, None]

    # A uniform number an image puts it into one of the four cells.
    place = random.random(shape)
    alike = random.random((repeats, seeds, 2, world.images)) < world.agreement
    place[:, :, 1] = np.where(alike, place[:, :, 0], place[:, :, 1])

    target = place < memorized + world.correlated
    known = place < memorized + world.correlated + world.misrepresented
    reference = (place >= memorized) & known
    hits = np.stack([target, reference], axis=-2)  # (repeats, seeds, 2, 2, roles, images)

    shifts = np.array([world.target_shift, world.reference_shift])[:, None]
    confidence = random.standard_normal(hits.shape) + shifts * hits
    return Guesses(hits, confidence)


def by_seed(guesses: Guesses) -> dict[str, np.ndarray]:
    """Return each quantity seed by seed: (repeats, seeds)."""
    accuracy = guesses.hits.mean(-1)  # (repeats, seeds, criteria, directions, roles)
    score = (accuracy[..., 0] - accuracy[..., 1]).mean(-1)  # (repeats, seeds, criteria)

    images = guesses.hits.shape[-1]
    count = int(np.ceil(images * TOP))
    first, confidence = guesses.hits[:, :, 0], guesses.confidence[:, :, 0]
    top = np.argpartition(-confidence, count - 1, axis=-1)[..., :count]
    top_accuracy = np.take_along_axis(first, top, -1).mean(
        -1
    )  # (repeats, seeds, directions, roles)
    top_score = (top_accuracy[..., 0] - top_accuracy[..., 1]).mean(-1)

    return {
        "score": score[..., 0],
        "score at p = 20 %": top_score,
        "difference of two criteria": score[..., 0] - score[..., 1],
    }


def truths(world: World, random: np.random.Generator) -> dict[str, float]:
    """Return each quantity's mean over very many trainings."""
    parts = [by_seed(simulate(world, 1000, 1, random)) for _ in range(20)]
    return {name: float(np.mean([part[name] for part in parts])) for name in QUANTITIES}


def t_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the t-interval over seeds for each repeat; `values` (repeats, seeds)."""
    seeds = values.shape[1]
    standard_error = values.std(axis=1, ddof=1) / np.sqrt(seeds)
    half = t.ppf(0.975, seeds - 1) * standard_error
    mean = values.mean(axis=1)
    return mean - half, mean + half


def seed_bootstrap(
    values: np.ndarray, random: np.random.Generator, resamples: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the percentile bootstrap over the seeds of each repeat."""
    seeds = values.shape[1]
    drawn = random.integers(0, seeds, (resamples, seeds))
    means = np.stack([values[:, row].mean(axis=1) for row in drawn])  # (resamples, repeats)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


def table(guesses: Guesses, repeat: int, criterion: int) -> pd.DataFrame:
    """Return one simulated study as the table that `scoring.curve` takes."""
    hits = guesses.hits[repeat, :, criterion]  # (seeds, directions, roles, images)
    seeds, directions, roles, images = np.indices(hits.shape)
    frame = pd.DataFrame(
        {
            "id": images.ravel(),
            "seed": seeds.ravel(),
            "direction": np.array(["a", "b"])[directions.ravel()],
            "role": np.array(["target", "reference"])[roles.ravel()],
            "correct": hits.ravel(),
            "confidence": guesses.confidence[repeat, :, criterion].ravel(),
        }
    )
    frame["id"] = frame["seed"].astype(str) + frame["direction"] + frame["id"].astype(str)
    frame["label"] = 0
    return frame


def image_bootstrap(guesses: Guesses, resamples: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the ends of the bootstrap over the images of all seeds, by quantity."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in QUANTITIES}
    for repeat in range(len(guesses.hits)):
        one = table(guesses, repeat, 0)
        two = table(guesses, repeat, 1)
        every, top = scoring.curve(one, [100, 100 * TOP], resamples=resamples)
        change = scoring.difference(one, two, resamples=resamples)
        for name, row in zip(QUANTITIES, (every, top, change), strict=True):
            found[name].append((row["low"], row["high"]))
    return {name: tuple(np.array(ends).T) for name, ends in found.items()}


def seed_level(
    world: World, seeds: int, repeats: int, truth: dict[str, float], random: np.random.Generator
) -> list[dict]:
    """Return the coverage of the two intervals over seeds, a row each and quantity."""
    parts = [by_seed(simulate(world, 200, seeds, random)) for _ in range(repeats // 200)]
    rows = []
    for name in QUANTITIES:
        values = np.concatenate([part[name] for part in parts])
        rows.append(_row("t over seeds", name, seeds, t_interval(values), truth[name]))
        ends = seed_bootstrap(values, random)
        rows.append(_row("bootstrap over seeds", name, seeds, ends, truth[name]))
    return rows


def image_level(
    world: World,
    seeds: int,
    repeats: int,
    truth: dict[str, float],
    random: np.random.Generator,
    resamples: int = 300,
) -> list[dict]:
    """Return the coverage of the interval over images, a row a quantity."""
    intervals = image_bootstrap(simulate(world, repeats, seeds, random), resamples)
    return [
        _row("bootstrap over images", name, seeds, intervals[name], truth[name])
        for name in QUANTITIES
    ]


def _row(kind: str, quantity: str, seeds: int, ends, truth: float) -> dict:
    low, high = ends
    inside = (low <= truth) & (truth <= high)
    coverage = float(inside.mean())
    return {
        "interval": kind,
        "quantity": quantity,
        "seeds": seeds,
        "coverage": coverage,
        "standard_error": float(np.sqrt(coverage * (1 - coverage) / len(inside))),
        "mean_width": float((high - low).mean()),
        "repeats": len(inside),
    }


def run(world: World, repeats: int = 4000, image_repeats: int = 200) -> pd.DataFrame:
    """Return the whole table; the same seed gives the same table."""
    random = np.random.default_rng(16)
    truth = truths(world, random)
    rows = []
    for seeds in (3, 5, 8, 15):
        rows += seed_level(world, seeds, repeats, truth, random)
    for seeds in (3, 5, 8):
        rows += image_level(world, seeds, image_repeats, truth, random)

    # The same images-only interval where seeds do not differ: it is right about fixed encoders.
    still = replace(world, spread=0.0)
    rows_still = image_level(still, 3, image_repeats, truths(still, random), random)
    rows += [row | {"interval": "bootstrap over images, seeds alike"} for row in rows_still]

    found = pd.DataFrame(rows)
    found["spread"] = np.where(found["interval"].str.endswith("alike"), 0.0, world.spread)
    return found


if __name__ == "__main__":
    result = run(measured())
    result.to_csv(HERE / "coverage.csv", index=False)
    print(result.to_string(index=False))
