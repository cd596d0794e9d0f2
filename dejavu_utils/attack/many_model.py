"""The many-model test: encoders on random halves of all attacked images, or trained again from
another start.

Every image is inside one half and outside the other, so with m encoders each is judged by m / 2
that saw it and m / 2 that did not (Feldman and Zhang, arXiv 2008.03703, for a classifier). From m =
LEAST on this says something about all images together, from m = SINGLE on about a single one: with
fewer its standard error may be a third.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd

from dejavu_utils import store
from dejavu_utils.attack import one_model, references
from dejavu_utils.models import pairs
from dejavu_utils.models.pairs import Pair

LEAST = 8  # encoders
SINGLE = 32  # encoders
AVERAGED = ["correct", "confidence"]


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
    a, b = pair.parts["a"], pair.parts["b"]
    ids = np.concatenate([a.ids, b.ids])
    labels = np.concatenate([a.labels, b.labels])
    half = one_model.assign(ids, labels, 2, f"{pair.setting['seed']}/half {i}")
    return {"a": half[: len(a)], "b": half[len(a) :]}


def _sources(pair: Pair, halves: dict[str, np.ndarray]) -> dict[str, Path]:
    """Return {"A", "B"} -> the file of what an encoder on half 0, or 1, is trained on."""
    a, b = pair.parts["a"], pair.parts["b"]
    found = {}
    for half, model in enumerate("AB"):
        own_a, own_b = a.subset(halves["a"] == half), b.subset(halves["b"] == half)
        rest_of_a = a.subset(halves["a"] != half)
        used = {"a": own_a, "shared": own_b, "b": rest_of_a}  # "A" is trained on a and shared
        job = pair.jobs[model]
        folder = Path(job.pixels).parent
        found[model] = pairs.training_set(used, "A", job.recipe, folder, pair.setting["seed"])
    return found


def _retrained(pair: Pair, sources: dict, start: str) -> Pair:
    """Return the pair with other training sets and another start of training, all else alike."""
    jobs = {}
    for model, job in pair.jobs.items():
        pixels, seed = Path(sources[model]), f"{job.seed}/{start}"
        before = Path(job.folder)
        name = store.key(like=before.name, pixels=pixels.stem, seed=seed)
        folder = before.with_name(f"{job.recipe.criterion}-{name}")
        changes = {"pixels": str(pixels), "folder": str(folder), "seed": seed}
        jobs[model] = dataclasses.replace(job, **changes)
    return dataclasses.replace(pair, jobs=jobs)


def table(pair: Pair, trained: list[Pair], epoch: int, k: int, device: str = "cpu") -> pd.DataFrame:
    """Return the attack's table, at the projector, of all encoders of `halves(pair, many)`,
    trained: a row per image and role.

    "target": those that saw the image, "reference": those that did not. `correct` and `confidence`
    are means over them, and `encoders` says how many each. Other columns: those of
    `references.two_model`.
    """
    tables = []
    for i, one in enumerate(trained):
        found = references.at_layer(one, epoch, k, device=device)
        halves_of = {}
        for side, half in fold(pair, i).items():
            halves_of |= dict(zip(pair.parts[side].ids, half, strict=True))
        by_b = (found["role"] == "target") == (found["direction"] == "b")  # encoder B guessed
        saw_it = found["id"].map(halves_of) == by_b.astype(int)
        tables.append(found.assign(role=np.where(saw_it, "target", "reference")))

    rows = pd.concat(tables).astype(dict.fromkeys(AVERAGED, float))
    setting = [name for name in rows if name not in (*AVERAGED, "prediction")]
    grouped = rows.groupby(setting, dropna=False)
    return grouped[AVERAGED].mean().assign(encoders=grouped.size()).reset_index()
