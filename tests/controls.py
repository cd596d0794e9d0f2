"""Controls of the attack that need no training, each repeated: does the 95 % interval miss the
truth 5 % of the time?

`make controls` (python tests/controls.py [repeats]) prints the table and writes
runs/controls/controls.csv. Where DEJAVU_DATA has the photographs, they are taken as well: 18
minutes instead of one.
"""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace

import numpy as np
import torch

from dejavu_utils import store
from dejavu_utils.attack import crops, inference, scoring
from dejavu_utils.data import datasets, manifests, scenes, split
from dejavu_utils.models.encoders import Encoder, embed
from dejavu_utils.models.train import stream

CROP = {"kind": "periphery", "min_side": 8}
CLASSES, K = 10, 10


def untrained(seed: int, permute: bool = False) -> SimpleNamespace:
    """Return what the attack needs, embedded by two untrained encoders on fresh scenes; the truth
    is 0.

    With `permute` the public labels are shuffled, so that neighbours mean nothing.
    """
    images, part = scenes.make(CLASSES, 60, 0.2, seed, size=32), np.arange(600) // 100
    parts = {
        "a": images.subset(part == 0),
        "b": images.subset(part == 1),
        "public": images.subset(part > 1),
    }
    case = _embedded(parts, seed, CROP, ("small8", "64-64", 32), "projector", K)
    if permute:
        case.public_labels = np.random.default_rng([seed, 5]).permutation(case.public_labels)
    return case


def photographs(seed: int, layer: str) -> SimpleNamespace:
    """Return the same for the profile `pictures`: its sizes, crop, encoder and k, split and start
    anew by the seed.
    """
    images = _tiny()
    sizes = {"classes": CLASSES, "attacked": 100, "public": 200, "probe": 50, "control": 50}
    parts = split.parts(images, split.partition(images, sizes, seed))
    return _embedded(
        parts, seed, CROP | {"min_side": 15}, ("small32", "512-512-512", 48), layer, 40
    )


@functools.cache
def _tiny():
    return datasets.read("tiny_imagenet_50", classes=CLASSES)


def _embedded(
    parts: dict, seed: int, crop: dict, build: tuple, layer: str, k: int
) -> SimpleNamespace:
    """Return background crops of "a" and "b" and whole "public" images, embedded by encoders
    without training.
    """
    found, kept = {"a": {}, "b": {}, "public": {}}, {}
    for side in "ab":
        rects, keep = crops.background(parts[side], crop)
        kept[side] = parts[side].subset(np.flatnonzero(keep)), rects[keep]
    size = build[2]
    for model in "AB":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, f"untrained {model}").initial_seed())
            encoder = Encoder(*build)
        for side, (images, rects) in kept.items():
            found[side][model] = embed(encoder, images.squares(size, rects), (layer,))[layer]
        found["public"][model] = embed(encoder, parts["public"].squares(size), (layer,))[layer]
    return SimpleNamespace(
        found=found,
        labels={side: images.labels for side, (images, _) in kept.items()},
        k=k,
        ids={side: images.ids for side, (images, _) in kept.items()},
        public_labels=parts["public"].labels,
    )


def planted(seed: int) -> SimpleNamespace:
    """Return embeddings in which each model maps a crop of its own images onto its class: the truth
    is 1.
    """
    rng = np.random.default_rng([seed, 17])
    centres = torch.from_numpy(rng.normal(size=(CLASSES, 16))).float()
    labels = {side: np.repeat(np.arange(CLASSES), 12) for side in "ab"}
    public_labels = np.repeat(np.arange(CLASSES), 40)

    def near(y):
        return 8 * centres[y] + torch.from_numpy(rng.normal(size=(len(y), 16))).float()

    wrong = {side: (y + rng.integers(1, CLASSES, len(y))) % CLASSES for side, y in labels.items()}
    found = {
        side: {model: near((labels if model.lower() == side else wrong)[side]) for model in "AB"}
        for side in "ab"
    }
    found["public"] = {model: near(public_labels) for model in "AB"}
    return SimpleNamespace(
        found=found,
        labels=labels,
        ids={s: np.array([f"{s}{i}" for i in range(120)]) for s in "ab"},
        public_labels=public_labels,
        k=K,
    )


def table(case: SimpleNamespace, same_model: bool = False):
    """Return the label-inference table of a case; `same_model` makes one encoder target and
    reference.
    """
    found = (
        {name: {"A": by["A"], "B": by["A"]} for name, by in case.found.items()}
        if same_model
        else case.found
    )
    return inference.label_inference(
        {side: found[side] for side in "ab"},
        found["public"],
        case.public_labels,
        case.ids,
        case.labels,
        case.k,
        CLASSES,
    )


CONTROLS = {
    "same encoder twice": (0.0, lambda seed: table(untrained(seed), same_model=True)),
    "untrained encoders": (0.0, lambda seed: table(untrained(seed))),
    "permuted public labels": (0.0, lambda seed: table(untrained(seed, permute=True))),
    "planted memory (positive)": (1.0, lambda seed: table(planted(seed))),
    **{
        f"untrained encoders, photographs, {layer}": (
            0.0,
            lambda seed, layer=layer: table(photographs(seed, layer)),
        )
        for layer in ("projector", "backbone")
    },
}


def repeat(name: str, repeats: int, level: float = 0.95) -> dict:
    """Return how often the interval of control `name` misses its truth in `repeats` runs, and the
    range 5 % allows.
    """
    from scipy.stats import binom

    truth, make = CONTROLS[name]
    rows = [
        scoring.score(make(seed), 100, resamples=1000, level=level)
        for seed in range(1000, 1000 + repeats)
    ]
    missed = sum(not row["low"] - 1e-12 <= truth <= row["high"] + 1e-12 for row in rows)
    low, high = binom.interval(0.999, repeats, 1 - level)
    return {
        "control": name,
        "truth": truth,
        "mean score": float(np.mean([row["score"] for row in rows])),
        "largest |score - truth|": max(abs(row["score"] - truth) for row in rows),
        "repeats": repeats,
        "n": rows[0]["n"],
        "interval misses": missed,
        "expected at most": int(high),
        "fits": bool(missed <= high),
    }


def main(repeats: int) -> None:
    import pandas as pd

    torch.set_num_threads(1)
    there = any(
        (manifests.home() / place).exists()
        for place in manifests.read("tiny_imagenet_50")["places"]
    )
    names = [name for name in CONTROLS if there or "photographs" not in name]
    frame = pd.DataFrame([repeat(name, repeats) for name in names])
    path = store.runs("controls") / "controls.csv"
    store.write_table(path, frame, {"parameters": {"repeats": repeats}, "seed": 1000})
    print(frame.to_string(index=False, float_format="{:.4f}".format))
    print(f"written to {path}")
    if not frame["fits"].all():
        raise SystemExit(
            "a control fails: its interval misses the truth more often than its level allows"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
