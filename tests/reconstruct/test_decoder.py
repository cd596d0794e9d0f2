"""Decoders draw what they are told, the same for the same seed, and come through being killed
without losing a bit.
"""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from dejavu_utils import store
from dejavu_utils.models import launch, train
from dejavu_utils.models.jobs import read_log
from dejavu_utils.reconstruct import decoder

TINY = {"channels": [16, 16], "blocks": [1, 1], "conditions": ["projector", "both"]}
WHERE = [
    (slice(0, 8), slice(0, 8)),
    (slice(0, 8), slice(8, 16)),
    (slice(8, 16), slice(0, 8)),
    (slice(8, 16), slice(8, 16)),
]  # the corner that is bright in each of four classes


def _pictures(n, classes=4):
    """Return noisy 16-px pictures with one bright corner, which is the class, and the classes as
    one-hot vectors.
    """
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    pixels = torch.randint(20, 90, (n, 3, 16, 16), generator=rng)
    for i, label in enumerate(labels):
        pixels[i][:, *WHERE[label]] += 140
    return pixels.to(torch.uint8), torch.eye(classes)[labels]


def _tensors(n=32):
    pixels, told = _pictures(n)
    return {"pixels": pixels, "projector": told, "backbone": told @ torch.ones(4, 6) + told[:, :1]}


def _recipe(**changes):
    constants = decoder.NET | TINY | changes.pop("constants", {})
    return train.Recipe(
        **{
            "criterion": "rcdm",
            "engine": "decoder",
            "size": 16,
            "batch": 16,
            "lr": 0.08,
            "precision": "fp32",
        }
        | changes,
        constants=constants,
    )


def _job(tmp_path, name, epochs, **changes):
    source = tmp_path / "public.safetensors"
    if not source.exists():
        store.write_tensors(source, _tensors())
    return train.Job(str(source), str(tmp_path / name), _recipe(**changes), epochs, "0/decoder")


def _equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def trained():
    """A decoder that was told the class of each picture."""
    pixels, told = _pictures(256)
    recipe = _recipe(
        constants={"conditions": ["projector"], "channels": [32, 32]}, batch=32, lr=0.03
    )
    training = decoder.Training({"pixels": pixels, "projector": told}, recipe, 30, 0)
    losses = [training.run_epoch() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    return training.encoder.eval()


def test_a_class_as_condition_draws_that_class(trained):
    drawn = (
        decoder.sample(trained, {"projector": torch.eye(4)}, samples=8, steps=12).float().mean(2)
    )
    light = torch.stack([drawn[:, :, *where].mean((2, 3)) for where in WHERE], 2)
    right = (light.argmax(2) == torch.arange(4)[:, None]).float()
    assert right.mean() >= 0.9, right.mean(1)


def test_guidance_draws_more_of_what_is_asked_for(trained):
    told = {"projector": torch.eye(4)}
    own = [
        decoder.sample(trained, told, samples=8, steps=12, guidance=g).float().mean(2)
        for g in (1.0, 2.0)
    ]
    lead = [
        torch.stack([each[i, :, *where].mean() for i, where in enumerate(WHERE)]).mean()
        - each.mean()
        for each in own
    ]
    assert lead[1] > lead[0]


def test_same_seed_same_pictures(trained):
    told = {"projector": torch.eye(4)}
    one, two, other = (
        decoder.sample(trained, told, samples=2, steps=3, seed=seed) for seed in (1, 1, 2)
    )
    assert one.dtype == torch.uint8 and one.shape == (4, 2, 3, 16, 16)
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert not torch.equal(one[:, 0], one[:, 1]), "samples of one image differ"


def test_the_same_noise_under_another_decoder(trained):
    """Target and reference start from equal noise: an untrained copy with equal weights draws equal
    pictures.
    """
    twin = decoder.Decoder({"projector": 4}, 16, trained.constants)
    twin.load_state_dict(trained.state_dict())
    told = {"projector": torch.eye(4)[:2]}
    assert torch.equal(
        decoder.sample(trained, told, steps=2), decoder.sample(twin.eval(), told, steps=2)
    )


def test_pictures_are_drawn_in_the_precision_of_the_recipe(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(
        trained, "forward", lambda x, *rest: seen.append(torch.is_autocast_enabled("cpu")) or 0 * x
    )
    monkeypatch.setattr(
        decoder.train,
        "precision",
        lambda name, _: {"bf16": torch.bfloat16}.get(name, torch.float32),
    )
    for precision in ("fp32", "bf16"):
        decoder.sample(trained, {"projector": torch.eye(4)}, steps=1, precision=precision)
    assert seen == [False, True]


def test_condition_names_and_constants_are_checked(trained):
    with pytest.raises(
        ValueError, match="given backbone; this decoder was trained with the conditions projector"
    ):
        decoder.sample(trained, {"backbone": torch.eye(4)})
    with pytest.raises(
        ValueError, match=r"conditions \['proj'\]; expected some of projector, backbone, both"
    ):
        decoder.Decoder({"projector": 4}, 16, {"conditions": ["proj"]})
    with pytest.raises(ValueError, match="width is no constant of it; it has channels"):
        decoder.Decoder({"projector": 4}, 16, {"width": 4})
    with pytest.raises(
        ValueError, match=r"channels \[4, 8\] and blocks \[1\]; expected one of each"
    ):
        decoder.Decoder({"projector": 4}, 16, {"channels": [4, 8], "blocks": [1]})
    with pytest.raises(ValueError, match="32 public pictures for batches of 64. Lower batch"):
        decoder.Training(_tensors(), _recipe(batch=64), 1, 0)


def test_a_condition_that_is_not_given_does_not_matter():
    """With weight 0 the representation must not reach the picture, with weight 1 it must."""
    training = decoder.Training(_tensors(), _recipe(), 4, 0)
    for _ in range(2):  # what starts at zero is no longer
        training.run_epoch()
    x, told = (
        torch.zeros(2, 3, 16, 16),
        {"projector": torch.eye(4)[:2], "backbone": torch.randn(2, 6)},
    )
    other = told | {"backbone": torch.randn(2, 6)}
    for weight, same in ((0.0, True), (1.0, False)):
        chosen = {"projector": torch.ones(2), "backbone": torch.full((2,), weight)}
        found = [training.encoder(x, torch.full((2,), 0.5), each, chosen) for each in (told, other)]
        assert torch.equal(*found) == same


def test_every_condition_is_learned_as_often():
    feed = decoder.Batches(
        _tensors(320), _recipe(), decoder.NET | TINY | {"unconditional": 0.25}, "cpu"
    )
    seen = [weight for _, (_, _, weight) in feed.epoch(train.stream(0, "epoch 0"))]
    projector, backbone = (
        torch.cat([weight[name] for weight in seen]) for name in ("projector", "backbone")
    )
    assert ((projector == 1) | (backbone == 0)).all(), "the backbone alone was not asked for"
    shares = [
        float(((projector == p) & (backbone == b)).float().mean())
        for p, b in ((0, 0), (1, 0), (1, 1))
    ]
    assert shares == pytest.approx([0.25, 0.375, 0.375], abs=0.1)


def test_resuming_at_any_epoch_gives_the_same_bits():
    whole = decoder.Training(_tensors(), _recipe(), 4, 0)
    for epoch in range(4):
        state = {name: value.clone() for name, value in whole.tensors().items()}
        part = decoder.Training(_tensors(), _recipe(), 4, 0)
        part.restore(state, epoch, "a test")
        while part.epoch <= epoch:
            part.run_epoch()
        whole.run_epoch()
        assert _equal(part.tensors(), whole.tensors()), f"resumed at epoch {epoch}"
        assert _equal(part.encoder.state_dict(), whole.encoder.state_dict()), (
            f"resumed at epoch {epoch}"
        )


def test_noise_grows_with_time():
    pictures = torch.ones(3, 3, 2, 2)
    noise = torch.full((3, 3, 2, 2), -1.0)
    noisy = decoder.mix(pictures, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert noisy[:, 0, 0, 0].tolist() == [1, 0.5, -1]


def test_sampling_ends_at_what_the_decoder_predicts(trained, monkeypatch):
    """At the last step no noise is left: one prediction for all times gives that very picture."""
    grey = torch.full((1, 3, 16, 16), 0.2)
    monkeypatch.setattr(trained, "forward", lambda x, *rest: grey.expand_as(x))
    drawn = decoder.sample(trained, {"projector": torch.eye(4)[:2]}, steps=5)
    assert (drawn == 153).all()  # (0.2 + 1) * 127.5


def test_sigkill_loses_nothing_but_time(tmp_path):
    torch.set_num_threads(1)
    whole, killed = (_job(tmp_path, name, [25]) for name in ("whole", "killed"))
    decoder.fit(whole)
    for wait in (0.4, 0.8, None):
        child = os.fork()
        if child == 0:
            try:
                decoder.fit(killed, every=0.0)
                os._exit(0)
            except BaseException:
                os._exit(1)
        if wait:
            _until((tmp_path / "killed" / "last.safetensors").exists)
            time.sleep(wait / 4)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert status == 0
    assert _equal(*(store.read_tensors(job.checkpoint(25))[0] for job in (whole, killed)))
    logs = [read_log(Path(job.folder) / "log.jsonl") for job in (whole, killed)]
    assert [[line["loss"] for line in log] for log in logs][0] == [line["loss"] for line in logs[1]]
    assert not (tmp_path / "killed" / "last.safetensors").exists()


def _until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def test_launch_trains_a_decoder_and_load_gives_it_back(tmp_path):
    job = _job(tmp_path, "one", [1])
    launch.fit(job)
    found, again = decoder.load(job), decoder.load(job)
    told = {"projector": torch.eye(4)}
    assert torch.equal(decoder.sample(found, told, steps=2), decoder.sample(again, told, steps=2))
    torch.testing.assert_close(found.mean_projector, _tensors()["projector"].mean(0))
    changed = store.read_tensors(job.checkpoint(1))
    store.write_tensors(
        job.checkpoint(1),
        {n: t for n, t in changed[0].items() if n != "net.conv_in.weight"},
        {"recipe": changed[1]["recipe"]},
    )
    with pytest.raises(
        store.StoreError, match="does not fit this decoder: missing net.conv_in.weight"
    ):
        decoder.load(job)


def test_the_paper_s_net_can_be_built():
    """At 128 px, with attention at 32, 16 and 8: shapes only, nothing is computed."""
    constants = {
        "channels": [256, 256, 512, 768, 1024],
        "blocks": [2, 2, 2, 2, 2],
        "attention": [32, 16, 8],
        "patch": 1,
        "conditions": ["both"],
    }
    with torch.device("meta"):
        net = decoder.Decoder({"projector": 8192, "backbone": 2048}, 128, constants)
        both = {"projector": torch.zeros(1, 8192), "backbone": torch.zeros(1, 2048)}
        weights = dict.fromkeys(both, torch.ones(1))
        predicted = net(torch.zeros(1, 3, 128, 128), torch.zeros(1), both, weights)
    assert predicted.shape == (1, 3, 128, 128)
    attends = [hasattr(stage[0].attention, "qkv") for stage in net.net.down]
    assert attends == [False, False, True, True, True]
    assert 1e8 < sum(p.numel() for p in net.parameters()) < 6e8
