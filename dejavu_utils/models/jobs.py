"""What is to be trained: a job and its log, whichever engine trains it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from dejavu_utils import store
from dejavu_utils.models import feed
from dejavu_utils.models.recipe import Recipe


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
        """Return whether every checkpoint is there, and intact."""
        return all(store.intact(self.checkpoint(epoch)) for epoch in self.epochs)

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
