"""convert.py: public layouts become boxes.csv; what cannot be used is listed, never reshaped."""

import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
import unicodedata
import zipfile

import numpy as np
import pytest
from PIL import Image

from dejavu_utils import store

SCRIPT = store.PACKAGE.parent / "data_manifests" / "convert.py"
spec = importlib.util.spec_from_file_location("convert", SCRIPT)
script = importlib.util.module_from_spec(spec)
sys.modules["convert"] = script  # dataclasses look their module up
spec.loader.exec_module(script)


def picture(path, size=(200, 150), orientation=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(path, exif=exif)
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def xml(*objects, size=(200, 150)):
    """An annotation with (class, xmin, ymin, xmax, ymax) a box."""
    text = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox></object>"
        for name, a, b, c, d in objects
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation>{sides}{text}</annotation>"


def table(path):
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def convert(layout, source, out, *more):
    """Return (rows, {file: reason}) of a source; the command must succeed."""
    assert script.main([layout, str(source), "--out", str(out), *more]) == 0
    unused = table(out.with_name("boxes.unused.csv"))
    return table(out), {row["file"]: row["reason"] for row in unused}


def boxes(rows):
    return {row["image"]: [float(row[each]) for each in ("x0", "y0", "x1", "y1")] for row in rows}


def refused(out):
    """Return {picture: reason} of the pictures whose annotation cannot be used."""
    unused = table(out.with_name("boxes.unused.csv"))
    return {row["image"]: row["reason"] for row in unused if row["image"]}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out" / "boxes.csv"


@pytest.fixture(autouse=True)
def folder_of_out(out):
    out.parent.mkdir()


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as file:
        for each in sorted(folder.rglob("*")):
            if each.is_file():
                file.write(each, each.relative_to(folder).as_posix())
    return path


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "voc"
    picture(root / "JPEGImages/1.jpg")
    picture(root / "JPEGImages/2.jpg")
    write(root / "Annotations/1.xml", xml(("dog", 1, 11, 60, 70), ("cat", 5, 5, 9, 9)))
    write(root / "Annotations/2.xml", xml(("dog", 1, 1, 10, 10)))
    return root


def test_voc_rows_are_half_open_and_name_the_class_of_each_box(voc, out):
    rows, unused = convert("voc", voc, out)
    assert [row["class"] for row in rows] == ["dog", "cat", "dog"]
    assert rows[0] == {
        "image": "JPEGImages/1.jpg",
        **{"width": "200", "height": "150", "x0": "0", "y0": "10", "x1": "60", "y1": "70"},
        **{"class": "dog", "split": ""},
    }
    assert unused == {}


def test_a_zip_is_read_in_place_and_gives_the_same(voc, out, tmp_path):
    rows, _ = convert("voc", voc, out)
    archive = zipped(voc, tmp_path / "voc.zip")
    before = archive.read_bytes()
    again, _ = convert("voc", archive, out)
    assert again == rows and archive.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "voc", "voc.zip"]


@pytest.mark.parametrize("pictures, marks", [("images", "annotations/xmls"), ("", "")])
def test_voc_in_other_folders(tmp_path, out, pictures, marks):
    """Also annotations beside the pictures, as labelImg and Roboflow write them."""
    picture(tmp_path / "x" / pictures / "train/1.jpg")
    write(tmp_path / "x" / marks / "train/1.xml", xml(("dog", 1, 1, 10, 10)))
    rows, unused = convert("voc", tmp_path / "x", out)
    assert len(rows) == 1 and rows[0]["split"] == "train" and unused == {}


def test_the_parts_of_an_object_are_no_objects(voc, out):
    head = xml(("head", 1, 1, 90, 90), size=None)
    part = head.replace("annotation", "part").replace("<object>", "").replace("</object>", "")
    whole = xml(("person", 1, 1, 50, 50)).replace("</object>", f"{part}</object>")
    write(voc / "Annotations/1.xml", whole)
    rows, _ = convert("voc", voc, out)
    assert [row["class"] for row in rows if row["image"].endswith("1.jpg")] == ["person"]


BOMB = '<!DOCTYPE l [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>'


@pytest.mark.parametrize(
    "content, reason",
    [
        (xml(("dog", 70, 1, 60, 9)), "a box ends before it starts"),
        (xml(("dog", 1, 70, 9, 60)), "a box ends before it starts"),
        (xml(("cat", 1, 1, 9, 9), ("dog", 70, 1, 60, 9)), "a box ends before it starts"),
        (xml(("dog", "nan", 1, 60, 9)), "a number that is not finite"),
        (xml(("dog", 1, 1, "inf", 9)), "a number that is not finite"),
        (xml(("dog", "one", 1, 60, 9)), "a number is missing or is none"),
        (xml(("dog", 1, 1, 60, 9)).replace("ymax>", "y>"), "a number is missing or is none"),
        (xml(("dog", 1, 1, 60, 9), size=None), "a number is missing or is none"),
        (xml(("dog", 1, 1, 60, 9), size=(0, 0)), "the annotation does not say how large"),
        (xml((" ", 1, 1, 60, 9)), "a box without a class"),
        ("<annotation><object><name>x</name></object></annotation>", "an object without a box"),
        ("<annotation>", "XML that cannot be parsed"),
        (b"\xff\x00", "XML with a DOCTYPE"),
        (BOMB, "XML with a DOCTYPE"),
        (BOMB.encode("utf-16"), "XML with a DOCTYPE"),
        (b"<annotation>" + b" " * (17 << 20) + b"</annotation>", "annotation too large"),
    ],
)
def test_xml_that_makes_no_sense_is_a_reason(voc, out, content, reason):
    write(voc / "Annotations/1.xml", content)
    rows, unused = convert("voc", voc, out)
    assert {row["image"] for row in rows} == {"JPEGImages/2.jpg"}
    assert unused["Annotations/1.xml"].startswith(reason)
    assert refused(out) == {"JPEGImages/1.jpg": unused["Annotations/1.xml"]}


def test_every_other_file_is_listed(voc, out, capsys):
    picture(voc / "JPEGImages/3.jpg")
    picture(voc / "JPEGImages/.hidden/1.jpg")
    write(voc / "Annotations/4.xml", xml(("dog", 1, 1, 9, 9)))
    write(voc / "Annotations/5.xml", xml())
    picture(voc / "JPEGImages/5.jpg")
    write(voc / "ImageSets/Main/train.txt", "1\n")
    os.symlink(voc / "JPEGImages", voc / "again")
    os.symlink(voc / "JPEGImages/1.jpg", voc / "JPEGImages/linked.jpg")
    os.mkfifo(voc / "JPEGImages/pipe.jpg")
    rows, unused = convert("voc", voc, out)
    assert unused == {
        "JPEGImages/3.jpg": "picture without an annotation",
        "JPEGImages/.hidden/1.jpg": "hidden file or folder",
        "Annotations/4.xml": "annotation without a picture",
        "Annotations/5.xml": "annotation without a box",
        "ImageSets/Main/train.txt": "neither a picture nor an annotation of this layout",
        "again": "link into the source",
        "JPEGImages/linked.jpg": "link into the source",
        "JPEGImages/pipe.jpg": "no plain file",
    }
    files = {str(path.relative_to(voc)) for path in voc.rglob("*") if not path.is_dir()}
    used = {"JPEGImages/1.jpg", "JPEGImages/2.jpg", "JPEGImages/5.jpg"}
    used |= {"Annotations/1.xml", "Annotations/2.xml"}
    assert files - set(unused) == used
    assert "      2 link into the source" in capsys.readouterr().out


def test_a_member_that_comes_twice_in_a_zip_is_listed(voc, out, tmp_path):
    archive = zipped(voc, tmp_path / "voc.zip")
    with zipfile.ZipFile(archive, "a") as file, pytest.warns(UserWarning):
        file.writestr("Annotations/1.xml", xml(("cat", 1, 1, 2, 2)))
    rows, unused = convert("voc", archive, out)
    assert unused["Annotations/1.xml"] == "the zip holds this name more than once"
    assert {row["image"] for row in rows} == {"JPEGImages/2.jpg"}


def test_imagenet_takes_the_class_of_the_folder_and_counts_from_0(tmp_path, out):
    picture(tmp_path / "x/train/n01/a.JPEG")
    picture(tmp_path / "x/train/n02/a.JPEG")
    write(tmp_path / "x/boxes/n01/a.xml", xml(("other", 10, 20, 29, 39)))
    write(tmp_path / "x/boxes/n02/a.xml", xml(("other", 70, 20, 60, 39)))
    rows, unused = convert("imagenet", tmp_path / "x", out)
    assert boxes(rows) == {"train/n01/a.JPEG": [10, 20, 30, 40]} and rows[0]["class"] == "n01"
    assert refused(out) == {"train/n02/a.JPEG": "a box ends before it starts"}


@pytest.fixture
def yolo(tmp_path):
    root = tmp_path / "yolo"
    for name in "ab":
        picture(root / f"images/train2017/{name}.jpg")
        write(root / f"labels/train2017/{name}.txt", "1 0.5 0.5 0.2 0.4\n")
    write(root / "data.yaml", "names: {0: cat, 1: dog}\n")
    return root


def test_yolo_shares_become_pixels(yolo, out):
    rows, _ = convert("yolo", yolo, out)
    assert boxes(rows)["images/train2017/a.jpg"] == [80, 45, 120, 105]
    assert {row["class"] for row in rows} == {"dog"} and {row["split"] for row in rows} == {"train"}


@pytest.mark.parametrize(
    "name, text", [("classes.txt", "cat\ndog\n"), ("dataset.yml", "names: [cat, dog]\n")]
)
def test_yolo_beside_its_pictures_with_other_lists_of_names(tmp_path, out, name, text):
    root = tmp_path / "x"
    picture(root / "1.jpg")
    write(root / "1.txt", "1 0.5 0.5 0.2 0.4\n")
    write(root / name, text)
    rows, _ = convert("yolo", root, out)
    assert [row["class"] for row in rows] == ["dog"]


@pytest.mark.parametrize("names", ["cat", "5", "true"])
def test_yolo_names_that_are_no_list_are_refused(yolo, out, names):
    write(yolo / "data.yaml", f"names: {names}\n")
    with pytest.raises(SystemExit, match="names is (str|int|bool), not a list or a mapping"):
        convert("yolo", yolo, out)


def test_yolo_without_names_or_with_two_lists_is_refused(yolo, out, tmp_path, capsys):
    write(yolo / "other.yaml", "names: [x, y]\n")
    with pytest.raises(SystemExit, match="2 lists of class names.*--names"):
        script.main(["yolo", str(yolo), "--out", str(out)])
    rows, _ = convert("yolo", yolo, out, "--names", str(yolo / "other.yaml"))
    assert {row["class"] for row in rows} == {"y"}
    (yolo / "other.yaml").unlink()
    (yolo / "data.yaml").unlink()
    with pytest.raises(SystemExit, match="0 lists of class names"):
        script.main(["yolo", str(yolo), "--out", str(out)])


@pytest.mark.parametrize(
    "line, reason",
    [
        ("2 .5 .5 .2 .2", "a class that has no name"),
        ("inf .5 .5 .2 .2", "a class that is no whole number"),
        ("nan .5 .5 .2 .2", "a class that is no whole number"),
        ("0.9 .5 .5 .2 .2", "a class that is no whole number"),
        ("-1 .5 .5 .2 .2", "a class that is no whole number"),
        ("0 .5 .5 -.2 -.2", "numbers that are no shares of the picture"),
        ("0 50 50 20 20", "numbers that are no shares of the picture"),
        ("0 .5 inf .2 .2", "numbers that are no shares of the picture"),
        ("0 .5 .5 .2", "a line that is no box"),
        ("0 .5 .5 .2 .2 .9", "a line that is no box"),
        ("0 .1 .1 .2 .1 .2 .2", "a line that is no box"),
        ("cat .5 .5 .2 .2", "a class that is no whole number"),
        ("9" * 400 + " .5 .5 .2 .2", "a class that is no whole number"),
        ("9" * 5000 + " .5 .5 .2 .2", "a class that is no whole number"),
        (b"\xff\xfe0 .5", "annotation is not UTF-8"),
    ],
)
def test_a_yolo_line_that_makes_no_sense_is_a_reason(yolo, out, line, reason):
    write(yolo / "labels/train2017/a.txt", line)
    rows, _ = convert("yolo", yolo, out)
    assert set(boxes(rows)) == {"images/train2017/b.jpg"}
    (found,) = refused(out).items()
    assert found[0] == "images/train2017/a.jpg" and found[1].startswith(reason)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_shares_of_a_picture_that_may_be_turned_are_refused(yolo, out, orientation):
    picture(yolo / "images/train2017/a.jpg", orientation=orientation)
    convert("yolo", yolo, out)
    assert "EXIF orientation" in refused(out)["images/train2017/a.jpg"]


def coco_json(**changes):
    content = {
        "images": [
            {"id": 1, "file_name": "1.jpg", "width": 200, "height": 150},
            {"id": 2, "file_name": "2.jpg", "width": 200, "height": 150},
        ],
        "annotations": [
            {"id": 7, "image_id": 1, "category_id": 18, "bbox": [10, 20, 30.5, 40]},
            {"id": 8, "image_id": 2, "category_id": 18, "bbox": [1, 2, 3, 4]},
        ],
        "categories": [{"id": 18, "name": "dog"}],
    }
    return json.dumps(content | changes)


@pytest.fixture
def coco(tmp_path):
    root = tmp_path / "coco"
    for name in "12":
        picture(root / f"train2017/{name}.jpg")
    write(root / "annotations/instances_train2017.json", coco_json())
    return root


def test_coco_boxes(coco, out):
    write(coco / "annotations/captions_train2017.json", json.dumps({"images": []}))
    rows, unused = convert("coco", coco, out)
    assert boxes(rows)["train2017/1.jpg"] == [10, 20, 40.5, 60]
    assert {(row["class"], row["split"]) for row in rows} == {("dog", "train")}
    assert list(unused) == ["annotations/captions_train2017.json"]


@pytest.mark.parametrize(
    "entry, reason",
    [
        ({"category_id": 18, "bbox": [10, 20, -3, 4]}, "a box ends before it starts"),
        ({"category_id": 18, "bbox": [10, 20, float("inf"), 4]}, "a number that is not finite"),
        ({"category_id": 18, "bbox": [10, 20, "x", 4]}, "a number is missing or is none"),
        ({"category_id": 18, "bbox": [10, 20, 3]}, "an object without a box"),
        ({"category_id": 18}, "an object without a box"),
        ({"category_id": 99, "bbox": [10, 20, 3, 4]}, "a class that has no name"),
    ],
)
def test_a_coco_box_that_makes_no_sense_is_a_reason(coco, out, entry, reason):
    good = {"id": 8, "image_id": 2, "category_id": 18, "bbox": [1, 2, 3, 4]}
    bad = {"id": 7, "image_id": 1} | entry
    write(coco / "annotations/instances_train2017.json", coco_json(annotations=[bad, good]))
    rows, _ = convert("coco", coco, out)
    assert set(boxes(rows)) == {"train2017/2.jpg"} and refused(out) == {"train2017/1.jpg": reason}


def test_coco_pictures_that_are_missing_or_twice_there(coco, out):
    picture(coco / "val2017/1.jpg")
    (coco / "train2017/2.jpg").unlink()
    picture(coco / "train2017/3.jpg")
    write(coco / "more/instances_x.json", coco_json(images=[{"id": 3, "file_name": "3.jpg"}]))
    assert script.main(["coco", str(coco), "--out", str(out)]) == 1
    reasons = {row["file"]: row["reason"] for row in table(out.with_name("boxes.unused.csv"))}
    name = "annotations/instances_train2017.json"
    assert reasons[f"{name}: image 1"] == "two pictures of that name"
    assert reasons[f"{name}: image 2"] == "annotation without a picture"
    assert reasons["more/instances_x.json: image 3"] == "a number is missing or is none"
    assert reasons["more/instances_x.json"] == "boxes of images that are not listed"
    assert not out.exists()


def test_json_that_is_something_else(coco, out):
    write(coco / "annotations/instances_val2017.json", "[1, 2]")
    write(coco / "annotations/instances_x.json", "{" * 100)
    _, unused = convert("coco", coco, out)
    assert set(unused.values()) == {"no JSON with images, annotations and categories"}


def test_tiny_imagenet_with_the_flat_pictures_of_val(tmp_path, out):
    root = tmp_path / "tiny"
    for name in ("train/n01/images/n01_0.JPEG", "val/images/val_0.JPEG", "val/images/val_1.JPEG"):
        picture(root / name, (64, 64))
    write(root / "train/n01/n01_boxes.txt", "n01_0.JPEG\t0\t10\t63\t58\nn01_9.JPEG\t0\t0\t1\t1\n")
    write(
        root / "val/val_annotations.txt",
        "val_0.JPEG\tn02\t5\t9\t5\t30\nval_1.JPEG\tn02\t9\t9\t5\t30\n",
    )
    rows, unused = convert("tiny_imagenet", root, out)
    assert boxes(rows) == {
        "train/n01/images/n01_0.JPEG": [0, 10, 64, 59],
        "val/images/val_0.JPEG": [5, 9, 5, 30],
    }
    assert [(row["class"], row["split"]) for row in rows] == [("n01", "train"), ("n02", "val")]
    assert refused(out) == {"val/images/val_1.JPEG": "a box ends before it starts"}
    assert unused["train/n01/n01_boxes.txt: line 2"] == "annotation without a picture"


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_number_of_any_length_is_a_reason(tmp_path, out, digits):
    """No float holds it, and Python itself refuses to read the longer one."""
    root = tmp_path / "tiny"
    for i in range(2):
        picture(root / f"train/n01/images/n01_{i}.JPEG", (64, 64))
    long = "9" * digits
    write(
        root / "train/n01/n01_boxes.txt",
        f"n01_0.JPEG\t0\t10\t63\t58\nn01_1.JPEG\t0\t0\t{long}\t1\n",
    )
    rows, _ = convert("tiny_imagenet", root, out)
    assert set(boxes(rows)) == {"train/n01/images/n01_0.JPEG"}
    reason = "a line that is no box: 4 whole numbers expected"
    assert refused(out) == {"train/n01/images/n01_1.JPEG": reason}


NAMES = [
    b"caf\xe9.jpg",
    "cafe\u0301.jpg".encode(),
    b"$10_$20.jpg",
    b"O'Brien.jpg",
    b'say "hi", please.jpg',
    b"<b>&amp;.jpg",
    b"new\nline.jpg",
    b"  blanks .jpg",
    b"-rf.jpg",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_file_survives(tmp_path, out, name):
    picture(tmp_path / "x/JPEGImages/1.jpg")
    write(tmp_path / "x/Annotations/1.xml", xml(("dog", 1, 1, 10, 10)))
    images, marks = (os.fsencode(tmp_path / "x" / each) for each in ("JPEGImages", "Annotations"))
    os.rename(images + b"/1.jpg", images + b"/" + name)
    os.rename(marks + b"/1.xml", marks + b"/" + name[:-4] + b".xml")
    rows, _ = convert("voc", tmp_path / "x", out)
    assert [os.fsencode(row["image"]) for row in rows] == [b"JPEGImages/" + name]


@pytest.mark.parametrize("name", ["caf\u00e9", "$10_$20", "O'Brien", 'a "b", c', "dog, big", "NA"])
def test_class_names_are_kept_but_for_nfc(voc, out, name):
    decomposed = unicodedata.normalize("NFD", name)
    write(voc / "Annotations/1.xml", xml((decomposed, 1, 1, 10, 10)))
    rows, _ = convert("voc", voc, out)
    assert rows[0]["class"] == name


def test_the_command_as_documented(voc, tmp_path):
    """A second run reads its own output as neither picture nor annotation."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, SCRIPT, "voc", voc, "--out", voc / "boxes.csv"],
            **{"capture_output": True, "text": True, "cwd": tmp_path},
        )
        assert done.returncode == 0, done.stderr
        assert "3 boxes of 2 pictures and 2 classes" in done.stdout
        assert done.stdout.startswith("0 files or entries gave no box")


@pytest.mark.parametrize("layout", ["voc", "imagenet", "yolo", "coco", "tiny_imagenet"])
def test_a_source_of_another_layout_is_one_line(tmp_path, layout, out):
    write(tmp_path / "x/notes.md", "nothing")
    done = subprocess.run(
        [sys.executable, SCRIPT, layout, tmp_path / "x", "--out", out],
        **{"capture_output": True, "text": True},
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr and not out.exists()


def damaged_zip(path, flag=0, method=None):
    """A zip whose annotations say that they are encrypted, or packed in an unknown way."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        pixels = io.BytesIO()
        Image.new("RGB", (200, 150)).save(pixels, "JPEG")
        file.writestr("images/1.jpg", pixels.getvalue())
        file.writestr("labels/1.txt", "0 .5 .5 .2 .2\n")
        file.writestr("images/2.jpg", pixels.getvalue())
        file.writestr("labels/2.txt", "0 .5 .5 .2 .2\n")
        file.writestr("classes.txt", "cat\n")
    raw = bytearray(content.getvalue())
    at = raw.find(b"PK\1\2", 0)
    at = raw.find(b"PK\1\2", at + 1)  # the second entry: labels/1.txt
    raw[at + 8] |= flag
    raw[at + 10] = method or raw[at + 10]
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("how", [{"flag": 1}, {"method": 99}])
def test_a_member_that_cannot_be_unpacked_is_a_reason(tmp_path, out, how):
    rows, _ = convert("yolo", damaged_zip(tmp_path / "y.zip", **how), out)
    assert set(boxes(rows)) == {"images/2.jpg"}
    assert refused(out) == {"images/1.jpg": "annotation cannot be read"}
