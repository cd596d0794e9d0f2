"""What may lower déjà vu, and what it costs (the paper's §6): pairs trained with another
hyperparameter, pairs fine-tuned on public images, representations released with less in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from dejavu_utils import store
from dejavu_utils.attack import inference, probe, references, scoring, summaries
from dejavu_utils.data.images import Images
from dejavu_utils.models import methods, own_format, pairs, train
from dejavu_utils.models.encoders import Encoder
from dejavu_utils.models.recipe import Recipe

LEAVES_ENCODERS = ("layer", "epoch", "noise", "bits")  # settings that train nothing
OTHERS = ("trained", "trained_steps", "sizes.attacked", "distinct")  # beside the recipe's fields
KEYS = ["criterion", "setting", "value", "layer"]  # the columns that tell one setting from another

Embeddings = dict[str, dict[str, Tensor]]  # {layer: {model: (n, d)}}


def trained(
    params: dict, folder: Path, settings: dict, device: str = "cpu"
) -> list[tuple[str, Any, pairs.Pair]]:
    """Return (setting, value, pair) of everything that needs training of its own, for every seed,
    at the first rho; nothing is trained yet.

    `settings`: {criterion: {setting: values}}. A setting is a hyperparameter of the recipe
    ("constants.invariance", "views.scale_min", "encoder", ...), or one of

    - "trained": images a class that are trained on, of which sizes.attacked are attacked;
      "trained_steps" takes as many steps with each;
    - "sizes.attacked": as many are trained on and attacked, the paper's confounded design;
    - "distinct": see `pairs.one`.

    The default's value gives the default pair, whose encoders are shared. ValueError names a
    setting that is none of these.
    """
    rho = params["rhos"][0] if params["dataset"] == "scenes" else float("nan")
    made = []
    for seed in params["seeds"]:
        for criterion, wanted in settings.items():
            for setting, values in wanted.items():
                for value in values:
                    changed, options = _changed(params, criterion, setting, value, values)
                    pair = pairs.one(changed, folder, criterion, rho, seed, device, **options)
                    made.append((setting, value, pair))
    return made


def _changed(
    params: dict, criterion: str, setting: str, value: Any, values: list
) -> tuple[dict, dict]:
    """Return the parameters with one setting at another value, and the options of `pairs.one`."""
    if setting == "trained":
        return params, {"trained": value, "pool": max(values)}
    if setting == "trained_steps":
        share = params["sizes"]["attacked"] / value
        epochs = sorted({round(epoch * share) for epoch in params["epochs"]})
        return params | {"epochs": epochs}, {"trained": value, "pool": max(values)}
    if setting == "distinct":
        return params, {"distinct": value}

    field, _, key = setting.partition(".")
    if field == "sizes" and key in params["sizes"]:
        return params | {"sizes": params["sizes"] | {key: value}}, {}
    return params | {"recipe": _changed_recipe(params["recipe"], criterion, setting, value)}, {}


def _changed_recipe(changes: dict, criterion: str, setting: str, value: Any) -> dict:
    """Return the changes of the recipe with one more, of one criterion; as they are if it is the
    value that the recipe has already.
    """
    recipe = pairs.recipe(criterion, changes)
    field, _, key = setting.partition(".")
    nested = field in ("constants", "views")
    if not hasattr(recipe, field) or bool(key) != nested:
        raise ValueError(
            f'setting "{setting}" is not known: expected a field of the recipe '
            f"(see models/recipe.py) or one of {', '.join(OTHERS)}"
        )
    if value == _current(recipe, field, key):
        return changes

    own = changes.get(criterion, {})
    changed = own.get(field, {}) | {key: value} if nested else value
    return changes | {criterion: own | {field: changed}}


def _current(recipe: Recipe, field: str, key: str) -> Any:
    """Return the value that a recipe has; a constant that it does not name has its criterion's
    default.
    """
    if field == "constants":
        return (methods.constants(recipe.criterion) | recipe.constants).get(key)
    value = getattr(recipe, field)
    return value.get(key) if key else value


def finetuned(
    pair: pairs.Pair, epoch: int, epochs: int, criterion: str = "supervised"
) -> pairs.Pair:
    """Return the pair after `epochs` more epochs on the public set X, from the encoders of `epoch`;
    trains if need be.

    "supervised" uses X's labels, with the pair's own recipe otherwise. No attacked image is seen
    again. With 0 epochs it is the pair as it was.
    """
    if epochs == 0:
        return pair
    public = pair.parts["public"]
    jobs = {}
    for model, job in pair.jobs.items():
        # Small local views are DINO's own.
        views = {
            name: value for name, value in job.recipe.views.items() if not name.startswith("local")
        }
        recipe = dataclasses.replace(job.recipe, criterion=criterion, constants={}, views=views)
        name = store.key(
            encoder=Path(job.folder).name,
            epoch=epoch,
            epochs=epochs,
            recipe=recipe,
            data=public.digest,
            code=store.code_version(__name__),
        )
        folder = Path(job.folder).parent / f"finetuned-{name}"
        jobs[model] = dataclasses.replace(job, folder=str(folder), recipe=recipe, epochs=[epochs])
        with store.lock(folder / "training"):
            if not jobs[model].done():
                _finetune(pair.encoder(model, epoch), jobs[model], public, epochs)
    return dataclasses.replace(pair, jobs=jobs)


def _finetune(encoder: Encoder, job: train.Job, public: Images, epochs: int) -> None:
    torch.set_num_threads(job.recipe.threads)
    training = train.Training(
        public.stacked,
        job.recipe,
        epochs,
        f"{job.seed}/finetune",
        job.device,
        torch.from_numpy(public.labels),
        len(public.classes),
    )
    training.encoder.load_state_dict(training.encoder.state_dict() | encoder.state_dict())
    for _ in range(epochs):
        training.run_epoch()
    own_format.save(
        job.checkpoint(epochs),
        training.encoder,
        job.recipe,
        epoch=epochs,
        seed=job.seed,
        precision=str(training.dtype),
    )


def release(
    values: Tensor, like: Tensor, noise: float = 0.0, bits: int = 0, seed: int | str = 0
) -> Tensor:
    """Return embeddings (n, d) as somebody would hand them out: with noise, or rounded to 2^bits
    levels a number; 0 leaves them as they are.

    `noise`: standard deviation of Gaussian noise, in standard deviations of each dimension over
    `like` (m, d), drawn once for an embedding. `bits`: the levels lie between the 1st and the 99th
    percentile of each dimension over `like`.
    """
    if noise < 0 or bits < 0 or bits > 16:
        raise ValueError(
            f"mitigation.release: noise {noise}, bits {bits}; expected noise >= 0 and 0 to 16 bits"
        )
    if noise:
        normal = torch.randn(values.shape, generator=train.stream(seed, "release"))  # (n, d)
        values = values + noise * like.std(0) * normal
    if bits:
        step = len(like) // 4096 + 1  # torch.quantile refuses more than 16 million numbers
        some = like[::step].float()
        low, high = torch.quantile(some, torch.tensor([0.01, 0.99]), dim=0)  # (d,) each
        highest = 2**bits - 1
        width = (high - low).clamp_min(1e-12) / highest
        level = ((values - low) / width).round().clamp(0, highest)
        values = low + level * width
    return values


@references.cached("tradeoff")
def measure(
    pair: pairs.Pair,
    epoch: int,
    k: int,
    layers: tuple[str, ...] = ("projector", "backbone"),
    releases: Sequence[dict] = ({},),
    device: str = "cpu",
) -> pd.DataFrame:
    """Return the label-inference table of a pair for every layer and release, with its usefulness
    beside it.

    `releases` are arguments of `release`, applied to all that leaves the encoder: an attacker and
    an honest user get the same. Columns: those of `references.two_model`, `release` (its number),
    `held_out`: accuracy on `n_held_out` images that no encoder saw (probe and control set) of a
    linear probe trained on the target's own images, at that layer and release.
    """
    encoders = {model: pair.encoder(model, epoch) for model in ("A", "B")}
    rules = inference.Rules(**pair.rules)
    options = {"size": pair.size(), "layers": layers, "device": device, "keep": rules.keep}
    attacked = {}
    found = {}
    for side, model in inference.TARGETS.items():
        own = pair.parts[side]
        attacked[side], rects = references.cropped(own, pair.crop)
        found[side] = references.embed_images(encoders, attacked[side], rects=rects, **options)
        one = {model: encoders[model]}
        found[f"own {side}"] = references.embed_images(one, own, **options)
    public = pair.parts["public"]
    found["public"] = references.embed_images(encoders, public, **options)
    found["held"], held_labels = references.held_out(pair, encoders, layers, device)

    tables = []
    for layer in layers:
        for number, change in enumerate(releases):
            released = _released(found, layer, change)
            table = _attack(released, public, attacked, k, rules, device)
            useful = _usefulness(released, pair, held_labels)
            held_out = table["direction"].map(useful)
            tables.append(table.assign(layer=layer, release=number, held_out=held_out))
    joined = pd.concat(tables, ignore_index=True)
    about = {"epoch": epoch, "k": k, "attacked": "attacked", "n_held_out": len(held_labels)}
    return joined.assign(**pair.setting, **about)


def _released(found: dict[str, Embeddings], layer: str, change: dict) -> Embeddings:
    """Return {name: {model: (n, d)}}: everything that leaves the encoders at one layer."""
    like = found["public"][layer]
    released: Embeddings = {}
    for name, embeddings in found.items():
        released[name] = {}
        for model, values in embeddings[layer].items():
            seed = f"{name}/{model}"
            released[name][model] = release(values, like[model], **change, seed=seed)
    return released


def _attack(
    released: Embeddings,
    public: Images,
    attacked: dict[str, Images],
    k: int,
    rules: inference.Rules,
    device: str,
) -> pd.DataFrame:
    """Return the label-inference table of released crops and public images."""
    crops = {}
    for side in attacked:  # the search runs where the crops are
        crops[side] = {model: values.to(device) for model, values in released[side].items()}
    return inference.label_inference(
        crops,
        released["public"],
        public.labels,
        {side: images.ids for side, images in attacked.items()},
        {side: images.labels for side, images in attacked.items()},
        k,
        len(public.classes),
        rules,
    )


def _usefulness(released: Embeddings, pair: pairs.Pair, held_labels: Any) -> dict[str, float]:
    """Return {side: held-out accuracy} of a linear probe on each target's own images."""
    useful = {}
    for side, model in inference.TARGETS.items():
        own = pair.parts[side]
        x, z = released[f"own {side}"][model], released["held"][model]
        found = probe.linear_probe(x, own.labels, z, held_labels, len(own.classes))
        useful[side] = found["test"]
    return useful


def changes(
    table: pd.DataFrame, released: str = "projector", resamples: int = 1000
) -> pd.DataFrame:
    """Return a row per setting: déjà vu score over all examples and at p = 20 %, held-out accuracy,
    and what both change against the default.

    `table` is of `measure`, with columns `setting` and `value` (text). A value is compared with the
    setting "default" at its own layer, a layer with the default at `released`, a training-set size
    with its first value. Columns: `score`, `score_20`, `held_out`, `score_change` and
    `held_out_change`, each with _low and _high, n, n_held_out. Changes are matched by seed. Their
    interval is the t-interval over seeds; with one seed, or where the encoders stay the same, it is
    over images (bootstrap for the score, binomial for the probe): the column `over` says which.
    Needs one rho, and one epoch a value.
    """
    rows = []
    for key, part in table.groupby(KEYS, sort=False):
        criterion, setting, _, layer = key
        base = _baseline(table, criterion, setting, released if setting == "layer" else layer)
        row = dict(zip(KEYS, key, strict=True))
        row["seeds"] = part["seed"].nunique()
        row |= _scores(part, resamples)
        row |= _change(part, base, setting, resamples)
        rows.append(row)
    return pd.DataFrame(rows)


def _baseline(table: pd.DataFrame, criterion: str, setting: str, layer: str) -> pd.DataFrame:
    """Return the part of the table that a setting is compared with."""
    mine = table[table["criterion"] == criterion]
    if setting.startswith("trained"):
        sizes = mine[(mine["setting"] == setting) & (mine["layer"] == layer)]
        return sizes[sizes["value"] == sizes["value"].iloc[0]]
    default = mine[(mine["setting"] == "default") & (mine["layer"] == layer)]
    if default.empty:
        raise ValueError(
            f"mitigation.changes: {setting} of {criterion}: there is no default at layer {layer} "
            "to compare with. Measure the default pair of every criterion whose settings change."
        )
    return default


def _scores(part: pd.DataFrame, resamples: int) -> dict:
    """Return the score over all examples and the one of the 20 % most confident, and n."""
    whole, confident = scoring.curve(part, (100, 20), resamples=resamples)
    row = {"score": whole["score"], "score_low": whole["low"], "score_high": whole["high"]}
    row["n"] = whole["n"]
    row["score_20"] = confident["score"]
    row["score_20_low"] = confident["low"]
    row["score_20_high"] = confident["high"]
    return row


def _change(part: pd.DataFrame, base: pd.DataFrame, setting: str, resamples: int) -> dict:
    """Return held_out, score_change and held_out_change, each with its interval, and what the
    interval of the score's change is over.
    """
    n = int(part.groupby("seed")["n_held_out"].first().sum())
    now = _held_out(part)  # (seeds,)
    before = _held_out(base)
    row = summaries.interval(now.to_numpy(), _variance(now, n), "held_out") | {"n_held_out": n}

    over = "images" if setting in LEAVES_ENCODERS or len(now) == 1 else "seeds"
    if over == "seeds":
        change = (_by_seed(part) - _by_seed(base)).to_numpy()
        row |= summaries.interval(change, 0.0, "score_change")
    else:
        change = scoring.difference(part, base, resamples=resamples)
        row["score_change"] = change["difference"]
        row["score_change_low"] = change["low"]
        row["score_change_high"] = change["high"]

    variance = _variance(now, n) + _variance(before, n)
    row |= summaries.interval((now - before).to_numpy(), variance, "held_out_change")
    return row | {"over": over}


def _held_out(part: pd.DataFrame) -> pd.Series:
    """Return the held-out accuracy of every seed, the mean over A and B."""
    return part.drop_duplicates(["seed", "direction"]).groupby("seed")["held_out"].mean()


def _variance(accuracy: pd.Series, n: int) -> float:
    """Return the binomial variance of an accuracy on n images."""
    return accuracy.mean() * (1 - accuracy.mean()) / n


def _by_seed(part: pd.DataFrame) -> pd.Series:
    """Return the score over all examples of every seed."""
    return part.groupby("seed").apply(lambda one: scoring.score(one, resamples=0)["score"])
