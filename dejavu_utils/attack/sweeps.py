"""Sweeps of the attack that need no training: layer, neighbours, crop (the paper's appendix); the
score per class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from dejavu_utils.attack import references, scoring
from dejavu_utils.models.pairs import Pair

if TYPE_CHECKING:
    from dejavu_utils.notebook import Progress

CROPS = {
    "min_side": "periphery",
    "fraction": "corner",
}  # a parameter of crops.background, and the crop that has it


def variants(base: dict, wanted: dict) -> list[tuple[str, object, dict]]:
    """Return (sweep, value, arguments of references.two_model) of every attack that `wanted` asks
    for.

    `wanted`: "layer" (names, see Encoder.layers), "k", "min_side" (px, periphery crops), "fraction"
    (corner crops), each with its values; `base` holds the k and crop of all else. ValueError names
    what there is.
    """
    if unknown := set(wanted) - {"layer", "k", *CROPS}:
        raise ValueError(
            f"sweeps: {', '.join(sorted(unknown))} is not known; there are layer, k, "
            f"{', '.join(CROPS)}."
        )
    projector = base | {"layers": ("projector",)}
    found = [("layer", name, base | {"layers": (name,)}) for name in wanted.get("layer", ())]
    found += [("k", k, projector | {"k": k}) for k in wanted.get("k", ())]
    for name, kind in CROPS.items():
        found += [
            (name, value, projector | {"crop": base["crop"] | {"kind": kind, name: value}})
            for value in wanted.get(name, ())
        ]
    return found


def attacks(
    pairs: list[Pair],
    epoch: int,
    k: int,
    wanted: dict,
    device: str = "cpu",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Return the label-inference tables of all variants and pairs, with columns `sweep` and `value`
    (text).
    """
    tables = []
    todo = [
        (pair, *variant)
        for pair in pairs
        for variant in variants({"k": k, "crop": pair.crop}, wanted)
    ]
    for i, (pair, sweep, value, arguments) in enumerate(todo, 1):
        table = references.two_model(pair, epoch, device=device, **arguments)
        tables.append(table.assign(sweep=sweep, value=str(value)))
        if progress:
            progress.update(i)
    return pd.concat(tables, ignore_index=True)


def scores(table: pd.DataFrame, resamples: int = 1000) -> pd.DataFrame:
    """Return a row per criterion, sweep, value, p and top: the déjà vu score with its interval,
    seeds pooled.

    p is 100 and 20 %, `top` 1 and 5 (the class among the five most voted); n says how many images
    had such a crop.
    """
    rows = []
    for (criterion, sweep, value), group in table.groupby(
        ["criterion", "sweep", "value"], sort=False
    ):
        for top in (1, 5):
            rows += [
                {"criterion": criterion, "sweep": sweep, "value": value, "top": top} | row
                for row in scoring.curve(group, (100, 20), top=top, resamples=resamples)
            ]
    return pd.DataFrame(rows).drop(columns=["ranking", "level", "resamples"], errors="ignore")


def per_class(table: pd.DataFrame, classes: tuple[str, ...], resamples: int = 500) -> pd.DataFrame:
    """Return a row per class: target and reference accuracy, déjà vu score and interval, the
    largest score first.

    `table` is one setting of `references.two_model`. With many classes some intervals miss 0 by
    chance alone.
    """
    rows = [
        {"class": classes[label]} | scoring.score(group, resamples=resamples)
        for label, group in table.groupby("label")
    ]
    frame = pd.DataFrame(rows)[["class", "n", "score", "low", "high", "target", "reference"]]
    return frame.sort_values("score", ascending=False, kind="stable", ignore_index=True)
