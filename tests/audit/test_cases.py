"""Situations of public bug reports, through the door of the audit: what is wrong with a picture, a
box, or a name is one line in the report, and never changes what is audited unseen.
"""

import os
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dejavu_utils.audit import audit, checks
from dejavu_utils.models.external import External

CLASSES = ("ant", "bee", "cat", "dog")
COUNTS = {"train": 10, "public": 15, "heldout": 10}  # a class
WIDTH, HEIGHT = 96, 80


class Colours(nn.Module):
    """A trunk without weights: colours in four quarters of the picture."""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


ENCODER = External(Colours(), name="colours", sha256="0" * 64)


def draw(random, label):
    """Return a coloured square on a noisy gradient."""
    slope = np.linspace(0, 160, WIDTH)[None, :, None] * random.random(3)
    pixels = slope + 60 * random.random(3) + random.normal(0, 15, (HEIGHT, WIDTH, 3))
    x, y = random.integers(35, 60), random.integers(25, 50)
    pixels[y - 12 : y + 12, x - 12 : x + 12] = np.eye(4, 3)[label] * 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), (x - 12, y - 12, x + 12, y + 12)


@pytest.fixture
def root(tmp_path):
    """Three folders of pictures in class folders."""
    random = np.random.default_rng(0)
    for part, count in COUNTS.items():
        for label, name in enumerate(CLASSES):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                draw(random, label)[0].save(tmp_path / part / name / f"{i:03}.jpg")
    return tmp_path


def loaded(root, **settings):
    places = [root / part for part in COUNTS]
    return audit.load(ENCODER, *places, settings=audit.Settings(size=32, **settings))


def report(root):
    return audit.run(ENCODER, *[root / part for part in COUNTS], size=32)


def counts(case):
    return [len(images) for images in (*case.attacked.values(), case.public)]


def annotate(folder, change=None):
    """Write boxes.csv of new pictures, 30 a class; `change` maps (image, row) to another row."""
    random = np.random.default_rng(1)
    rows = ["image,width,height,x0,y0,x1,y1,class"]
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(30):
            picture, box = draw(random, label)
            image = f"{name}/b{i:03}.png"
            picture.save(folder / image)
            row = [WIDTH, HEIGHT, *box]
            row = change(image, row) if change else row
            rows.append(f"{image},{','.join(map(str, row))},{name}")
    (folder / "boxes.csv").write_text("\n".join(rows) + "\n")


# -- boxes ------------------------------------------------------------------------------------


def swapped(width, height, *box):
    return [height, width, *box]


def reversed_box(width, height, x0, y0, x1, y1):
    return [width, height, x1, y0, x0, y1]


def square(width, height, *box):
    return [256, 256, *box]


def nothing(width, height, *box):
    return [0, 0, *box]


@pytest.mark.parametrize("wrong", [swapped, reversed_box, square, nothing])
def test_a_box_that_makes_no_sense_is_left_out_and_counted(tmp_path, wrong):
    bad = "bee/b007.png"
    change = lambda image, row: wrong(*row) if image == bad else row  # noqa: E731
    annotate(tmp_path / "train", change)
    annotate(tmp_path / "public")
    random = np.random.default_rng(5)  # other pictures than the members
    for file in (tmp_path / "public").rglob("*.png"):
        pixels = np.asarray(Image.open(file)).astype(int) + random.integers(10, 60, 3)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
    case = audit.load(
        ENCODER,
        tmp_path / "train",
        tmp_path / "public",
        settings=audit.Settings(size=32, crop={"min_side": 5}),
    )
    assert case.crop["kind"] == "periphery" and len(case.members) == 119
    assert bad not in case.members.ids
    assert any("IMAGES: 1 files not used (1 .png: " in limit for limit in case.limits)


def test_boxes_of_a_frame_of_half_the_size_are_scaled(tmp_path):
    half = lambda image, row: [value / 2 for value in row]  # noqa: E731
    annotate(tmp_path / "half", half)
    annotate(tmp_path / "whole")
    found = [audit.sources.pictures(tmp_path / name) for name in ("half", "whole")]
    assert np.allclose(np.stack(found[0].boxes), np.stack(found[1].boxes))


# -- nothing vanishes uncounted, and one bad item is a line -----------------------------------


def test_files_that_are_not_read_are_counted_by_kind(root):
    for suffix, name in ((".heic", "ant"), (".avif", "cat"), (".pdf", "dog")):
        for i in range(6):
            (root / f"train/{name}/{i:03}.jpg").rename(root / f"train/{name}/{i:03}{suffix}")
            (root / f"train/{name}/{i:03}{suffix}").write_bytes(b"no such picture")
    for suffix, kind in ((".tif", "TIFF"), (".ppm", "PPM"), (".jfif", "JPEG"), (".webp", "WEBP")):
        file = root / "train/bee/000.jpg"
        Image.open(file).save(root / f"train/bee/x{suffix}", format=kind)
        Image.open(root / "train/bee/001.jpg").transpose(0).save(file.with_suffix(suffix), kind)
    page = report(root).html()
    for suffix in (".heic", ".avif", ".pdf"):
        assert f"6 {suffix}: " in page
    case = loaded(root)
    assert {"bee/000.tif", "bee/000.ppm", "bee/000.jfif", "bee/000.webp"} & {*case.members.ids}


@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>", "cut"])
def test_files_that_cannot_be_read_are_left_out_and_counted(root, content):
    for name in ("ant/001.jpg", "bee/002.jpg", "dog/003.jpg"):
        file = root / "train" / name
        file.write_bytes(file.read_bytes()[:-600] if content == "cut" else content)
    case = loaded(root)
    assert counts(case) == [37, 40, 60]
    assert any("IMAGES: 3 files not used (3 .jpg: " in limit for limit in case.limits)


def test_a_picture_of_16_bits_is_no_white_picture(root):
    ramp = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint16), (HEIGHT, 1))
    Image.fromarray(ramp * 257).save(root / "train/ant/deep.png")
    case = loaded(root)
    if "ant/deep.png" not in case.members.ids:
        assert any("16" in limit and "not used" in limit for limit in case.limits)
    else:
        row = list(case.members.ids).index("ant/deep.png")
        assert (case.members.pixels[row] == 255).float().mean() < 0.1


# -- independence -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["copy", "hard link", "link", "png", "smaller"])
@pytest.mark.parametrize("there", ["heldout", "public"])
def test_a_member_in_another_set_is_left_out_and_counted(root, how, there):
    for i in range(5):
        source = root / f"train/ant/{i:03}.jpg"
        target = root / there / f"ant/again{i}.jpg"
        if how == "copy":
            shutil.copy(source, target)
        elif how == "hard link":
            os.link(source, target)
        elif how == "link":
            target.symlink_to(source)
        elif how == "png":
            Image.open(source).save(target.with_suffix(".png"))
        else:
            Image.open(source).resize((WIDTH // 2, HEIGHT // 2), 4).save(target, quality=95)
    case = loaded(root)
    assert counts(case) == [40, 40, 60]
    said = " ".join(case.limits)
    assert "5 held-out pictures" in said or "5 public pictures" in said or "5 files" in said


@pytest.mark.parametrize("how", ["copy", "png"])
def test_a_member_that_is_there_twice_counts_once(root, how):
    for i in range(5):
        file = root / f"train/ant/{i:03}.jpg"
        if how == "copy":
            shutil.copy(file, root / f"train/bee/again{i}.jpg")  # even in another class
        else:
            Image.open(file).save(root / f"train/ant/again{i}.png")
    case = loaded(root)
    assert counts(case)[0] == 40
    assert any("IMAGES: 5 pictures look like an earlier one" in limit for limit in case.limits)


@pytest.mark.parametrize("part", ["train", "heldout", "public"])
def test_a_mirrored_copy_is_the_same_picture(root, part):
    """Training mirrors pictures itself: the encoder has seen it."""
    for i in range(5):
        with Image.open(root / f"train/ant/{i:03}.jpg") as picture:
            picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / part / f"ant/m{i}.jpg")
    case = loaded(root)
    assert counts(case) == [40, 40, 60]
    assert any(" 5 " in f" {limit}" and " look like " in limit for limit in case.limits)


def test_held_out_pictures_that_are_the_members_say_so(root):
    shutil.rmtree(root / "heldout")
    (root / "heldout").symlink_to(root / "train")
    with pytest.raises(
        ValueError, match="HELD_OUT: 0 of 0 .* 40 held-out pictures look like one of"
    ):
        loaded(root)


def forty_a_class(folder, seed):
    """Make the folders of all sets and classes; yield set, name without suffix, and picture."""
    random = np.random.default_rng(seed)
    for part in COUNTS:
        for label, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for i in range(40):
                picture, _ = draw(random, label)
                yield part, f"{name}/{i:03}", picture


def squashed(picture):
    return picture.resize((WIDTH, HEIGHT // 2), Image.Resampling.BILINEAR)


def grey(picture):
    return picture.convert("L").convert("RGB")


def darker(picture):
    return picture.point(lambda value: 0.6 * value)


@pytest.mark.parametrize("altered", [squashed, grey, darker])
def test_altered_copies_of_the_members_are_no_held_out_set(tmp_path, altered):
    """Held-out pictures that are the members' own, altered: the encoder was trained on them, and
    what tells the two sets apart is how they are stored.
    """
    for part, name, picture in forty_a_class(tmp_path, seed=3):
        if part == "heldout":
            picture = altered(Image.open(tmp_path / "train" / f"{name}.png"))
        picture.save(tmp_path / part / f"{name}.png")
    found = report(tmp_path)
    assert found.verdict.word == "undecided" and found.verdict.why == "control"
    assert checks.PICTURES in found.verdict.sentence


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (300, 2)])
def test_a_picture_too_small_for_a_corner_is_counted(root, size):
    """One pixel of it would be more of the picture than a corner may show."""
    Image.new("RGB", size, (9, 99, 9)).save(root / "train/ant/small.png")
    case = loaded(root)
    assert counts(case)[0] == 40
    assert any("IMAGES: 1 of 41 pictures have no background crop" in note for note in case.notes)


# -- names are bytes --------------------------------------------------------------------------

NAMES = [
    b"caf\xe9.jpg",
    b"\xff\xfe.jpg",
    b"a\nb.jpg",
    b"$10_$20.jpg",
    b'it\'s "it".jpg',
    b"<b>bold.jpg",
    b"--help.jpg",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_file_reaches_the_report(root, name):
    os.rename(root / "train/ant/000.jpg", os.fsencode(root / "train/ant") + b"/" + name)
    found = report(root)
    assert counts(found.case) == [40, 40, 60]
    path = found.write(root / "report.html")
    page = path.read_text(encoding="utf-8")
    assert "<b>bold" not in page and "What could not be checked" in page
    assert len(path.with_suffix(".csv").read_text(encoding="utf-8")) > 1000


@pytest.mark.parametrize("name", ["$10_$20", "100%", "<b>bold", "O'Brien", 'a "b"', "{{ 7 * 7 }}"])
def test_any_name_of_a_class_reaches_the_report(root, name):
    for part in COUNTS:
        (root / part / "ant").rename(root / part / name)
    page = report(root).html()
    assert "<b>bold" not in page and "49" not in page.partition("Class by class")[2][:900]


def test_a_class_in_another_normal_form_is_the_same_class(root):
    composed = "caf\u00e9"
    for part, form in zip(COUNTS, ("NFC", "NFD", "NFC"), strict=True):
        (root / part / "cat").rename(root / part / unicodedata.normalize(form, composed))
    case = loaded(root)
    assert counts(case) == [40, 40, 60] and composed in case.public.classes


@pytest.mark.parametrize("there", ["cat ", "Cat", "cats"])
def test_a_class_that_is_called_almost_so_is_named(root, there):
    (root / "public/cat").rename(root / "public" / there)
    with pytest.raises(ValueError, match=rf"such as 'cat' \(PUBLIC has '{there}'\)"):
        loaded(root)


# -- no verdict from a broken instrument ------------------------------------------------------


@pytest.mark.parametrize("how", ["quality 20", "half the size"])
def test_sets_that_were_stored_otherwise_give_no_verdict(tmp_path, how):
    """Members and public pictures as they are, held-out ones at another quality or size."""
    for part, name, picture in forty_a_class(tmp_path, seed=2):
        quality = 95
        if part == "heldout" and how == "quality 20":
            quality = 20
        elif part == "heldout":
            picture = picture.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.BILINEAR)
        picture.save(tmp_path / part / f"{name}.jpg", quality=quality)
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = External(trunk, name="random")
    found = audit.run(encoder, *[tmp_path / part for part in COUNTS], size=32)
    assert found.verdict.why == "control" and checks.PICTURES in found.verdict.sentence
