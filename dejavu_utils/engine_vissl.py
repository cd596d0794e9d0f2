"""Training through VISSL's own engine (0.1.6): its models, losses, optimisers and loop, in a
process of its own.

VISSL has SimCLR, Barlow Twins, MoCo, SwAV and DINO, and neither VICReg nor BYOL. Its Barlow Twins
is NOT the paper's equation: it standardises both views by one mean and deviation, the paper each
view by its own (a test shows the numbers); for the equation use our own loop. One device a job,
full precision. Importing this does not import VISSL.
"""

from __future__ import annotations

import dataclasses
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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dejavu_utils import store
from dejavu_utils.vissl_config import config, seed, work

if TYPE_CHECKING:
    from classy_vision.tasks import ClassyTask

    from dejavu_utils.jobs import Job
    from dejavu_utils.lazy import Lazy


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
        if all(checkpoint(job, epoch).exists() for epoch in job.epochs):
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
    if epoch not in job.epochs or checkpoint(job, epoch).exists():
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
            [sys.executable, "-m", "dejavu_utils.engine_vissl", "job.json"],
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
        from dejavu_utils.jobs import open_log

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

    from dejavu_utils.jobs import load_job

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
