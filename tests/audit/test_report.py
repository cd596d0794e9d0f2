"""The audit's page: it stands alone, everything in it is escaped and described, and it says what
the tables say.
"""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from dejavu_utils import store
from dejavu_utils.attack import scoring
from dejavu_utils.audit import audit, report, subject
from dejavu_utils.data.images import Images
from dejavu_utils.models.external import External

EVIL = '<script>alert("x")</script>'


class Reader(HTMLParser):
    """What a page holds: its tags with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


class Noise(nn.Module):
    """A trunk without weights."""

    def forward(self, x):
        return x.mean((2, 3))


def images(n, seed, sides=(40,)):
    """Return n noisy pictures of three classes, one of which has a dangerous name."""
    random, sizes = (
        np.random.default_rng(seed),
        np.array([[sides[i % len(sides)]] * 2 for i in range(n)]),
    )
    pixels = [
        torch.from_numpy(random.integers(0, 256, (3, side, side), dtype=np.uint8))
        for side, _ in sizes
    ]
    boxes = [np.array([[side / 2, 0, side, side]], np.float32) for side, _ in sizes]
    return Images(
        np.array([f"{EVIL}{seed}-{i:03d}" for i in range(n)]),
        np.arange(n) % 3,
        boxes,
        (EVIL, "a & b", "c"),
        sizes,
        torch.stack(pixels) if len(sides) == 1 else Stack(pixels),
    )


class Stack(list):
    """Pictures of mixed sizes, as lazy.Lazy."""

    stamps = np.zeros(1)

    def subset(self, index):
        return Stack(self[i] for i in index)


def examined(sides=(40,), reference=False):
    encoder = External(
        Noise(), name="noise", notes=(f"read as {EVIL}",), assumed=(EVIL,), sha256="ab" * 32
    )
    params = {
        "reading": {"size": 16, "layer": ""},
        "audit": {"limit": 0},
        "k": 3,
        "seeds": [0],
        "crop": {
            "kind": "periphery",
            "rule": "paper",
            "min_side": 8,
            "fraction": 0.3,
            "corner": "lower-left",
        },
    }
    encoders = {"target": encoder} | ({"reference": encoder} if reference else {})
    sets = {
        "images": images(30, 1, sides),
        "public": images(30, 2, sides),
        "held_out": images(30, 3, sides),
    }
    case = subject.prepare(encoders, sets, params)
    inferred = audit.infer(case, 3)
    rows = audit.table(case, inferred, None if reference else audit.judge(case, inferred, folds=2))
    own, scores, controls = (
        audit.part(rows, "backbone"),
        audit.scores(rows),
        audit.controls(case, rows, inferred),
    )
    pictures = report.gallery(case, inferred, own, list(case.audited.ids[[3, 1]]))
    files = {"target": f"/home/{EVIL}.pt", "reference": "second.pt"}
    found = {
        "title": EVIL,
        "verdict": audit.verdict(case, scores, controls),
        "scores": scores,
        "controls": controls,
        "split": scoring.four_way(own, resamples=50),
        "classes": audit.by_class(own, case.public.classes, 50),
        "memorized": pictures,
        "random": [],
        "made": report.provenance(case, files, params),
    }
    return case, found, inferred


@pytest.fixture(scope="module")
def one():
    return examined()


@pytest.fixture(scope="module")
def page(one):
    return report.page(*one[:2])


def test_nothing_is_fetched_and_nothing_runs(page):
    read = Reader(page)
    assert not {tag for tag, _ in read.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "form",
    }
    assert not re.search(r"https?://|url\(|@import|\bon\w+=", page)
    assert all(image["src"].startswith("data:image/png;base64,") for image in read.all("img"))
    policy = [
        meta["content"]
        for meta in read.all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_names_from_outside_are_text(page):
    assert EVIL not in page
    text = Reader(page).text
    assert text.count(EVIL) > 5 and "a & b" in text


def test_every_picture_is_described_and_is_the_right_one(one, page):
    case, found, inferred = one
    pictures = Reader(page).all("img")
    assert len(pictures) == 2 * (2 + 3) and all(image["alt"] for image in pictures)
    assert pictures[0]["alt"] == f"background crop of {case.audited.ids[3]}"
    shown = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(pictures[1]["src"].partition(",")[2])))
    )
    assert np.array_equal(shown, case.audited.subset([3]).squares(64)[0].permute(1, 2, 0).numpy())
    near = inferred["audited", "backbone", "target"]["neighbours"][3, 0]
    assert found["memorized"][0][2][1] == case.public.classes[case.public.labels[near]]


def test_it_says_what_the_tables_say(one, page):
    case, found, _ = one
    text, verdict = Reader(page).text, found["verdict"]
    assert verdict["sentence"] in text and verdict["word"] in text
    box = text.partition("What was done")[0]
    assert f"Assumed of the encoder: {case.assumed[0]}" in box
    for row in found["scores"].to_dict("records"):
        assert (
            f"{report.points(row['score'])} ( {report.points(row['low'])}".replace("( ", "(")
            in text
        )
    assert not re.search(r"\bnan\b|None", text)
    assert all(limit in text for limit in case.limits)
    made = (
        "ab" * 32,
        f"/home/{EVIL}.pt",
        store.versions()["torch"],
        store.code_version(),
        case.public.digest[:16],
    )
    for value in made:
        assert value in text
    assert "There is none." in text  # the empty gallery


def test_it_is_a_page_for_phones_paper_and_readers_aloud(page):
    read = Reader(page)
    assert (
        read.all("html") == [{"lang": "en"}]
        and "width=device-width" in page
        and "@media print" in page
    )
    assert len(read.all("h1")) == len(read.all("title")) == 1
    assert all(header.get("scope") in ("col", "row") for header in read.all("th"))
    drawings = [div for div in read.all("div") if div.get("class") in ("track", "bar")]
    assert drawings and all(
        "aria-hidden" in div for div in drawings
    )  # their numbers stand beside them


def test_each_verdict_has_a_sign_and_a_word_beside_its_colour(one):
    case, found, _ = one
    for word, (sign, colour) in report.SIGNS.items():
        page = report.page(case, found | {"verdict": found["verdict"] | {"word": word}})
        assert f'<strong style="color:{colour}">{sign} {word}</strong>' in page


def test_a_second_model_and_pictures_of_many_sizes():
    case, found, _ = examined(sides=(40, 52), reference=True)
    text = Reader(report.page(case, found)).text
    assert "than a second model" in text and "second.pt, noise" in text
    assert "Whether the second model was trained alike" in text


def test_at_most_fifty_classes_are_shown(one):
    case, found, _ = one
    many = pd.concat([found["classes"].assign(**{"class": f"class {i}"}) for i in range(40)])
    text = Reader(report.page(case, found | {"classes": many})).text
    assert f"50 of {len(many)} classes" in text and "class 16" in text and "class 17" not in text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0434, "+4.3"), (-0.007, "−0.7"), (0.0, "+0.0"), (float("nan"), "–")]
)
def test_points(value, text):
    assert report.points(value) == text


def test_the_page_is_written_whole_with_a_sidecar(tmp_path):
    report.write(tmp_path / "new" / "r.html", "<p>é", {"seed": 3})
    assert (tmp_path / "new" / "r.html").read_bytes() == "<p>é".encode()
    assert store.verify(tmp_path / "new" / "r.html")["seed"] == 3
