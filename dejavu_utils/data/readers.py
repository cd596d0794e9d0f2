"""Readers of the layouts that data sets come in: Tiny-ImageNet, ImageNet, Pascal VOC, YOLO; folders
or zip files.
"""

import functools
import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from dejavu_utils.data import manifests
from dejavu_utils.data.images import Images, threads
from dejavu_utils.data.lazy import Lazy, Tree, decoded, picture

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".gif")


class Source(NamedTuple):
    """A data set on disk: its manifest, its files, the folders of its pictures and of its
    annotations ("": none).
    """

    entry: dict
    tree: Tree
    images: str
    marks: str

    def mark(self, name: str, suffix: str) -> str:
        """Return the name of a picture's own annotation file, there or not: it has the same place
        in `marks`.
        """
        return str(PurePosixPath(f"{self.marks}{name[len(self.images) :]}").with_suffix(suffix))


def _source(entry: dict, tree: Tree) -> Source:
    """Return the data set in `tree`; FileNotFoundError if a folder that its layout needs is not
    there.
    """
    found = {what: tree.find(entry.get(what, ())) for what in ("images", "annotations")}
    for what in ("images", "annotations") if entry["layout"] == "yolo" else ("images",):
        if found[what] is None:
            raise FileNotFoundError(
                f"{tree.path} is not a data set of layout {entry['layout']}: expected a folder "
                f"{' or '.join(entry[what])} in it. See data_manifests/{entry['name']}.yaml."
            )
    return Source(entry, tree, found["images"], found["annotations"] or "")


def _folder(source: Source, name: str) -> str:
    """Return the class of a picture: the folder it is in."""
    return name[len(source.images) + 1 :].partition("/")[0]


def _prefix(source: Source, name: str) -> str:
    """Return the class of a picture: what its file name says before its last underscore."""
    return PurePosixPath(name).stem.rpartition("_")[0]


def _largest(source: Source, name: str) -> int | None:
    """Return the class of a picture: that of its largest YOLO box."""
    try:
        return _yolo_rows(source, name)[1]
    except ValueError:
        return None  # reading its boxes fails in the same way and gives the reason


@functools.lru_cache(maxsize=16)
def _table(tree: Tree, name: str) -> dict[str, list[str]]:
    return {line[0]: line[1:5] for line in tree.lines(name)}


def _tiny_boxes(source: Source, name: str) -> tuple[np.ndarray, None]:
    """Return the box in the table of the picture's class: whole pixels, the last one included, made
    half-open.

    A box whose first and last column (or row) are the same is a degenerate annotation and keeps its
    zero area.
    """
    key = _folder(source, name)
    table = _table(source.tree, f"{source.images}/{key}/{key}_boxes.txt")
    box = np.array(table.get(PurePosixPath(name).name, []), np.float64).reshape(-1, 4)
    if (box[:, 2:] > box[:, :2]).all():
        box[:, 2:] += 1
    return box, None


def _xml_boxes(
    source: Source, name: str, grow: tuple[int, int]
) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Return the boxes of a Pascal VOC file, their corners moved by `grow` to be half-open, and the
    annotated size.
    """
    file = source.mark(name, ".xml")
    raw = source.tree.read(file) if file in source.tree else b"<annotation/>"
    if b"\0" in raw or re.search(rb"<!(?!--)", raw):
        raise ValueError("an annotation with a DOCTYPE or ENTITY is refused")
    root = ElementTree.fromstring(raw)
    corners = [
        [float(box.findtext(edge)) for edge in ("xmin", "ymin", "xmax", "ymax")]
        for box in root.iter("bndbox")
    ]
    size = tuple(float(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
    return np.array(corners, np.float64).reshape(-1, 4) + np.repeat(grow, 2), size if min(
        size
    ) > 0 else None


def _yolo_rows(source: Source, name: str) -> tuple[np.ndarray, int]:
    """Return the rows of a YOLO label file (class, centre, size) and the class of the largest
    box.
    """
    rows = np.array(source.tree.lines(source.mark(name, ".txt")), np.float64).reshape(-1, 5)
    if not len(rows):
        raise ValueError("no class: no label file, or no box in it")
    key, classes = int(rows[np.argmax(rows[:, 3] * rows[:, 4]), 0]), len(source.entry["names"])
    if not 0 <= key < classes:
        raise ValueError(f"no class: {key} is not one of 0 to {classes - 1}")
    return rows, key


def _yolo_boxes(source: Source, name: str) -> tuple[np.ndarray, tuple[float, float]]:
    """Return corners as fractions of the picture: the annotated size is 1 x 1."""
    rows, _ = _yolo_rows(source, name)
    centre, half = rows[:, 1:3], rows[:, 3:5] / 2
    return np.c_[centre - half, centre + half], (1.0, 1.0)


# How each layout tells the class of a picture, and its boxes (m, 4) with the (width, height) they
# refer to (None: the picture's). VOC boxes are 1-based, last pixel included. ImageNet's are read as
# 0-based with the last pixel included: that covers the object if they are edges, too.
LAYOUTS = {
    "tiny_imagenet": (_folder, _tiny_boxes),
    "imagenet": (_folder, functools.partial(_xml_boxes, grow=(0, 1))),
    "voc": (_prefix, functools.partial(_xml_boxes, grow=(-1, 0))),
    "yolo": (_largest, _yolo_boxes),
}


def _classes(source: Source, wanted: int | None, found: set) -> tuple[list, tuple[str, ...]]:
    """Return (keys, names) of the classes to read, sorted by key, of those `found`: the first
    `wanted`, None for all.

    A manifest may list its classes, and so may a file wnids.txt; their names are in the manifest or
    in words.txt.
    """
    entry, base = source.entry, source.images.rpartition("train")[0]
    there = {line[0] for line in source.tree.lines(f"{base}wnids.txt")} or found - {None}
    keys = sorted(
        there.intersection(entry["classes"]) if isinstance(entry["classes"], list) else there
    )
    if not keys or wanted is not None and not 1 <= wanted <= len(keys):
        raise ValueError(
            f"data set {entry['name']}: classes = {wanted}, but {len(keys)} are there; expected 1 "
            "to "
            f"{len(keys)}, or None for all."
        )
    keys = keys[:wanted]
    words = {
        line[0]: line[1].split(",")[0]
        for line in source.tree.lines(f"{base}words.txt")
        if len(line) > 1
    }
    names = [entry["names"][key] if "names" in entry else words.get(key, key) for key in keys]
    return keys, tuple(
        n if names.count(n) == 1 else f"{n} ({key})" for n, key in zip(names, keys, strict=True)
    )


def _unique(pictures: list[tuple], keys: set) -> tuple[list[tuple], list[tuple[str, str]]]:
    """Return the pictures (id, name, class) of these classes, and those of them whose id is taken
    as (name, reason).
    """
    chosen = [each for each in pictures if each[2] in keys]
    first = {own: name for own, name, _ in reversed(chosen)}
    skipped = [
        (name, f"has the id of {first[own]}") for own, name, _ in chosen if name != first[own]
    ]
    return [each for each in chosen if each[1] == first[each[0]]], skipped


def _fit(boxes: np.ndarray, annotated: tuple | None, size: tuple) -> np.ndarray:
    """Return boxes scaled from the annotated size to the picture's, and clamped to it: float32 (m,
    4).
    """
    limits = np.array([*size, *size], np.float64)
    if annotated:
        boxes = boxes * (limits / [*annotated, *annotated])
    if not np.isfinite(boxes).all():
        raise ValueError("a box that is not finite")
    return boxes.clip(0, limits).astype(np.float32)


def _one(
    source: Source, name: str, row: Tensor | None
) -> tuple[np.ndarray, tuple[int, int], int] | str:
    """Return (boxes, size, bytes) of one picture, its pixels put into `row`; or, in words, why it
    cannot be read.

    Without `row`, a JPEG with an end marker is taken to be whole and not decoded: ImageNet would
    take half an hour.
    """
    try:
        with source.tree.open(name) as file, picture(file) as image:
            size, boxes = (
                image.size,
                _fit(*LAYOUTS[source.entry["layout"]][1](source, name), image.size),
            )
            if row is not None and size != (row.shape[2], row.shape[1]):
                raise ValueError(
                    f"{size[0]} x {size[1]} px, expected {row.shape[2]} x {row.shape[1]}"
                )
            if row is not None:
                row.copy_(decoded(image))
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - 2))
            if row is None and (image.format != "JPEG" or file.read() != b"\xff\xd9"):
                image.load()
        return boxes, size, length
    except (
        Exception
    ) as error:  # decoders and parsers fail in many ways; every one is a line in `skipped`
        return f"{type(error).__name__}: {error}"


def load(entry: dict, path: Path, classes: int | None = None) -> Images:
    """Return the data set at `path` (a folder or a zip), read as its manifest `entry` says.

    `classes`: the first so many (sorted; None all). Pictures of one size (`image_size`) are held
    decoded, others are decoded when asked for. Broken ones are in `skipped`, each with its reason.
    """
    if path.is_file() and path.name == entry.get("file") and entry.get("sha256"):
        manifests.verify(entry, path)
    source, class_of = _source(entry, Tree(path)), LAYOUTS[entry["layout"]][0]
    files = [name for name in source.tree.below(source.images) if name.lower().endswith(SUFFIXES)]
    pictures = sorted((PurePosixPath(name).stem, name, class_of(source, name)) for name in files)
    keys, names = _classes(source, classes, {key for *_, key in pictures})
    pictures, skipped = _unique(pictures, {None, *keys})
    width, height = entry.get("image_size") or (0, 0)
    pixels = torch.empty(len(pictures), 3, height, width, dtype=torch.uint8)
    found = threads(
        lambda i: _one(source, pictures[i][1], pixels[i] if width else None), range(len(pictures))
    )
    skipped += [
        (name, one)
        for (_, name, _), one in zip(pictures, found, strict=True)
        if isinstance(one, str)
    ]
    good = [i for i, one in enumerate(found) if not isinstance(one, str)]
    if not good:
        raise ValueError(
            f"{path}: none of {len(pictures)} pictures could be read. {(skipped or [''])[0]}"
        )
    boxes, sizes, stamps = zip(*(found[i] for i in good), strict=True)
    ids, files, labels = zip(*(pictures[i] for i in good), strict=True)
    pixels = pixels if len(good) == len(pictures) else pixels[good]
    return Images(
        ids=np.array(ids),
        labels=np.array([keys.index(key) for key in labels], np.int64),
        boxes=list(boxes),
        classes=names,
        sizes=np.array(sizes),
        pixels=pixels if width else Lazy(source.tree, files, stamps),
        skipped=sorted(skipped),
    )
