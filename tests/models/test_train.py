"""Training: schedule, exact resume, SIGKILL, streams, and the errors a user can meet."""

import dataclasses
import errno
import json
import math
import os
import random
import signal
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dejavu_utils import store
from dejavu_utils.models import launch, methods, own_format, train
from dejavu_utils.models.jobs import read_log

TINY = train.Recipe(encoder="small4", projector="16-16-16", batch=8, precision="fp32", constants={})


def _job(tmp_path, name="run", recipe=TINY, epochs=(0, 2, 5), seed="0/A"):
    source = tmp_path / "pixels.safetensors"
    if not source.exists():
        pixels = torch.randint(
            0, 256, (32, 3, 48, 48), dtype=torch.uint8, generator=train.stream(0, "pixels")
        )
        store.write_tensors(source, {"pixels": pixels, "labels": torch.arange(32) % 4})
    return train.Job(str(source), str(tmp_path / name), recipe, list(epochs), seed, classes=4)


def _weights(job, epoch):
    return store.read_tensors(job.checkpoint(epoch))[0]


def _equal(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def test_streams_are_named_not_ordered():
    first = torch.rand(3, generator=train.stream(1, "views"))
    train.stream(1, "weights")
    assert torch.equal(first, torch.rand(3, generator=train.stream(1, "views")))
    assert not torch.equal(first, torch.rand(3, generator=train.stream(1, "order")))
    assert not torch.equal(first, torch.rand(3, generator=train.stream(2, "views")))


class Waits(TorchDispatchMode):
    """Counts what a GPU's queue has to run dry for: values that are read, or copied from a list."""

    def __init__(self):
        super().__init__()
        self.read = self.copied = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.read += function is torch.ops.aten._local_scalar_dense.default
        self.copied += function is torch.ops.aten.lift_fresh.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("criterion", list(methods.METHODS))
def test_a_gpu_is_waited_for_once_an_epoch(criterion):
    """Two values are read at its end: whether the losses are finite, and their mean."""
    recipe = dataclasses.replace(TINY, criterion=criterion)
    pixels = torch.randint(0, 256, (32, 3, 40, 40), dtype=torch.uint8)
    training = train.Training(pixels, recipe, 3, "waits", labels=torch.arange(32) % 4, classes=4)
    training.run_epoch()  # constants are copied

    with Waits() as waits:
        training.run_epoch()
    assert training.feed.steps == 4
    assert (waits.read, waits.copied) == (2, 0)


def test_schedule_is_linear_then_cosine():
    recipe = dataclasses.replace(TINY, lr=1.0, batch=256, warmup=0.1)
    rates = [train.learning_rate(step, 100, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    middle = 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * 45 / 90))
    assert rates[55] == pytest.approx(middle)
    assert 0.001 <= rates[-1] < 0.003 and rates[10:] == sorted(rates[10:], reverse=True)


def test_rate_grows_with_the_batch():
    one, two = (
        train.learning_rate(50, 100, dataclasses.replace(TINY, batch=batch)) for batch in (64, 128)
    )
    assert two == pytest.approx(2 * one)


@pytest.mark.parametrize(
    "criterion, optimizer", [*((name, "adamw") for name in methods.METHODS), ("vicreg", "lars")]
)
def test_loss_falls(tmp_path, optimizer, criterion):
    rate = {"adamw": 0.05, "lars": 3.0}[optimizer]
    views = {"local": 2} if criterion == "dino" else {}
    constants = {"prototypes": 32} if criterion == "dino" else {}
    recipe = dataclasses.replace(
        TINY,
        optimizer=optimizer,
        criterion=criterion,
        lr=rate,
        views=views,
        batch=16,
        constants=constants,
    )
    job = _job(tmp_path, recipe=recipe, epochs=(0, 16))
    train.fit(job)
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["epoch"] for line in log] == list(range(1, 17))
    assert sum(line["loss"] for line in log[-4:]) < sum(line["loss"] for line in log[:4])


def test_same_seed_same_bits_other_seed_other_bits(tmp_path):
    jobs = [
        _job(tmp_path, name, seed=seed) for name, seed in (("a", "0/A"), ("b", "0/A"), ("c", "0/B"))
    ]
    for job in jobs:
        train.fit(job)
    one, same, other = (_weights(job, 5) for job in jobs)
    assert _equal(one, same) and not _equal(one, other)


@pytest.mark.parametrize(
    "criterion, optimizer", [*((name, "adamw") for name in methods.METHODS), ("vicreg", "lars")]
)
def test_resume_at_every_epoch_ends_with_the_same_bits(tmp_path, criterion, optimizer):
    job = _job(tmp_path, recipe=dataclasses.replace(TINY, criterion=criterion, optimizer=optimizer))
    train.fit(job)

    def fresh():
        return train.Training(recipe=job.recipe, epochs=5, seed=job.seed, classes=4, **job.read())

    whole = fresh()
    for epoch in range(5):
        part = fresh()
        store.write_tensors(tmp_path / "state.safetensors", whole.tensors())
        part.restore(store.read_tensors(tmp_path / "state.safetensors")[0], epoch, "state")
        while part.epoch < 5:
            part.run_epoch()
        assert _equal(part.encoder.state_dict(), _weights(job, 5)), f"resumed at epoch {epoch}"
        whole.run_epoch()


def _kill_at_random_until_done(job, times, seed):
    """Fork a child that trains `job`, kill it at random moments `times` times, then let one
    finish.
    """
    draw = random.Random(seed)
    for attempt in range(times + 1):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                if not job.done():
                    train.fit(job, every=0.0)
                os._exit(0)
            except BaseException:
                os._exit(1)
        if attempt < times:
            time.sleep(draw.uniform(0.05, 0.6))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return status


@pytest.mark.parametrize("times", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_sigkill_loses_nothing_but_time(tmp_path, times):
    torch.set_num_threads(1)
    epochs = (0, 20, 40)
    whole, killed = _job(tmp_path, "whole", epochs=epochs), _job(tmp_path, "killed", epochs=epochs)
    train.fit(whole)
    assert _kill_at_random_until_done(killed, times, seed=times) == 0
    for epoch in epochs:
        assert _equal(_weights(whole, epoch), _weights(killed, epoch))
    logs = [read_log(f"{job.folder}/log.jsonl") for job in (whole, killed)]
    assert [[line["loss"] for line in log] for log in logs][0] == [line["loss"] for line in logs[1]]
    assert [line["epoch"] for line in logs[1]] == list(range(1, 41))


def test_workers_give_the_bits_of_one_process(tmp_path):
    alone, together = (
        _job(tmp_path, "alone", epochs=(0, 1)),
        [_job(tmp_path, f"w{i}", epochs=(0, 1)) for i in range(2)],
    )
    train.fit(alone)
    seen = []
    launch.fit_all(
        together, workers=2, progress=lambda done, total, text: seen.append((done, total))
    )
    assert all(_equal(_weights(alone, 1), _weights(job, 1)) for job in together)
    assert all(total == 2 for _, total in seen)


def test_worker_failure_is_reported(tmp_path):
    bad = dataclasses.replace(TINY, batch=64)
    with pytest.raises(RuntimeError, match="a batch of 64 needs as many images, found 32"):
        launch.fit_all([_job(tmp_path, f"w{i}", recipe=bad) for i in range(2)], workers=2)


def test_nan_stops_with_the_epoch_and_keeps_the_last_state(tmp_path, monkeypatch):
    job = _job(tmp_path)
    calls = []

    def broken(z1, z2):
        calls.append(1)
        return (z1 - z2).pow(2).mean() * (float("nan") if len(calls) > 9 else 1)

    monkeypatch.setattr(methods.criteria, "vicreg", broken)
    with pytest.raises(FloatingPointError, match="nan in epoch 3, step 2 of 4.*last good state"):
        train.fit(job, every=0.0)
    assert store.read_tensors(tmp_path / "run" / "last.safetensors")[1]["epoch"] == 2
    assert job.checkpoint(2).exists() and not job.checkpoint(5).exists()


def test_a_full_disk_leaves_the_last_state_whole(tmp_path, monkeypatch):
    job, calls = _job(tmp_path), []
    real = os.replace

    def full(source, target):
        if str(target).endswith("last.safetensors"):
            calls.append(1)
            if len(calls) > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(Exception, match="[Nn]o space"):
        train.fit(job, every=0.0)
    last = tmp_path / "run" / "last.safetensors"
    assert store.read_tensors(last)[1]["epoch"] == 1 and not list(last.parent.glob("*.tmp*"))
    monkeypatch.undo()
    train.fit(job)
    whole = _job(tmp_path, "whole")
    train.fit(whole)
    assert _equal(_weights(job, 5), _weights(whole, 5))


def test_supervised_checkpoint_keeps_its_classifier(tmp_path):
    job = _job(tmp_path, recipe=dataclasses.replace(TINY, criterion="supervised"), epochs=(0, 1))
    train.fit(job)
    found = own_format.load(job.checkpoint(1)).layers(torch.zeros(1, 3, 32, 32))
    assert found["logits"].shape == (1, 4)


def test_checkpoint_is_strict(tmp_path):
    job = _job(tmp_path, epochs=(0,))
    train.fit(job)
    encoder = own_format.load(job.checkpoint(0))
    assert not encoder.training and store.verify(job.checkpoint(0))["precision"] == "torch.float32"
    tensors = encoder.state_dict()
    tensors["trunk.extra"] = torch.zeros(1)
    del tensors["projector.2.weight"]
    with pytest.raises(
        store.StoreError, match=r"missing projector.2.weight; unexpected trunk.extra"
    ):
        own_format.fill(encoder, tensors, "memory")


def test_damaged_checkpoint_is_refused(tmp_path):
    job = _job(tmp_path, epochs=(0,))
    train.fit(job)
    content = bytearray(job.checkpoint(0).read_bytes())
    content[-1] ^= 1
    job.checkpoint(0).write_bytes(content)
    with pytest.raises(store.StoreError, match="sha256"):
        own_format.load(job.checkpoint(0))


def test_log_survives_a_cut_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"epoch": 1}) + "\n" + '{"epoch": 2, "lo')
    assert read_log(path) == [{"epoch": 1}]
