"""The audit's page: it stands alone, everything in it is escaped and described, and it says what
the tables say.
"""

import base64
import dataclasses
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
from dejavu_utils.audit import audit, conclusion, report, subject
from dejavu_utils.audit.settings import Settings
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
    random = np.random.default_rng(seed)
    sizes = np.array([[sides[i % len(sides)]] * 2 for i in range(n)])
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

    digests = np.zeros(1, "S32")

    def subset(self, index):
        return Stack(self[i] for i in index)


def examined(n=60, sides=(40,), reference=False):
    encoder = External(
        Noise(), name=f"noise {EVIL}", notes=(f"read as {EVIL}",), assumed=(EVIL,), sha256="ab" * 32
    )
    settings = Settings(k=3, size=16, limit=0, crop={"min_side": 8})
    sets = [images(n, seed, sides) for seed in (1, 2, 3)]
    second = encoder if reference else None
    case = subject.prepare(encoder, *sets, second, settings)
    asked = {"encoder": f"/home/{EVIL}.pt", "reference": "second.pt"}
    return audit.examine(case, settings, asked)


@pytest.fixture(scope="module")
def one():
    return examined()


@pytest.fixture(scope="module")
def page(one):
    return one.html()


def test_nothing_is_fetched_and_nothing_runs(page):
    read = Reader(page)
    active = {"script", "link", "iframe", "object", "embed", "form"}
    assert not {tag for tag, _ in read.tags} & active
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


def test_every_picture_is_described_and_is_the_right_one(one):
    case = one.case
    ids = list(case.members.ids[[3, 1]])
    lines = report.gallery(one, ids)
    assert len(lines) == 2 and all(len(line) == 2 + 3 for line in lines)
    assert all(picture["text"] for line in lines for picture in line)
    assert lines[0][0]["text"] == f"background crop of {ids[0]}"

    png = base64.b64decode(lines[0][1]["source"].partition(",")[2])
    shown = np.asarray(Image.open(io.BytesIO(png)))
    expected = case.members.subset([3]).squares(64)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(shown, expected)

    near = one.inferred["members", "backbone", "target"]["neighbours"][3, 0]
    assert lines[0][2]["caption"] == case.public.classes[case.public.labels[near]]
    assert all(image["alt"] for image in Reader(one.html()).all("img"))


def test_it_says_what_the_tables_say(one, page):
    text = Reader(page).text
    assert not re.search(r"\bnan\b|None", text)
    for row in one.scores.to_dict("records"):
        n = report.scored_images(row)
        ends = report.interval(row["low"], row["high"], n)
        comma = "" if ends.startswith("(") else ","
        shares = [report.points(row[role], sign=False) for role in ("target", "reference")]
        cells = [report.points(row["score"]), comma, ends, *shares, str(n)]
        assert " ".join(filter(None, cells)) in text
    for row in one.membership.to_dict("records"):
        assert f"{row['auc']:.3f} ({row['auc_low']:.3f} to {row['auc_high']:.3f})" in text
    assert all(limit in text for limit in one.case.limits)
    made = ("ab" * 32, f"/home/{EVIL}.pt", store.versions()["torch"], store.code_version())
    for value in (*made, one.case.public.digest[:16]):
        assert value in text


def test_the_verdict_stands_first_with_one_sentence_one_interval_and_one_figure(one, page):
    box = page.partition("<div class=verdict")[2].partition("</div>")[0]
    read = Reader(box)
    assert one.verdict.sentence in read.text and report.numbers(one) in read.text
    assert read.text.count("95 % interval") == 1 and len(read.all("img")) == 1
    assert f"Assumed of the encoder: {one.case.assumed[0]}" in read.text
    described = read.all("img")[0]["alt"]
    for name in (*one.scores["reading"].unique(), *one.controls["control"]):
        assert name in described


def test_it_is_a_page_for_phones_paper_and_readers_aloud(page):
    read = Reader(page)
    assert read.all("html") == [{"lang": "en"}]
    assert "width=device-width" in page and "@media print" in page
    assert len(read.all("h1")) == len(read.all("title")) == 1
    assert all(header.get("scope") in ("col", "row") for header in read.all("th"))
    assert len(read.all("main")) == 1 and not re.search(r"<th[^>]*></th>", page)
    scrolls = [each for each in read.all("div") if each.get("class") == "wide"]
    assert scrolls and all(each.get("tabindex") == "0" for each in scrolls)
    drawings = [div for div in read.all("div") if div.get("class") in ("track", "bar")]
    assert drawings  # their numbers stand beside them
    assert all("aria-hidden" in div for div in drawings)


def test_each_verdict_has_a_sign_and_a_word_beside_its_colour(one):
    assert set(report.SIGNS) == set(conclusion.STATUS)
    for word, (sign, colour) in report.SIGNS.items():
        other = dataclasses.replace(one, verdict=dataclasses.replace(one.verdict, word=word))
        assert f'<strong style="color:{colour}">{sign} {word}</strong>' in other.html()


def test_a_second_model_and_pictures_of_many_sizes():
    found = examined(sides=(40, 52), reference=True)
    text = Reader(found.html()).text
    assert "than a second model" in text and f"second.pt, noise {EVIL}" in text
    assert "Whether the second model was trained alike" in text


def test_at_most_fifty_classes_are_shown(one):
    many = pd.concat([one.classes.assign(**{"class": f"class {i}"}) for i in range(40)])
    text = Reader(dataclasses.replace(one, classes=many).html()).text
    assert f"50 of {len(many)} classes" in text and "class 16" in text and "class 17" not in text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0434, "+4.3"), (-0.007, "−0.7"), (0.0, "+0.0"), (float("nan"), "–")]
)
def test_points(value, text):
    assert report.points(value) == text


@pytest.mark.parametrize(
    ("ends", "n", "text"),
    [
        ((-0.01, 0.02), 90, "(−1.0 to +2.0)"),
        ((float("nan"), float("nan")), 33, "too few (n = 33)"),
        ((float("nan"), float("nan")), 90, "no interval"),
    ],
)
def test_interval(ends, n, text):
    assert report.interval(*ends, n) == text


def test_the_page_is_written_whole_with_a_sidecar(tmp_path):
    report.write(tmp_path / "new" / "r.html", "<p>é", {"seed": 3})
    assert (tmp_path / "new" / "r.html").read_bytes() == "<p>é".encode()
    assert store.verify(tmp_path / "new" / "r.html")["seed"] == 3


def test_a_report_overwrites_its_own_and_no_other(one, tmp_path):
    path = tmp_path / "report.html"
    one.write(path)
    one.write(path)
    other = dataclasses.replace(one, settings=dataclasses.replace(one.settings, margin=0.2))
    with pytest.raises(FileExistsError, match="is not the report of this audit.*another OUT"):
        other.write(path)
    path.with_name("notes.html").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.html is there already"):
        one.write(path.with_name("notes.html"))
    assert store.verify(path)["audit"] == one.name


@pytest.mark.parametrize("which", [lambda path: path, store.sidecar], ids=["page", "sidecar"])
def test_a_damaged_report_under_its_own_name_is_written_again(one, tmp_path, which):
    """As `make figures` does: nobody but this audit gives a file that name."""
    path = tmp_path / f"{one.name}.html"
    one.write(path)
    good = path.read_bytes()
    damaged = which(path)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    one.write(path)
    assert path.read_bytes() == good and store.verify(path)["audit"] == one.name


def _contrast(one, other):
    """Return the contrast of two colours as WCAG 2 defines it: 1 to 21."""

    def luminance(colour):
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("word", report.SIGNS)
@pytest.mark.parametrize("page", ["#ffffff", "#161616"])
def test_the_verdict_can_be_read_on_light_and_dark_pages(word, page):
    assert _contrast(report.SIGNS[word][1], page) >= 3  # large, bold letters
