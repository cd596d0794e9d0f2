"""Knobs: what may lower déjà vu (the paper's §6): pairs trained otherwise, and representations
released otherwise.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from dejavu_utils import store
from dejavu_utils.data import images
from dejavu_utils.models import methods, own_format, pairs, train
from dejavu_utils.models.encoders import Encoder

NAMES = {
    "constants.invariance": "invariance λ",
    "constants.temperature": "temperature τ",
    "views.scale_min": "smallest crop of the views",
    "weight_decay": "weight decay",
    "encoder": "trunk",
    "projector": "projector",
    "trained": "images a class, fixed epochs",
    "trained_steps": "images a class, fixed steps",
    "sizes.attacked": "images a class, the paper's design",
    "distinct": "near-duplicates removed above",
    "finetune": "epochs of fine-tuning on X",
    "layer": "layer released",
    "epoch": "stopped at epoch",
    "noise": "noise on the release",
    "bits": "bits a number (0: all)",
}


def trained(
    params: dict, folder: Path, knobs: dict, device: str = "cpu"
) -> list[tuple[str, object, pairs.Pair]]:
    """Return (knob, value, pair) of every setting that needs training of its own, for every seed,
    at the first rho.

    `knobs`: {criterion: {knob: values}}. A knob is a field of the recipe ("constants.invariance",
    "views.scale_min", "encoder", ...), "trained" (images a class, of which sizes.attacked are
    attacked; "trained_steps" does as many steps with each), "sizes.attacked" (all of them attacked:
    the paper's confounded design) or "distinct" (see pairs.one). ValueError names a knob that is
    none of these.
    """
    rho = params["rhos"][0] if params["dataset"] == "scenes" else float("nan")
    return [
        (knob, value, _pair(params, folder, criterion, rho, seed, device, knob, value, values))
        for seed in params["seeds"]
        for criterion, wanted in knobs.items()
        for knob, values in wanted.items()
        for value in values
    ]


def _pair(
    params: dict,
    folder: Path,
    criterion: str,
    rho: float,
    seed: int,
    device: str,
    knob: str,
    value: float | str,
    values: list,
) -> pairs.Pair:
    """Return the pair of one value of one knob; the default's value is the default pair, whose
    encoders are shared.
    """
    field, _, key = knob.partition(".")
    how, more = pairs.recipe(criterion, params["recipe"]), {}
    if knob in ("trained", "trained_steps"):
        more = {"trained": value, "pool": max(values)}
        if knob == "trained_steps":
            share = params["sizes"]["attacked"] / value
            params = params | {
                "epochs": sorted({round(epoch * share) for epoch in params["epochs"]})
            }
    elif knob == "distinct":
        more = {"distinct": value}
    elif field == "sizes" and key in params["sizes"]:
        params = params | {"sizes": params["sizes"] | {key: value}}
    elif not hasattr(how, field) or bool(key) != (field in ("constants", "views")):
        raise ValueError(
            f'knob "{knob}" is not known: expected a field of the recipe '
            "(see models/recipe.py) or one of "
            f"{', '.join(name for name in NAMES if '.' not in name)}, sizes.attacked"
        )
    elif value != _default(how, field, key):
        own = params["recipe"].get(criterion, {})
        own = own | {field: own.get(field, {}) | {key: value} if key else value}
        params = params | {"recipe": params["recipe"] | {criterion: own}}
    return pairs.one(params, folder, criterion, rho, seed, device, **more)


def _default(how: train.Recipe, field: str, key: str) -> float | str | None:
    """Return the value that a recipe has already; a constant that it does not name has its
    criterion's default.
    """
    if field == "constants":
        return (methods.constants(how.criterion) | how.constants).get(key)
    return getattr(how, field).get(key) if key else getattr(how, field)


def finetuned(
    pair: pairs.Pair, epoch: int, epochs: int, criterion: str = "supervised"
) -> pairs.Pair:
    """Return the pair after `epochs` more epochs on the public set X, from the encoders of `epoch`;
    trains if need be.

    "supervised" uses X's labels, with the pair's own recipe otherwise. No attacked image is seen
    again. With 0 epochs it is the pair as it was.
    """
    if not epochs:
        return pair
    jobs = {}
    for model, job in pair.jobs.items():
        how = dataclasses.replace(
            job.recipe, criterion=criterion, constants={}, views=_two(job.recipe.views)
        )
        public = pair.parts["public"]
        name = store.key(
            encoder=Path(job.folder).name,
            epoch=epoch,
            epochs=epochs,
            recipe=how,
            data=public.digest,
            code=store.code_version(__name__),
        )
        where = Path(job.folder).parent / f"finetuned-{name}"
        jobs[model] = dataclasses.replace(job, folder=str(where), recipe=how, epochs=[epochs])
        with store.lock(where / "training"):
            if not jobs[model].done():
                _finetune(pair.encoder(model, epoch), jobs[model], public, epochs)
    return dataclasses.replace(pair, jobs=jobs)


def _two(views: dict) -> dict:
    """Return the views without small local ones: only DINO has them."""
    return {name: value for name, value in views.items() if not name.startswith("local")}


def _finetune(encoder: Encoder, job: train.Job, public: images.Images, epochs: int) -> None:
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
    values: Tensor, like: Tensor, noise: float = 0.0, bits: int = 0, seed: int = 0
) -> Tensor:
    """Return embeddings (n, d) as somebody would hand them out: with noise, or rounded to 2^bits
    levels a number.

    `noise` is the deviation of Gaussian noise in deviations of each dimension over `like` (m, d),
    drawn from `seed` once for an embedding. `bits` from 1 on: as many levels between the 1st and
    99th percentile of each dimension. 0 leaves the values as they are. The same for queries, public
    set and probe: nobody has anything better.
    """
    if noise < 0 or bits < 0 or bits > 16:
        raise ValueError(
            f"knobs.release: noise {noise}, bits {bits}; expected noise >= 0 and 0 to 16 bits"
        )
    if noise:
        drawn = torch.randn(values.shape, generator=train.stream(seed, "release"))
        values = values + noise * like.std(0) * drawn
    if bits:
        some = like[
            :: len(like) // 4096 + 1
        ].float()  # torch.quantile refuses more than 16 million numbers
        low, high = torch.quantile(some, torch.tensor([0.01, 0.99]), dim=0)
        step = (high - low).clamp_min(1e-12) / (2**bits - 1)
        values = low + ((values - low) / step).round().clamp(0, 2**bits - 1) * step
    return values
