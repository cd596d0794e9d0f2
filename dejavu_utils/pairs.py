"""Pairs of encoders to compare: A trained on set A, B on set B, alike in all else (the paper's §3.1)."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dejavu_utils import checkpoints, data, store, train
from dejavu_utils.criteria import CRITERIA
from dejavu_utils.models import Encoder


@functools.lru_cache(maxsize=4)
def _parts(dataset: str, seed: int, rho: float, sizes: str) -> tuple[dict, dict]:
    """Return {part: Images} of one data set, split, and how many images are attackable and why the others are not.

    The arguments are plain, so that one notebook makes the same data set once.
    """
    wanted = json.loads(sizes)
    if dataset == "scenes":
        each = 2 * wanted["attacked"] + sum(wanted[part] for part in ("shared", "public", "probe", "control"))
        images = data.read("scenes", classes=wanted["classes"], per_class=each, rho=rho, seed=seed)
    else:
        images = data.read(dataset, classes=wanted["classes"])
    return data.parts(images, data.partition(images, wanted, seed)), data.attackable(images)[1]


def recipe(criterion: str, changes: dict) -> train.Recipe:
    """Return the recipe of one criterion: the defaults with `changes`; of the constants, those this criterion knows."""
    if criterion not in CRITERIA:
        raise ValueError(f'criterion "{criterion}" is not known: expected one of {", ".join(CRITERIA)}')
    known = {name: set(inspect.signature(loss).parameters) - {"z1", "z2"} for name, loss in CRITERIA.items()}
    default = train.Recipe()
    constants = default.constants | changes.get("constants", {})
    if unknown := set(constants) - set().union(*known.values()):
        raise ValueError(f"recipe constants: {', '.join(sorted(unknown))} belongs to no criterion: expected of {known}")
    own = {name: value for name, value in constants.items() if name in known[criterion]}
    views = default.views | changes.get("views", {})
    return train.Recipe(**{**changes, "criterion": criterion, "constants": own, "views": views})


@dataclass(frozen=True)
class Pair:
    """Two encoders of one setting: A trained on set A, B on set B, alike in all else (the paper's §3.1)."""

    parts: dict        # {"a", "b", "shared", "public", "probe", "control"} -> Images
    jobs: dict         # {"A", "B"} -> train.Job
    setting: dict      # criterion, rho, seed: the columns that name this pair in every table
    crop: dict         # see crops.background
    counts: dict       # how many images of the data set are attackable, and why the others are not
    folder: Path       # tables of this pair

    def encoder(self, model: str, epoch: int) -> Encoder:
        """Return encoder "A" or "B" as it was after `epoch` epochs."""
        return checkpoints.load(self.jobs[model].checkpoint(epoch))

    def size(self) -> int:
        return self.jobs["A"].recipe.size


def one(params: dict, folder: Path, criterion: str, rho: float, seed: int, device: str = "cpu") -> Pair:
    """Return the pair of one setting; nothing is trained yet (`train.fit_all(jobs(pairs))` does).

    `params` are a notebook's parameters: dataset, sizes, recipe, epochs, crop. The folder of an encoder is named by the
    key of all that decides its weights: its pixels, recipe, epochs, seed and the code that trains.
    """
    parts, counts = _parts(params["dataset"], seed, rho, json.dumps(params["sizes"], sort_keys=True))
    how = recipe(criterion, params["recipe"])
    jobs = {}
    for model in ("A", "B"):
        pixels = _training_pixels(parts, model, how)
        name = store.key(pixels=hashlib.sha256(pixels.numpy().tobytes()).hexdigest())
        source = folder / "pixels" / f"{name}.safetensors"
        if not source.exists():
            store.write_tensors(source, {"pixels": pixels}, {"seed": seed})
        code = store.code_version("train", "views", "models", "criteria", "crops")
        start = f"{seed}/{model}"
        own = store.key(pixels=name, recipe=how, epochs=params["epochs"], seed=start, code=code)
        where = folder / "encoders" / f"{criterion}-{own}"
        jobs[model] = train.Job(str(source), str(where), how, list(params["epochs"]), start, device)
    setting = {"criterion": criterion, "rho": rho, "seed": seed}
    return Pair(parts, jobs, setting, params["crop"], counts, folder / "pairs")


def make(params: dict, folder: Path, device: str = "cpu") -> list[Pair]:
    """Return a pair for every seed and criterion at the first rho, and for the first criterion at every other rho.

    On real pictures nobody knows rho: it is NaN, and there is one of it.
    """
    rhos = params["rhos"] if params["dataset"] == "scenes" else [float("nan")]
    settings = [(criterion, rho, seed) for seed in params["seeds"] for rho in rhos
                for criterion in (params["criteria"] if rho is rhos[0] else params["criteria"][:1])]
    return [one(params, folder, *setting, device) for setting in settings]


def _training_pixels(parts: dict, model: str, how: train.Recipe):
    """Return what encoder A (B) is trained on: set A (B) and the shared part, uint8 (n, 3, H, W), in id order.

    Native pixels where all pictures of both sets have one size, else squares a little larger than the views: the choice
    is made for both sets at once, so that A and B never differ in it.
    """
    import torch

    sizes = np.concatenate([parts[part].sizes for part in ("a", "b", "shared")])
    used = [images for images in (parts[model.lower()], parts["shared"]) if len(images)]
    if (sizes == sizes[0]).all():
        return torch.cat([images.stacked for images in used])
    return torch.cat([images.squares(round(how.size * 8 / 7)) for images in used])


def jobs(every: list[Pair]) -> list[train.Job]:
    """Return the training jobs of all pairs, encoder A and B of a pair side by side."""
    return [each.jobs[model] for each in every for model in ("A", "B")]


def losses(every: list[Pair]):
    """Return the training logs of all pairs: a row per encoder and epoch with its loss and seconds."""
    import pandas as pd

    rows = [line | pair.setting | {"name": f"{Path(job.folder).name}/{model}"} for pair in every
            for model, job in pair.jobs.items() for line in train.read_log(Path(job.folder) / "log.jsonl")]
    return pd.DataFrame(rows)


def speed(every: list[Pair]) -> float:
    """Return how many images a second one encoder's training took in, the median over epochs (two views of each)."""
    log = losses(every)
    job = every[0].jobs["A"]
    used = len(every[0].parts["a"]) + len(every[0].parts["shared"])
    return round(used // job.recipe.batch * job.recipe.batch / float(log["seconds"].median()), 1)


def partition_table(every: list[Pair]):
    """Return id, class, part and seed of every image of every pair: the split, as a table."""
    import pandas as pd

    rows = {(name, images.classes[label], part, pair.setting["seed"]): None for pair in every
            for part, images in pair.parts.items() for name, label in zip(images.ids, images.labels, strict=True)}
    return pd.DataFrame(list(rows), columns=["id", "class", "part", "seed"])
