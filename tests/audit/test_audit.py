"""The audit says yes to planted memory and no where there is none; every bad input is one clear
error.
"""

import dataclasses
import hashlib
import os
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from dejavu_utils import store
from dejavu_utils.attack import crops, one_model
from dejavu_utils.audit import audit, sources, subject
from dejavu_utils.data import scenes
from dejavu_utils.data.images import Images
from dejavu_utils.models import encoders, external, own_format, train, views
from dejavu_utils.models.encoders import Encoder

CLASSES = 10
PARAMS = {
    "reading": {"size": 16, "layer": ""},
    "audit": {"limit": 0},
    "k": 10,
    "seeds": [0],
    "crop": {
        "kind": "periphery",
        "rule": "paper",
        "min_side": 0,
        "fraction": 0.3,
        "corner": "lower-left",
    },
}
PARTITION = {"a": 100, "b": 100, "control": 150, "public": 30}  # images a class


def keys(x):
    """Return a name for each normalised picture."""
    return [hashlib.sha256(np.round(one.numpy(), 3).tobytes()).digest() for one in x]


class Planted(nn.Module):
    """A trunk that knows the class of the pictures in its memory, and sees noise in all others."""

    def __init__(self):
        super().__init__()
        self.memory = {}

    def reset_parameters(self):
        self.memory = {}

    def learn(self, pixels, labels):
        self.memory |= dict(zip(keys(views.normalize(pixels)), map(int, labels), strict=True))

    def forward(self, x):
        noise = [np.random.default_rng(list(key[:4])).normal(size=CLASSES) for key in keys(x)]
        known = [self.memory.get(key, -1) for key in keys(x)]
        return torch.tensor(
            np.array(
                [
                    8 * np.eye(CLASSES + 1)[i][:CLASSES] + z if i >= 0 else z
                    for i, z in zip(known, noise, strict=True)
                ]
            )
        ).float()


@pytest.fixture(scope="module")
def parts():
    images = scenes.make(CLASSES, sum(PARTITION.values()), rho=0.2, seed=5, size=32)
    ends = np.cumsum(list(PARTITION.values())) * CLASSES
    found = {
        name: images.subset(range(end - PARTITION[name] * CLASSES, end))
        for name, end in zip(PARTITION, ends, strict=True)
    }
    found["control"] = dataclasses.replace(found["control"], attributes={})
    return {name: dataclasses.replace(each, attributes={}) for name, each in found.items()}


def planted(parts, remembered, share=0.3):
    """Return an encoder that recognises public pictures and remembers a share of the crops of one
    part.
    """
    trunk = Planted()
    trunk.learn(parts["public"].squares(16), parts["public"].labels)
    crop = PARAMS["crop"] | {"min_side": 8}  # px: what 0 stands for on pictures of 32 px
    images = parts[remembered].subset(crops.background(parts[remembered], crop)[1])
    images = images.subset(range(int(share * len(images))))
    trunk.learn(images.squares(16, crops.background(images, crop)[0]), images.labels)
    return external.External(trunk, name="planted", notes=("planted",), sha256="0" * 64)


def examine(encoder, images, reference=None, **params):
    encoders = {"target": encoder} | ({"reference": reference} if reference else {})
    case = subject.prepare(encoders, images, PARAMS | params)
    inferred = audit.infer(case, 10)
    rows = audit.table(case, inferred, None if reference else audit.judge(case, inferred))
    scores, checks = audit.scores(rows), audit.controls(case, rows, inferred)
    return case, rows, scores, checks, audit.verdict(case, scores, checks)


def sets(parts, images, held_out="control"):
    found = {"images": parts[images], "public": parts["public"]}
    return found | ({"held_out": parts[held_out]} if held_out else {})


@pytest.fixture(scope="module")
def encoder(parts):
    return planted(parts, "a")


@pytest.mark.parametrize("held_out", ["control", ""])
def test_it_says_memorizes_on_a_and_no_on_b(parts, encoder, held_out):
    case, rows, scores, checks, yes = examine(encoder, sets(parts, "a", held_out))
    assert case.source == ("held-out" if held_out else "public")
    assert checks["passed"].all(), checks
    assert yes["word"] == "memorizes" and 0.15 < yes["score"] < 0.4
    *_, checks, no = examine(encoder, sets(parts, "b", held_out))
    assert no["word"] == ("no evidence" if held_out else no["word"]) != "memorizes"
    assert no["low"] <= 0 <= no["high"]


def test_with_a_second_model(parts, encoder):
    other = planted(parts, "b")
    assert examine(encoder, sets(parts, "a"), other)[-1]["word"] == "memorizes"
    assert (
        examine(encoder, sets(parts, "b", "control"), planted(parts, "a", 0))[-1]["word"]
        == "no evidence"
    )
    *_, scores, _, same = examine(encoder, sets(parts, "a"), encoder)
    assert (
        scores.set_index(["reading", "p"]).loc[("audited", 100), "score"] == 0
    )  # the same encoder twice
    assert same["word"] != "memorizes"


def test_a_failed_control_takes_the_verdict_away(parts, encoder):
    case, _, scores, checks, verdict = examine(encoder, sets(parts, "a"))
    checks.loc[1, "passed"] = False
    found = audit.verdict(case, scores, checks)
    assert (verdict["word"], found["word"], found["why"]) == ("memorizes", "undecided", "control")
    assert checks["control"][1] in found["sentence"]


def made(low, high, calibrated=None):
    rows = [
        {
            "layer": "backbone",
            "reading": "audited",
            "p": 100,
            "score": (low + high) / 2,
            "low": low,
            "high": high,
        }
    ]
    if calibrated:
        rows.append(
            rows[0] | {"reading": "calibrated", "low": calibrated[0], "high": calibrated[1]}
        )
    return pd.DataFrame(rows).assign(n=100)


@pytest.mark.parametrize(
    ("source", "second", "plain", "calibrated", "word", "why"),
    [
        ("held-out", False, (0.2, 0.3), (0.01, 0.2), "memorizes", "memorizes"),
        ("held-out", False, (0.2, 0.3), (-0.03, 0.04), "no evidence", "no evidence"),
        ("held-out", False, (0.2, 0.3), (-0.03, 0.06), "undecided", "undecided"),
        ("held-out", False, (0.2, 0.3), (-0.3, -0.1), "no evidence", "no evidence"),
        ("public", False, (0.2, 0.3), (0.1, 0.2), "memorizes", "memorizes"),
        ("public", False, (0.2, 0.3), (-0.03, 0.04), "undecided", "disagree"),
        ("public", True, (0.2, 0.3), (-0.03, 0.04), "memorizes", "memorizes"),
        ("", False, (0.2, 0.3), None, "undecided", "offset"),
        ("", True, (0.2, 0.3), None, "memorizes", "memorizes"),
    ],
)
def test_rules_of_the_verdict(source, second, plain, calibrated, word, why):
    case = type(
        "Case", (), {"layers": ("backbone",), "source": source, "reference": second or None}
    )
    fine = pd.DataFrame({"control": ["x"], "passed": [True]})
    found = audit.verdict(case, made(*plain, calibrated), fine)
    assert (found["word"], found["why"]) == (word, why)
    assert found["smallest"] > 0 and "{" not in found["sentence"]


def rows_of(right, belief, labels=None):
    n = len(right)
    base = {
        "id": [f"{i:05d}" for i in range(n)],
        "label": np.zeros(n, int) if labels is None else labels,
    }
    target = pd.DataFrame(base | {"role": "target", "correct": right, "belief": 0.0})
    return pd.concat(
        [target, pd.DataFrame(base | {"role": "reference", "correct": False, "belief": belief})]
    )


def test_calibrated_is_the_residual_of_a_line_through_the_unseen_images():
    random = np.random.default_rng(0)
    (t, b), (s, c) = ((random.random(n) < 0.4, random.random(n)) for n in (50, 70))
    slope, intercept = np.polyfit(c, s.astype(float), 1)
    found = audit.calibrated(rows_of(t, b), rows_of(s, c), resamples=50)
    assert found["score"] == pytest.approx(t.mean() - intercept - slope * b.mean(), abs=1e-12)
    assert found["target"] - found["reference"] == pytest.approx(found["score"])
    constant = audit.calibrated(
        rows_of(t, np.full(50, 0.3)), rows_of(s, np.full(70, 0.3)), resamples=50
    )
    assert constant["score"] == pytest.approx(t.mean() - s.mean())


@pytest.mark.parametrize("classes", [10, 60])
def test_the_interval_misses_no_memory_one_time_in_twenty(classes):
    """Beliefs tell how often the encoder is right, and the two sets differ in them; the offset is
    large.
    """
    misses = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        both = []
        for n, easy in ((240, 2.0), (360, 1.0)):
            b = random.random(n) ** (1 / easy)
            both.append(rows_of(random.random(n) < 0.3 + 0.5 * b, b, np.arange(n) % classes))
        found = audit.calibrated(*both, resamples=300)
        misses += not found["low"] <= 0 <= found["high"]
    assert 2 <= misses <= 22  # 10 expected; binomial, five in a million outside


def test_no_image_is_judged_by_a_classifier_that_saw_it():
    labels, learn = np.arange(40) % 2, np.arange(40) < 30
    fold = one_model.assign([str(i) for i in range(40)], labels, 5)
    seen = []

    def fit(x, y, classes, name):
        assert set(x.tolist()) <= set(range(30))  # unseen images are never learned from
        return lambda other: (
            seen.append((set(x.tolist()), set(other.tolist())))
            or np.full((len(other), classes), 0.5)
        )

    found = one_model.cross_fit(fit, np.arange(40), labels, fold, 2, learn)
    assert np.isfinite(found).all() and sum(len(judged) for _, judged in seen) == 40
    assert all(not learned & judged for learned, judged in seen)


def test_the_network_can_be_the_reference(parts, encoder, monkeypatch):
    small = train.Recipe(encoder="small4", projector="8-8", batch=32, threads=1)
    network = one_model.network
    monkeypatch.setattr(one_model, "network", lambda device: network(small, 1, device))
    case = subject.prepare({"target": encoder}, sets(parts, "a"), PARAMS | {"audit": {"limit": 80}})
    judged = audit.judge(case, {}, "network")
    assert len(judged["audited"][0]) == len(case.audited) == 80
    assert ((0 <= judged["unseen"][2]) & (judged["unseen"][2] <= 1)).all()
    with pytest.raises(ValueError, match='expected "naive_bayes" or "network"'):
        audit.judge(case, {}, "resnet")


def test_pictures_that_look_like_attacked_ones_are_left_out_of_x(parts, encoder):
    twins = parts["a"].subset(range(40))
    twins = dataclasses.replace(twins, pixels=(twins.pixels.int() + 1).clamp(0, 255).byte())
    public = Images(
        np.r_[parts["public"].ids, twins.ids],
        np.r_[parts["public"].labels, twins.labels],
        parts["public"].boxes + twins.boxes,
        twins.classes,
        np.r_[parts["public"].sizes, twins.sizes],
        torch.cat([parts["public"].pixels, twins.pixels]),
    )
    case = subject.prepare({"target": encoder}, sets(parts, "a") | {"public": public}, PARAMS)
    assert len(case.public) == len(parts["public"])
    assert any(
        "40 public pictures look like one of the attacked images" in note for note in case.notes
    )
    with pytest.raises(
        ValueError, match=r"PUBLIC: no picture of 10 of 10 classes.*1000 were left out"
    ):
        subject.prepare({"target": encoder}, sets(parts, "a") | {"public": parts["a"]}, PARAMS)
    with pytest.raises(ValueError, match=r"HELD_OUT: 0 of 0 pictures have a usable"):
        subject.prepare({"target": encoder}, sets(parts, "a", "a"), PARAMS)


def test_classes_are_matched_by_name(parts, encoder):
    turned = dataclasses.replace(
        parts["public"],
        classes=parts["public"].classes[::-1],
        labels=CLASSES - 1 - parts["public"].labels,
    )
    first, second = (
        subject.prepare({"target": encoder}, sets(parts, "a") | {"public": public}, PARAMS).public
        for public in (parts["public"], turned)
    )
    assert first.digest == second.digest


def test_too_little_is_an_error_that_says_what_to_pass(parts, encoder):
    target, few = {"target": encoder}, parts["a"].subset(range(19))
    with pytest.raises(
        ValueError, match=r"IMAGES: 18 of 19 pictures have a usable periphery crop, at least 20"
    ):
        subject.prepare(target, sets(parts, "a") | {"images": few}, PARAMS)
    one = parts["public"].subset(parts["public"].labels > 0)
    with pytest.raises(
        ValueError, match="PUBLIC: no picture of 1 of 10 classes of IMAGES, such as 'umbrella'; its"
    ):
        subject.prepare(target, sets(parts, "a") | {"public": one}, PARAMS)
    with pytest.raises(ValueError, match="PUBLIC: 300 pictures, fewer than k = 301"):
        subject.prepare(target, sets(parts, "a"), PARAMS | {"k": 301})
    with pytest.raises(ValueError, match="of 1 classes; at least 2"):
        subject.prepare(
            target, sets(parts, "a") | {"images": parts["a"].subset(parts["a"].labels == 3)}, PARAMS
        )
    with pytest.raises(
        ValueError, match=r"has no layer 'block9', it has backbone. Pass reading.layer=backbone"
    ):
        subject.prepare(
            target, sets(parts, "a"), PARAMS | {"reading": {"size": 16, "layer": "block9"}}
        )


def test_without_boxes_the_corner_is_attacked(parts, encoder):
    bare = {
        name: dataclasses.replace(each, boxes=[np.zeros((0, 4), np.float32)] * len(each))
        for name, each in parts.items()
    }
    case = subject.prepare({"target": encoder}, sets(bare, "a"), PARAMS)
    assert case.crop["kind"] == "corner" and len(case.audited) == len(parts["a"])
    assert case.rects(case.audited)[0].tolist() == [0, 23, 9, 32]
    assert any("no boxes" in limit for limit in case.limits)


def test_the_untrained_twin_has_other_weights_and_leaves_everything_as_it_was():
    encoder, state = Encoder("small4", "8-8", 16), torch.get_rng_state()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    fresh = encoders.untrained(encoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not torch.equal(fresh.trunk[0].weight, encoder.trunk[0].weight)
    assert torch.equal(encoders.untrained(encoder).trunk[0].weight, fresh.trunk[0].weight)
    assert torch.isfinite(fresh(torch.randn(2, 3, 16, 16))).all()


def folder_of(root, images, count):
    for i in range(count):
        place = root / images.classes[images.labels[i]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.pixels[i].permute(1, 2, 0).numpy()).save(place / f"{i:04d}.png")
    return root


def test_a_folder_of_class_folders(parts, tmp_path):
    root = folder_of(tmp_path / "mine", parts["a"], 60)
    (root / "umbrella" / "broken.png").write_bytes(b"no picture")
    (root / "notes.txt").write_text("not a picture")
    found = sources.pictures(str(root))
    assert found.classes == tuple(sorted(parts["a"].classes)) and len(found) == 60
    assert [name for name, _ in found.skipped] == ["notes.txt", "umbrella/broken.png"]
    assert torch.equal(found.pixels[0], parts["a"].pixels[int(found.ids[0][-8:-4])])
    with pytest.raises(
        ValueError, match=r"PUBLIC: the pictures in .* are in 0 folders, and 7 lie directly in it"
    ):
        sources.pictures(str(root / "umbrella"), "PUBLIC")
    with pytest.raises(ValueError, match="1 folders, .*Pass its folder mine"):
        sources.pictures(str(tmp_path))


@pytest.mark.parametrize("name", ["", "no/such/folder", "imagenett"])
def test_images_that_are_not_there(name):
    with pytest.raises(
        FileNotFoundError, match=f"PUBLIC: {name or 'nothing was passed'}; expected a folder.*pets"
    ):
        sources.pictures(name, "PUBLIC")


def test_parameters_name_what_is_audited(parts, tmp_path):
    root = str(folder_of(tmp_path / "mine", parts["a"], 40))
    encoder = {"target": "torchvision:resnet18", "weights": "", "reference": ""}
    encoder |= {"reference_weights": ""}
    params = {"encoder": encoder, "sets": {"images": root, "public": root, "held_out": ""}}
    files, images, _ = sources.given(params)
    assert files == {"target": "torchvision:resnet18"} and set(images) == {"images", "public"}
    for change, message in (
        ({"reference": "gone.pt"}, "REFERENCE: there is no file gone.pt; expected timm:NAME"),
        ({"weights": "gone.pt"}, "ENCODER: there is no file gone.pt; expected a file of weights"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            sources.given(params | {"encoder": encoder | change})
    pair = type("Pair", (), {"parts": parts, "jobs": {}})
    wrong = {
        "encoder": {"target": "", "reference": ""},
        "sets": params["sets"] | {"images": "c"},
        "epochs": [1],
    }
    with pytest.raises(ValueError, match=r"'c' is neither a part .*\(a, b, control, public\)"):
        sources.demonstration(wrong, pair)


@pytest.mark.slow
def test_make_audit_from_the_command_line(parts, tmp_path):
    """A file of an untrained encoder and folders of pictures: a report, whose verdict is not that
    it memorizes.
    """
    own_format.save(
        tmp_path / "e.safetensors",
        Encoder("small4", "8-8", 24).eval(),
        train.Recipe(encoder="small4", projector="8-8", size=24),
    )
    for name in ("a", "public", "control"):
        folder_of(tmp_path / name, parts[name], 300)
    out, make = tmp_path / "my report.html", shutil.which("make")
    given = {
        "ENCODER": tmp_path / "e.safetensors",
        "IMAGES": tmp_path / "a",
        "PUBLIC": tmp_path / "public",
        "HELD_OUT": tmp_path / "control",
        "OUT": out,
        "P": "k=5",
        "PYTHON": shutil.which("python") or "python3",
    }
    environment = os.environ | {"DEJAVU_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    command = [
        make,
        "audit",
        *(f"{name}={value}" for name, value in given.items() if name != "PYTHON"),
    ]
    done = subprocess.run(
        command, cwd=store.PACKAGE.parent, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "memorizes</strong>" not in out.read_text()
        and "What could not be checked" in out.read_text()
    )
    store.verify(out)
    command = [word for word in command if not word.startswith("PUBLIC")]
    done = subprocess.run(
        command, cwd=store.PACKAGE.parent, capture_output=True, text=True, env=environment
    )
    assert done.returncode != 0 and "make audit ENCODER=" in done.stderr
    done = subprocess.run(
        [*command, "PUBLIC=/no/such"],
        cwd=store.PACKAGE.parent,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode != 0 and "PUBLIC: /no/such; expected a folder" in done.stdout
