"""What is to be trained: a recipe, a job, and the job's log, whichever engine trains it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from dejavu_utils import store
from dejavu_utils.models import feed


@dataclass(frozen=True)
class Recipe:
    """How encoders are trained; the defaults are for two CPU cores, the profile `imagenet` has the
    paper's (§2.2).
    """

    criterion: str = "vicreg"  # "vicreg", "barlow_twins", "simclr", "byol", "dino" or "supervised"
    encoder: str = "small32"  # trunk, see models.trunk
    projector: str = "512-512-512"  # widths of the projector's layers
    size: int = 32  # px, side of the square that the encoder sees
    batch: int = 50  # images a step; the last incomplete batch of an epoch is dropped
    optimizer: str = "adamw"  # "adamw" or "lars"
    lr: float = 0.01  # peak, per 256 images: the step uses lr * batch / 256
    weight_decay: float = 1e-6  # on weights only, not on biases and norms
    warmup: float = 0.05  # share of the steps with a linearly rising rate
    constants: dict = field(
        default_factory=lambda: {"temperature": 0.2}
    )  # of the criterion, e.g. {"invariance": 25.0}
    views: dict = field(
        default_factory=lambda: {"scale_min": 0.04, "strength": 0.4, "blur": 0.0}
    )  # see views.Views
    precision: str = "auto"  # "fp32", "bf16" or "auto": bf16 where the processor computes it
    threads: int = 1  # CPU threads of one job: 1 and 2 give different bits
    compile: bool = False  # torch.compile of the trunk: a minute first, faster on a GPU
    resident: float = 8.0  # GiB of pixels kept on the device; more are decoded in workers
    workers: int = 0  # processes that decode; 0 is one less than there are cores
    processes: int = 1  # that share each batch, one device each, started by torchrun
    nodes: int = 1  # machines of so many processes each, started by srun
    sync_bn: bool = False  # batch norms over the joint batch of all processes
    engine: str = "own"  # "own", or "vissl" for VISSL's training engine


@dataclass(frozen=True)
class Job:
    """One encoder to train. `pixels` is the path of what it is trained on: a tensor artifact that
    holds "pixels" (n, 3, H, W) uint8 and "labels" (n,), or a table of pictures still on disk (see
    `pairs`).
    """

    pixels: str
    folder: str
    recipe: Recipe
    epochs: list[
        int
    ]  # epochs at which the encoder is kept; 0 is the untrained one, the last ends training
    seed: str
    device: str = "cpu"
    classes: int = 0  # how many the labels count

    def checkpoint(self, epoch: int) -> Path:
        """Return where the encoder of `epoch` is kept."""
        suffix = "torch" if self.recipe.engine == "vissl" else "safetensors"
        return Path(self.folder) / f"epoch-{epoch:04d}.{suffix}"

    def done(self) -> bool:
        """Return whether every checkpoint is there."""
        return all(self.checkpoint(epoch).exists() for epoch in self.epochs)

    def read(self) -> dict:
        """Return images, labels and, of lazy images, sizes: what `Training` takes."""
        if self.pixels.endswith(".safetensors"):
            tensors = store.read_tensors(self.pixels)[0]
            return {"images": tensors["pixels"], "labels": tensors.get("labels")}
        return feed.read_list(self.pixels)


def open_log(path: Path, epoch: int) -> TextIO:
    """Return the log, cut back to `epoch` (a resumed run writes the later lines again), open for
    appending by lines.
    """
    kept = [line for line in read_log(path) if line["epoch"] <= epoch]
    with store.atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return path.open("a", buffering=1)


def read_log(path: str | Path) -> list[dict]:
    """Return the lines of a training log; a last line that a kill cut short is left out."""
    path = Path(path)
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def load_job(entry: dict) -> Job:
    """Return the job that `dataclasses.asdict` made a dict of."""
    return Job(**entry | {"recipe": Recipe(**entry["recipe"])})
