"""Readers: every layout gives the same kind of `Images`, whatever the file order, and bad files
never stop them.
"""

import io
import os
import shutil
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dejavu_utils.data import datasets, manifests, split
from dejavu_utils.data.images import Images

REAL = Path(os.environ.get("DEJAVU_DATA", "-"))
BOMB = (
    '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>'
    "<annotation><object><name>&b;</name></object></annotation>"
)


@pytest.fixture(autouse=True)
def own_runs(tmp_path_factory, monkeypatch):
    """boxes.csv of data sets made here goes into a folder of its own."""
    monkeypatch.setenv("DEJAVU_RUNS", str(tmp_path_factory.mktemp("runs")))


def real(name):
    return pytest.mark.skipif(
        not (REAL / name).exists(), reason=f"set DEJAVU_DATA to a folder that holds {name}"
    )


def picture(width, height, seed=0, mode="RGB", kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def xml(size, *boxes):
    objects = "".join(
        f"<object><name>x</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>"
        "</bndbox></object>"
        for a, b, c, d in boxes
    )
    return (
        f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>{objects}"
        "</annotation>"
    )


def archive(folder, path, top="top/", order=sorted):
    with zipfile.ZipFile(path, "w") as out:
        for file in order([p for p in folder.rglob("*") if p.is_file()]):
            out.write(file, top + file.relative_to(folder).as_posix())
    return path


@pytest.fixture
def tiny(tmp_path):
    """A Tiny-ImageNet of three classes of four pictures; ids n01_0 ... n03_3."""
    folder = tmp_path / "tiny-imagenet-200"
    write(folder / "wnids.txt", "n03\nn01\nn02\n")
    write(
        folder / "words.txt",
        "n01\tgoldfish, Carassius auratus\nn02\tcrane, bird\nn03\tcrane\nn99\tother\n",
    )
    for c in (1, 2, 3):
        for i in range(4):
            mode = "L" if i == 3 else "RGB"
            write(
                folder / f"train/n0{c}/images/n0{c}_{i}.JPEG",
                picture(64, 64, 10 * c + i, mode, "JPEG"),
            )
        lines = [
            f"n0{c}_0.JPEG\t0\t10\t63\t58",
            f"n0{c}_1.JPEG\t0\t0\t63\t63",
            f"n0{c}_2.JPEG\t5\t9\t5\t30",
        ]
        write(folder / f"train/n0{c}/n0{c}_boxes.txt", "\n".join(lines) + "\n")
    write(folder / "val/images/val_3.JPEG", picture(64, 64, 93, kind="JPEG"))  # not looked at
    return folder


@pytest.fixture
def imagenet(tmp_path):
    """An ImageNet of two classes: n02_2 is annotated at half its size, n02_3 has two boxes, n02_5
    is no picture.
    """
    folder = tmp_path / "imagenet"
    for c in (1, 2):
        for i in range(5):
            write(
                folder / f"train/n0{c}/n0{c}_{i}.JPEG", picture(80 + i, 60, 10 * c + i, kind="JPEG")
            )
        for i in (0, 1):
            write(folder / f"boxes/n0{c}/n0{c}_{i}.xml", xml((80 + i, 60), (10, 20, 29, 39)))
    write(folder / "boxes/n02/n02_2.xml", xml((41, 30), (10, 10, 19, 19)))
    write(folder / "boxes/n02/n02_3.xml", xml((83, 60), (-5, 2, 9, 99), (40, 30, 200, 40)))
    write(folder / "train/n02/n02_5.JPEG", "this is not a picture")
    return folder


def same(one, two):
    return (
        one.digest == two.digest
        and one.ids.tolist() == two.ids.tolist()
        and one.classes == two.classes
    )


def test_tiny_imagenet_reads_ids_labels_boxes_and_classes(tiny):
    images = datasets.read("tiny_imagenet", tiny.parent)
    assert images.ids.tolist() == [f"n0{c}_{i}" for c in (1, 2, 3) for i in range(4)]
    assert images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images.classes == ("goldfish", "crane (n02)", "crane (n03)")
    assert images.pixels.shape == (12, 3, 64, 64) and images.pixels.dtype == torch.uint8
    assert (
        images.boxes[0].tolist() == [[0, 10, 64, 59]] and images.boxes[0].dtype == np.float32
    )  # half-open
    assert images.boxes[2].tolist() == [[5, 9, 5, 30]] and images.boxes[3].shape == (0, 4)
    assert images.sizes.tolist() == [[64, 64]] * 12
    with Image.open(tiny / "train/n02/images/n02_1.JPEG") as image:
        assert np.array_equal(images.pixels[5].permute(1, 2, 0), np.asarray(image))
    grey = images.pixels[3]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    good, counts = split.attackable(images)
    assert counts == {"no box": 3, "zero area": 3, "whole image": 3}
    assert good.tolist() == [True, False, False, False] * 3


def test_folder_and_zip_in_any_order_are_the_same(tiny, tmp_path, monkeypatch):
    images = datasets.read("tiny_imagenet", tiny)
    forward = archive(tiny, tmp_path / "a.zip")
    backward = archive(
        tiny, tmp_path / "b.zip", top="", order=lambda files: sorted(files, reverse=True)
    )
    assert same(images, datasets.read("tiny_imagenet", forward)) and same(
        images, datasets.read("tiny_imagenet", backward)
    )
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    assert same(images, datasets.read("tiny_imagenet", tiny))


def test_only_the_classes_and_pictures_asked_for_are_read(tiny):
    shutil.rmtree(tiny / "train/n03/images")  # its table of boxes is still there
    images = datasets.read("tiny_imagenet", tiny, classes=2)
    assert images.ids.tolist() == [f"n0{c}_{i}" for c in (1, 2) for i in range(4)]
    with pytest.raises(ValueError, match="classes = 3, but 2 are there"):
        datasets.read("tiny_imagenet", tiny, classes=3)


def test_a_manifest_that_lists_its_classes_reads_only_those(tiny):
    entry = manifests.read("tiny_imagenet") | {"classes": ["n03", "n01", "n77"]}
    assert set(datasets.load(entry, tiny).ids) == {f"n0{c}_{i}" for c in (1, 3) for i in range(4)}


def test_bad_pictures_are_listed_not_fatal(tiny, tmp_path):
    folder = tiny / "train/n01/images"
    whole = (folder / "n01_0.JPEG").read_bytes()
    write(folder / "n01_0.JPEG", whole[: len(whole) // 2])
    write(folder / "n01_1.JPEG", "")
    write(folder / "n01_2.JPEG", picture(32, 64))
    write(tiny / "train/n02/n02_boxes.txt", "n02_0.JPEG\t1\t2\tx\t4\n")
    images = datasets.read("tiny_imagenet", tiny)
    reasons = dict(images.skipped)
    assert sorted(Path(name).name for name in reasons) == [
        "n01_0.JPEG",
        "n01_1.JPEG",
        "n01_2.JPEG",
        "n02_0.JPEG",
    ]
    assert "truncated" in reasons["train/n01/images/n01_0.JPEG"]
    assert "cannot identify" in reasons["train/n01/images/n01_1.JPEG"]
    assert "32 x 64 px, expected 64 x 64" in reasons["train/n01/images/n01_2.JPEG"]
    assert len(images) == 8 == len(images.pixels) and images.ids[0] == "n01_3"
    assert [name for name, _ in images.skipped] == sorted(reasons)


def bomb_png(side):
    """A PNG that declares side x side pixels and holds none."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore:Image size")
def test_imagenet_boxes_are_rescaled_clamped_and_bad_files_skipped(imagenet):
    write(imagenet / "boxes/n01/n01_1.xml", BOMB)
    write(imagenet / "train/n01/n01_6.JPEG", bomb_png(12_000))
    write(imagenet / "train/n01/n01_7.JPEG", bomb_png(40_000))
    whole = (imagenet / "train/n01/n01_4.JPEG").read_bytes()
    write(imagenet / "train/n01/n01_4.JPEG", whole[:-900])
    write(imagenet / "train/n01/n01_8.JPEG", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    write(imagenet / "train/n01/n01_9.png", picture(80, 60)[:-900])
    images = datasets.read("imagenet", imagenet.parent)
    found = dict(zip(images.ids.tolist(), images.boxes, strict=True))
    found = {Path(name).stem: each for name, each in found.items()}
    assert images.classes == ("n01", "n02")
    assert list(found) == ["n01_0", "n01_2", "n01_3", "n02_0", "n02_1", "n02_2", "n02_3", "n02_4"]
    assert found["n01_0"].tolist() == [[10, 20, 30, 40]]  # 0-based, last pixel included
    assert np.allclose(
        found["n02_2"], [[20, 20, 40, 40]]
    )  # annotated at 41 x 30, the picture is 82 x 60
    assert found["n02_3"].tolist() == [[0, 2, 10, 60], [40, 30, 83, 41]]  # x and y clamped
    assert found["n02_4"].shape == (0, 4) and found["n02_4"].dtype == np.float32
    reasons = {Path(name).stem: reason for name, reason in images.skipped}
    assert (
        "DOCTYPE" in reasons["n01_1"]
        and "truncated" in reasons["n01_4"]
        and "cannot identify" in reasons["n01_8"]
    )
    assert (
        "bomb" in reasons["n01_6"]
        and "bomb" in reasons["n01_7"]
        and "cannot identify" in reasons["n02_5"]
    )
    assert "truncated" in reasons["n01_9"]
    assert len(reasons) == 7
    assert images.pixels[1].shape == (3, 60, 82) and images.pixels[1].dtype == torch.uint8
    assert split.attackable(images)[0].tolist() == [
        True,
        False,
        False,
        True,
        True,
        True,
        True,
        False,
    ]


def test_a_lazy_picture_that_breaks_later_says_which(imagenet):
    images = datasets.read("imagenet", imagenet)
    (imagenet / "train/n01/n01_3.JPEG").write_text("gone")
    with pytest.raises(ValueError, match=r"n01_3.JPEG cannot be decoded .*Repair or remove"):
        images.pixels[3]


def test_ilsvrc_as_published_is_the_same(imagenet, tmp_path):
    images = datasets.read("imagenet", imagenet)
    (tmp_path / "ILSVRC").mkdir()
    shutil.move(imagenet / "train", tmp_path / "ILSVRC/Data/CLS-LOC/train")
    shutil.move(imagenet / "boxes", tmp_path / "ILSVRC/Annotations/CLS-LOC/train")
    shutil.rmtree(imagenet)
    assert same(images, datasets.read("imagenet", tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "<annotation>",
        xml((80, 60), (1, 1, 2, 3)).replace("ymax>", "y>"),
        BOMB,
        BOMB.encode("utf-16"),
        xml((80, 60), ("nan", 1, 2, 3)),
        b"\xff\x00",
    ],
)
def test_bad_xml_is_a_reason(imagenet, text):
    write(imagenet / "boxes/n01/n01_0.xml", text)
    images = datasets.read("imagenet", imagenet)
    assert "train/n01/n01_0.JPEG" in dict(images.skipped) and "n01/n01_0.JPEG" not in images.ids
    assert "n01/n01_1.JPEG" in images.ids


def test_pets_take_the_class_from_the_file_name_and_boxes_from_1(tmp_path):
    for name in ("big_dog_1", "big_dog_2", "cat_1", "cat_2"):
        write(tmp_path / f"images/{name}.jpg", picture(50, 40, kind="JPEG"))
        write(tmp_path / f"annotations/xmls/{name}.xml", xml((50, 40), (1, 1, 10, 20)))
    write(tmp_path / "images/cat_2.png", picture(50, 40))
    write(tmp_path / "images/cat_3.jpg", picture(50, 40, kind="JPEG"))
    write(tmp_path / "images/cat_1.mat", "not looked at")
    images = datasets.read("pets", tmp_path)
    assert images.ids.tolist() == ["big_dog_1", "big_dog_2", "cat_1", "cat_3"]
    assert images.classes == ("big_dog", "cat") and images.labels.tolist() == [0, 0, 1, 1]
    assert images.boxes[0].tolist() == [[0, 0, 10, 20]] and images.stacked.shape == (4, 3, 40, 50)
    assert len(images.boxes[3]) == 0  # a class, but no box
    assert images.skipped == [
        ("images/cat_1.mat", "not a picture: .mat"),
        ("images/cat_2.jpg", "two pictures for one annotation"),
        ("images/cat_2.png", "two pictures for one annotation"),
    ]


def test_yolo_takes_the_class_of_the_largest_box(tmp_path):
    for name in "abcde":
        write(tmp_path / f"images/train2017/{name}.jpg", picture(50, 40, kind="JPEG"))
    write(tmp_path / "labels/train2017/a.txt", "16 0.2 0.5 0.1 0.2\n15 0.5 0.5 0.8 0.5\n")
    write(tmp_path / "labels/train2017/b.txt", "0 0.9 0.9 0.4 0.2\n")
    write(tmp_path / "labels/train2017/c.txt", "")
    write(tmp_path / "labels/train2017/d.txt", "99 0.5 0.5 0.5 0.5\n")
    images = datasets.read("coco128", tmp_path)
    assert images.ids.tolist() == ["a", "b"] and images.labels.tolist() == [1, 0]
    assert images.classes == ("person", "cat")
    assert np.allclose(images.boxes[0], [[7.5, 16, 12.5, 24], [5, 10, 45, 30]])
    assert np.allclose(images.boxes[1], [[35, 32, 50, 40]])  # clamped
    assert [Path(name).stem for name, _ in images.skipped] == ["c", "d", "e"]


def test_squares_are_the_centre_of_the_cut_and_the_same_lazily(imagenet):
    images = datasets.read("imagenet", imagenet)
    rects = np.array([[3, 5, 43, 25]] * len(images))
    lazy = images.squares(20, rects)
    assert lazy.shape == (len(images), 3, 20, 20) and lazy.dtype == torch.uint8
    for i in range(len(images)):
        assert torch.equal(lazy[i], images.pixels[i][:, 5:25, 13:33])
    assert torch.equal(images.squares(10, rects, keep=0.5), lazy[..., 5:15, 5:15])
    same_size = images.subset(np.flatnonzero((images.sizes == images.sizes[0]).all(1)))
    held = replace(same_size, pixels=same_size.stacked)
    for size, keep in ((20, 1.0), (33, 1.0), (17, 0.875)):
        assert torch.equal(held.squares(size, keep=keep), same_size.squares(size, keep=keep))
    assert images.stacked is None and images.subset([]).squares(8).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match="2 rectangles for"):
        images.squares(8, rects[:2])


def test_squares_never_look_outside_the_rectangle():
    pixels = torch.full((1, 3, 40, 40), 255, dtype=torch.uint8)
    pixels[..., 7:20, 4:33] = 9
    no_box, size = [np.zeros((0, 4), np.float32)], np.array([[40, 40]])
    images = Images(np.array(["a"]), np.zeros(1, np.int64), no_box, ("x",), size, pixels)
    for size, keep in ((5, 1.0), (16, 0.9), (64, 1.0)):
        assert (images.squares(size, [[4, 7, 33, 20]], keep) == 9).all()


def test_digest_and_subset(tiny):
    images = datasets.read("tiny_imagenet", tiny)
    back = images.subset([5, 2])
    assert back.ids.tolist() == ["n02_1", "n01_2"] and torch.equal(back.pixels[0], images.pixels[5])
    mask = np.isin(images.ids, ["n02_1"])
    assert images.subset(mask).ids.tolist() == ["n02_1"] and len(images.subset([])) == 0
    changed = images.pixels.clone()
    changed[0, 0, 0, 0] ^= 1
    boxes = [images.boxes[0] + 1, *images.boxes[1:]]
    moved = [
        images.boxes[0][:0],
        np.concatenate(images.boxes[:2]),
        *images.boxes[2:],
    ]  # same boxes, other images
    variants = [
        images,
        replace(images, pixels=changed),
        replace(images, boxes=boxes),
        replace(images, boxes=moved),
        back,
        replace(images, labels=images.labels[::-1].copy()),
    ]
    assert len({v.digest for v in variants}) == len(variants) and len(images.digest) == 64
    with pytest.raises(ValueError, match="different lengths"):
        replace(images, labels=images.labels[1:])


def test_missing_data_set_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DEJAVU_DATA", str(tmp_path))
    with pytest.raises(
        FileNotFoundError,
        match="tiny-imagenet-200.zip, .*make data NAME=tiny_imagenet.*DEJAVU_DATA",
    ):
        datasets.read("tiny_imagenet")
    with pytest.raises(FileNotFoundError, match="Register at image-net.org"):
        datasets.read("imagenet")
    with pytest.raises(ValueError, match="expected one of coco128, imagenet"):
        datasets.read("tinyimagenet")
    (tmp_path / "imagenet").mkdir()
    with pytest.raises(
        FileNotFoundError, match="imagenet is not data set imagenet: expected a folder train or"
    ):
        datasets.read("imagenet")


def test_truncated_or_wrong_zip(tiny, tmp_path):
    whole = archive(tiny, tmp_path / "tiny-imagenet-50.zip")
    with pytest.raises(ValueError, match="wrong checksum: sha256 .* expected 9fa3bf85"):
        datasets.read("tiny_imagenet_50", tmp_path)
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole.read_bytes()[:-500])
    with pytest.raises(ValueError, match="not a whole zip file"):
        datasets.read("tiny_imagenet", cut)


def test_no_readable_picture_is_one_error(tiny):
    for file in (tiny / "train").rglob("*.JPEG"):
        file.write_text("x")
    with pytest.raises(ValueError, match="none of 12 pictures could be read.*n01_0.JPEG"):
        datasets.read("tiny_imagenet", tiny)


def test_scenes_are_dispatched():
    images = datasets.read("scenes", classes=3, per_class=4)
    assert (
        len(images) == 12
        and split.attackable(images)[0].all()
        and images.squares(16).shape == (12, 3, 16, 16)
    )


@real("tiny-imagenet-50.zip")
def test_real_tiny_imagenet():
    train = datasets.read("tiny_imagenet_50", classes=4)
    assert len(train) == 2000 and train.skipped == []
    assert train.classes == ("goldfish", "American alligator", "black widow", "koala")
    assert train.boxes[0].tolist() == [[0, 10, 64, 59]] and train.ids[0] == "n01443537_0"


@real("oxford-pets-3class.zip")
def test_real_pets():
    images = datasets.read("pets")
    assert len(images) == 296 and images.classes == ("Abyssinian", "Bengal", "american_bulldog")
    assert (
        sum(map(len, images.boxes)) == 297
        and split.attackable(images)[0].all()
        and not images.skipped
    )
    assert images.boxes[0].tolist() == [[332, 71, 425, 158]] and images.sizes[0].tolist() == [
        600,
        400,
    ]


@real("coco128-train.zip")
def test_real_coco():
    images = datasets.read("coco128")
    assert len(images) == 126 and sum(map(len, images.boxes)) == 929
    assert sorted(int(Path(name).stem) for name, _ in images.skipped) == [250, 508]
    assert all(
        (b[:, 2:] <= s).all() and (b >= 0).all()
        for b, s in zip(images.boxes, images.sizes, strict=True)
    )
