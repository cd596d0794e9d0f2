"""VISSL as a second engine: its configuration, its losses against the equations, and real runs of
it.
"""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from dejavu_utils import store, vissl_engine
from dejavu_utils.attack import inference
from dejavu_utils.models import criteria, encoders, external, train
from dejavu_utils.models.jobs import read_log

needs_vissl = pytest.mark.skipif(
    importlib.util.find_spec("vissl") is None,
    reason="vissl is not installed: make .venv/.installed",
)
TINY = train.Recipe(
    criterion="simclr",
    encoder="resnet50",
    projector="64-32",
    batch=4,
    optimizer="sgd",
    lr=1.0,
    constants={},
    precision="fp32",
    engine="vissl",
)


def _job(folder, epochs=(0, 1), seed="0/A", **changes):
    source = folder / "pixels.safetensors"
    if not source.exists():
        pixels = torch.randint(
            0, 256, (8, 3, 40, 48), dtype=torch.uint8, generator=train.stream(0, "pixels")
        )
        store.write_tensors(source, {"pixels": pixels})
    return train.Job(
        str(source), str(folder / "run"), dataclasses.replace(TINY, **changes), list(epochs), seed
    )


def _model(job, epoch):
    """Return VISSL's {"trunk", "heads"} of a kept checkpoint, whose checksum is verified."""
    store.verify(vissl_engine.checkpoint(job, epoch))
    content = torch.load(vissl_engine.checkpoint(job, epoch), weights_only=True)
    assert content["type"] == "consolidated"
    return content["classy_state_dict"]["base_model"]["model"]


def _config(tmp_path, images=100, **changes):
    return vissl_engine.config(_job(tmp_path, epochs=(0, 5), **changes), images)


def _log(job):
    return read_log(f"{job.folder}/log.jsonl")


@pytest.mark.parametrize(
    ("criterion", "constants", "expected"),
    [
        (
            "simclr",
            {"temperature": 0.2},
            {"temperature": 0.2, "buffer_params": {"embedding_dim": 32}},
        ),
        ("barlow_twins", {"redundancy": 0.01}, {"lambda_": 0.01, "embedding_dim": 32}),
        ("moco", {"momentum": 0.99}, {"momentum": 0.99, "embedding_dim": 32, "queue_size": 100}),
        ("swav", {"epsilon": 0.03, "prototypes": 16}, {"epsilon": 0.03, "num_prototypes": 16}),
        (
            "dino",
            {"teacher_warmup": 0.2, "teacher_temperature": 0.05},
            {"num_crops": 2, "teacher_temp_max": 0.05, "teacher_temp_warmup_iters": 25},
        ),
    ],
)
def test_a_recipe_in_vissls_words(tmp_path, criterion, constants, expected):
    config = _config(tmp_path, criterion=criterion, constants=constants)
    assert config["LOSS"][config["LOSS"]["name"]] == expected
    ((kind, head),) = config["MODEL"]["HEAD"]["PARAMS"]
    assert head["dims"] == [2048, 64, 32] and head["use_bn"]
    assert (kind == "swav_head") == (criterion in ("swav", "dino"))
    assert head.get("num_clusters") == {"swav": [16], "dino": [1024]}.get(criterion)
    data = config["DATA"]["TRAIN"]
    assert data["COLLATE_FUNCTION"].split("_")[0] == {
        "moco": "moco",
        "swav": "multicrop",
        "dino": "multicrop",
    }.get(criterion, "simclr")
    assert (
        data["DATA_PATHS"] == [str(tmp_path / "run" / "images")]
        and data["BATCHSIZE_PER_REPLICA"] == 4
    )


def test_views_device_and_seed_reach_the_configuration(tmp_path):
    views = {
        "scale_min": 0.3,
        "flip": 0.1,
        "jitter": 0.7,
        "strength": 0.5,
        "grey": 0.15,
        "blur": 0.6,
        "solarize": 0.25,
    }
    config = _config(tmp_path, views=views, size=112, encoder="resnet101-w2")
    steps = {
        step.get("transforms", [step])[0]["name"]: step
        for step in config["DATA"]["TRAIN"]["TRANSFORMS"]
    }
    assert steps["RandomResizedCrop"] == {
        "name": "RandomResizedCrop",
        "size": 112,
        "scale": [0.3, 1.0],
    }
    assert steps["RandomHorizontalFlip"]["p"] == 0.1 and steps["RandomGrayscale"]["p"] == 0.15
    assert (
        steps["ColorJitter"]["prob"] == [0.7, 0.7]
        and steps["ColorJitter"]["transforms"][0]["brightness"] == 0.2
    )
    assert steps["ImgPilGaussianBlur"]["prob"] == [0.6, 0.0] and steps["RandomSolarize"][
        "prob"
    ] == [0.0, 0.25]
    assert steps["ImgPilGaussianBlur"]["transforms"][0]["radius_max"] == pytest.approx(1.0)
    assert config["MODEL"]["TRUNK"]["RESNETS"] == {"DEPTH": 101, "WIDTH_MULTIPLIER": 2}
    assert config["MODEL"]["HEAD"]["PARAMS"][0][1]["dims"][0] == 4096
    other = dataclasses.replace(_job(tmp_path, epochs=(0, 5)), seed="0/B", device="cuda")
    other = vissl_engine.config(other, 100)
    assert (config["MACHINE"]["DEVICE"], other["MACHINE"]["DEVICE"]) == ("cpu", "gpu")
    assert (
        config["SEED_VALUE"] != other["SEED_VALUE"]
        and config["SEED_VALUE"] == _config(tmp_path)["SEED_VALUE"]
    )


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.333])
def test_schedule_is_ours(tmp_path, warmup):
    scheduler = pytest.importorskip(
        "fvcore.common.param_scheduler", reason="fvcore comes with vissl"
    )
    config = _config(tmp_path, images=80, warmup=warmup)["OPTIMIZER"]["param_schedulers"]["lr"]
    kinds = {"linear": scheduler.LinearParamScheduler, "cosine": scheduler.CosineParamScheduler}
    parts = [
        kinds[part["name"]](part["start_value"], part["end_value"]) for part in config["schedulers"]
    ]
    theirs = scheduler.CompositeParamScheduler(parts, config["lengths"], config["interval_scaling"])
    recipe = dataclasses.replace(TINY, warmup=warmup)
    assert [theirs(step / 100) for step in range(100)] == pytest.approx(
        [train.learning_rate(step, 100, recipe) for step in range(100)]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"criterion": "vicreg"},
            r'no criterion "vicreg", it has simclr, barlow_twins, moco, swav, dino',
        ),
        ({"encoder": "resnet18"}, r'no encoder "resnet18", it has resnet50, resnet50-w2'),
        ({"constants": {"margin": 1}}, r'no simclr constant "margin", it has temperature'),
        ({"optimizer": "adam"}, r'no optimizer "adam", it has sgd, lars, adamw'),
        ({"precision": "bf16"}, r'no precision "bf16", it has auto, fp32'),
        ({"views": {"local": 6}}, r'no views local "6"'),
        ({"processes": 2}, r'no number of processes "2"'),
        ({"batch": 101}, r"a batch of 101 needs as many images, found 100"),
    ],
)
def test_what_vissl_lacks_is_said(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        _config(tmp_path, **changes)


def test_a_wrong_recipe_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="vicreg"):
        vissl_engine.fit(_job(tmp_path, criterion="vicreg"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["vissl.lock"]


def test_without_vissl_the_error_says_how_to_add_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"vissl, which is not installed: run `make .venv/.installed`"
    ):
        vissl_engine.fit(_job(tmp_path))


def test_pictures_are_exported_without_loss_and_once(tmp_path):
    from PIL import Image

    pixels, folder = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8), tmp_path / "images"
    vissl_engine.export_images(pixels, folder)
    files = sorted(folder.glob("*/*.png"))
    read = torch.stack(
        [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files]
    )
    assert torch.equal(read, pixels)
    written = files[0].stat().st_mtime_ns
    vissl_engine.export_images(pixels, folder)
    assert files[0].stat().st_mtime_ns == written
    files[1].unlink()
    vissl_engine.export_images(pixels, folder)
    assert len(list(folder.glob("*/*.png"))) == 3 and not (tmp_path / "images.part").exists()


def test_whole_checkpoints_are_kept_and_cut_ones_removed(tmp_path):
    job = _job(tmp_path, epochs=(1, 3, 4))
    folder = vissl_engine.work(job)
    folder.mkdir(parents=True)
    for phase in (0, 1, 2):
        torch.save({"phase_idx": phase}, folder / f"model_phase{phase}.torch")
    whole = (folder / "model_phase2.torch").read_bytes()
    (folder / "model_final_checkpoint_phase3.torch").write_bytes(whole[:-100])
    vissl_engine._keep_written(job)
    kept = [epoch for epoch in range(6) if vissl_engine.checkpoint(job, epoch).exists()]
    assert kept == [1, 3] and store.verify(vissl_engine.checkpoint(job, 3))["epoch"] == 3
    assert vissl_engine.checkpoint(job, 3).read_bytes() == whole
    assert [path.name for path in folder.iterdir()] == ["model_phase2.torch"]


@needs_vissl
def test_a_failed_run_gives_its_last_lines(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(
        "#!/bin/sh\necho first\nfor i in 1 2 3 4; do echo more; done\necho boom >&2\nexit 3\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(vissl_engine.sys, "executable", str(program))
    with pytest.raises(
        RuntimeError,
        match=r"code 3 and without epoch 0\. .*vissl\.log ends with:\n(more\n){4}boom$",
    ):
        vissl_engine.fit(_job(tmp_path))


LOSSES = """
import json, sys, torch
from dejavu_utils import vissl_engine
vissl_engine.shim()
from classy_vision.generic.distributed_util import set_cpu_device
set_cpu_device()
from classy_vision.losses import build_loss
from vissl.config import AttrDict
import vissl.losses
z = torch.tensor(json.loads(sys.stdin.read()), requires_grad=True)
n, d = z.shape
out = []
for config in ({"name": "simclr_info_nce_loss", "temperature": 0.1, "buffer_params": {
                    "embedding_dim": d, "world_size": 1, "effective_batch_size": n}},
               {"name": "barlow_twins_loss", "lambda_": 0.0051, "scale_loss": 1.0, "embedding_dim": d}):
    value = build_loss(AttrDict(config))(z, None)
    out.append([value.item(), torch.autograd.grad(value, z)[0].tolist()])
print(json.dumps(out))
"""


@needs_vissl
def test_vissls_simclr_is_the_equation_and_its_barlow_twins_is_another():
    """VISSL standardises both views together: where they differ in mean and scale, its value is
    another one.
    """
    from lightly.loss import BarlowTwinsLoss

    rng = train.stream(0, "views")
    z1, z2 = torch.randn(16, 32, generator=rng), 3 * torch.randn(16, 32, generator=rng) + 2
    given = json.dumps(torch.cat([z1, z2]).tolist())
    out = subprocess.run(
        [sys.executable, "-c", LOSSES],
        input=given,
        capture_output=True,
        text=True,
        cwd=store.PACKAGE.parent,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    (simclr, gradient), (barlow, _) = json.loads(out.stdout.splitlines()[-1])
    z = torch.cat([z1, z2]).requires_grad_()
    ours = criteria.simclr(*z.chunk(2), temperature=0.1)
    assert simclr == pytest.approx(ours.item(), rel=1e-5)
    assert torch.allclose(torch.tensor(gradient), torch.autograd.grad(ours, z)[0], atol=1e-6)
    together = torch.nn.functional.batch_norm(z.detach(), None, None, training=True)
    correlation = together[:16].T @ together[16:] / 16
    off = correlation - torch.diag(correlation.diag())
    assert barlow == pytest.approx(
        ((1 - correlation.diag()) ** 2).sum().item() + 0.0051 * (off**2).sum().item(), rel=1e-3
    )
    paper = BarlowTwinsLoss(lambda_param=0.0051)(z1, z2).item()
    assert criteria.barlow_twins(z1, z2).item() == pytest.approx(paper, rel=1e-3)
    assert barlow > 1.2 * paper


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A job that VISSL trained: two iterations on eight pictures."""
    job = _job(tmp_path_factory.mktemp("a folder ä"))
    os.environ["DEJAVU_TEST_PASSWORD"] = "canary"
    try:
        vissl_engine.fit(job)
    finally:
        del os.environ["DEJAVU_TEST_PASSWORD"]
    return job


@needs_vissl
def test_vissl_trains_and_its_own_file_is_kept(trained, monkeypatch):
    before, after = (_model(trained, epoch) for epoch in (0, 1))
    for part, some in (("trunk", "_feature_blocks.conv1.weight"), ("heads", "0.clf.0.weight")):
        assert before[part].keys() == after[part].keys()
        assert not torch.equal(before[part][some], after[part][some])
    meta = store.verify(vissl_engine.checkpoint(trained, 1))
    assert meta["engine"] == "vissl 0.1.6" and meta["parameters"]["encoder"] == "resnet50"
    (line,) = _log(trained)
    assert line["epoch"] == 1 and 0 < line["loss"] < 10 and line["seconds"] > 0
    assert not list(vissl_engine.work(trained).glob("*.torch"))
    said = (vissl_engine.work(trained).parent / "vissl.log").read_text()
    assert "Total 2 iterations for training" in said and "canary" not in said
    assert "vissl" not in sys.modules and not hasattr(
        np, "float"
    )  # the shim stayed in VISSL's process
    monkeypatch.setattr(subprocess, "run", None)  # a second call has nothing to do
    vissl_engine.fit(trained)


@needs_vissl
def test_vissls_checkpoint_is_attacked(trained):
    """Both checkpoints as models A and B: the attack runs on what VISSL wrote; on eight pictures,
    no more.
    """
    pixels = torch.randint(
        0, 256, (30, 3, 32, 32), dtype=torch.uint8, generator=train.stream(1, "crops")
    )
    labels, embedded = torch.arange(30) % 3, {}
    for model, epoch in (("A", 1), ("B", 0)):
        encoder = external.encoder(str(vissl_engine.checkpoint(trained, epoch)))
        assert encoder.size == 32 and len(encoder.projector) == 2
        embedded[model] = encoders.embed(encoder, pixels, layers=("projector", "backbone"))
        assert embedded[model]["projector"].shape == (30, 32) and embedded[model][
            "backbone"
        ].shape == (30, 2048)
    sets = {"a": slice(0, 8), "b": slice(8, 16)}
    crops = {
        name: {model: e["projector"][rows] for model, e in embedded.items()}
        for name, rows in sets.items()
    }
    public = {model: e["projector"][16:] for model, e in embedded.items()}
    ids, truth = (
        {name: values[rows] for name, rows in sets.items()} for values in (np.arange(30), labels)
    )
    table = inference.label_inference(crops, public, labels[16:], ids, truth, k=3, classes=3)
    assert len(table) == 32 and table["confidence"].notna().all()


@needs_vissl
@pytest.mark.slow
@pytest.mark.parametrize(
    ("criterion", "optimizer", "constants"),
    [
        ("barlow_twins", "lars", {}),
        ("moco", "sgd", {}),
        ("swav", "lars", {"prototypes": 16}),
        ("dino", "adamw", {"prototypes": 16}),
    ],
)
def test_every_criterion_trains(tmp_path, criterion, optimizer, constants):
    job = _job(
        tmp_path, criterion=criterion, optimizer=optimizer, constants=constants, lr=0.1, workers=1
    )
    vissl_engine.fit(job)
    before, after = (
        _model(job, epoch)["trunk"]["_feature_blocks.layer4.2.conv3.weight"] for epoch in (0, 1)
    )
    assert not torch.equal(before, after) and np.isfinite(_log(job)[0]["loss"])
    file = str(vissl_engine.checkpoint(job, 1))
    read = [external.encoder(file)]
    for prefix in {"moco": ["loss.moco"], "dino": ["loss.momentum"]}.get(criterion, []):
        read.append(external.encoder("torchvision:resnet50", file, prefix=prefix))
    for encoder in read:
        found = encoders.embed(encoder, torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
        assert found["projector"].shape == (2, 32)


@needs_vissl
@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"not finite at step \d+: lower recipe lr"):
        vissl_engine.fit(_job(tmp_path, epochs=(0, 9), lr=1e30))


@needs_vissl
@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    for folder in (whole, killed):
        folder.mkdir()
    jobs = whole, killed = [_job(folder, epochs=(0, 4)) for folder in (whole, killed)]
    vissl_engine.fit(whole)
    program = (
        "import json, sys; from dejavu_utils import vissl_engine; from dejavu_utils.models import train; "
        "vissl_engine.fit(train.load_job(json.load(sys.stdin)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        cwd=store.PACKAGE.parent,
        start_new_session=True,
    )
    process.stdin.write(json.dumps(dataclasses.asdict(killed)).encode())
    process.stdin.close()
    while len(_log(killed)) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not vissl_engine.checkpoint(killed, 4).exists()
    vissl_engine.fit(killed)
    one, same = (_model(job, 4) for job in jobs)
    assert all(torch.equal(one[part][name], same[part][name]) for part in one for name in one[part])
    assert [[line["loss"] for line in _log(job)] for job in jobs][0] == [
        line["loss"] for line in _log(killed)
    ]
