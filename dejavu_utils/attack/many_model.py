"""The many-model test: encoders on random halves of all attacked images, or trained again from
another start.

Every image is inside one half and outside the other, so with m encoders each is judged by m / 2
that saw it and m / 2 that did not (Feldman and Zhang, arXiv 2008.03703, for a classifier). From m =
LEAST on this says something about all images together, from m = SINGLE on about a single one:
before that its standard error is a third.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd

from dejavu_utils import store
from dejavu_utils.attack import one_model, references
from dejavu_utils.models import pairs
from dejavu_utils.models.pairs import Pair

LEAST, SINGLE = 8, 32
SAID = ["correct", "correct5", "confidence"]


def again(pair: Pair, start: int) -> Pair:
    """Return the pair trained once more on the same sets, with other weights and views: its
    `start`-th repetition.

    Nothing is trained yet (`launch.fit_all(pairs.jobs([...]))` does); 0 is the pair itself.
    """
    sources = {model: job.pixels for model, job in pair.jobs.items()}
    return _retrained(pair, sources, f"start {start}") if start else pair


def halves(pair: Pair, many: int) -> list[Pair]:
    """Return many / 2 pairs on random halves of set A and B together, drawn class by class; nothing
    is trained yet.

    In the i-th, encoder "A" is trained on fold 0 of `fold(pair, i)`, encoder "B" on fold 1.
    ValueError below LEAST encoders, for an odd number, and where both sets share images.
    """
    if many < LEAST or many % 2 or len(pair.parts["shared"]):
        raise ValueError(
            f"many_model.halves: {many} encoders, {len(pair.parts['shared'])} shared images; "
            "expected an "
            f"even number from {LEAST} on, and none. Set more.many and sizes.shared."
        )
    return [_retrained(pair, _sources(pair, fold(pair, i)), f"half {i}") for i in range(many // 2)]


def fold(pair: Pair, i: int) -> dict[str, np.ndarray]:
    """Return {"a", "b"} -> the half (n,), 0 or 1, that each image of that set is in; half of every
    class each.
    """
    ids, labels = (
        np.concatenate([getattr(pair.parts[side], name) for side in "ab"])
        for name in ("ids", "labels")
    )
    drawn = one_model.assign(ids, labels, 2, f"{pair.setting['seed']}/half {i}")
    return dict(zip("ab", np.split(drawn, [len(pair.parts["a"])]), strict=True))


def _sources(pair: Pair, drawn: dict) -> dict[str, Path]:
    """Return {"A", "B"} -> the file of what an encoder on half 0, or 1, is trained on."""
    found = {}
    for half, model in enumerate("AB"):
        a, b = (
            [pair.parts[side].subset(drawn[side] == which) for which in (half, 1 - half)]
            for side in "ab"
        )
        used = {"a": a[0], "shared": b[0], "b": a[1]}  # "A" is trained on a and shared
        folder = Path(pair.jobs[model].pixels).parent
        found[model] = pairs.training_set(
            used, "A", pair.jobs[model].recipe, folder, pair.setting["seed"]
        )
    return found


def _retrained(pair: Pair, sources: dict, start: str) -> Pair:
    """Return the pair with other training sets and another start of training, all else alike."""
    jobs = {}
    for model, job in pair.jobs.items():
        where, seed = Path(job.folder), f"{job.seed}/{start}"
        name = store.key(like=where.name, pixels=Path(sources[model]).stem, seed=seed)
        folder = where.with_name(f"{job.recipe.criterion}-{name}")
        jobs[model] = dataclasses.replace(
            job, pixels=str(sources[model]), folder=str(folder), seed=seed
        )
    return dataclasses.replace(pair, jobs=jobs)


def table(
    pair: Pair,
    trained: list[Pair],
    epoch: int,
    k: int,
    layer: str = "projector",
    device: str = "cpu",
) -> pd.DataFrame:
    """Return the attack's table of all encoders of `halves(pair, many)`, trained: a row per image
    and role.

    "target": those that saw the image, "reference": those that did not. `correct`, `correct5` and
    `confidence` are means over them, and `encoders` says how many each. Other columns: those of
    `references.two_model`.
    """
    rows = []
    for i, one in enumerate(trained):
        found = references.at_layer(one, epoch, k, layer, device=device)
        drawn = {
            name: half
            for side, each in fold(pair, i).items()
            for name, half in zip(pair.parts[side].ids, each, strict=True)
        }
        by_b = (found["role"] == "target") == (found["direction"] == "b")
        inside = found["id"].map(drawn) == by_b.astype(int)
        rows.append(found.assign(role=np.where(inside, "target", "reference")))
    rows = pd.concat(rows)
    setting = [name for name in rows if name not in (*SAID, "prediction")]
    grouped = rows.astype(dict.fromkeys(SAID, float)).groupby(setting, dropna=False)
    return grouped[SAID].mean().assign(encoders=grouped.size()).reset_index()


def images(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per image: `memorization`, how much oftener encoders that saw it are right, and
    its `error`.

    The standard error counts one more success and one more failure on either side: of so few
    encoders, all alike does not mean certain. `memorized` is 1 where memorization is above 1.96
    errors (without memory, of 2.5 % of images), and NaN, with a `reason`, below SINGLE encoders:
    then no single image can be told.
    """
    key = ["id", "label", "direction", "seed", "encoders"]
    wide = table.astype({"correct": float}).pivot(index=key, columns="role", values="correct")
    rows = (
        wide.rename(columns={"target": "inside", "reference": "outside"})
        .reset_index()
        .rename_axis(columns=None)
    )
    rows["encoders"] = n = rows["encoders"].astype(int)
    shares = [(rows[side] * n + 1) / (n + 2) for side in ("inside", "outside")]
    rows["memorization"], many = rows["inside"] - rows["outside"], 2 * n
    rows["error"] = np.sqrt(sum(share * (1 - share) / n for share in shares))
    sure = (rows["memorization"] > 1.96 * rows["error"]).astype(float)
    rows["memorized"] = sure.where(many >= SINGLE)
    rows["reason"] = np.where(
        many >= SINGLE, "", many.astype(str) + f" encoders; a single image needs {SINGLE}"
    )
    return rows
