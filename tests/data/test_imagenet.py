"""The `imagenet` profile on a tree of ImageNet's form: three classes, odd XML sizes, two boxes, a
bad file.
"""

import json

import numpy as np
import pytest
from PIL import Image

from dejavu_utils import store
from dejavu_utils.models import methods, pairs
from dejavu_utils.models.views import Views

CLASSES = ("n01440764", "n01443537", "n01484850")
TINY = {
    "sizes": {"classes": 3, "attacked": 6, "shared": 2, "public": 0, "probe": 4, "control": 0},
    "criteria": ["simclr"],
    "epochs": [0, 1],
    "k": 3,
    "crop": {"min_side": 20},
    "recipe": {
        "encoder": "small4",
        "size": 32,
        "batch": 8,
        "processes": 1,
        "sync_bn": False,
        "workers": 1,
        "compile": False,
        "resident": 0.0,
        "lr": 0.01,
        "simclr": {"projector": "8-8"},
    },
}


def _xml(folder, name, annotated, boxes):
    objects = "".join(
        f"<object><name>x</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
        f"<ymax>{y1}</ymax></bndbox></object>"
        for x0, y0, x1, y1 in boxes
    )
    width, height = annotated
    (folder / f"{name}.xml").write_text(
        f"<annotation><size><width>{width}</width><height>{height}</height></size>"
        f"{objects}</annotation>"
    )


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """imagenet/train/<wnid>/*.JPEG and imagenet/boxes/<wnid>/*.xml: 24 boxed and 8 plain pictures a
    class.
    """
    random = np.random.default_rng(0)
    for wnid in CLASSES:
        pictures, boxes = (tmp_path / "imagenet" / part / wnid for part in ("train", "boxes"))
        pictures.mkdir(parents=True)
        boxes.mkdir(parents=True)
        for i in range(32):
            width, height = int(random.integers(60, 90)), int(random.integers(60, 90))
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pictures / f"{wnid}_{i}.JPEG")
            if i < 24:  # annotated at twice the picture's size; every fourth has two boxes
                two = [(2, 2, 30, 40), (60, 80, 80, 100)] if i % 4 == 0 else [(2, 2, 50, 40)]
                _xml(boxes, f"{wnid}_{i}", (2 * width, 2 * height), two)
    (tmp_path / "imagenet" / "train" / CLASSES[0] / f"{CLASSES[0]}_99.JPEG").write_bytes(
        b"no picture"
    )
    monkeypatch.setenv("DEJAVU_DATA", str(tmp_path))
    monkeypatch.setenv("DEJAVU_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("DEJAVU_ROOT", raising=False)
    return tmp_path


@pytest.mark.slow
def test_the_profile_runs_end_to_end(tree, batch, capsys):
    sweeps = {"layer": ["block1", "backbone"], "k": [1, 3], "min_side": [30], "fraction": [0.4]}
    assert batch.execute("01_training", "imagenet", TINY) is None
    assert batch.execute("02_attack", "imagenet", TINY | {"sweeps": sweeps}) is None
    assert batch.execute("07_other_measures", "imagenet", TINY) is None
    folder = store.runs("imagenet")
    scores = store.read_table(folder / "tables" / "scores.csv")
    assert set(scores["criterion"]) == {"simclr"} and scores["n"].min() >= 10
    assert set(scores["epoch"]) == {0, 1} and scores["score"].abs().max() <= 1
    skipped = store.read_table(folder / "tables" / "skipped.csv")
    assert list(skipped["name"].str.contains("_99.JPEG")) == [True]
    partition = (
        store.read_table(folder / "tables" / "partition.csv").groupby(["class", "part"]).size()
    )
    # the paper's rule, n = 6 + 2 a class: 8 boxed pictures in each of A and B, none to share, X is
    # what is left
    assert partition.to_dict() == {
        (name, part): count
        for name in CLASSES
        for part, count in (("a", 8), ("b", 8), ("probe", 4), ("public", 12))
    }
    lists = [path for path in (folder / "pixels").glob("*.parquet")]
    assert len(lists) == 2  # decoded in workers, as pictures that do not fit into memory are
    recipes = [
        json.loads(path.read_text())["recipe"]
        for path in folder.glob("encoders/*/epoch-0001.safetensors.json")
    ]
    assert {(recipe["optimizer"], recipe["projector"]) for recipe in recipes} == {("lars", "8-8")}


def test_the_recipes_are_the_papers(batch, monkeypatch):
    """The training recipe of the paper's released code: its values, criterion by criterion."""
    monkeypatch.delenv("DEJAVU_ROOT", raising=False)
    given = batch.given("imagenet", {})["01_training"]
    found = {criterion: pairs.recipe(criterion, given["recipe"]) for criterion in given["criteria"]}
    for recipe in found.values():
        assert (recipe.encoder, recipe.optimizer, recipe.batch) == ("resnet101", "lars", 1024)
        assert recipe.weight_decay == 1e-6
        assert (
            recipe.warmup * max(given["epochs"]) == 10 and recipe.processes == 8 and recipe.sync_bn
        )
    assert {name: recipe.lr for name, recipe in found.items()} == {
        "vicreg": 0.2,
        "simclr": 0.3,
        "supervised": 0.2,
        "barlow_twins": 0.2,
        "byol": 0.2,
        "dino": 0.2,
    }
    assert {found[name].projector for name in ("vicreg", "supervised", "barlow_twins")} == {
        "8192-8192-8192"
    }
    assert found["simclr"].projector == "2048-256" and found["simclr"].constants == {
        "temperature": 0.15
    }
    whole = {name: methods.constants(name) | recipe.constants for name, recipe in found.items()}
    assert whole["vicreg"] == {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
    assert whole["barlow_twins"] == {"redundancy": 0.0051} and whole["byol"] == {"momentum": 0.996}
    dino = whole["dino"]
    assert (dino["teacher_start"], dino["teacher_temperature"], dino["teacher_warmup"]) == (
        0.04,
        0.07,
        50 / 1000,
    )
    assert (dino["student_temperature"], dino["centre_momentum"], dino["momentum"]) == (
        0.1,
        0.9,
        0.996,
    )
    views = Views(**found["vicreg"].views)
    assert (
        views.scale_min,
        views.strength,
        views.jitter,
        views.grey,
        views.blur,
        views.solarize,
    ) == (0.08, 1.0, 0.8, 0.2, 1.0, 0.2)


def test_the_plan_names_jobs_hours_and_disk(batch, capsys):
    assert batch.main(["plan", "--profile", "imagenet"]) == 0
    text = capsys.readouterr().out
    assert "12 encoders" in text and "GPU hours" in text and "GiB of checkpoints" in text
    assert all(
        name in text for name in ("vicreg", "simclr", "supervised", "barlow_twins", "byol", "dino")
    )
