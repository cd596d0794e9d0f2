"""Pairs of encoders to compare: A trained on set A, B on set B, alike in all else (the paper's
§3.1).
"""

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
from dejavu_utils.models import engines, external, feed, methods, train, views
from dejavu_utils.models.encoders import Encoder
from dejavu_utils.models.jobs import read_log

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
    if dataset == "scenes":
        others = sum(wanted[part] for part in ("shared", "public", "probe", "control"))
        each = 2 * max(wanted["attacked"], pool) + others
        images = datasets.read(
            "scenes", classes=wanted["classes"], per_class=each, rho=rho, seed=seed
        )
    else:
        images = datasets.read(dataset, classes=wanted["classes"])
    rule = (manifests.read(dataset).get("split") or {}).get(
        "rule", "disjoint"
    )  # ImageNet has the paper's own
    return split.parts(images, split.partition(images, wanted, seed, rule)), split.attackable(
        images
    )[1]


def recipe(criterion: str, changes: dict) -> train.Recipe:
    """Return the recipe of one criterion: the defaults, then TUNED's, then `changes`.

    A key of `changes` that is a criterion's name holds changes for that criterion alone. Of the
    constants each criterion takes its own. ValueError names a constant or a criterion that nobody
    knows.
    """
    common = {name: value for name, value in changes.items() if name not in methods.METHODS}
    own = changes.get(criterion, {})
    engine = (common | own).get("engine", "own")
    constants = engines.load(engine).constants()
    if criterion not in constants:
        raise ValueError(
            f'criterion "{criterion}" is not known to the engine "{engine}": expected one of '
            f"{', '.join(constants)}"
        )
    layers = [TUNED.get(criterion, {}) if engine == "own" else {}, common, own]
    default = train.Recipe()
    merged = {key: dict(getattr(default, key)) for key in ("constants", "views")}
    for layer in layers:
        for key, value in layer.items():
            merged[key] = merged[key] | value if key in ("constants", "views") else value
    everyone = set().union(*constants.values())
    if unknown := set(merged["constants"]) - everyone:
        raise ValueError(
            f"recipe constants: {', '.join(sorted(unknown))} belongs to no criterion: expected "
            "some of "
            f"{', '.join(sorted(everyone))}"
        )
    merged["constants"] = {
        name: value for name, value in merged["constants"].items() if name in constants[criterion]
    }
    return train.Recipe(**merged | {"criterion": criterion})


@dataclass(frozen=True)
class Pair:
    """Two encoders of one setting: A trained on set A, B on set B, alike in all else (the paper's
    §3.1).
    """

    parts: dict  # {"a", "b", "shared", "public", "probe", "control"} -> Images
    jobs: dict  # {"A", "B"} -> train.Job
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
    sizes = params["sizes"]
    parts, counts = _parts(params["dataset"], seed, rho, json.dumps(sizes, sort_keys=True), pool)
    larger = json.dumps(sizes | {"attacked": trained or sizes["attacked"]}, sort_keys=True)
    used = _parts(params["dataset"], seed, rho, larger, pool)[0]
    if outside := sum(len(np.setdiff1d(parts[side].ids, used[side].ids)) for side in ("a", "b")):
        raise ValueError(
            f"pairs: {outside} of the attacked images would not be trained on, with {trained} "
            "images a "
            f"class of {params['dataset']}: take at least sizes.attacked, and a data set whose "
            "split rule "
            'is "disjoint" (sweep sizes.attacked instead)'
        )
    if distinct < 1:
        used = used | {
            part: used[part].subset(split.distinct(used[part], distinct))
            for part in ("a", "b", "shared")
        }
    how = recipe(criterion, params["recipe"])
    jobs = {}
    for model in ("A", "B"):
        source = training_set(used, model, how, folder / "pixels", seed)
        code = store.code_version(engines.ENGINES[how.engine])
        start = f"{seed}/{model}"
        key = store.key(
            pixels=source.stem, recipe=how, epochs=params["epochs"], seed=start, code=code
        )
        where = folder / "encoders" / f"{criterion}-{key}"
        jobs[model] = train.Job(
            str(source),
            str(where),
            how,
            list(params["epochs"]),
            start,
            device,
            len(parts["public"].classes),
        )
    setting = {"criterion": criterion, "rho": rho, "seed": seed}
    rules = params.get("rules", {})
    return Pair(parts, jobs, setting, params["crop"], counts, folder / "pairs", rules)


def settings(params: dict) -> list[tuple[str, float, int]]:
    """Return (criterion, rho, seed) of every pair: each criterion at the first rho, the first at
    every other rho.

    On real pictures nobody knows rho: it is NaN, and there is one of it.
    """
    rhos = params["rhos"] if params["dataset"] == "scenes" else [float("nan")]
    return [
        (criterion, rho, seed)
        for seed in params["seeds"]
        for rho in rhos
        for criterion in (params["criteria"] if rho is rhos[0] else params["criteria"][:1])
    ]


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
    rows, chosen = [], [setting[0] for setting in settings(params)]
    images = params["sizes"]["classes"] * (params["sizes"]["attacked"] + params["sizes"]["shared"])
    for criterion in dict.fromkeys(chosen):
        how, encoders = recipe(criterion, params["recipe"]), 2 * chosen.count(criterion)
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


def _cost(how: train.Recipe, large: int) -> tuple[float, int]:
    """Return (operations of one image's views in a forward pass, number of weights) of a recipe's
    encoder.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad():  # shapes only: nothing is computed
        encoder = Encoder(how.encoder, how.projector, how.size).eval()
    with torch.device("meta"), torch.no_grad(), counter:
        for side, _ in views.plan(views.Views(**how.views), how.size, large):
            encoder(torch.zeros(1, 3, side, side))
    return counter.get_total_flops(), sum(weight.numel() for weight in encoder.parameters())


def training_set(parts: dict, model: str, how: train.Recipe, folder: Path, seed: int) -> Path:
    """Return the file of what encoder A (B) is trained on: set A (B) and the shared part, named by
    its content.

    Pixels and labels where they fit into the recipe's `resident` memory, else the list of the
    pictures on disk.
    """
    both = {name: [parts[name.lower()], parts["shared"]] for name in ("A", "B")}
    used = [images for images in both[model] if len(images)]
    native, area = (
        equal_sized(parts),
        max(sum(images.sizes.prod(1).sum() for images in each) for each in both.values()),
    )
    side = round(
        how.size * 8 / 7
    )  # of the squares that pictures of mixed sizes become: a little more than the views
    if not native:
        area = max(sum(map(len, each)) for each in both.values()) * side**2
    if 3 * area > how.resident * 2**30 and not isinstance(used[0].pixels, torch.Tensor):
        return feed.write_list(folder, used, {"seed": seed})
    pixels = torch.cat([images.stacked if native else images.squares(side) for images in used])
    labels = torch.from_numpy(np.concatenate([images.labels for images in used]))
    name = store.key(
        pixels=hashlib.sha256(pixels.numpy().tobytes()).hexdigest(), labels=labels.tolist()
    )
    path = folder / f"{name}.safetensors"
    if not path.exists():
        store.write_tensors(path, {"pixels": pixels, "labels": labels}, {"seed": seed})
    return path


def equal_sized(parts: dict) -> bool:
    """Return whether all pictures of both sets have one size: decided for A and B at once, never
    for one alone.
    """
    sizes = np.concatenate([parts[part].sizes for part in ("a", "b", "shared")])
    return bool((sizes == sizes[0]).all())


def jobs(every: list[Pair]) -> list[train.Job]:
    """Return the training jobs of all pairs, encoder A and B of a pair side by side."""
    return [each.jobs[model] for each in every for model in ("A", "B")]


def losses(every: list[Pair]) -> pd.DataFrame:
    """Return the training logs of all pairs: a row per encoder and epoch with its loss, seconds and
    images.
    """
    rows = []
    for pair in every:
        for model, job in pair.jobs.items():
            seen = (
                (len(pair.parts[model.lower()]) + len(pair.parts["shared"]))
                // job.recipe.batch
                * job.recipe.batch
            )
            about = pair.setting | {"name": f"{Path(job.folder).name}/{model}", "images": seen}
            rows += [line | about for line in read_log(Path(job.folder) / "log.jsonl")]
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
