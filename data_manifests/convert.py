"""Turn the annotations of a public layout into boxes.csv, one row a box.

    python data_manifests/convert.py voc FOLDER|ZIP --out boxes.csv

Layouts: voc, imagenet (both XML), yolo (text), coco (JSON), tiny_imagenet (tables of boxes). A zip
is read in place; nothing is unpacked and no picture is copied. Annotations are taken as they are or
refused, never repaired. boxes.unused.csv beside the output lists every file that gave no row, and
why. This script stands alone: it imports nothing of dejavu_utils.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
import secrets
import sys
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import yaml
from PIL import Image

COLUMNS = ("image", "width", "height", "x0", "y0", "x1", "y1", "class", "split")
UNUSED = ("file", "image", "reason", "detail")
PICTURES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"),
)
NAMES = 1 << 20  # bytes, the largest list of class names
SMALL = 16 << 20  # bytes, the largest annotation of one picture
LARGE = 2 << 30  # bytes, the largest annotation of a whole data set
ORIENTATION = 0x0112  # the EXIF tag

Box = tuple[float, float, float, float]  # x0, y0, x1, y1
Frame = tuple[float, float]  # width, height


# what numbers and structures of other types than expected raise
UNREADABLE = (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError)


class Refused(ValueError):
    """An annotation that cannot be used: a reason that many share, and the detail of this one."""

    def __init__(self, reason: str, detail: object = "") -> None:
        self.detail = str(detail).encode("utf-8", "backslashreplace").decode()
        super().__init__(f"{reason} ({self.detail})" if self.detail else reason)
        self.reason = reason


# The source: a folder or a zip


class Source:
    """A folder or a zip, read by relative name. `files` are sorted; `closed` are (name, reason)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.closed: list[tuple[str, str]] = []
        self.zip: zipfile.ZipFile | None = None

        if path.is_dir():
            self.files = sorted(self._walk())
        elif path.is_file():
            try:
                self.zip = zipfile.ZipFile(path)
            except Exception as error:  # a damaged directory makes it stumble in many ways
                raise SystemExit(f"error: {path} is no whole zip file ({error})") from error
            self.files = sorted(self._members())
        else:
            raise SystemExit(f"error: {path} is neither a folder nor a zip file")

        self.names = frozenset(self.files)

    def _walk(self) -> Iterator[str]:
        """Yield the plain files. A link to what lies in the source is listed, not read twice."""
        root = os.path.realpath(self.path)
        seen = {root}

        def note(error: OSError) -> None:
            self.closed.append((os.path.relpath(error.filename, self.path), "folder not readable"))

        for folder, inner, names in os.walk(self.path, onerror=note, followlinks=True):
            for name in sorted(inner):
                path = os.path.join(folder, name)
                target = os.path.realpath(path)
                if os.path.islink(path) and any(overlap(target, each) for each in seen):
                    self.closed.append((os.path.relpath(path, self.path), "link into the source"))
                    inner.remove(name)
                elif os.path.islink(path):
                    seen.add(target)

            for name in names:
                path = os.path.join(folder, name)
                relative = os.path.normpath(os.path.join(os.path.relpath(folder, self.path), name))
                if not os.path.isfile(path):
                    self.closed.append((relative, "no plain file"))
                elif os.path.islink(path) and points_inside(path, root):
                    self.closed.append((relative, "link into the source"))
                else:
                    yield relative

    def _members(self) -> Iterator[str]:
        names = [info.filename for info in self.zip.infolist()]
        names = [name for name in names if name and not name.endswith("/")]
        for name, count in Counter(names).items():
            if count == 1:
                yield name
            else:
                self.closed.append((name, "the zip holds this name more than once"))

    def open(self, name: str) -> io.BufferedIOBase:
        if self.zip is not None:
            return self.zip.open(name)
        return (self.path / name).open("rb")

    def read(self, name: str, limit: int = SMALL) -> bytes:
        """Return the bytes of a file; Refused if it is larger than `limit` or cannot be read."""
        try:
            with self.open(name) as file:
                content = file.read(limit + 1)
        except Exception as error:  # a damaged or encrypted member fails in many ways
            raise Refused("annotation cannot be read", error) from error

        if len(content) > limit:
            raise Refused("annotation too large", f"more than {limit} bytes")
        return content

    def text(self, name: str, limit: int = SMALL) -> str:
        try:
            return self.read(name, limit).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Refused("annotation is not UTF-8", error) from error

    def below(self, folder: str, suffixes: tuple[str, ...]) -> list[str]:
        """Return the files in `folder` ("": everywhere) and the folders inside it."""
        start = f"{folder}/" if folder else ""
        return [
            name
            for name in self.files
            if name.startswith(start) and name.lower().endswith(suffixes) and not hidden(name)
        ]

    def tops(self) -> list[str]:
        """Return where a layout may begin: at the root, or one folder below it."""
        folders = {name.split("/", 1)[0] + "/" for name in self.files if "/" in name}
        return ["", *sorted(folders)]


def overlap(one: str, other: str) -> bool:
    """Return whether one of two folders lies in the other."""
    return os.path.commonpath([one, other]) in (one, other)


def points_inside(link: str, root: str) -> bool:
    """Return whether a link leads to a file below `root`, but for hidden folders, tools' stores."""
    inside = os.path.relpath(os.path.realpath(link), root)
    return not inside.startswith("..") and not hidden(inside)


def hidden(name: str) -> bool:
    """Return whether a file or a folder above it is hidden, as copies of editors and Macs are."""
    parts = name.split("/")
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


# What is written


@dataclass
class Table:
    """The rows of boxes.csv, and the files that gave none."""

    rows: list[tuple] = field(default_factory=list)
    unused: list[tuple[str, str, str, str]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)  # files that gave rows or were refused

    def add(self, mark: str, image: str, frame: Frame, found: Iterable[tuple[Box, str]]) -> None:
        """Add all boxes of one picture, or none: Refused if one of them makes no sense."""
        rows = []
        split = split_of(image)

        for number, (box, name) in enumerate(found, 1):
            check_box(number, box, frame)
            values = [number_text(value) for value in (*frame, *box)]
            rows.append((image, *values, class_name(name), split))

        self.rows += rows
        self.used |= {mark, image}
        if not rows:
            self.unused.append((mark, "", "annotation without a box", ""))

    def refuse(self, mark: str, image: str, error: Refused) -> None:
        """List an annotation that cannot be used; its picture is not used either."""
        self.unused.append((mark, image, error.reason, error.detail))
        self.used |= {mark, image}

    def close(self, source: Source) -> None:
        """List every other file of the source, so that none goes unnamed."""
        for name in source.files:
            if name not in self.used:
                self.unused.append((name, "", reason_of(name), ""))
        for name, reason in source.closed:
            self.unused.append((name, "", reason, ""))


def reason_of(name: str) -> str:
    """Return why a file that no annotation led to was not used."""
    if hidden(name):
        return "hidden file or folder"
    if name.lower().endswith(PICTURES):
        return "picture without an annotation"
    return "neither a picture nor an annotation of this layout"


def check_box(number: int, box: Box, frame: Frame) -> None:
    """Raise Refused unless a box is finite, ends after it starts, and its frame is known."""
    if not all(math.isfinite(value) for value in (*box, *frame)):
        raise Refused("a number that is not finite", f"box {number}: {box}")
    if min(frame) <= 0:
        raise Refused("the annotation does not say how large the picture is", f"{frame}")

    x0, y0, x1, y1 = box
    if x0 > x1 or y0 > y1:
        raise Refused("a box ends before it starts", f"box {number}: {box}")


def class_name(name: str) -> str:
    """Return a class name as NFC text; Refused if there is none."""
    name = unicodedata.normalize("NFC", str(name))
    if not name.strip():
        raise Refused("a box without a class")
    if re.search("[\ud800-\udfff]", name):  # half of a character, as JSON can write it
        raise Refused("a class whose name is no text", name)
    return name


def number_text(value: float) -> str:
    """Return the shortest text that reads as the same number."""
    value = float(value)
    return str(int(value)) if value.is_integer() else repr(value)


def split_of(image: str) -> str:
    """Return train, val or test if a folder above the picture says so, else nothing."""
    for part in image.split("/")[:-1]:
        found = re.fullmatch(r"(train|val|test|valid)(ation|ing)?(\d{4})?", part.lower())
        if found:
            return "val" if found[1] == "valid" else found[1]
    return ""


def write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple]) -> None:
    """Write a table; whoever reads it never sees a half of it. Names may hold any bytes."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# Which annotation belongs to which picture


def pairs(
    source: Source, table: Table, images: str, marks: str, suffix: str
) -> Iterator[tuple[str, str]]:
    """Yield (annotation, picture): the same path in `marks` as in `images`, but for the suffix.

    Two pictures for one annotation are refused: nobody can tell which of them it describes.
    """
    found: dict[str, list[str]] = {}
    for picture in source.below(images, PICTURES):
        inner = picture[len(images) :].lstrip("/")
        mark = str(PurePosixPath(marks, inner).with_suffix(suffix))
        found.setdefault(mark, []).append(picture)

    for mark in source.below(marks, (suffix,)):
        pictures = found.get(mark, [])
        if len(pictures) == 1:
            yield mark, pictures[0]
        elif pictures:
            for picture in pictures:
                table.refuse(mark, picture, Refused("two pictures for one annotation"))
        elif suffix != ".txt" or images:  # a text beside pictures may be a read-me
            table.refuse(mark, "", Refused("annotation without a picture"))


def folders(
    source: Source, options: argparse.Namespace, usual: list[tuple[str, str]], suffix: str
) -> tuple[str, str]:
    """Return the folders of pictures and of annotations: as told, or the first usual ones there."""
    if options.images is not None or options.annotations is not None:
        images = options.images or ""
        usual = [(images, options.annotations if options.annotations is not None else images)]

    for images, marks in usual:
        for top in source.tops():
            images_there = f"{top}{images}".rstrip("/")
            marks_there = f"{top}{marks}".rstrip("/")
            pictures = source.below(images_there, PICTURES)
            if pictures and source.below(marks_there, (suffix,)):
                return images_there, marks_there

    known = "; ".join(f"{images or '.'} with {marks or '.'}" for images, marks in usual)
    raise SystemExit(
        f"error: {source.path} has no pictures with {suffix} annotations in the usual folders "
        f"({known}). Name them: --images FOLDER --annotations FOLDER, relative to the source."
    )


# Pascal VOC and ImageNet


def xml_root(content: bytes) -> ElementTree.Element:
    """Return the parsed XML; a DOCTYPE or an entity, which may expand without end, is refused."""
    if b"\0" in content or re.search(rb"<!(?!--)", content):
        raise Refused("XML with a DOCTYPE, an entity or NUL bytes")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError) as error:
        raise Refused("XML that cannot be parsed", error) from error


def xml_number(element: ElementTree.Element, place: str) -> float:
    text = element.findtext(place)
    try:
        return float(text)
    except (TypeError, ValueError) as error:
        raise Refused("a number is missing or is none", f"{place}: {text!r}") from error


def xml_boxes(root: ElementTree.Element, grow: tuple[int, int]) -> list[tuple[Box, str]]:
    """Return the box and the name of each object; `grow` makes the corners half-open.

    An object's parts (VOC 2012 has heads and hands) lie inside it and are not looked at.
    """
    found = []
    for number, item in enumerate(root.iter("object"), 1):
        bounds = item.find("bndbox")
        if bounds is None:
            raise Refused("an object without a box", f"object {number}")

        edges = ("xmin", "ymin", "xmax", "ymax")
        x0, y0, x1, y1 = (xml_number(bounds, edge) for edge in edges)
        if x0 > x1 or y0 > y1:
            raise Refused("a box ends before it starts", f"object {number}: {(x0, y0, x1, y1)}")

        first, last = grow
        name = (item.findtext("name") or "").strip()
        found.append(((x0 + first, y0 + first, x1 + last, y1 + last), name))
    return found


def xml_files(
    source: Source, options: argparse.Namespace, usual: list[tuple[str, str]], by_folder: bool
) -> Table:
    """Return the boxes of XML files, one a picture.

    VOC counts pixels from 1 with the last one included. ImageNet's boxes are read as counted from 0
    with the last one included, which covers the object also where they are edges. ImageNet's class
    is the folder of the picture, VOC's stands at the object.
    """
    grow = (0, 1) if by_folder else (-1, 0)
    table = Table()
    images, marks = folders(source, options, usual, ".xml")

    for mark, picture in pairs(source, table, images, marks, ".xml"):
        try:
            root = xml_root(source.read(mark))
            found = xml_boxes(root, grow)
            if found:
                frame = (xml_number(root, "size/width"), xml_number(root, "size/height"))
            else:
                frame = (0, 0)
            if by_folder:
                folder = PurePosixPath(picture).parent.name
                found = [(box, folder) for box, _ in found]
            table.add(mark, picture, frame, found)
        except Refused as error:
            table.refuse(mark, picture, error)
    return table


def voc(source: Source, options: argparse.Namespace) -> Table:
    usual = [("JPEGImages", "Annotations"), ("images", "annotations/xmls"), ("images", "xmls")]
    usual += [("images", "annotations"), ("", "")]
    return xml_files(source, options, usual, by_folder=False)


def imagenet(source: Source, options: argparse.Namespace) -> Table:
    usual = [("train", "boxes"), ("Data/CLS-LOC/train", "Annotations/CLS-LOC/train")]
    usual += [("Data/CLS-LOC/val", "Annotations/CLS-LOC/val"), ("train", "bboxes_annotations")]
    usual += [("ILSVRC/Data/CLS-LOC/train", "ILSVRC/Annotations/CLS-LOC/train"), ("", "")]
    return xml_files(source, options, usual, by_folder=True)


# YOLO


def yolo(source: Source, options: argparse.Namespace) -> Table:
    """Return the boxes of text files with lines "class x y width height", shares of the picture."""
    names = yolo_names(source, options.names)
    table = Table()

    for images, marks in yolo_folders(source, options):
        for mark, picture in pairs(source, table, images, marks, ".txt"):
            try:
                lines = source.text(mark).splitlines()
                frame = picture_size(source, picture)
                found = [yolo_box(line, names, frame) for line in lines if line.strip()]
                table.add(mark, picture, frame, found)
            except Refused as error:
                table.refuse(mark, picture, error)
    return table


def yolo_folders(source: Source, options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return (pictures, labels): each folder images with its sibling labels, else the same place.

    This covers images/train2017 with labels/train2017, and train/images with train/labels.
    """
    if options.images is not None or options.annotations is not None:
        return [folders(source, options, [], ".txt")]

    found = set()
    for picture in source.below("", PICTURES):
        parts = picture.split("/")[:-1]
        if "images" in parts:
            at = len(parts) - 1 - parts[::-1].index("images")
            images = "/".join(parts[: at + 1])
            found.add((images, "/".join([*parts[:at], "labels"])))

    beside = [pair for pair in sorted(found) if source.below(pair[1], (".txt",))]
    return beside or [("", "")]


def yolo_box(line: str, names: dict[int, str], frame: Frame) -> tuple[Box, str]:
    """Return the corners in px and the class of one line of a label file."""
    fields = line.split()
    if len(fields) != 5:
        raise Refused("a line that is no box: 5 numbers expected", line[:80])
    try:
        x, y, width, height = (float(each) for each in fields[1:])
    except ValueError as error:
        raise Refused("a line that is no box: 5 numbers expected", line[:80]) from error

    if not re.fullmatch(r"\d{1,9}(\.0*)?", fields[0]):
        raise Refused("a class that is no whole number", line[:80])
    index = int(float(fields[0]))
    if index not in names:
        raise Refused("a class that has no name", f"{index}, {len(names)} names")
    if not all(0 <= share <= 1 + 1e-6 for share in (x, y, width, height)):
        raise Refused("numbers that are no shares of the picture, 0 to 1", line[:80])

    wide, high = frame
    left, right = (x - width / 2) * wide, (x + width / 2) * wide
    top, bottom = (y - height / 2) * high, (y + height / 2) * high
    return (left, top, right, bottom), names[index]


def yolo_names(source: Source, given: Path | None) -> dict[int, str]:
    """Return the class names by number: from --names, else from the data set's own list."""
    if given is not None:
        try:
            return names_in(str(given), given.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise SystemExit(f"error: {given} is not UTF-8 ({error})") from error

    lists = ("classes.txt", "obj.names", "classes.names", "_darknet.labels")
    found = {}
    for name in source.files:
        base = PurePosixPath(name).name
        if hidden(name) or not (base in lists or base.endswith((".yaml", ".yml"))):
            continue
        try:
            names = names_in(f"{source.path}/{name}", source.text(name, NAMES))
        except Refused as error:
            raise SystemExit(f"error: {source.path}/{name}: {error}; pass --names FILE") from error
        if names:
            found[name] = names

    different = {json.dumps(names, sort_keys=True) for names in found.values()}
    if len(different) != 1:
        raise SystemExit(
            f"error: {source.path} has {len(different)} lists of class names "
            f"({', '.join(found) or 'no data.yaml, no classes.txt'}); pass one: --names FILE"
        )
    return next(iter(found.values()))


def names_in(file: str, text: str) -> dict[int, str]:
    """Return the class names in a YAML file (`names`, a list or a mapping) or a text, one a line.

    A YAML file without names gives none.
    """
    if not file.endswith((".yaml", ".yml")):
        return dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))
    try:
        names = (yaml.safe_load(text) or {}).get("names") or {}
        numbered = dict(enumerate(names)) if isinstance(names, list) else names
        if not isinstance(numbered, dict):
            raise TypeError(f"names is {type(names).__name__}, not a list or a mapping")
        if any(isinstance(name, list | dict | set) for name in numbered.values()):
            raise TypeError("a name that is a list")
        return {int(number): str(name) for number, name in numbered.items()}
    except (yaml.YAMLError, *UNREADABLE) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(
            f"error: {file} holds no class names ({reason}); pass --names FILE"
        ) from error


def picture_size(source: Source, name: str) -> Frame:
    """Return width and height of a picture from its header; Refused if it may be turned.

    Shares of a picture do not say whether they were drawn before or after the turn.
    """
    try:
        with source.open(name) as file, Image.open(file) as image:
            size = image.size
            turn = image.getexif().get(ORIENTATION, 1)
    except Exception as error:  # decoders fail in many ways
        raise Refused("picture cannot be read", error) from error

    if turn not in (0, 1):
        raise Refused("EXIF orientation: boxes may be of the turned picture", f"orientation {turn}")
    return size


# COCO


def coco(source: Source, options: argparse.Namespace) -> Table:
    """Return the boxes of JSON files with `images`, `annotations` and `categories`."""
    if options.annotations is not None:
        files = [name for name in source.files if name == options.annotations]
        files = files or source.below(options.annotations, (".json",))
    else:
        files = source.below("", (".json",))
        instances = [name for name in files if PurePosixPath(name).name.startswith("instances")]
        files = instances or files
    if not files:
        raise SystemExit(f"error: {source.path} holds no .json file; name it: --annotations FILE")

    table = Table()
    places = picture_places(source, options.images or "")
    for name in files:
        try:
            coco_file(source, table, name, places)
        except Refused as error:
            table.refuse(name, "", error)
    return table


def picture_places(source: Source, images: str) -> dict[str, list[str]]:
    """Return where the pictures of each base name are."""
    places: dict[str, list[str]] = {}
    for picture in source.below(images, PICTURES):
        places.setdefault(PurePosixPath(picture).name, []).append(picture)
    return places


def coco_file(source: Source, table: Table, name: str, places: dict[str, list[str]]) -> None:
    """Add the boxes of one JSON file; Refused if the file as a whole is no such file."""
    try:
        content = json.loads(source.text(name, LARGE))
        images = {entry["id"]: entry for entry in content["images"]}
        classes = {entry["id"]: entry["name"] for entry in content["categories"]}
        boxes: dict = {key: [] for key in images}
        strays = 0
        for entry in content["annotations"]:
            if entry["image_id"] in boxes:
                boxes[entry["image_id"]].append(entry)
            else:
                strays += 1
    except UNREADABLE as error:
        raise Refused("no JSON with images, annotations and categories", repr(error)) from error
    if len(images) < len(content["images"]):
        raise Refused("two images of one id")

    table.used.add(name)
    if strays:
        table.unused.append((name, "", "boxes of images that are not listed", f"{strays} boxes"))
    for key, entry in images.items():
        place = ""
        mark = f"{name}: image {key!r}"
        try:
            place = coco_place(str(entry.get("file_name", "")), places)
            frame = (float(entry["width"]), float(entry["height"]))
            table.add(mark, place, frame, [coco_box(box, classes) for box in boxes[key]])
        except Refused as error:
            table.refuse(mark, place, error)
        except UNREADABLE as error:
            table.refuse(mark, place, Refused("a number is missing or is none", repr(error)))


def coco_place(file: str, places: dict[str, list[str]]) -> str:
    """Return the path of the picture that a JSON file calls `file`; Refused unless it is one."""
    found = places.get(PurePosixPath(file).name, [])
    exact = [place for place in found if f"/{place}".endswith(f"/{file}")]
    found = exact or found
    if not found:
        raise Refused("annotation without a picture", file)
    if len(found) > 1:
        raise Refused("two pictures of that name", ", ".join(found[:2]))
    return found[0]


def coco_box(entry: dict, classes: dict) -> tuple[Box, str]:
    """Return the corners and the class of one annotation."""
    bounds = entry.get("bbox")
    if not isinstance(bounds, list) or len(bounds) != 4:
        raise Refused("an object without a box", f"annotation {entry.get('id')}")
    if entry.get("category_id") not in classes:
        raise Refused("a class that has no name", entry.get("category_id"))

    x, y, width, height = (float(value) for value in bounds)
    return (x, y, x + width, y + height), classes[entry["category_id"]]


# Tiny-ImageNet


def tiny_imagenet(source: Source, options: argparse.Namespace) -> Table:
    """Return the boxes of <wnid>_boxes.txt and val_annotations.txt; pictures are 64 px wide."""
    table = Table()
    texts = source.below(options.annotations or "", (".txt",))
    for name in texts:
        base = PurePosixPath(name).name
        if base.endswith("_boxes.txt"):
            tiny_table(source, table, name, base.removesuffix("_boxes.txt"))
        elif base == "val_annotations.txt":
            tiny_table(source, table, name, "")
    if not table.used:
        raise SystemExit(
            f"error: {source.path} holds no <class>_boxes.txt and no val_annotations.txt"
        )
    return table


def tiny_table(source: Source, table: Table, name: str, wnid: str) -> None:
    """Add the boxes of one table: file, [class,] x0, y0, x1, y1, in whole pixels from 0 to 63."""
    table.used.add(name)
    folder = PurePosixPath(name).parent

    try:
        lines = source.text(name).splitlines()
    except Refused as error:
        table.refuse(name, "", error)
        return

    for number, line in enumerate(lines, 1):
        mark = f"{name}: line {number}"
        fields = line.split("\t") if "\t" in line else line.split()
        place = str(folder / "images" / fields[0]) if fields else ""
        present = place in source.names
        try:
            if fields and not present:
                raise Refused("annotation without a picture", line[:80])
            if fields:
                found = tiny_box(fields if wnid else fields[:1] + fields[2:], line)
                table.add(mark, place, (64, 64), [(found, wnid or fields[1])])
        except Refused as error:
            table.refuse(mark, place if present else "", error)


def tiny_box(fields: list[str], line: str) -> Box:
    """Return a box, whose last pixel is included, as half-open.

    A box whose first and last column (or row) are the same keeps its zero area: it is degenerate.
    """
    if len(fields) != 5 or not all(re.fullmatch(r"\d{1,9}", each) for each in fields[1:]):
        raise Refused("a line that is no box: 4 whole numbers expected", line[:80])
    x0, y0, x1, y1 = (int(each) for each in fields[1:])
    if x1 > x0 and y1 > y0:
        return x0, y0, x1 + 1, y1 + 1
    return x0, y0, x1, y1


# The command

LAYOUTS = {
    "voc": voc,
    "imagenet": imagenet,
    "yolo": yolo,
    "coco": coco,
    "tiny_imagenet": tiny_imagenet,
}


def convert(layout: str, source: Source, options: argparse.Namespace) -> Table:
    """Return the table of a data set, complete: every file gave rows or has a reason."""
    table = LAYOUTS[layout](source, options)
    refused = {image for _, image, _, _ in table.unused if image}
    table.rows = [row for row in table.rows if row[0] not in refused]
    table.close(source)
    table.rows.sort(key=lambda row: row[0])
    table.unused.sort()
    return table


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    layouts = found.add_subparsers(dest="layout", required=True)
    for layout in LAYOUTS:
        command = layouts.add_parser(layout)
        command.add_argument("source", type=Path, help="a folder or a zip")
        command.add_argument("--out", type=Path, default=Path("boxes.csv"))
        command.add_argument("--images", help="the folder of the pictures, inside the source")
        command.add_argument("--annotations", help="the folder or file of the annotations")
        command.add_argument("--limit-gib", type=float, default=8.0, help="memory it may take (8)")
        if layout == "yolo":
            command.add_argument("--names", type=Path, help="a YAML or a text with class names")
    return found


def limit(gib: float) -> None:
    """Limit this process to so much memory, and to no time of whoever started it; on Linux."""
    if sys.platform == "linux":
        import resource

        memory, hard = int(gib * 2**30), resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard == resource.RLIM_INFINITY or memory < hard:
            resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


def main(arguments: list[str] | None = None, alone: bool = False) -> int:
    """Write boxes.csv and the list of unused files; return 0, or 1 after one line that says what is
    wrong: for example that there is no box at all.

    `alone`: this process does nothing else, so its memory is limited.
    """
    options = parser().parse_args(arguments)
    if alone:
        limit(options.limit_gib)
    try:
        return write(options)
    except MemoryError:
        reason = f"takes more memory than --limit-gib {options.limit_gib:g}; pass a larger one"
    except OSError as error:
        reason = f"could not be read or written: {error}"
    except Exception as error:  # never a traceback
        reason = f"could not be read, by a fault of ours ({type(error).__name__}: {error})"
        reason = f"{reason[:300]}. Please report it, with the file"
    print(f"error: {printable(options.source)} {reason}.", file=sys.stderr)
    return 1


def write(options: argparse.Namespace) -> int:
    """Write both tables; return 0, or 1 if there is no box at all."""
    source = Source(options.source)
    unused = options.out.with_name(f"{options.out.stem}.unused.csv")
    written = {
        os.path.relpath(path.resolve(), source.path.resolve()) for path in (options.out, unused)
    }
    source.files = [name for name in source.files if name not in written]

    table = convert(options.layout, source, options)
    write_csv(unused, UNUSED, table.unused)
    print(f"{len(table.unused)} files or entries gave no box, listed in {printable(unused)}:")
    for reason, count in Counter(row[2] for row in table.unused).most_common():
        print(f"  {count:7,} {reason}")

    if not table.rows:
        print(f"error: no box was found in {printable(options.source)}", file=sys.stderr)
        return 1
    write_csv(options.out, COLUMNS, table.rows)
    pictures = len({row[0] for row in table.rows})
    classes = len({row[7] for row in table.rows})
    print(
        f"{len(table.rows):,} boxes of {pictures:,} pictures and {classes:,} classes "
        f"in {printable(options.out)}"
    )
    return 0


def printable(path: Path) -> str:
    """Return a path as text that any terminal takes, whatever bytes its name holds."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


if __name__ == "__main__":
    sys.exit(main(alone=True))
