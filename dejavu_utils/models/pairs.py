"""Pairs of encoders to compare: A trained on set A, B on set B, alike in all else (the paper's
§3.1).
"""

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dejavu_utils import store
from dejavu_utils.data import datasets, manifests, split
from dejavu_utils.models import engines, external, feed, methods, views
from dejavu_utils.models.encoders import Encoder
from dejavu_utils.models.jobs import Job, read_log
from dejavu_utils.models.recipe import CRITERIA, Recipe, Views

# What a criterion changes of the default recipe, for scenes on a CPU; found on seeds 0 and 1.
TUNED: dict[str, dict] = {
    "barlow_twins": {"constants": {"redundancy": 0.02}},
    "byol": {"lr": 0.005},
    "dino": {
        "lr": 0.005,
        "constants": {"prototypes": 128, "teacher_temperature": 0.04},
        "views": {"local": 2},
    },
}


@functools.lru_cache(maxsize=4)
def _parts(dataset: str, seed: int, rho: float, sizes: str, pool: int = 0) -> tuple[dict, dict]:
    """Return {part: Images} of one data set, split, and how many images are attackable and why the
    others are not.

    The arguments are plain, so that one notebook makes the same data set once. `pool`: scenes
    enough for so many attacked images a class are made, so that the splits of different sizes are
    cut from the same scenes.
    """
    wanted = json.loads(sizes)
    classes = wanted["classes"]
    if dataset == "scenes":
        others = sum(wanted[part] for part in ("shared", "public", "probe", "control"))
        each = 2 * max(wanted["attacked"], pool) + others
        images = datasets.read("scenes", classes=classes, per_class=each, rho=rho, seed=seed)
    else:
        images = datasets.read(dataset, classes=classes)

    manifest = manifests.read(dataset)
    rule = (manifest.get("split") or {}).get("rule", "disjoint")  # ImageNet has the paper's own
    frame = split.partition(images, wanted, seed, rule)
    _, counts = split.attackable(images)
    return split.parts(images, frame), counts


def recipe(criterion: str, changes: dict) -> Recipe:
    """Return the recipe of one criterion: the defaults, then TUNED's, then `changes`.

    A key of `changes` that is a criterion's name holds changes for that criterion alone. Of the
    constants each criterion takes its own. ValueError names a constant or a criterion that nobody
    knows.
    """
    common = {name: value for name, value in changes.items() if name not in CRITERIA}
    own = changes.get(criterion, {})
    engine = (common | own).get("engine", "own")
    known = engines.load(engine).constants()  # {criterion: names of its constants}
    if criterion not in known:
        raise ValueError(
            f'criterion "{criterion}" is not known to the engine "{engine}": expected one of '
            f"{', '.join(known)}"
        )

    tuned = TUNED.get(criterion, {}) if engine == "own" else {}
    fields = dataclasses.asdict(Recipe())
    for layer in (tuned, common, own):
        for name, value in layer.items():
            inner = name in ("constants", "views")
            fields[name] = fields[name] | value if inner else value

    everyone = set().union(*known.values())
    unknown = set(fields["constants"]) - everyone
    if unknown:
        raise ValueError(
            f"recipe constants: {', '.join(sorted(unknown))} belongs to no criterion: expected "
            f"some of {', '.join(sorted(everyone))}"
        )

    constants = fields["constants"].items()
    fields["constants"] = {name: value for name, value in constants if name in known[criterion]}
    return Recipe(**fields | {"criterion": criterion})


@dataclass(frozen=True)
class Pair:
    """Two encoders of one setting: A trained on set A, B on set B, alike in all else (the paper's
    §3.1).
    """

    parts: dict  # {"a", "b", "shared", "public", "probe", "control"} -> Images
    jobs: dict  # {"A", "B"} -> Job
    setting: dict  # criterion, rho, seed: the columns that name this pair in every table
    crop: dict  # see crops.background
    counts: dict  # how many images of the data set are attackable, and why the others are not
    folder: Path  # tables of this pair
    rules: dict = field(default_factory=dict)  # of the attack, see attack.inference.Rules

    def encoder(self, model: str, epoch: int) -> Encoder:
        """Return encoder "A" or "B" as it was after `epoch` epochs."""
        return external.encoder(str(self.jobs[model].checkpoint(epoch)))

    def size(self) -> int:
        return self.jobs["A"].recipe.size


def one(
    params: dict,
    folder: Path,
    criterion: str,
    rho: float,
    seed: int,
    device: str = "cpu",
    trained: int = 0,
    pool: int = 0,
    distinct: float = 1.0,
) -> Pair:
    """Return the pair of one setting; nothing is trained yet (`launch.fit_all(jobs(pairs))` does).

    `params` are a notebook's parameters: dataset, sizes, recipe, epochs, crop, rules. The folder
    of an encoder is named by the key of all that decides its weights: its pixels, recipe, epochs,
    seed and the code that trains.

    What is trained on may differ from what is attacked: `trained` images a class instead of
    `sizes.attacked`, of which the attacked ones are the first (`pool` is the largest such number of
    a sweep: all its sizes then share their images); without those that resemble another one more
    than `distinct` (see `data.distinct`).
    """
    parts, counts = _sets(params, rho, seed, 0, pool)
    used = parts
    if trained:
        used, _ = _sets(params, rho, seed, trained, pool)
        _check_trained(parts, used, trained, params["dataset"])
    if distinct < 1:
        used = dict(used)
        for part in ("a", "b", "shared"):
            used[part] = used[part].subset(split.distinct(used[part], distinct))

    how = recipe(criterion, params["recipe"])
    jobs = {}
    for model in ("A", "B"):
        source = training_set(used, model, how, folder / "pixels", seed)
        code = store.code_version(engines.ENGINES[how.engine])
        epochs = list(params["epochs"])
        start = f"{seed}/{model}"
        key = store.key(pixels=source.stem, recipe=how, epochs=epochs, seed=start, code=code)
        where = folder / "encoders" / f"{criterion}-{key}"
        classes = len(parts["public"].classes)
        jobs[model] = Job(str(source), str(where), how, epochs, start, device, classes)

    setting = {"criterion": criterion, "rho": rho, "seed": seed}
    rules = params.get("rules", {})
    return Pair(parts, jobs, setting, params["crop"], counts, folder / "pairs", rules)


def _sets(params: dict, rho: float, seed: int, trained: int, pool: int) -> tuple[dict, dict]:
    """Return `_parts` of a notebook's data set, with `trained` images a class in A and B, if not
    0.
    """
    sizes = dict(params["sizes"])
    if trained:
        sizes["attacked"] = trained
    return _parts(params["dataset"], seed, rho, json.dumps(sizes, sort_keys=True), pool)


def _check_trained(parts: dict, used: dict, trained: int, dataset: str) -> None:
    """Raise a ValueError unless every attacked image is among those that are trained on."""
    outside = [np.setdiff1d(parts[side].ids, used[side].ids) for side in ("a", "b")]
    count = sum(len(ids) for ids in outside)
    if count:
        raise ValueError(
            f"pairs: {count} of the attacked images would not be trained on, with {trained} images "
            f"a class of {dataset}: take at least sizes.attacked, and a data set whose split rule "
            'is "disjoint" (sweep sizes.attacked instead)'
        )


def settings(params: dict) -> list[tuple[str, float, int]]:
    """Return (criterion, rho, seed) of every pair: each criterion at the first rho, the first at
    every other rho.

    On real pictures nobody knows rho: it is NaN, and there is one of it.
    """
    rhos = params["rhos"] if params["dataset"] == "scenes" else [float("nan")]
    found = []
    for seed in params["seeds"]:
        for i, rho in enumerate(rhos):
            criteria = params["criteria"] if i == 0 else params["criteria"][:1]
            found += [(criterion, rho, seed) for criterion in criteria]
    return found


def make(params: dict, folder: Path, device: str = "cpu") -> list[Pair]:
    """Return the pair of every setting."""
    return [one(params, folder, *setting, device) for setting in settings(params)]


def plan(params: dict) -> pd.DataFrame:
    """Return a table of what training costs, before anything is read or trained: a row per
    criterion.

    `encoders`, `steps` each, `exaflop` of all (multiplications and additions of the large and local
    views, three times the forward pass; BYOL's target and DINO's teacher add one forward pass),
    `gib` of all checkpoints.
    """
    sizes = params["sizes"]
    images = sizes["classes"] * (sizes["attacked"] + sizes["shared"])
    chosen = [criterion for criterion, _, _ in settings(params)]
    rows = []
    for criterion in dict.fromkeys(chosen):
        how = recipe(criterion, params["recipe"])
        encoders = 2 * chosen.count(criterion)
        large = methods.METHODS[criterion].views if criterion in methods.METHODS else 2
        forward, weights = _cost(how, large)
        passes = 4 if criterion in ("byol", "dino") else 3
        seen = images // how.batch * how.batch * max(params["epochs"])
        rows.append(
            {
                "criterion": criterion,
                "encoders": encoders,
                "steps": seen // how.batch,
                "exaflop": encoders * seen * forward * passes / 1e18,
                "gib": encoders * weights * 4 * (len(params["epochs"]) + 3) / 2**30,
            }
        )
    return pd.DataFrame(rows)


def _cost(how: Recipe, large: int) -> tuple[float, int]:
    """Return (operations of one image's views in a forward pass, number of weights) of a recipe's
    encoder.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad():  # shapes only: nothing is computed
        encoder = Encoder(how.encoder, how.projector, how.size).eval()
    with torch.device("meta"), torch.no_grad(), counter:
        for side, _ in views.plan(Views(**how.views), how.size, large):
            encoder(torch.zeros(1, 3, side, side))
    return counter.get_total_flops(), sum(weight.numel() for weight in encoder.parameters())


def training_set(parts: dict, model: str, how: Recipe, folder: Path, seed: int) -> Path:
    """Return the file of what encoder A (B) is trained on: set A (B) and the shared part, named by
    its content.

    Pixels and labels where they fit into the recipe's `resident` memory, else the list of the
    pictures on disk.
    """
    native = equal_sized(parts)
    side = round(how.size * 8 / 7)  # of squares of mixed pictures: a little more than the views
    areas = {}
    for name in ("a", "b"):
        sizes = np.concatenate([parts[name].sizes, parts["shared"].sizes])
        areas[name] = sizes.prod(1).sum() if native else len(sizes) * side**2  # px

    used = [images for images in (parts[model.lower()], parts["shared"]) if len(images)]
    fits = 3 * max(areas.values()) <= how.resident * 2**30  # decided for A and B at once
    if not fits and not isinstance(used[0].pixels, torch.Tensor):
        return feed.write_list(folder, used, {"seed": seed})

    pixels = torch.cat([images.stacked if native else images.squares(side) for images in used])
    labels = torch.from_numpy(np.concatenate([images.labels for images in used]))
    digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    name = store.key(pixels=digest, labels=labels.tolist())
    path = folder / f"{name}.safetensors"
    if not store.intact(path):
        store.write_tensors(path, {"pixels": pixels, "labels": labels}, {"seed": seed})
    return path


def equal_sized(parts: dict) -> bool:
    """Return whether all pictures of both sets have one size: decided for A and B at once, never
    for one alone.
    """
    sizes = np.concatenate([parts[part].sizes for part in ("a", "b", "shared")])
    return bool((sizes == sizes[0]).all())


def jobs(every: list[Pair]) -> list[Job]:
    """Return the training jobs of all pairs, encoder A and B of a pair side by side."""
    return [each.jobs[model] for each in every for model in ("A", "B")]


def losses(every: list[Pair]) -> pd.DataFrame:
    """Return the training logs of all pairs: a row per encoder and epoch with its loss, seconds and
    images.
    """
    rows = []
    for pair in every:
        for model, job in pair.jobs.items():
            images = len(pair.parts[model.lower()]) + len(pair.parts["shared"])
            batch = job.recipe.batch
            folder = Path(job.folder)
            about = {"name": f"{folder.name}/{model}", "images": images // batch * batch}
            for line in read_log(folder / "log.jsonl"):
                rows.append(line | pair.setting | about)
    return pd.DataFrame(rows)


def partition_table(every: list[Pair]) -> pd.DataFrame:
    """Return id, class, part and seed of every image of every pair: the split, as a table."""
    rows = {
        (name, images.classes[label], part, pair.setting["seed"]): None
        for pair in every
        for part, images in pair.parts.items()
        for name, label in zip(images.ids, images.labels, strict=True)
    }
    return pd.DataFrame(list(rows), columns=["id", "class", "part", "seed"])
