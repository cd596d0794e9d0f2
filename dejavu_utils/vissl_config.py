"""What a recipe is in VISSL's words: the configuration that its engine trains from.

VISSL 0.1.6 has SimCLR, Barlow Twins, MoCo, SwAV and DINO (here with two views), and neither VICReg
nor BYOL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dejavu_utils import store
from dejavu_utils.views import MEAN, STD, Views

if TYPE_CHECKING:
    from dejavu_utils.train import Job, Recipe

# criterion: VISSL's loss, its collator, {our constant: VISSL's name}; one that is not given is
# VISSL's own
LOSSES = {
    "simclr": ("simclr_info_nce_loss", "simclr_collator", {"temperature": "temperature"}),
    "barlow_twins": (
        "barlow_twins_loss",
        "simclr_collator",
        {"redundancy": "lambda_", "scale": "scale_loss"},
    ),
    "moco": ("moco_loss", "moco_collator", {"temperature": "temperature", "momentum": "momentum"}),
    "swav": (
        "swav_loss",
        "multicrop_collator",
        {"temperature": "temperature", "epsilon": "epsilon", "prototypes": "num_prototypes"},
    ),
    "dino": (
        "dino_loss",
        "multicrop_collator",
        {
            "momentum": "momentum",
            "student_temperature": "student_temp",
            "teacher_start": "teacher_temp_min",
            "teacher_temperature": "teacher_temp_max",
            "teacher_warmup": "teacher_temp_warmup_iters",
            "centre_momentum": "ema_center",
            "prototypes": "output_dim",
        },
    ),
}
ENCODERS = {
    f"resnet{depth}{suffix}": (depth, width)
    for depth in (50, 101, 152, 200)
    for suffix, width in (("", 1), ("-w2", 2), ("-w4", 4))
}  # w: that many times as wide
OPTIMIZERS = {"sgd": {"use_larc": False}, "lars": {"exclude_bias_and_norm": True}, "adamw": {}}


def config(job: Job, images: int) -> dict:
    """Return VISSL's configuration for training `job` on so many images; ValueError names what
    VISSL has.
    """
    recipe, gpu, epochs = job.recipe, job.device == "cuda", max(1, *job.epochs)
    _known("criterion", recipe.criterion, LOSSES)
    _known("precision", recipe.precision, ("auto", "fp32"))
    _known("device", job.device, ("cpu", "cuda"))
    _known("number of processes", recipe.processes * recipe.nodes, (1,))
    if images < recipe.batch:
        raise ValueError(
            f"train: a batch of {recipe.batch} needs as many images, found {images}: "
            "lower recipe batch or raise sizes"
        )
    folder, steps = str(Path(job.folder).resolve() / "images"), images // recipe.batch
    train = {
        "DATA_SOURCES": ["disk_folder"],
        "DATASET_NAMES": ["images"],
        "DATA_PATHS": [folder],
        "LABEL_PATHS": [folder],
        "LABEL_TYPE": "sample_index",
        "BATCHSIZE_PER_REPLICA": recipe.batch,
        "DROP_LAST": True,
        "USE_STATEFUL_DISTRIBUTED_SAMPLER": True,  # the other sampler ignores the seed
        "TRANSFORMS": _transforms(recipe),
        "COLLATE_FUNCTION": LOSSES[recipe.criterion][1],
    }
    return {
        "SEED_VALUE": seed(job.seed) % (2**31 // epochs),  # VISSL seeds with this times the epochs
        "TEST_MODEL": False,
        "MULTI_PROCESSING_METHOD": "fork",  # workers that fork need no shim of their own
        "DATA": {
            "NUM_DATALOADER_WORKERS": recipe.workers or (store.cores() - 1) * gpu,
            "TRAIN": train,
        },
        "MODEL": _model(recipe, steps),
        "LOSS": _loss(recipe, images, epochs * steps),
        "OPTIMIZER": _optimizer(recipe, epochs, steps),
        "MACHINE": {"DEVICE": "gpu" if gpu else "cpu"},
        "DISTRIBUTED": {
            "BACKEND": "nccl" if gpu else "gloo",
            "NUM_NODES": 1,
            "NUM_PROC_PER_NODE": 1,
        },
        "CHECKPOINT": {"DIR": str(work(job)), "CHECKPOINT_FREQUENCY": 1},
    }


def _known(what: str, value: str | int, choices: Iterable[str | int]) -> None:
    if value not in choices:
        raise ValueError(
            f'the engine "vissl" has no {what} "{value}", it has {", ".join(map(str, choices))}: '
            "choose one of them, or our own engine"
        )


def _transforms(recipe: Recipe) -> list[dict]:
    """Return our two views (views.Views) as VISSL's transforms, with the same parameters.

    VISSL's colour distortion has other saturation, its solarization a random threshold:
    torchvision's are used instead.
    """
    views, blur = (
        Views(**recipe.views),
        recipe.size / 224,
    )  # px of the blur that is one pixel at 224
    _known("views local", views.local, (0,))

    def apply(first: float, second: float, **transform: str | float) -> dict:
        return {
            "name": "ImgPilMultiCropRandomApply",
            "transforms": [transform],
            "prob": [first, second],
        }

    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    jitter = {name: value * views.strength for name, value in jitter.items()}
    return [
        {"name": "ImgReplicatePil", "num_times": 2},
        {
            "name": "RandomResizedCrop",
            "size": recipe.size,
            "scale": [views.scale_min, views.scale_max],
        },
        {"name": "RandomHorizontalFlip", "p": views.flip},
        apply(views.jitter, views.jitter, name="ColorJitter", **jitter),
        {"name": "RandomGrayscale", "p": views.grey},
        apply(
            views.blur,
            0.0,
            name="ImgPilGaussianBlur",
            p=1.0,
            radius_min=0.1 * blur,
            radius_max=2.0 * blur,
        ),
        apply(0.0, views.solarize, name="RandomSolarize", threshold=128, p=1.0),
        {"name": "ToTensor"},
        {"name": "Normalize", "mean": list(MEAN), "std": list(STD)},
    ]


def _model(recipe: Recipe, steps: int) -> dict:
    """Return the trunk, and a head with the layers of our projector; SwAV and DINO put prototypes
    on it.
    """
    _known("encoder", recipe.encoder, ENCODERS)
    depth, width = ENCODERS[recipe.encoder]
    head = {"dims": [2048 * width, *map(int, recipe.projector.split("-"))], "use_bn": True}
    trunk = {"NAME": "resnet", "RESNETS": {"DEPTH": depth, "WIDTH_MULTIPLIER": width}}
    if "prototypes" not in LOSSES[recipe.criterion][2]:
        return {"TRUNK": trunk, "HEAD": {"PARAMS": [["mlp", head | {"use_relu": True}]]}}
    head["num_clusters"] = [recipe.constants.get("prototypes", 1024)]
    return {
        "TRUNK": trunk,
        "HEAD": {"PARAMS": [["swav_head", head]]},  # frozen for an epoch, as in VISSL's own recipes
        "TEMP_FROZEN_PARAMS_ITER_MAP": [["module.heads.0.prototypes0.weight", steps]],
    }


def _loss(recipe: Recipe, images: int, steps: int) -> dict:
    name, _, constants = LOSSES[recipe.criterion]
    for constant in recipe.constants:
        _known(f"{recipe.criterion} constant", constant, constants)
    given = {
        theirs: recipe.constants[ours]
        for ours, theirs in constants.items()
        if ours in recipe.constants
    }
    width, warm = int(recipe.projector.split("-")[-1]), recipe.constants.get("teacher_warmup", 0.05)
    sizes = {
        "simclr": {"buffer_params": {"embedding_dim": width}},
        "barlow_twins": {"embedding_dim": width},
        # whole batches of keys, and no picture twice: its older key would count as a negative
        "moco": {
            "embedding_dim": width,
            "queue_size": min(65536, images) // recipe.batch * recipe.batch,
        },
        "dino": {"num_crops": 2, "teacher_temp_warmup_iters": round(warm * steps)},
    }
    return {"name": name, name: given | sizes.get(recipe.criterion, {})}


def _optimizer(recipe: Recipe, epochs: int, steps: int) -> dict:
    """Return optimiser and schedule: as in train.learning_rate, linear warm-up, cosine to a
    thousandth of the peak.
    """
    _known("optimizer", recipe.optimizer, OPTIMIZERS)
    peak, warm = recipe.lr * recipe.batch / 256, max(1, round(recipe.warmup * epochs * steps))
    share = warm / (epochs * steps)
    schedule = {
        "name": "composite",
        "lengths": [share, 1 - share],
        "interval_scaling": ["rescaled", "rescaled"],
        "schedulers": [
            {"name": "linear", "start_value": peak / warm, "end_value": peak + peak / warm},
            {"name": "cosine", "start_value": peak, "end_value": 0.001 * peak},
        ],
    }
    return {
        "name": recipe.optimizer,
        "weight_decay": recipe.weight_decay,
        "momentum": 0.9,
        "num_epochs": epochs,
        "regularize_bn": False,
        "regularize_bias": False,
        **OPTIMIZERS[recipe.optimizer],
        "param_schedulers": {"lr": schedule | {"update_interval": "step"}},
    }


def seed(*names: int | str) -> int:
    """Return 32 bits that depend on `names` alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:4], "little")


def work(job: Job) -> Path:
    """Return the folder in which VISSL works on `job`."""
    return Path(job.folder).resolve() / "vissl"
