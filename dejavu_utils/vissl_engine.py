"""Training through VISSL's own engine (0.1.6): its models, losses, optimisers and loop, in a
process of its own.

VISSL has SimCLR, Barlow Twins, MoCo, SwAV and DINO, and neither VICReg nor BYOL. Its Barlow Twins
is NOT the paper's equation: it standardises both views by one mean and deviation, the paper each
view by its own (a test shows the numbers); for the equation use our own loop. One device a job,
full precision. Importing this does not import VISSL.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dejavu_utils import store
from dejavu_utils.models.jobs import Job, load_job, open_log
from dejavu_utils.models.recipe import Recipe
from dejavu_utils.models.views import MEAN, STD, Views

if TYPE_CHECKING:
    from classy_vision.tasks import ClassyTask

    from dejavu_utils.data.lazy import Lazy

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
    recipe = job.recipe
    gpu = job.device == "cuda"
    epochs = max(1, *job.epochs)
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


def constants() -> dict[str, set[str]]:
    """Return {criterion: the names of its constants} of the criteria that VISSL trains."""
    return {criterion: set(names) for criterion, (_, _, names) in LOSSES.items()}


def require() -> None:
    """Return if VISSL is installed; ModuleNotFoundError says how to add it."""
    for module, package in (
        ("vissl", "--no-deps vissl==0.1.6"),
        ("pkg_resources", '"setuptools<82"'),
    ):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f'the engine "vissl" needs the module {module}, which is not installed: run `make '
                ".venv/.installed` or "
                f"`pip install {package}`. Everything else works without it, our own engine "
                "trains too."
            )


def checkpoint(job: Job, epoch: int) -> Path:
    """Return where VISSL's checkpoint of `epoch` is kept; 0 is its untrained model, in the same
    layout.
    """
    return Path(job.folder) / f"epoch-{epoch:04d}.torch"


def fit(job: Job) -> None:
    """Train `job` (a jobs.Job) with VISSL to its end and keep VISSL's checkpoint of each of
    `job.epochs`.

    A killed run goes on after its last whole epoch. Order and views are drawn from (seed, step), so
    it ends with the same bits as one that was not killed; but for MoCo and DINO, where VISSL's
    restart leaves out an update of the slow copy and normalises prototypes once more. log.jsonl has
    a line an epoch, vissl.log all that VISSL says. ValueError names what VISSL has, RuntimeError
    carries the last lines of a run that failed.
    """
    with store.lock(Path(job.folder) / "vissl"):
        if job.done():
            return
        require()
        _run(job)
        for path in work(job).glob("*.torch"):
            path.unlink()


def export_images(images: torch.Tensor | Lazy, folder: Path) -> None:
    """Write pictures (3, H, W) uint8, n of them, as lossless PNG files all/0000000.png and on,
    unless all are there.
    """
    from PIL import Image

    if len(list(folder.glob("all/*.png"))) == len(images):
        return
    part = folder.with_name(f"{folder.name}.part")
    for stale in (folder, part):
        shutil.rmtree(stale, ignore_errors=True)
    (part / "all").mkdir(parents=True)
    for i in range(len(images)):
        picture = Image.fromarray(images[i].permute(1, 2, 0).numpy())
        picture.save(part / "all" / f"{i:07d}.png", compress_level=1)
    part.rename(folder)


def _keep(job: Job, epoch: int, write: Callable[[Path], None]) -> None:
    """Keep what `write(path)` writes as the checkpoint of `epoch`, if that is wanted and not
    there.
    """
    if epoch not in job.epochs or store.intact(checkpoint(job, epoch)):
        return
    recipe = dataclasses.asdict(job.recipe)
    meta = {
        "parameters": {name: recipe[name] for name in ("encoder", "projector", "size")},
        "recipe": recipe,
        "epoch": epoch,
        "seed": job.seed,
        "precision": "torch.float32",
        "engine": "vissl 0.1.6",
    }
    with store.artifact(checkpoint(job, epoch), meta) as temporary:
        write(temporary)


def _epoch(path: Path) -> int:
    return int(re.search(r"phase(\d+)", path.name)[1]) + 1  # VISSL counts from 0


def _keep_written(job: Job) -> None:
    """Keep the wanted checkpoints that VISSL wrote; of its own files only the last whole one stays,
    to go on from.
    """
    files = sorted(work(job).glob("model_*phase*.torch"), key=_epoch)
    whole = [
        path for path in files if zipfile.is_zipfile(path)
    ]  # a kill cuts the end off, where its index is
    for path in whole:
        _keep(job, _epoch(path), lambda temporary, path=path: shutil.copyfile(path, temporary))
    for path in set(files) - set(whole[-1:]):
        path.unlink()


def _prepare(job: Job) -> Path:
    """Return the folder that VISSL works in, after writing its configuration, the job and its
    pictures.
    """
    import yaml

    images, folder = job.read()["images"], work(job)
    text = yaml.safe_dump({"config": config(job, len(images))})
    (folder / "configs" / "config").mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "config" / "job.yaml").write_text(f"# @package _global_\n{text}")
    (folder / "job.json").write_text(
        json.dumps(dataclasses.asdict(job) | {"folder": str(folder.parent)})
    )
    export_images(images, Path(job.folder) / "images")
    return folder


def _run(job: Job) -> None:
    """Train in a process of its own, in its own folder; RuntimeError if a checkpoint is missing
    afterwards.
    """
    folder, log = _prepare(job), Path(job.folder) / "vissl.log"
    threads, path = (
        str(job.recipe.threads),
        os.pathsep.join([str(store.PACKAGE.parent), *filter(None, sys.path)]),
    )
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONPATH": path,
    }
    with log.open("ab") as out:
        code = subprocess.run(
            [sys.executable, "-m", "dejavu_utils.vissl_engine", "job.json"],
            cwd=folder,
            stdout=out,
            env=environment,
            stderr=subprocess.STDOUT,
        ).returncode
    _keep_written(job)
    if missing := [epoch for epoch in job.epochs if not checkpoint(job, epoch).exists()]:
        words = "\n".join(log.read_text(errors="replace").strip().splitlines()[-5:])
        raise RuntimeError(
            f"VISSL ended with code {code} and without epoch {missing[0]}. {log} ends "
            f"with:\n{words}"
        )


def shim() -> None:
    """Give VISSL 0.1.6, of 2021, the names that torchvision and numpy have dropped since; only in
    its own process.
    """
    from torchvision.datasets import kinetics

    kinetics.Kinetics400 = kinetics.Kinetics
    for name, kind in (("float", float), ("int", int), ("object", object), ("str", str)):
        setattr(np, name, kind)


class _Epochs:
    """The hook that VISSL calls before its own ones: seeds, log, kept checkpoints."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.parent = job, os.getppid()

    def on_start(self, task: ClassyTask) -> None:
        done = task.train_phase_idx + 1
        self.log = open_log(Path(self.job.folder) / "log.jsonl", done)
        if done == 0:
            state = {
                "type": "consolidated",
                "phase_idx": -1,
                "train_phase_idx": -1,
                "iteration": 0,
                "iteration_num": -1,
                "loss": task.loss.state_dict(),
                "classy_state_dict": task.get_classy_state(),
            }
            _keep(self.job, 0, lambda temporary: torch.save(state, temporary))
        self._reseed(task)

    def _reseed(self, task: ClassyTask) -> None:
        number = seed(self.job.seed, task.iteration)
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002 VISSL's transforms draw from it
        torch.manual_seed(number)

    def on_phase_start(self, task: ClassyTask) -> None:
        _keep_written(self.job)
        if os.getppid() != self.parent:
            raise SystemExit(f"{self.job.folder}: stopped, the starting process ended")
        self.began, self.losses = time.monotonic(), []

    def on_forward(self, task: ClassyTask) -> None:
        """Stop where VISSL would go on: it trains on grey for a picture it cannot read, and saves
        after a NaN.
        """
        outputs = task.last_batch.model_output
        if int(task.last_batch.sample["data_valid"][0].min()) < 0:
            raise ValueError(
                f"VISSL cannot read a picture of {self.job.folder}/images: delete that folder, "
                "run again"
            )
        if not all(
            part.isfinite().all() for part in (outputs if isinstance(outputs, list) else [outputs])
        ):
            raise FloatingPointError(
                f"the model's output is not finite at step {task.iteration}: lower recipe lr"
            )

    def on_step(self, task: ClassyTask) -> None:
        self.losses.append(task.last_batch.loss.item())
        self._reseed(task)

    def on_phase_end(self, task: ClassyTask) -> None:
        mean = sum(self.losses) / len(self.losses)
        line = {
            "epoch": task.train_phase_idx + 1,
            "loss": mean,
            "seconds": round(time.monotonic() - self.began, 4),
        }
        self.log.write(json.dumps(line) + "\n")

    def on_end(self, task: ClassyTask) -> None:
        """Do nothing: the process that started this one keeps the last checkpoint."""


def _main(path: str) -> None:
    """Run VISSL on the job in `path`; the working folder holds its configuration."""
    shim()
    from classy_vision.hooks import ClassyHook
    from vissl.engines import train as engine
    from vissl.hooks import default_hook_generator
    from vissl.utils.distributed_launcher import launch_distributed
    from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict

    job = load_job(json.loads(Path(path).read_text()))
    hook = type("Epochs", (_Epochs, ClassyHook), {})(job)
    engine.print_system_env_info = lambda environment: (
        None
    )  # VISSL would log every variable, passwords included
    torch.nn.SyncBatchNorm.convert_sync_batchnorm = lambda module: (
        module
    )  # GPUs only; one process needs none
    with store.lock(
        work(job) / "running"
    ):  # until one whose starting process was killed has stopped
        _keep_written(job)
        _, configuration = convert_to_attrdict(compose_hydra_configuration(["config=job"]))
        launch_distributed(
            configuration, 0, "train", lambda cfg: [hook, *default_hook_generator(cfg)]
        )


if __name__ == "__main__":
    _main(sys.argv[1])
