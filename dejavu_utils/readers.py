"""Readers of the layouts that data sets come in: Tiny-ImageNet, ImageNet, Pascal VOC, YOLO; folders or zip files."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from dejavu_utils import manifests
from dejavu_utils.data import Images, threads
from dejavu_utils.manifests import Tree

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")  # pictures only: Pillow also opens programs (EPS) and documents
LARGEST = 89_478_485  # px: from here on Pillow warns of a decompression bomb


class Lazy(Sequence):
    """Pictures decoded when asked for: item i is uint8 (3, h, w). `stamps` are the sizes of the files."""

    def __init__(self, tree: Tree, names: Sequence[str], stamps: Sequence[int]):
        self.tree, self.names, self.stamps = tree, np.asarray(names, dtype=object), np.asarray(stamps, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, index: np.ndarray) -> Lazy:
        return Lazy(self.tree, self.names[index], self.stamps[index])

    def __getitem__(self, i: int) -> Tensor:
        try:
            return decode(self.tree.read(self.names[i]))
        except Exception as error:
            raise ValueError(f"{self.tree.path}: {self.names[i]} cannot be decoded ({error}). "
                             "Repair or remove that picture and run the command again.") from error


@contextlib.contextmanager
def _picture(file):
    """Open a picture without decoding it; an error if it is none, or one of more than `LARGEST` px."""
    from PIL import Image
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > LARGEST:
            raise ValueError(f"{image.width} x {image.height} px, more than {LARGEST}: a decompression bomb?")
        yield image


def decode(raw: bytes) -> Tensor:
    """Return a picture as uint8 (3, h, w) RGB; greyscale becomes RGB. Raises if it is not one, or not whole."""
    with _picture(io.BytesIO(raw)) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy())


class Item(NamedTuple):
    """One picture still on disk: `boxes()` returns (boxes (m, 4), annotated (width, height) or None)."""

    name: str
    key: str | int | None
    boxes: Callable

    @property
    def id(self) -> str:
        return PurePosixPath(self.name).stem


def _find(tree: Tree, entry: dict, what: str) -> str:
    """Return the folder of the pictures ("images") or the annotations, or raise FileNotFoundError."""
    found = tree.find(entry[what])
    if found is None:
        raise FileNotFoundError(f"{tree.path} is not a data set of layout {entry['layout']}: expected a folder "
                                f"{' or '.join(entry[what])} in it. See data_manifests/{entry['name']}.yaml.")
    return found


def _tiny_box(text: list[str]):
    """Return the box of one Tiny-ImageNet picture: whole pixels, the last one included, made half-open.

    A box whose first and last column (or row) are the same is a degenerate annotation and keeps its zero area.
    """
    box = np.array(text, np.float64).reshape(-1, 4)
    if (box[:, 2:] > box[:, :2]).all():
        box[:, 2:] += 1
    return box, None


def _tiny_imagenet(tree: Tree, entry: dict, choose: Callable):
    """Return (items, class keys, class names) of Tiny-ImageNet: train/<wnid>/images and a table of boxes each."""
    train = _find(tree, entry, "images")
    base = train.rpartition("train")[0]
    keys, items = choose([line[0] for line in tree.lines(f"{base}wnids.txt")] or tree.names(train)), []
    for key in keys:
        boxes = {line[0]: line[1:5] for line in tree.lines(f"{train}/{key}/{key}_boxes.txt")}
        items += [Item(name, key, functools.partial(_tiny_box, boxes.get(PurePosixPath(name).name, [])))
                  for name in tree.pictures(f"{train}/{key}/images")]
    words = {line[0]: line[1].split(",")[0] for line in tree.lines(f"{base}words.txt") if len(line) > 1}
    return items, keys, [words.get(key, key) for key in keys]


def _xml_boxes(tree: Tree, name: str | None, grow: tuple[int, int]):
    """Return the boxes of a Pascal VOC file, their corners moved by `grow` to be half-open, and the annotated size."""
    raw = tree.read(name) if name else b"<annotation/>"
    if b"\0" in raw or re.search(rb"<!(?!--)", raw):
        raise ValueError("an annotation with a DOCTYPE or ENTITY is refused")
    root = ElementTree.fromstring(raw)
    corners = [[float(box.findtext(edge)) for edge in ("xmin", "ymin", "xmax", "ymax")] for box in root.iter("bndbox")]
    boxes = np.array(corners, np.float64).reshape(-1, 4) + np.repeat(grow, 2)
    size = tuple(float(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
    return boxes, size if min(size) > 0 else None


def _xml_items(tree: Tree, folder: str, xmls: str | None, grow: tuple[int, int], key: str | None = None) -> list[Item]:
    """Return the pictures in `folder`, each with its XML file in `xmls` if there is one.

    The class is `key`, or else what the file name says before its last underscore.
    """
    known, items = set(tree.names(xmls)) if xmls else set(), []
    for name in tree.pictures(folder):
        stem = PurePosixPath(name).stem
        xml = f"{xmls}/{stem}.xml" if f"{stem}.xml" in known else None
        items.append(Item(name, key or stem.rpartition("_")[0], functools.partial(_xml_boxes, tree, xml, grow)))
    return items


def _imagenet(tree: Tree, entry: dict, choose: Callable):
    """Return (items, class keys, class names) of class folders and, in a parallel tree, one XML file per picture.

    Its boxes are read as 0-based with the last pixel included: that covers the object if they are edges, too.
    """
    base, xmls = _find(tree, entry, "images"), tree.find(entry["annotations"])
    keys, items = choose([name for name in tree.names(base) if tree.names(f"{base}/{name}")]), []
    for key in keys:
        items += _xml_items(tree, f"{base}/{key}", xmls and f"{xmls}/{key}", (0, 1), key)
    return items, keys, keys


def _voc(tree: Tree, entry: dict, choose: Callable):
    """Return (items, class keys, class names) of one folder of <class>_<number>.jpg. Boxes are 1-based, last pixel
    included."""
    items = _xml_items(tree, _find(tree, entry, "images"), tree.find(entry["annotations"]), (-1, 0))
    keys = choose({item.key for item in items})
    return items, keys, keys


def _yolo_rows(tree: Tree, name: str, classes: int) -> tuple[np.ndarray, int]:
    """Return the rows of a YOLO label file (class, centre, size) and the class of the largest box."""
    rows = np.array(tree.lines(name), np.float64).reshape(-1, 5)
    if not len(rows):
        raise ValueError("no class: no label file, or no box in it")
    key = int(rows[np.argmax(rows[:, 3] * rows[:, 4]), 0])
    if not 0 <= key < classes:
        raise ValueError(f"no class: {key} is not one of 0 to {classes - 1}")
    return rows, key


def _yolo_boxes(*label):
    """Return corners as fractions of the picture: the annotated size is 1 x 1."""
    rows, _ = _yolo_rows(*label)
    centre, half = rows[:, 1:3], rows[:, 3:5] / 2
    return np.c_[centre - half, centre + half], (1.0, 1.0)


def _yolo(tree: Tree, entry: dict, choose: Callable):
    """Return (items, class keys, class names) of YOLO text boxes; the class of a picture is that of its largest box."""
    folder, items = _find(tree, entry, "annotations"), []
    for name in tree.pictures(_find(tree, entry, "images")):
        label = (tree, f"{folder}/{PurePosixPath(name).stem}.txt", len(entry["names"]))
        try:
            key = _yolo_rows(*label)[1]
        except ValueError:
            key = None  # reading its boxes fails in the same way and gives the reason
        items.append(Item(name, key, functools.partial(_yolo_boxes, *label)))
    keys = choose({item.key for item in items} - {None})
    return items, keys, [entry["names"][key] for key in keys]


LAYOUTS = {"tiny_imagenet": _tiny_imagenet, "imagenet": _imagenet, "voc": _voc, "yolo": _yolo}


def _choose(entry: dict, classes: int | None, keys) -> list:
    """Return the class keys to read, sorted: those the manifest lists, if it does, and of these the first so many."""
    listed = entry["classes"] if isinstance(entry["classes"], list) else None
    keys = sorted(key for key in keys if listed is None or key in listed)
    if not keys or classes is not None and not 1 <= classes <= len(keys):
        raise ValueError(f"data set {entry['name']}: classes = {classes}, but {len(keys)} are there; expected 1 to "
                         f"{len(keys)}, or None for all.")
    return keys[:classes]


def _unique(items: list[Item], keys: list) -> tuple[list[Item], list[tuple[str, str]]]:
    """Return the items of these classes (or of none), sorted by id, and those whose id is taken as (name, reason)."""
    chosen, skipped = {}, []
    for item in sorted(items, key=lambda item: (item.id, item.name)):
        if item.id in chosen:
            skipped.append((item.name, f"has the id of {chosen[item.id].name}"))
        elif item.key is None or item.key in keys:
            chosen[item.id] = item
    return list(chosen.values()), skipped


def _fit(boxes: np.ndarray, annotated: tuple | None, size: tuple) -> np.ndarray:
    """Return boxes scaled from the annotated size to the picture's, and clamped to it: float32 (m, 4)."""
    limits = np.array([*size, *size], np.float64)
    if annotated:
        boxes = boxes * (limits / [*annotated, *annotated])
    if not np.isfinite(boxes).all():
        raise ValueError("a box that is not finite")
    return boxes.clip(0, limits).astype(np.float32)


def _one(tree: Tree, item: Item, row: Tensor | None):
    """Return (boxes, size, bytes) of one picture, its pixels put into `row`; or, in words, why it cannot be read.

    Without `row`, a JPEG with an end marker is taken to be whole and not decoded: ImageNet would take half an hour.
    """
    try:
        with tree.open(item.name) as file, _picture(file) as image:
            size, length = image.size, file.seek(0, os.SEEK_END)
            file.seek(max(0, length - 2))
            whole = image.format == "JPEG" and file.read() == b"\xff\xd9"
        boxes = _fit(*item.boxes(), size)
        if row is not None and size != (row.shape[2], row.shape[1]):
            raise ValueError(f"{size[0]} x {size[1]} px, expected {row.shape[2]} x {row.shape[1]}")
        pixels = None if whole and row is None else decode(tree.read(item.name))
        if row is not None:
            row.copy_(pixels)
        return boxes, size, length
    except Exception as error:  # decoders and parsers fail in many ways; every one is a line in `skipped`
        return f"{type(error).__name__}: {error}"


def load(entry: dict, path: Path, classes: int | None = None) -> Images:
    """Return the data set at `path` (a folder or a zip), read as its manifest `entry` says.

    `classes`: the first so many (sorted; None all). Pictures of one size (`image_size`) are held decoded, others are
    decoded when asked for. Broken ones are in `skipped`, each with its reason.
    """
    if path.is_file() and path.name == entry.get("file") and entry.get("sha256"):
        manifests.verify(entry, path)
    tree = Tree(path)
    items, keys, names = LAYOUTS[entry["layout"]](tree, entry, functools.partial(_choose, entry, classes))
    items, skipped = _unique(items, keys)
    width, height = entry.get("image_size") or (0, 0)
    pixels = torch.empty(len(items), 3, height, width, dtype=torch.uint8)
    found = threads(lambda i: _one(tree, items[i], pixels[i] if width else None), range(len(items)))
    skipped += [(item.name, one) for item, one in zip(items, found, strict=True) if isinstance(one, str)]
    good = [i for i, one in enumerate(found) if not isinstance(one, str)]
    if not good:
        raise ValueError(f"{path}: none of {len(items)} pictures could be read. {(skipped or [''])[0]}")
    boxes, sizes, stamps = zip(*(found[i] for i in good), strict=True)
    pixels, items = pixels if len(good) == len(items) else pixels[good], [items[i] for i in good]
    return Images(
        ids=np.array([item.id for item in items]),
        labels=np.array([keys.index(item.key) for item in items], np.int64),
        boxes=list(boxes),
        classes=tuple(n if names.count(n) == 1 else f"{n} ({key})" for n, key in zip(names, keys, strict=True)),
        sizes=np.array(sizes),
        pixels=pixels if width else Lazy(tree, [item.name for item in items], stamps),
        skipped=sorted(skipped),
    )
