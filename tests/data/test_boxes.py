"""The reader of a folder or zip and its boxes.csv: each kind of fault on several instances."""

import io
import os
import shutil
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps

from dejavu_utils import plots, store
from dejavu_utils.audit import sources
from dejavu_utils.audit.audit import load
from dejavu_utils.audit.settings import Settings
from dejavu_utils.data import boxes, datasets, manifests, split

COLUMNS = "image,width,height,x0,y0,x1,y1,class"


@pytest.fixture(autouse=True)
def own_runs(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DEJAVU_RUNS", str(tmp_path_factory.mktemp("runs")))


def save(path, width=96, height=80, seed=0, box=None, orientation=None, **options):
    """Save coloured tiles with a red rectangle at `box`; with an EXIF orientation, if any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tiles = np.random.default_rng(seed).integers(0, 100, (4, 4, 3), np.uint8)
    pixels = np.kron(tiles, np.ones((-(-height // 4), -(-width // 4), 1), np.uint8))
    pixels = pixels[:height, :width].copy()
    if box is not None:
        x0, y0, x1, y1 = box
        pixels[y0:y1, x0:x1] = (255, 0, 0)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


def table(root, *rows, header=COLUMNS):
    (root / "boxes.csv").write_text("\n".join([header, *rows]) + "\n")


def classes_of(root, names=("ant", "bee", "cat", "dog"), count=10, suffix="jpg", seed=0):
    """Class folders of `count` pictures each, whose file names repeat from class to class."""
    for place, name in enumerate(names):
        for i in range(count):
            save(root / name / f"{i:03}.{suffix}", seed=1000 * seed + 100 * place + i)
    return root


# Frames: uniform scale or a reason


@pytest.mark.parametrize(
    "annotated, box",
    [
        ((300, 200), (100, 50, 200, 150)),
        ((150, 100), (50, 25, 100, 75)),
        ((600, 400), (200, 100, 400, 300)),
        ((301, 200), (100, 50, 200, 150)),  # a pixel of rounding
        ((75, 50), (25, 12.5, 50, 37.5)),
    ],
)
def test_a_uniform_scale_is_applied(annotated, box):
    found = boxes.fit(np.array([box], float), annotated, (300, 200))
    assert np.allclose(found, [[100, 50, 200, 150]], atol=1) and found.dtype == np.float32


@pytest.mark.parametrize("annotated", [(200, 300), (256, 256), (300, 210), (310, 200), (640, 480)])
def test_another_shape_is_a_reason(annotated):
    with pytest.raises(ValueError, match="annotated in another shape"):
        boxes.fit(np.array([[1.0, 1, 2, 2]]), annotated, (300, 200))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_a_turned_picture_are_turned_with_it(tmp_path, orientation):
    """The box is drawn in the picture as viewers show it; pixels stay as they are stored."""
    stored = save(tmp_path / "a/1.png", 120, 80, box=(10, 20, 40, 70), orientation=orientation)
    save(tmp_path / "b/2.png", 80, 120)
    with Image.open(stored) as image:
        shown = np.asarray(ImageOps.exif_transpose(image))
    assert shown.shape[:2] == (120, 80)
    rows, columns = np.nonzero(shown[..., 0] == 255)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    table(tmp_path, f"a/1.png,80,120,{','.join(map(str, box))},a", "b/2.png,80,120,1,1,9,9,b")
    images = datasets.folder(tmp_path)
    assert images.boxes[0].tolist() == [[10, 20, 40, 70]] and not images.skipped
    x0, y0, x1, y1 = images.boxes[0][0].astype(int)
    assert (images.pixels[0][0, y0:y1, x0:x1] == 255).all()


@pytest.mark.parametrize(
    "orientation, size, annotated",
    [
        (6, (120, 80), (120, 80)),  # said to be of the stored picture: tools differ
        (3, (120, 80), (120, 80)),
        (2, (120, 80), (120, 80)),
        (8, (80, 80), (80, 80)),
        (6, (120, 80), (100, 100)),
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_boxes_that_may_be_of_the_other_frame_are_refused(
    tmp_path, orientation, size, annotated, suffix
):
    save(tmp_path / f"a/1.{suffix}", *size, orientation=orientation)
    save(tmp_path / f"a/2.{suffix}", *size)
    save(tmp_path / f"b/3.{suffix}", *size, orientation=orientation)  # no box: nothing to turn
    width, height = annotated
    table(tmp_path, f"a/1.{suffix},{width},{height},1,1,9,9,")
    images = datasets.folder(tmp_path)
    assert images.ids.tolist() == [f"a/2.{suffix}", f"b/3.{suffix}"]
    ((name, reason),) = images.skipped
    assert name == f"a/1.{suffix}" and ("EXIF orientation" in reason or "another shape" in reason)


def test_a_tiff_on_its_side_is_read_as_it_is_shown(tmp_path):
    save(tmp_path / "a/1.tif", 120, 80, box=(10, 20, 40, 70), orientation=6)
    save(tmp_path / "b/2.tif", 80, 120)
    table(tmp_path, "a/1.tif,80,120,10,10,60,40,a", "b/2.tif,80,120,1,1,9,9,b")
    images = datasets.folder(tmp_path)
    x0, y0, x1, y1 = images.boxes[0][0].astype(int)
    assert (images.pixels[0][0, y0:y1, x0:x1] == 255).all()
    assert (images.pixels[0][0] == 255).sum() == 30 * 50


# boxes.csv


@pytest.mark.parametrize(
    "header, message",
    [
        ("image,width,height,x0,y0,x1,class", "missing: y1"),
        ("picture,width,height,x0,y0,x1,y1,class", "missing: image; unknown: 'picture'"),
        (COLUMNS + ",confidence", "unknown: 'confidence'"),
        ("image;width;height;x0;y0;x1;y1;class", "missing: image, width"),
    ],
)
def test_columns_that_are_missing_or_unknown_are_refused(tmp_path, header, message):
    classes_of(tmp_path, count=1)
    table(tmp_path, header=header)
    with pytest.raises(ValueError, match=message):
        datasets.folder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{wide}",
        "{header}\n\n{wide}\n",
        "{header}\r{wide}\r",
        "{header}\nant/0.jpg,9,9,1,1,2,2,ant\n{wide}",
    ],
)
@pytest.mark.parametrize("name", ["boxes.csv", "boxes.unused.csv"])
def test_a_line_of_thousands_of_columns_is_refused_at_once(tmp_path, name, content):
    """Of a million columns pandas makes an index for minutes."""
    classes_of(tmp_path, count=1)
    table(tmp_path, "ant/0.jpg,96,80,1,1,9,9,ant")
    text = content.format(header=COLUMNS, wide="1," * 1_000_000)
    (tmp_path / name).write_text(text, newline="")
    with pytest.raises(store.StoreError, match=rf"{name}: line \d has 1000000 commas, expected at"):
        datasets.folder(tmp_path)


@pytest.mark.parametrize(
    "numbers, reason",
    [
        ("96,80,70,1,60,9", "a box ends before it starts"),
        ("96,80,1,70,9,60", "a box ends before it starts"),
        ("96,80,nan,1,60,9", "a number in boxes.csv is missing or not finite"),
        ("96,80,1,1,inf,9", "a number in boxes.csv is missing or not finite"),
        ("96,80,,1,60,9", "a number in boxes.csv is missing or not finite"),
        ("96,80,one,1,60,9", "a number in boxes.csv is missing or not finite"),
        ("0,0,1,1,60,9", "its width or height in boxes.csv is not above 0"),
        ("96,80,96,1,120,9", "a box outside its picture"),
        ("96,80,-9,-9,-1,-1", "a box outside its picture"),
        ("80,96,1,1,60,9", "annotated in another shape"),
    ],
)
def test_a_row_that_makes_no_sense_leaves_its_picture_out(tmp_path, numbers, reason):
    """Also where another row of it is good: the object may be anywhere."""
    classes_of(tmp_path, count=2)
    table(tmp_path, "ant/000.jpg,96,80,1,1,9,9,", f"ant/000.jpg,{numbers},")
    images = datasets.folder(tmp_path)
    ((name, found),) = images.skipped
    assert name == "ant/000.jpg" and len(images) == 7
    assert found.startswith(reason) or found.startswith("its rows differ")


def shares(width, height, x0, y0, x1, y1):
    return [x0 / width, y0 / height, x1 / width, y1 / height]


def centres(width, height, x0, y0, x1, y1):
    middle = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height]
    return [*middle, (x1 - x0) / width, (y1 - y0) / height]


def percents(width, height, *box):
    return [100 * each for each in shares(width, height, *box)]


def thousandths(width, height, *box):
    return [1000 * each for each in shares(width, height, *box)]


def widths(width, height, x0, y0, x1, y1):
    return [x0, y0, x1 - x0, y1 - y0]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (shares, "40 of 40 boxes lie in the first 100 px of large frames: in percent, or shares"),
        (centres, r"\d+ of 40 boxes end before they start: are x1, y1 widths"),
        (percents, "40 of 40 boxes lie in the first 100 px of large frames: in percent"),
        (thousandths, r"40 of 40 boxes reach far out of their frame"),
        (widths, r"\d+ of 40 boxes end before they start: are x1, y1 widths"),
    ],
)
def test_boxes_in_other_units_are_refused_as_a_whole(tmp_path, units, message):
    """Not only those that are impossible: the others would be as wrong."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(40):
        save(tmp_path / f"{i}.jpg", 400, 300, seed=i)
        x0, y0 = random.integers(20, 200, 2)
        numbers = units(400, 300, x0, y0, x0 + 150, y0 + 90)
        rows.append(f"{i}.jpg,400,300,{','.join(map(str, numbers))},{'ab'[i % 2]}")
    table(tmp_path, *rows)
    with pytest.raises(ValueError, match=message):
        datasets.folder(tmp_path)


def test_a_box_in_shares_of_its_frame_is_a_reason_of_its_picture(tmp_path):
    save(tmp_path / "1.jpg")
    save(tmp_path / "2.jpg")
    table(tmp_path, "1.jpg,96,80,0.2,0.3,0.6,0.9,a", "2.jpg,96,80,1,2,9,9,b")
    images = datasets.folder(tmp_path)
    assert images.ids.tolist() == ["2.jpg"]
    assert images.skipped == [("1.jpg", "a box in the first pixel: shares of the frame, not px?")]


def test_a_table_of_several_splits_is_no_set(tmp_path):
    classes_of(tmp_path, count=2)
    rows = [f"{name}/000.jpg,96,80,1,1,9,9,{name},train" for name in ("ant", "bee")]
    table(tmp_path, *rows, header=f"{COLUMNS},split")
    assert len(datasets.folder(tmp_path)) == 2
    table(tmp_path, *rows, "cat/000.jpg,96,80,1,1,9,9,cat,val", header=f"{COLUMNS},split")
    with pytest.raises(ValueError, match=r"HELD_OUT: .* the splits train \(2\), val \(1\)"):
        datasets.folder(tmp_path, "HELD_OUT")


def test_rows_and_files_that_find_no_partner(tmp_path):
    classes_of(tmp_path, count=2)
    table(tmp_path, "ant/000.jpg,96,80,1,1,9,9,ant", "ant/gone.jpg,96,80,1,1,9,9,ant")
    images = datasets.folder(tmp_path)
    assert images.ids.tolist() == ["ant/000.jpg"] and images.boxes[0].tolist() == [[1, 1, 9, 9]]
    assert dict(images.skipped)["ant/gone.jpg"] == "boxes.csv names it, but there is none"
    assert dict(images.skipped)["dog/001.jpg"].startswith("no class: boxes.csv has no row")
    assert len(images.skipped) == 8
    table(tmp_path, "x/ant/000.jpg,96,80,1,1,9,9,ant")
    with pytest.raises(ValueError, match="none of the 1 pictures of boxes.csv is there.*x/ant"):
        datasets.folder(tmp_path)


def test_the_class_of_the_largest_box_and_the_owner(tmp_path):
    for name in "123":
        save(tmp_path / f"{name}.jpg")
    rows = ["1.jpg,96,80,0,0,5,5,cat,eve,train", "1.jpg,96,80,0,0,50,50,dog,eve,train"]
    rows += [
        "2.jpg,96,80,0,0,50,50,cat,,",
        "3.jpg,96,80,0,0,5,5,cat,eve,",
        "3.jpg,96,80,0,0,5,5,cat,bob,",
    ]
    table(tmp_path, *rows, header=f"{COLUMNS},owner,split")
    images = datasets.folder(tmp_path)
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [1, 0]
    assert images.attributes["owner"].tolist() == ["eve", ""]
    assert images.skipped == [("3.jpg", "its rows differ in width, height, owner or split")]


@pytest.mark.parametrize(
    "rows, kept",
    [
        (["0,0,50,50,cat", "0,0,50,50,dog"], False),
        (["0,0,5,5,cat", "0,0,50,50,dog", "0,0,50,50,cat"], False),
        (["0,0,50,50,cat", "0,0,50,50,cat"], True),  # a row twice
        (["0,0,50,50,cafe\u0301", "0,0,50,50,caf\u00e9"], True),  # one name, in two spellings
        (["0,0,5,5,cat", "0,0,5,5,dog", "0,0,50,50,cat"], True),  # not the box that counts
        (["0,0,50,50,cat", "5,5,55,55,dog"], True),  # two objects of one size: the first
    ],
)
def test_one_box_of_two_classes_is_a_reason(tmp_path, rows, kept):
    save(tmp_path / "1.jpg")
    save(tmp_path / "2.jpg")
    table(tmp_path, "2.jpg,96,80,0,0,9,9,cat", *(f"1.jpg,96,80,{row}" for row in rows))
    images = datasets.folder(tmp_path)
    assert ("1.jpg" in images.ids) == kept
    left = [] if kept else [("1.jpg", "one box, two classes: cat and dog")]
    assert images.skipped == left


@pytest.mark.parametrize("name", ["boxes.csv", "Boxes.CSV", "BOXES.csv"])
@pytest.mark.parametrize("top", ["", "mine/"])
def test_the_table_is_found_in_any_case(tmp_path, name, top):
    root = classes_of(tmp_path / top, count=2)
    table(root, "ant/000.jpg,96,80,1,1,9,9,")
    (root / "boxes.csv").rename(root / name)
    (root / "old_boxes.csv").write_text("x")
    images = datasets.folder(root)
    assert [len(each) for each in images.boxes] == [1, 0, 0, 0, 0, 0, 0, 0]
    assert images.skipped == [("old_boxes.csv", "not a picture: .csv")]


@pytest.mark.parametrize("names", [("boxes.csv", "Boxes.CSV"), ("ant/boxes.csv", "bee/boxes.csv")])
def test_two_tables_of_boxes_are_named(tmp_path, names):
    root = classes_of(tmp_path, count=2)
    for name in names:
        (root / name).write_text(f"{COLUMNS}\nant/000.jpg,96,80,1,1,9,9,\n")
    with pytest.raises(store.StoreError, match="are 2 tables of boxes; expected one") as caught:
        datasets.folder(root)
    assert all(name in str(caught.value) for name in names)


def test_pictures_whose_annotation_was_refused_are_left_out(tmp_path):
    classes_of(tmp_path, count=2)
    table(tmp_path, "ant/000.jpg,96,80,1,1,9,9,")
    unused = "file,image,reason,detail\nx.xml,ant/001.jpg,XML that cannot be parsed,line 1\n"
    (tmp_path / "boxes.unused.csv").write_text(unused)
    images = datasets.folder(tmp_path)
    assert images.skipped == [("ant/001.jpg", "XML that cannot be parsed: line 1")]


def test_a_zip_with_a_top_folder_is_the_same_as_its_folder(tmp_path):
    root = classes_of(tmp_path / "mine", count=2)
    table(root, "ant/000.jpg,96,80,1,1,9,9,")
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as file:
        for path in sorted(root.rglob("*.*")):
            file.write(path, f"mine/{path.relative_to(root)}")
        file.writestr("__MACOSX/mine/._boxes.csv", b"\0")
    one, other = datasets.folder(root), datasets.folder(tmp_path / "mine.zip")
    assert one.digest == other.digest and one.boxes[0].tolist() == [[1, 1, 9, 9]]
    assert sources.pictures(str(tmp_path / "mine.zip")).ids.tolist() == one.ids.tolist()


# Every file is used or has a reason


def everything(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}


def test_every_file_is_used_or_listed(tmp_path):
    """Kinds that are read, kinds that are not, damaged files, links, pipes, hidden folders."""
    root = classes_of(tmp_path / "mine", count=3)
    for suffix in ("tif", "tiff", "ppm", "png", "bmp", "gif", "webp", "avif"):
        save(root / f"ant/x.{suffix}")
    shutil.copy(root / "ant/000.jpg", root / "ant/y.jfif")
    shutil.copy(root / "ant/000.jpg", root / "ant/y.JPG")
    kept = {f"ant/x.{each}" for each in ("tif", "tiff", "ppm", "png", "bmp", "gif", "webp", "avif")}
    kept |= {"ant/y.jfif", "ant/y.JPG"} | {path for path in everything(root) if path[4:5] == "0"}

    (root / "bee/phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "bee/gone.jpg").write_text("<html>404 Not Found</html>")
    (root / "bee/empty.jpg").write_bytes(b"")
    (root / "bee/notes").write_text("x")
    (root / "bee/clip.mp4").write_text("x")
    (root / ".DS_Store").write_text("x")
    save(root / "bee/.ipynb_checkpoints/000.jpg")
    os.symlink("000.jpg", root / "bee/link.jpg")
    os.symlink("nowhere.jpg", root / "bee/broken.jpg")
    os.symlink(".", root / "bee/loop")
    os.symlink("../cat", root / "bee/cats")
    os.mkfifo(root / "bee/pipe.jpg")

    images = datasets.folder(root)
    assert set(images.ids) == kept and len(set(images.ids)) == len(images)
    reasons = dict(images.skipped)
    assert set(reasons) | kept >= everything(root) and len(reasons) == len(images.skipped)
    assert reasons["bee/notes"] == "not a picture: no suffix"
    assert reasons["bee/.ipynb_checkpoints/000.jpg"] == "hidden file or folder"
    assert reasons["bee/loop"] == reasons["bee/cats"] == "link to a folder that is read anyway"
    assert reasons["bee/pipe.jpg"] == reasons["bee/broken.jpg"] == "no plain file"
    line = datasets.unused(images)
    assert line.startswith("12 files not used (") and ".heic: cannot be read" in line


def test_a_linked_folder_elsewhere_is_read_once(tmp_path):
    elsewhere = classes_of(tmp_path / "elsewhere", ("ant",), 2)
    root = classes_of(tmp_path / "mine", ("bee",), 2)
    os.symlink(elsewhere / "ant", root / "ant")
    os.symlink(elsewhere / "ant", root / "ants")
    images = datasets.folder(root)
    assert len(images) == 4 and set(images.classes) == {"bee", images.classes[0]}
    assert [reason for _, reason in images.skipped] == ["link to a folder that is read anyway"]


# The cases that people met


def test_case_voc_as_published(tmp_path, monkeypatch):
    """The class stands at the object, not in the file name: VOC's year is no class."""
    names = ("person", "aeroplane", "tvmonitor", "dog")
    for i in range(24):
        stem = f"{2007 + i % 5}_{i:06}"
        save(tmp_path / f"voc/JPEGImages/{stem}.jpg", 200, 150, i)
        (tmp_path / "voc/Annotations").mkdir(exist_ok=True)
        (tmp_path / f"voc/Annotations/{stem}.xml").write_text(
            "<annotation><size><width>200</width><height>150</height></size><object><name>"
            f"{names[i % 4]}</name><bndbox><xmin>{i + 1}</xmin><ymin>9</ymin><xmax>{i + 60}</xmax>"
            "<ymax>60</ymax></bndbox></object></annotation>"
        )
    entry = mine(convert="voc", class_from="column", images=["JPEGImages"])
    images = datasets.load(entry | {"annotations": ["Annotations"]}, tmp_path / "voc")
    assert images.classes == tuple(sorted(names)) and not images.skipped
    assert np.bincount(images.labels).tolist() == [6] * 4


def mine(**changes):
    entry = {"name": "mine", "title": "t", "layout": "boxes", "places": ["mine"], "min_side": 16}
    assert manifests.problems({k: v for k, v in (entry | changes).items() if k != "name"}) == []
    return manifests.DEFAULTS | entry | changes


IMAGENET = {"convert": "imagenet", "images": ["train"], "annotations": ["boxes"]}


def imagenet(root, size, box, names=("a", "b")):
    for name in names:
        save(root / "train" / name / f"{name}1.jpg", 300, 200)
        (root / "boxes" / name).mkdir(parents=True)
        x0, y0, x1, y1 = box
        (root / "boxes" / name / f"{name}1.xml").write_text(
            f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size><object>"
            f"<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
            "<name>x</name></object></annotation>"
        )
    return root


def test_case_sizes_of_the_annotation(tmp_path):
    right = datasets.load(
        mine(**IMAGENET), imagenet(tmp_path / "1", (300, 200), (100, 50, 199, 149))
    )
    half = datasets.load(mine(**IMAGENET), imagenet(tmp_path / "2", (150, 100), (50, 25, 99, 74)))
    for images in (right, half):
        assert images.boxes[0].tolist() == [[100, 50, 200, 150]] and not images.skipped


@pytest.mark.parametrize("size", [(200, 300), (256, 256)])
def test_case_sizes_swapped_or_wrong(tmp_path, size):
    root = imagenet(tmp_path, size, (1, 1, 9, 9))
    save(root / "train/a/a2.jpg")
    images = datasets.load(mine(**IMAGENET), root)
    assert images.ids.tolist() == ["a/a2.jpg"]
    assert [name for name, _ in images.skipped] == ["train/a/a1.jpg", "train/b/b1.jpg"]
    assert all("another shape" in reason for _, reason in images.skipped)


def test_case_same_names_in_all_classes(tmp_path):
    for layout in ({"ids": "path"}, {"ids": "stem"}):
        root = classes_of(tmp_path / layout["ids"] / "train", count=30).parent
        images = datasets.load(mine(layout="folder", images=["train"], **layout), root)
        assert len(images) == 120 and len(set(images.ids)) == 120 and not images.skipped
        assert "dog/029.jpg" in images.ids


@pytest.mark.parametrize("scale, dtype", [(257, np.uint16), (16, np.uint16), (1, np.float32)])
def test_case_16_bit_and_floating_point(tmp_path, scale, dtype):
    ramp = np.tile(np.linspace(0, 255, 100).astype(np.uint8), (80, 1))
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(ramp).save(tmp_path / name / "8.tif")
        Image.fromarray(ramp.astype(dtype) * dtype(scale)).save(tmp_path / name / "16.tif")
    images = datasets.folder(tmp_path)
    assert images.ids.tolist() == ["a/8.tif", "b/8.tif"]
    assert torch.equal(images.pixels[0][0], torch.from_numpy(ramp))
    assert all("16-bit" in reason for _, reason in images.skipped) and len(images.skipped) == 2


@pytest.mark.parametrize("cut", [600, 2, 1])
def test_case_truncated(tmp_path, cut):
    classes_of(tmp_path, count=10)
    names = ["ant/001.jpg", "bee/002.jpg", "dog/003.jpg"]
    for name in names:
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-cut])
    images = datasets.folder(tmp_path)
    kept = sum(name not in dict(images.skipped) for name in names)
    assert len(images) == 37 + kept and (kept == 0 or cut < 600)  # pixels may be whole without end
    for i in range(len(images)):
        assert images.pixels[i].shape == (3, 80, 96)  # nothing breaks later


def flat(root, count=10):
    for i in range(count):
        save(root / f"val_{i}.JPEG", 64, 64, seed=i)
    return root


def test_case_flat_pictures_say_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match="HELD_OUT: .* 0 folders, and 10 lie directly in it.*boxes.csv"
    ):
        sources.pictures(str(flat(tmp_path / "val")), "HELD_OUT")
    flat(tmp_path / "tiny/val/images")
    lines = [f"val_{i}.JPEG\tn0{i % 2}\t0\t0\t40\t40" for i in range(10)]
    (tmp_path / "tiny/val/val_annotations.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="val_annotations.txt has their classes") as error:
        sources.pictures(str(tmp_path / "tiny/val"), "HELD_OUT")

    command = str(error.value).partition("`")[2].partition("`")[0]  # the advice works
    assert os.system(f"cd {store.root()} && .venv/bin/{command} > /dev/null") == 0
    images = sources.pictures(str(tmp_path / "tiny/val"), "HELD_OUT")
    assert len(images) == 10 and images.classes == ("n00", "n01")


@pytest.mark.parametrize("splits", [("train", "val"), ("Train", "Test"), ("train", "other")])
def test_case_the_folder_above_the_splits(tmp_path, splits):
    for name in splits:
        classes_of(tmp_path / name, count=1)
    with pytest.raises(
        ValueError, match="splits and no classes. Pass one of them, such as .*/[tT]"
    ):
        datasets.folder(tmp_path)


def test_a_class_that_is_called_train(tmp_path):
    assert datasets.folder(classes_of(tmp_path, ("train", "bus"), 2)).classes == ("bus", "train")


@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"\xff\xfe.jpg", b"a\nb.jpg", b"$1_$2 '\".jpg"])
def test_case_names_are_bytes(tmp_path, name):
    classes_of(tmp_path, count=2)
    os.rename(tmp_path / "ant/000.jpg", os.fsencode(tmp_path / "ant") + b"/" + name)
    images = datasets.folder(tmp_path)
    assert len(images) == 8 and not images.skipped and len(images.digest) == 64
    assert images.pixels[7].shape == images.pixels[0].shape
    sizes = {"attacked": 0, "shared": 1, "public": 1, "probe": 0, "control": 0}
    frame = split.partition(images, sizes, 0)
    assert len(frame) == 8 and len(split.partition_hash(frame)) == 64
    assert all(each.encode() for each in images.ids.tolist())  # text that every table can hold


def test_a_table_may_name_such_a_picture(tmp_path):
    """One row in Latin-1 made the whole table unreadable."""
    classes_of(tmp_path, count=2)
    os.rename(tmp_path / "ant/000.jpg", os.fsencode(tmp_path / "ant") + b"/caf\xe9.jpg")
    rows = "caf\xe9.jpg,96,80,1,1,9,9,", "001.jpg,96,80,1,1,9,9,"
    table(tmp_path, *(f"ant/{row}" for row in rows))
    text = (tmp_path / "boxes.csv").read_text()
    (tmp_path / "boxes.csv").write_bytes(text.encode("latin-1"))
    images = datasets.folder(tmp_path)
    assert sum(len(boxes) for boxes in images.boxes) == 2 and not images.skipped


def test_a_table_in_utf_16_is_one_error(tmp_path):
    classes_of(tmp_path, count=2)
    table(tmp_path, "ant/000.jpg,96,80,1,1,9,9,")
    text = (tmp_path / "boxes.csv").read_text()
    (tmp_path / "boxes.csv").write_text(text, encoding="utf-16")
    with pytest.raises(ValueError, match="boxes.csv is UTF-16: save it as UTF-8"):
        datasets.folder(tmp_path)


def test_a_folder_may_be_given_as_text(tmp_path):
    classes_of(tmp_path, count=2)
    assert len(datasets.folder(str(tmp_path))) == len(datasets.folder(tmp_path))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_of_which_nothing_is_left_says_why(tmp_path):
    """Packed twice over: each name could be either of two pictures."""
    classes_of(tmp_path / "set", count=2)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for path in sorted((tmp_path / "set").rglob("*.jpg")) * 2:
            file.write(path, path.relative_to(tmp_path / "set"))
    with pytest.raises(ValueError, match="files were left out, such as ant/000.jpg: the zip holds"):
        datasets.folder(tmp_path / "set.zip")


def test_case_nfc_and_nfd_are_one_class(tmp_path):
    name = "caf\u00e9"
    classes_of(tmp_path, (name, "dog"), 2)
    decomposed = tmp_path / unicodedata.normalize("NFD", name)
    if not decomposed.exists():  # a Mac makes no difference
        save(decomposed / "x.jpg")
    images = datasets.folder(tmp_path)
    assert images.classes == (name, "dog") and np.bincount(images.labels).tolist() == [3, 2]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_table_in_another_spelling_than_the_files(tmp_path, form):
    """Written on one system, the pictures unpacked on another."""
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    classes_of(tmp_path, (unicodedata.normalize(form, "caf\u00e9"), "dog"), 2)
    name = unicodedata.normalize(other, "caf\u00e9")
    table(tmp_path, f"{name}/000.jpg,96,80,1,1,9,9,", "dog/000.jpg,96,80,1,1,9,9,")
    images = datasets.folder(tmp_path)
    assert [len(each) for each in images.boxes] == [1, 0, 1, 0] and not images.skipped

    both = [unicodedata.normalize(each, "caf\u00e9") for each in ("NFC", "NFD")]
    table(tmp_path, *(f"{name}/000.jpg,96,80,1,1,9,9," for name in both))
    ((_, reason),) = datasets.folder(tmp_path).skipped
    assert reason == "boxes.csv spells its name in two ways"


def audit(root, sets=("train", "public", "heldout")):
    """Return the subject of an audit of a random ResNet-18 on folders of pictures."""
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), root / "encoder.pt")
    places = [str(root / place) for place in sets]
    weights = str(root / "encoder.pt")
    return load("torchvision:resnet18", *places, weights=weights, settings=Settings(size=64))


def three_sets(root, names=("ant", "bee", "cat", "dog")):
    for seed, (part, count) in enumerate((("train", 10), ("public", 15), ("heldout", 10))):
        classes_of(root / part, names, count, seed=seed)
    return root


def test_case_the_report_names_what_was_not_used(tmp_path):
    root = three_sets(tmp_path)
    shutil.copy(root / "train/ant/000.jpg", root / "train/ant/000.heic")
    (root / "train/ant/001.jpg").write_bytes(b"")
    (root / "heldout/bee/001.jpg").write_text("<html>")
    said = " ".join(audit(root).limits)
    assert "IMAGES: 1 files not used (1 .jpg: cannot be read)" in said  # a JPEG by another name
    assert "HELD_OUT: 1 files not used (1 .jpg: cannot be read)" in said


def test_case_a_class_that_differs_by_a_blank(tmp_path):
    root = three_sets(tmp_path)
    (root / "public/cat").rename(root / "public/cat ")
    with pytest.raises(ValueError, match="such as 'cat' .PUBLIC has 'cat '."):
        audit(root)


def test_case_dollars_in_class_names(tmp_path):
    names = ("$10_$20", "100%", "$10 bill", "<b>bold")
    images = datasets.folder(classes_of(tmp_path, names, 2))
    titles = [images.classes[label] for label in images.labels]
    rects = [(found, (0, 0, 9, 9)) for found in images.boxes]
    figure = plots.examples(list(images.pixels), rects, titles)
    figure.savefig(io.BytesIO())
    assert set(titles) == set(names)


# Manifests of one's own


def test_the_template_of_the_readme_works(tmp_path, monkeypatch):
    """The ten lines in data_manifests/README.md, as they stand there."""
    text = (store.root() / "data_manifests/README.md").read_text()
    template = text.partition("```yaml\n")[2].partition("```")[0]
    monkeypatch.setenv("DEJAVU_ROOT", str(tmp_path))
    monkeypatch.setenv("DEJAVU_DATA", str(tmp_path / "data"))
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "data_manifests/mine.yaml").write_text(template)
    assert 5 <= len(template.splitlines()) <= 10
    root = tmp_path / "data/my_pictures"
    classes_of(root, ("bird", "cat"), 3)
    table(root, *(f"bird/00{i}.jpg,96,80,10,10,50,50,bird" for i in range(3)))
    images = datasets.read("mine")
    assert images.classes == ("bird", "cat") and len(images) == 6
    assert split.attackable(images)[0].sum() == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": None}, "images is None"),
        ({"images": "DROP"}, "images is empty"),
        ({"places": "DROP"}, "places missing"),
        ({"layout": "folders"}, "layout is 'folders', expected one of scenes, folder, boxes"),
        ({"layout": "DROP"}, "layout missing"),
        ({"immages": ["."]}, "immages unknown"),
        ({"convert": "pascal"}, "convert is 'pascal', expected one of voc"),
        ({"class_from": "name"}, "class_from is 'name'"),
        ({"min_side": "16 px"}, "min_side is '16 px'"),
        ({"image_size": 64}, "image_size is 64"),
        ({"classes": "all"}, "classes is 'all'"),
        ({"split": {"seed": 0}}, "split is"),
    ],
)
def test_a_manifest_that_is_wrong_says_so_at_once(tmp_path, monkeypatch, changes, message):
    import yaml

    entry = {"title": "t", "layout": "folder", "places": ["x"], "images": ["."], "min_side": 16}
    entry = {key: value for key, value in (entry | changes).items() if value != "DROP"}
    monkeypatch.setenv("DEJAVU_ROOT", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "data_manifests/mine.yaml").write_text(yaml.safe_dump(entry))
    with pytest.raises(ValueError, match=message) as error:
        datasets.read("mine", tmp_path)
    assert "data_manifests/mine.yaml: " in str(error.value) and "template" in str(error.value)


def test_converted_once_and_again_when_the_annotations_change(tmp_path, capfd):
    root = imagenet(tmp_path / "x", (300, 200), (10, 20, 29, 39))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    entry = mine(**IMAGENET)
    datasets.load(entry, root)
    datasets.load(entry, root)
    assert capfd.readouterr().out.count("reading the annotations") == 1
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    path = root / "boxes/a/a1.xml"
    path.write_text(path.read_text().replace("<xmin>10<", "<xmin>11<"))
    assert datasets.load(entry, root).boxes[0].tolist() == [[11, 20, 30, 40]]
    cached = next(Path(os.environ["DEJAVU_RUNS"]).rglob("boxes.csv"))
    assert cached.with_name("boxes.unused.csv").is_file()


def test_a_damaged_table_is_made_again(tmp_path):
    root = imagenet(tmp_path / "x", (300, 200), (10, 20, 29, 39))
    entry = mine(**IMAGENET)
    first = datasets.load(entry, root)
    cached = next(Path(os.environ["DEJAVU_RUNS"]).rglob("boxes.csv"))
    cached.write_text(cached.read_text().replace(",10,", ",99,"))
    assert datasets.load(entry, root).digest == first.digest


def test_a_layout_without_annotations_is_one_error(tmp_path):
    classes_of(tmp_path / "train", count=1)
    with pytest.raises(ValueError, match="no pictures with .xml annotations"):
        datasets.load(mine(**IMAGENET), tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no boxes.csv.*convert: voc"):
        datasets.load(mine(images=["train"]), tmp_path)
