"""Training an encoder: one loop, exact resume, a line of JSON per epoch."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dejavu_utils import store
from dejavu_utils.models import distributed, feed, methods, own_format
from dejavu_utils.models.encoders import Encoder
from dejavu_utils.models.jobs import Job, load_job, open_log
from dejavu_utils.models.recipe import Recipe

if TYPE_CHECKING:
    from dejavu_utils.data.lazy import Lazy


def constants() -> dict[str, set[str]]:
    """Return {criterion: the names of its constants} of the criteria that this loop trains."""
    return {criterion: set(methods.constants(criterion)) for criterion in methods.METHODS}


def stream(seed: int | str, purpose: str, device: str = "cpu") -> torch.Generator:
    """Return the generator for one purpose: equal (seed, purpose) draw equal numbers, whatever else
    was drawn.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def precision(name: str, device: str) -> torch.dtype:
    """Return the autocast type for `name` ("auto", "bf16", "fp32"): auto is bf16 where the hardware
    computes it.
    """
    known = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if name != "auto":
        return known[name]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    computes = torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 torch has no public test
    return torch.bfloat16 if computes else torch.float32


def make_optimizer(method: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser of the trained weights; biases and norms do not decay."""
    trained = [p for p in method.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    from timm.optim import (
        Lars,
    )  # the paper's optimiser; its trust ratio skips tensors without weight decay

    return Lars(groups, lr=0.0, momentum=0.9, trust_coeff=0.001)


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Return the rate at `step` of `steps`: linear warm-up, then cosine to a thousandth of the
    peak.
    """
    peak = recipe.lr * recipe.batch / 256
    warm = max(1, round(recipe.warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return methods.cosine(peak, 0.001 * peak, (step - warm) / max(1, steps - warm))


class Training:
    """One encoder in training: everything that a checkpoint must hold, and one epoch at a time.

    `images` uint8 (n, 3, H, W), or lazy ones with their `sizes` (n, 2), see feed.Feed. Each epoch's
    order and views come from streams named by (seed, epoch), so the state at the end of an epoch is
    the method (encoder, heads, slow copy), the optimiser and the epoch's number, and a resumed run
    has the same bits.
    """

    def __init__(
        self,
        images: Tensor | Lazy,
        recipe: Recipe,
        epochs: int,
        seed: int | str,
        device: str = "cpu",
        labels: Tensor | None = None,
        classes: int = 0,
        sizes: Tensor | None = None,
    ) -> None:
        rank, processes, self.device = distributed.start(device)
        self.recipe, self.epochs, self.seed, self.epoch = recipe, epochs, seed, 0
        labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        if sizes is None:
            sizes = torch.tensor(images.shape[:1:-1]).expand(len(images), 2)
        large = methods.METHODS[recipe.criterion].views
        self.feed = feed.Feed(images, sizes, labels, recipe, large, self.device, rank, processes)
        self.dtype = precision(recipe.precision, self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, "weights").initial_seed())
            encoder = Encoder(recipe.encoder, recipe.projector, recipe.size)
            self.method = methods.build(recipe.criterion, encoder, classes, recipe.constants)
        self.method.bf16 = self.dtype == torch.bfloat16
        self.method.to(self.device, memory_format=torch.channels_last).train()
        self.model = self._wrapped(processes)
        self.optimizer = make_optimizer(self.method, recipe)

    def _wrapped(self, processes: int) -> nn.Module:
        """Return the method, compiled and shared between processes as the recipe says."""
        if self.recipe.compile:
            self.method.encoder.trunk.compile()
        if processes == 1:
            return self.method
        if self.recipe.sync_bn:
            distributed.synchronise(self.method, self.device)
        return DistributedDataParallel(self.method, broadcast_buffers=False)

    @property
    def encoder(self) -> Encoder:
        """The encoder that is kept: the one that the gradient reaches (BYOL's online net, DINO's
        student).
        """
        return self.method.encoder

    def run_epoch(self) -> float:
        """Return the mean loss of the next epoch, after training it; FloatingPointError names a
        step that broke it.
        """
        rng, steps = stream(self.seed, f"epoch {self.epoch}", self.device), self.feed.steps
        losses = torch.zeros(
            steps, device=self.device
        )  # read once an epoch: a look at each would stall a GPU
        for i, (views, labels) in enumerate(self.feed.epoch(rng)):
            losses[i] = self._step(views, labels, self.epoch * steps + i, self.epochs * steps)
        if not torch.isfinite(losses).all():
            step = int((~torch.isfinite(losses)).nonzero()[0])
            raise FloatingPointError(
                f"train: the loss became {losses[step].item()} in epoch {self.epoch + 1}, step "
                f"{step + 1} of {steps}"
            )
        self.epoch += 1
        return float(losses.double().mean())

    def _step(self, views: list[Tensor], labels: Tensor, step: int, steps: int) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, self.recipe)
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        loss = self.model(views, labels, step / steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.method.after_step((step + 1) / steps)
        return loss.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs, as named tensors: the method's and the
        optimiser's.
        """
        state = {f"method.{name}": value for name, value in self.method.state_dict().items()}
        for i, slots in self.optimizer.state_dict()["state"].items():
            state |= {
                f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in slots.items()
            }
        return state

    def restore(self, tensors: dict[str, Tensor], epoch: int, where: str | Path) -> None:
        """Continue from what `tensors()` returned at the end of `epoch`."""
        state = {
            n.removeprefix("method."): t for n, t in tensors.items() if n.startswith("method.")
        }
        own_format.fill(self.method, state, where)
        slots: dict[int, dict] = {}
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, slot = name.split(".", 2)
                like = weights[
                    int(index)
                ]  # a moment must lie in memory as its weight does, or the bits differ
                value = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
                slots.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})
        self.epoch = epoch


def fit(job: Job, every: float = 30.0) -> None:
    """Train `job` to its end, from its last state if there is one, and keep the encoder of each of
    `job.epochs`.

    A state is saved every `every` seconds: a killed run loses no more, and its rerun ends with the
    same bits. One line of JSON per epoch goes to log.jsonl. FloatingPointError says where a loss
    stopped being finite.
    """
    torch.set_num_threads(job.recipe.threads)
    training = Training(
        recipe=job.recipe,
        epochs=max(job.epochs),
        seed=job.seed,
        device=job.device,
        classes=job.classes,
        **job.read(),
    )
    last = Path(job.folder) / "last.safetensors"
    if store.intact(last):
        tensors, meta = store.read_tensors(last)
        training.restore(tensors, meta["epoch"], last)
    run_epochs(training, job, last, every, writes=distributed.rank() == 0)
    if distributed.rank() == 0:
        for path in (last, store.sidecar(last)):
            path.unlink(missing_ok=True)


def run_epochs(training: Training, job: Job, last: Path, every: float, writes: bool) -> None:
    """Run the epochs that are left; keep the encoders that `job` wants, and the state in `last`.

    Only the process that `writes` keeps anything: of several, the first. SystemExit where the
    starting process has ended, FloatingPointError where a loss stopped being finite.
    """
    parent, saved = os.getppid(), time.monotonic()
    log = open_log(Path(job.folder) / "log.jsonl", training.epoch) if writes else None
    while True:
        kept = job.checkpoint(training.epoch)
        if writes and training.epoch in job.epochs and not store.intact(kept):
            own_format.save(
                kept,
                training.encoder,
                job.recipe,
                epoch=training.epoch,
                seed=job.seed,
                precision=str(training.dtype),
            )
        if training.epoch >= training.epochs:
            return
        if writes and time.monotonic() - saved > every:
            store.write_tensors(
                last, training.tensors(), {"epoch": training.epoch, "seed": job.seed}
            )
            saved = time.monotonic()
        if os.getppid() != parent:  # whoever started this is gone: stop at a whole state
            raise SystemExit(
                f"{job.folder}: stopped at epoch {training.epoch}, the starting process ended"
            )
        began = time.monotonic()
        try:
            loss = training.run_epoch()
        except FloatingPointError as error:
            text = f"{error}; {job.folder} keeps the last good state: lower the recipe's lr"
            raise FloatingPointError(text) from None
        if log:
            line = {
                "epoch": training.epoch,
                "loss": loss,
                "seconds": round(time.monotonic() - began, 4),
            }
            log.write(json.dumps(line) + "\n")


if (
    __name__ == "__main__"
):  # one of torchrun's processes: `torchrun … -m dejavu_utils.models.train run.json`
    fit(load_job(json.loads(Path(sys.argv[1]).read_text())))
