"""Training an encoder: one loop, exact resume, a line of JSON per epoch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dejavu_utils import checkpoints, criteria, store
from dejavu_utils.models import Encoder
from dejavu_utils.views import Views, view


@dataclass(frozen=True)
class Recipe:
    """How encoders are trained; the defaults are for two CPU cores, the profile `imagenet` has the paper's (§2.2)."""

    criterion: str = "vicreg"            # "vicreg" or "simclr"
    encoder: str = "small32"             # trunk, see models.trunk
    projector: str = "512-512-512"       # widths of the projector's layers
    size: int = 32                       # px, side of the square that the encoder sees
    batch: int = 50                      # images a step; the last incomplete batch of an epoch is dropped
    optimizer: str = "adamw"             # "adamw" or "lars"
    lr: float = 0.01                     # peak, per 256 images: the step uses lr * batch / 256
    weight_decay: float = 1e-6           # on weights only, not on biases and norms
    warmup: float = 0.05                 # share of the steps with a linearly rising rate
    constants: dict = field(default_factory=lambda: {"temperature": 0.2})  # of the criterion, e.g. {"invariance": 25.0}
    views: dict = field(default_factory=lambda: {"scale_min": 0.04, "strength": 0.4, "blur": 0.0})  # see views.Views
    precision: str = "auto"              # "fp32", "bf16" or "auto": bf16 where the processor computes it
    threads: int = 1                     # CPU threads of one job: 1 and 2 give different bits


def stream(seed: int, purpose: str, device: str = "cpu") -> torch.Generator:
    """Return the generator for one purpose: equal (seed, purpose) draw equal numbers, whatever else was drawn."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def precision(name: str, device: str) -> torch.dtype:
    """Return the autocast type for `name` ("auto", "bf16", "fp32"): auto is bf16 where the hardware computes it."""
    known = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if name != "auto":
        return known[name]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def _optimizer(encoder: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    weights = [p for p in encoder.parameters() if p.ndim > 1]
    others = [p for p in encoder.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    from timm.optim import Lars  # the paper's optimiser; its trust ratio skips tensors without weight decay

    return Lars(groups, lr=0.0, momentum=0.9, trust_coeff=0.001)


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Return the rate at `step` of `steps`: linear warm-up, then cosine to a thousandth of the peak."""
    peak = recipe.lr * recipe.batch / 256
    warm = max(1, round(recipe.warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    return peak * (0.001 + 0.999 * cosine)


class Training:
    """One encoder in training: everything that a checkpoint must hold, and one epoch at a time.

    `pixels` (n, 3, H, W) uint8. Each epoch's order and views come from streams named by (seed, epoch), so the state at
    the end of an epoch is the model, the optimiser and the epoch's number, and a resumed run has the same bits.
    """

    def __init__(self, pixels: Tensor, recipe: Recipe, epochs: int, seed: int, device: str = "cpu"):
        if len(pixels) < recipe.batch:
            raise ValueError(f"train: a batch of {recipe.batch} needs as many images, found {len(pixels)}: "
                             "lower recipe batch or raise sizes")
        self.pixels, self.recipe, self.epochs, self.seed, self.device = pixels.to(device), recipe, epochs, seed, device
        self.dtype = precision(recipe.precision, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, "weights").initial_seed())
            self.encoder = Encoder(recipe.encoder, recipe.projector, recipe.size)
        self.encoder.to(device, memory_format=torch.channels_last).train()
        self.optimizer = _optimizer(self.encoder, recipe)
        self.loss = criteria.CRITERIA[recipe.criterion]
        self.views = Views(**recipe.views)
        self.epoch = 0

    def run_epoch(self) -> float:
        """Return the mean loss of the next epoch, after training it."""
        rng = stream(self.seed, f"epoch {self.epoch}", self.device)
        order = torch.randperm(len(self.pixels), generator=rng, device=self.device)
        per_epoch = len(order) // self.recipe.batch
        total = torch.zeros((), device=self.device)
        for i in range(per_epoch):
            rate = learning_rate(self.epoch * per_epoch + i, self.epochs * per_epoch, self.recipe)
            total += self._step(order[i * self.recipe.batch:(i + 1) * self.recipe.batch], rate, rng)
        mean = total.item() / per_epoch
        if not math.isfinite(mean):
            raise FloatingPointError(f"train: the loss became {mean} in epoch {self.epoch + 1}")
        self.epoch += 1
        return mean

    def _step(self, index: Tensor, rate: float, rng: torch.Generator) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch, size = self.pixels[index], self.recipe.size
        both = torch.cat([view(batch, size, self.views, rng), view(batch, size, self.views, rng, second=True)])
        both = both.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            z = self.encoder(both).float()
        z1, z2 = z.chunk(2)
        loss = self.loss(z1, z2, **self.recipe.constants)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs, as named tensors: the encoder's and the optimiser's."""
        state = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        for i, slots in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in slots.items()}
        return state

    def restore(self, tensors: dict[str, Tensor], epoch: int, where: str | Path) -> None:
        """Continue from what `tensors()` returned at the end of `epoch`."""
        weights = {n.removeprefix("encoder."): t for n, t in tensors.items() if n.startswith("encoder.")}
        checkpoints.fill(self.encoder, weights, where)
        slots: dict[int, dict] = {}
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, slot = name.split(".", 2)
                like = weights[int(index)]  # a moment must lie in memory as its weight does, or the bits differ
                value = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
                slots.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})
        self.epoch = epoch


@dataclass(frozen=True)
class Job:
    """One encoder to train: `pixels` is the path of a tensor artifact that holds "pixels" (n, 3, H, W) uint8."""

    pixels: str
    folder: str
    recipe: Recipe
    epochs: list[int]  # epochs at which the encoder is kept; 0 is the untrained one, the last ends training
    seed: str
    device: str = "cpu"

    def checkpoint(self, epoch: int) -> Path:
        """Return where the encoder of `epoch` is kept."""
        return Path(self.folder) / f"epoch-{epoch:04d}.safetensors"

    def done(self) -> bool:
        """Return whether every checkpoint is there."""
        return all(self.checkpoint(epoch).exists() for epoch in self.epochs)


def fit(job: Job, every: float = 30.0) -> None:
    """Train `job` to its end, from its last state if there is one, and keep the encoder of each of `job.epochs`.

    A state is saved every `every` seconds: a killed run loses no more, and its rerun ends with the same bits. One line
    of JSON per epoch goes to log.jsonl. FloatingPointError says where a loss stopped being finite.
    """
    with store.lock(Path(job.folder) / "training"):
        if job.done():
            return
        torch.set_num_threads(job.recipe.threads)
        pixels = store.read_tensors(job.pixels)[0]["pixels"]
        training = Training(pixels, job.recipe, max(job.epochs), job.seed, job.device)
        last = Path(job.folder) / "last.safetensors"
        if last.exists():
            tensors, meta = store.read_tensors(last)
            training.restore(tensors, meta["epoch"], last)
        _run(training, job, last, every)
        for path in (last, store.sidecar(last)):
            path.unlink(missing_ok=True)


def _run(training: Training, job: Job, last: Path, every: float) -> None:
    parent, saved = os.getppid(), time.monotonic()
    with _open_log(Path(job.folder) / "log.jsonl", training.epoch) as log:
        while True:
            if training.epoch in job.epochs and not job.checkpoint(training.epoch).exists():
                checkpoints.save(job.checkpoint(training.epoch), training.encoder, job.recipe, epoch=training.epoch,
                                 seed=job.seed, precision=str(training.dtype))
            if training.epoch >= training.epochs:
                return
            if time.monotonic() - saved > every:
                store.write_tensors(last, training.tensors(), {"epoch": training.epoch, "seed": job.seed})
                saved = time.monotonic()
            if os.getppid() != parent:  # whoever started this is gone: stop at a whole state
                raise SystemExit(f"{job.folder}: stopped at epoch {training.epoch}, the starting process ended")
            began = time.monotonic()
            try:
                loss = training.run_epoch()
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"{error}; {job.folder} keeps the last good state: lower the recipe's lr") from None
            line = {"epoch": training.epoch, "loss": loss, "seconds": round(time.monotonic() - began, 4)}
            log.write(json.dumps(line) + "\n")


def _open_log(path: Path, epoch: int):
    """Return the log, cut back to `epoch` (a resumed run writes the later lines again), open for appending by lines."""
    kept = [line for line in read_log(path) if line["epoch"] <= epoch]
    with store.atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return path.open("a", buffering=1)


def read_log(path: str | Path) -> list[dict]:
    """Return the lines of a training log; a last line that a kill cut short is left out."""
    path = Path(path)
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def fit_all(jobs: list[Job], workers: int | None = None, progress=None) -> None:
    """Train all jobs, `workers` at a time, each worker a process of its own; those that are done cost nothing.

    `workers` defaults to the cores divided by a job's threads. `progress(done, total, text)` is called about once a
    second, in epochs. RuntimeError carries the last lines of a worker that failed; the others' work is kept.
    """
    todo = [job for job in jobs if not job.done()]
    if not todo:
        return
    workers = workers or max(1, store.cores() // todo[0].recipe.threads)
    if workers == 1 or len(todo) == 1:
        for job in todo:
            fit(job)
        return
    running = [_Worker(todo[i::workers]) for i in range(min(workers, len(todo)))]
    try:
        while True:
            time.sleep(0.5)
            codes = [worker.process.poll() for worker in running]
            if progress:
                progress(*_state(todo))
            if failed := [worker for worker, code in zip(running, codes, strict=True) if code]:
                raise RuntimeError(f"training failed: {failed[0].last_words()}")
            if None not in codes:
                return
    finally:
        for worker in running:
            worker.stop()


def _state(jobs: list[Job]) -> tuple[int, int, str]:
    logs = [read_log(Path(job.folder) / "log.jsonl") for job in jobs]
    done = sum(log[-1]["epoch"] if log else 0 for log in logs)
    losses = [f"{log[-1]['loss']:.2f}" for log, job in zip(logs, jobs, strict=True) if log and not job.done()]
    return done, sum(max(job.epochs) for job in jobs), "loss " + " ".join(losses) if losses else ""


class _Worker:
    """A process that trains a list of jobs, one after the other."""

    def __init__(self, jobs: list[Job]):
        self.log = Path(jobs[0].folder) / "worker.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(jobs[0].recipe.threads)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dejavu_utils.train"], stdin=subprocess.PIPE, stderr=self.log.open("wb"),
            cwd=store.PACKAGE.parent, env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads})
        self.process.stdin.write(json.dumps([dataclasses.asdict(job) for job in jobs]).encode())
        self.process.stdin.close()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()

    def last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-5:])


if __name__ == "__main__":
    for entry in json.load(sys.stdin):
        fit(Job(**entry | {"recipe": Recipe(**entry["recipe"])}))
