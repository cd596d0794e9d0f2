"""What the target is compared with. The paper's two-model test: encoders A and B, each the other's reference (§3)."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dejavu_utils import attack, checkpoints, crops, data, knn, probe, scenes, store, train
from dejavu_utils.criteria import CRITERIA
from dejavu_utils.models import Encoder, embed


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


def pair(params: dict, folder: Path, criterion: str, rho: float, seed: int, device: str = "cpu") -> Pair:
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


def pairs(params: dict, folder: Path, device: str = "cpu") -> list[Pair]:
    """Return a pair for every seed and criterion at the first rho, and for the first criterion at every other rho.

    On real pictures nobody knows rho: it is NaN, and there is one of it.
    """
    rhos = params["rhos"] if params["dataset"] == "scenes" else [float("nan")]
    settings = [(criterion, rho, seed) for seed in params["seeds"] for rho in rhos
                for criterion in (params["criteria"] if rho is rhos[0] else params["criteria"][:1])]
    return [pair(params, folder, *setting, device) for setting in settings]


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


def _cached(pair: Pair, name: str, make, **parts):
    """Return the table that `make()` returns, read from disk if the same was made before."""
    encoders = [Path(job.folder).name for job in pair.jobs.values()]
    data_hash = {part: images.digest for part, images in pair.parts.items()}
    code = store.code_version("attack", "knn", "crops", "models", "probe", "references")
    own = store.key(encoders=encoders, data=data_hash, code=code, **parts)
    path = pair.folder / f"{name}-{own}.parquet"
    if not path.exists():
        store.write_table(path, make(), {"parameters": parts | pair.setting, "seed": pair.setting["seed"]})
    return store.read_table(path)


def two_model(pair: Pair, epoch: int, k: int, layers: tuple[str, ...] = ("projector", "backbone"),
              attacked: str = "attacked", crop: dict | None = None, device: str = "cpu"):
    """Return the label-inference table of a pair at one epoch: one row per attacked image, model and layer.

    `attacked="control"` attacks images of a third set that neither encoder saw. Columns: those of
    `attack.label_inference`, then criterion, rho, seed, epoch, layer, k, attacked.
    """
    crop = crop or pair.crop
    make = functools.partial(_two_model, pair, epoch, k, layers, attacked, crop, device)
    return _cached(pair, f"attack-{epoch:04d}", make, epoch=epoch, k=k, layers=layers, attacked=attacked, crop=crop)


def _two_model(pair: Pair, epoch: int, k: int, layers, attacked: str, crop: dict, device: str):
    import pandas as pd

    targets = _attacked(pair, attacked)
    rects = {side: crops.background(images, crop) for side, images in targets.items()}
    targets = {side: images.subset(np.flatnonzero(rects[side][1])) for side, images in targets.items()}
    squares = {side: images.squares(pair.size(), rects[side][0][rects[side][1]]) for side, images in targets.items()}
    public = pair.parts["public"]
    encoders = {model: pair.encoder(model, epoch) for model in ("A", "B")}
    found = {name: {model: embed(encoder, pixels, layers, device=device) for model, encoder in encoders.items()}
             for name, pixels in [*squares.items(), ("public", public.squares(pair.size()))]}
    tables = []
    for layer in layers:
        at = {name: {model: out[layer] for model, out in by_model.items()} for name, by_model in found.items()}
        table = attack.label_inference(
            {side: at[side] for side in ("a", "b")}, at["public"], public.labels, {s: targets[s].ids for s in targets},
            {s: targets[s].labels for s in targets}, k=k, classes=len(public.classes))
        tables.append(table.assign(**pair.setting, epoch=epoch, layer=layer, k=k, attacked=attacked))
    return pd.concat(tables, ignore_index=True)


def _attacked(pair: Pair, which: str) -> dict:
    """Return {"a", "b"} -> Images: the images unique to each set, or the two halves of the control set."""
    if which == "attacked":
        return {side: pair.parts[side] for side in ("a", "b")}
    control = pair.parts["control"]
    half = np.arange(len(control)) % 2 == 0
    return {"a": control.subset(np.flatnonzero(half)), "b": control.subset(np.flatnonzero(~half))}


def probes(pair: Pair, epoch: int, layer: str = "backbone", device: str = "cpu"):
    """Return what the conventional test sees: a row per encoder with probe accuracies and two gaps, at one epoch.

    `train`, `held_out`, `gap`: a linear probe trained on the encoder's own images, judged on them and on the probe set
    (the paper's baseline). `member`, `non_member`, `fresh_gap`: a probe trained on half of the probe set, judged on the
    encoder's own images and on the other half, so that the probe itself has seen neither. `knn`: k-NN accuracy.
    """
    make = functools.partial(_probes, pair, epoch, layer, device)
    return _cached(pair, f"probe-{epoch:04d}", make, epoch=epoch, layer=layer)


def _probes(pair: Pair, epoch: int, layer: str, device: str):
    import pandas as pd

    held, classes, rows = pair.parts["probe"], len(pair.parts["probe"].classes), []
    for model in ("A", "B"):
        encoder, own = pair.encoder(model, epoch), pair.parts[model.lower()]
        x, y = embed(encoder, own.squares(pair.size()), (layer,), device=device)[layer], own.labels
        z, t = embed(encoder, held.squares(pair.size()), (layer,), device=device)[layer], held.labels
        first = np.arange(len(t)) % 2 == 0
        paper = probe.linear_probe(x, y, z, t, classes)
        folds = [probe.linear_probe(z[a], t[a], z[~a], t[~a], classes, extra=(x, y)) for a in (first, ~first)]
        member, fresh = (np.mean([fold[name] for fold in folds]) for name in ("extra", "test"))
        rows.append({"model": model, "train": paper["train"], "held_out": paper["test"], "gap": paper["gap"],
                     "member": member, "non_member": fresh, "fresh_gap": member - fresh,
                     "knn": probe.knn_accuracy(x, y, z, t, classes=classes), "n_train": len(y), "n_held_out": len(t)})
    return pd.DataFrame(rows).assign(**pair.setting, epoch=epoch, layer=layer)


def bayes(pair: Pair) -> float:
    """Return the known Bayes accuracy from the background alone; NaN on real pictures, where nobody knows it."""
    is_scenes = pair.parts["public"].ids[0].startswith("scene-")
    return scenes.bayes_accuracy(pair.setting["rho"], len(pair.parts["public"].classes)) if is_scenes else float("nan")


def choose(table, count: int, how: str = "memorized", seed: int = 0) -> list[str]:
    """Return ids of attacked images to look at: the most confidently memorized, or a random draw (`how="random"`).

    The ranking is the paper's: the target's confidence minus the reference's, among images only the target gets right.
    """
    wide = table[table["layer"] == "projector"].pivot(index="id", columns="role", values=["correct", "confidence"])
    if how == "random":
        return list(np.random.default_rng(seed).choice(wide.index.to_numpy(), count, replace=False))
    lead = wide["confidence", "target"].astype(float) - wide["confidence", "reference"].astype(float)
    only = wide["correct", "target"].astype(bool) & ~wide["correct", "reference"].astype(bool)
    return list(lead[only].sort_values(ascending=False, kind="stable").index[:count])


def neighbours(pair: Pair, epoch: int, ids: list[str], k: int = 4) -> list[dict]:
    """Return a row per id for `plots.gallery`: crop, image, class and the k nearest public images under both models."""
    public, size = pair.parts["public"], pair.size()
    encoders = {model: pair.encoder(model, epoch) for model in ("A", "B")}
    known = public.squares(size)
    bank = {model: embed(encoder, known, ("projector",))["projector"] for model, encoder in encoders.items()}
    rows = []
    for name in ids:
        side = "a" if name in pair.parts["a"].ids else "b"
        one = pair.parts[side].subset(np.flatnonzero(pair.parts[side].ids == name))
        crop = one.squares(size, crops.background(one, pair.crop)[0])
        row = {"crop": crop[0], "image": one.squares(size)[0], "name": one.classes[one.labels[0]]}
        for role, model in (("target", side.upper()), ("reference", "BA"["AB".index(side.upper())])):
            query = embed(encoders[model], crop, ("projector",))["projector"]
            nearest = knn.search(query, bank[model], k)[1][0].numpy()
            row[role] = [(known[j], public.classes[public.labels[j]]) for j in nearest]
        rows.append(row)
    return rows


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
