"""Lists among the parameters may be empty, of one entry, or long; or one line says that they may
not.

Each case is a notebook and a seed, which a failure prints.
"""

import os
import random

import pytest

from dejavu_utils.parameters import FILLED, ParameterError, declared, merged, stages

SEED = int(os.environ.get("DEJAVU_SEED", "0"))
SMALLEST = {
    "sizes": {"classes": 3, "attacked": 8, "shared": 0, "public": 12, "probe": 4, "control": 8},
    "k": 3,
    "recipe": {"encoder": "small4", "projector": "8-8", "batch": 8, "size": 16},
    "probe": {"augment": False},
    "views": 2,
    "shown": 2,
    "decoder": {"epochs": 1, "batch": 8, "size": 16, "classifier_epochs": 1},
    "sampling": {"steps": 2, "neighbours": 2},
}
VALUES = {
    "seeds": range(2),
    "rhos": (0.0, 0.2, 0.5),
    "criteria": ("vicreg", "simclr", "supervised"),
    "epochs": (0, 1, 2),
    "top_p": (100, 50, 20, 1),
    "conditions": ("projector", "backbone", "both", "nearest"),
    "channels": (8, 16),
    "blocks": (1, 2),
    "attention": (2, 4, 8),
    "layer": ("projector", "block1", "backbone"),
    "k": (1, 2, 3, 5, 8),
    "min_side": (4, 6, 8),
    "fraction": (0.2, 0.3, 0.5),
    "noise": (0.0, 0.1, 1.0),
    "bits": (0, 1, 2, 8),
    "finetune": (0, 1),
}


def drawn(name, rng, shortest):
    """Return a list for a parameter: empty, of one entry, or of all that there are."""
    values = list(VALUES[name])
    count = rng.choice((shortest, 1, len(values)))
    chosen = sorted(rng.sample(values, count), key=values.index)
    return [1] if name == "epochs" and chosen == [0] else chosen  # which is refused


def parameters(stage, rng):
    """Return the smallest parameters of a notebook, with lists that are drawn."""
    known = declared(stage)
    found = {}
    for name, default in known.items():
        if isinstance(default, list):
            found[name] = drawn(name, rng, int(name in FILLED))
        elif isinstance(default, dict):
            inner = {key: value for key, value in default.items() if isinstance(value, list)}
            lists = {key: drawn(key, rng, int(key in FILLED)) for key in inner}
            found[name] = SMALLEST.get(name, {}) | lists if name != "trained" else {}
        elif name in SMALLEST:
            found[name] = SMALLEST[name]
    if "decoder" in found:
        found["decoder"] |= {
            "channels": [8, 16],
            "blocks": [1, 1],
            "conditions": ["projector", "backbone", "both"],
        }
    return {name: value for name, value in found.items() if value or isinstance(value, list)}


@pytest.mark.parametrize("stage", stages())
def test_every_list_is_taken_or_refused_in_one_line(stage):
    for seed in range(50):
        merged(parameters(stage, random.Random(f"{stage} {seed}")), declared(stage))

    for name, default in declared(stage).items():
        if isinstance(default, list) and name in FILLED:
            with pytest.raises(ParameterError, match=f"^{name} = .. is empty, expected at least"):
                merged({name: []}, declared(stage))
        if isinstance(default, dict):
            for key, value in default.items():
                if isinstance(value, list) and key not in FILLED:
                    assert merged({name: {key: []}}, declared(stage))[name][key] == []


def test_epochs_that_train_nothing_are_refused_in_one_line():
    known = declared("00_tour")
    assert merged({"epochs": [1]}, known)["epochs"] == [1]
    with pytest.raises(ParameterError, match=r"^00_tour: epochs = \[0\] trains nothing, expected"):
        merged({"epochs": [0]}, known, "00_tour: ")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2 * SEED, 2 * SEED + 2))
@pytest.mark.parametrize("stage", [stage for stage in stages() if stage != "06_figures"])
def test_the_smallest_notebooks_run_with_any_lists(batch, tmp_path, monkeypatch, stage, seed):
    monkeypatch.setenv("DEJAVU_RUNS", str(tmp_path / "runs"))
    given = parameters(stage, random.Random(f"{stage} {seed}"))
    problem = batch.execute(stage, "smoke", given)
    assert problem is None, f"{stage} {seed}: {given}\n{problem}"
