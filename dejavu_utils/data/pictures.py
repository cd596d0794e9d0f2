"""`read`: the pictures of a folder or zip, with their classes and boxes, as `Images`.

Every file is used, or listed in `Images.skipped` with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from dejavu_utils import limited
from dejavu_utils.data import identity, readers
from dejavu_utils.data.boxes import Annotation, Table, class_text, fit
from dejavu_utils.data.images import Images, threads
from dejavu_utils.data.lazy import Lazy
from dejavu_utils.data.tree import Tree, printable
from dejavu_utils.store import StoreError

TABLES = (".txt", ".xml", ".json", ".csv", ".yaml", ".yml")  # convert.py lists what it did not use
UNNAMED = "picture"  # the class of all pictures where there are none
# Why a picture has no class, by where classes come from.
NO_CLASS = {
    "column": "no class: boxes.csv has no row for it, or no class in it",
    "prefix": "no class: its name is not <class>_<number>",
    "folder": "no class: it is in no class folder",
}


@dataclass(frozen=True)
class Rules:
    """How a data set tells ids and classes, and which pictures are its own."""

    # folder: the first one, column: boxes.csv, prefix: <class>_<number>, none: all of one class
    class_from: str = "folder"
    ids: str = "path"  # path, or stem: the bare name where no other picture has it
    classes: tuple[str, ...] = ()  # only these; () all of them
    order: tuple[str, ...] = ()  # of the classes; () alphabetical
    titles: dict[str, str] = field(default_factory=dict)  # what a class is called in figures
    # Width and height of all pictures, which are then held decoded.
    size: tuple[int, int] | None = None


class _Picture(NamedTuple):
    id: str
    file: str
    name: str  # of its class
    mark: Annotation | None


class _Measured(NamedTuple):
    boxes: np.ndarray | None = None  # (m, 4) px
    size: tuple[int, int] = (0, 0)  # width, height, px
    reason: str = ""  # why the picture cannot be used; empty if it can


def read(
    tree: Tree,
    images: str,
    table: Table,
    rules: Rules,
    classes: int | None = None,
    what: str = "",
    limit_gib: float = limited.LIMIT_GIB,
) -> Images:
    """Return the pictures in the folder `images` ("": everywhere) of `tree`, sorted by id.

    `classes`: the first so many; None all. Pictures of one size (`rules.size`) are held decoded,
    others are decoded when asked for. How many pixels one may have goes by `limit_gib` (GiB).
    StoreError if nothing can be read; `what` names the data set.
    """
    pictures, skipped = _listed(tree, images, table, rules)
    if not pictures:
        raise StoreError(f"{what or tree.path}: no file can be used{most(skipped)}")
    names = _chosen((each.name for each in pictures), rules, classes, what or str(tree.path))
    label = {name: i for i, name in enumerate(names)}
    pictures = [each for each in pictures if each.name in label]
    pictures.sort(key=lambda each: (each.id, each.file))

    pixels = None
    if rules.size:
        width, height = rules.size
        pixels = torch.empty(len(pictures), 3, height, width, dtype=torch.uint8)

    def measure(i: int) -> _Measured:
        row = None if pixels is None else pixels[i]
        return _measure(tree, pictures[i], row, limit_gib)

    measured = threads(measure, range(len(pictures)))
    good = [i for i, one in enumerate(measured) if not one.reason]
    for each, one in zip(pictures, measured, strict=True):
        if one.reason:
            skipped.append((each.file, one.reason))
    if not good:
        reason = most(skipped)
        raise StoreError(f"{tree.path}: none of {len(pictures)} pictures could be read{reason}")

    kept = [pictures[i] for i in good]
    found = [measured[i] for i in good]
    if pixels is None:
        hashes = identity.of_files(tree, [each.file for each in kept])
        pixels = Lazy(tree, list(hashes), list(hashes.values()))
    elif len(kept) < len(pictures):
        pixels = pixels[good]
    return Images(
        ids=np.array([each.id for each in kept]),
        labels=np.array([label[each.name] for each in kept], np.int64),
        boxes=[one.boxes for one in found],
        classes=_titles(names, rules.titles),
        sizes=np.array([one.size for one in found]),
        pixels=pixels,
        attributes=_attributes(kept),
        skipped=sorted((printable(name), printable(reason)) for name, reason in skipped),
    )


def most(skipped: list[tuple[str, str]]) -> str:
    """Return the most common reasons why files are not used, with an example of each."""
    if not skipped:
        return ": there is none."
    example = {reason: name for name, reason in reversed(skipped)}
    count = Counter(reason for _, reason in skipped).most_common(3)
    told = [f"{n} ({printable(example[reason])}): {printable(reason)}" for reason, n in count]
    return f". {'; '.join(told)}."


def _listed(
    tree: Tree, images: str, table: Table, rules: Rules
) -> tuple[list[_Picture], list[tuple[str, str]]]:
    """Return the pictures that have a class, and every other file of the folder with its reason."""
    start = f"{images}/" if images else ""
    annotations = TABLES if table.listed else ()

    files, skipped = [], []
    for file in tree.below(images):
        reason = readers.not_a_picture(file.removeprefix(start))
        if not reason:
            files.append(file)
        elif file not in table.files and not file.lower().endswith(annotations):
            skipped.append((file, reason))
    skipped += [(name, reason) for name, reason in tree.left_out if name.startswith(start)]

    found = []
    inner = [file.removeprefix(start) for file in files]
    for file, own, name in zip(files, _ids(inner, rules.ids), inner, strict=True):
        mark = table.found.get(file)
        label = _class_of(name, mark, rules.class_from)
        if file in table.refused:
            skipped.append((file, table.refused[file]))
        elif not label:
            skipped.append((file, NO_CLASS[rules.class_from]))
        else:
            found.append(_Picture(own, file, label, mark))
    return found, skipped + _without_picture(tree, table)


def _without_picture(tree: Tree, table: Table) -> list[tuple[str, str]]:
    """Return the names in boxes.csv that no file has; StoreError if that is all of them."""
    gone = [name for name in table.found if name not in tree]
    if gone and len(gone) == len(table.found):
        raise StoreError(
            f"{tree.path}: none of the {len(gone)} pictures of boxes.csv is there, such as "
            f"{printable(gone[0])}; its column image must hold paths relative to that place."
        )
    return [(name, "boxes.csv names it, but there is none") for name in gone]


def _measure(tree: Tree, picture: _Picture, row: Tensor | None, limit_gib: float) -> _Measured:
    """Return boxes and size of one picture; or, in words, why it cannot be used."""
    try:
        size, turn = readers.measure(tree, picture.file, row, limit_gib)
        boxes = np.zeros((0, 4), np.float32)
        if picture.mark is not None:
            boxes = fit(picture.mark.boxes, picture.mark.size, size, turn)
        return _Measured(boxes, size)
    except Exception as error:  # decoders fail in many ways; every one is a line in `skipped`
        return _Measured(reason=_why(error))


def _why(error: Exception) -> str:
    """Return in words why a picture cannot be read; a ValueError of ours says it."""
    if type(error) is ValueError:
        return str(error)
    if limited.out_of_memory(error):
        return f"takes more memory than limit_gib allows: {limited.MORE}"
    if isinstance(error, UnidentifiedImageError):  # its words hold an address in memory
        return "cannot be read (cannot identify a picture in it)"
    return f"cannot be read ({type(error).__name__}: {error})"


# Classes, ids


def _class_of(inner: str, mark: Annotation | None, class_from: str) -> str:
    """Return the class of the picture at `inner`, relative to the folder of pictures; "": none."""
    if class_from == "column":
        return mark.name if mark else ""
    if class_from == "none":
        return UNNAMED
    if class_from == "prefix":
        return class_text(PurePosixPath(inner).stem.rpartition("_")[0])
    return class_text(inner.partition("/")[0]) if "/" in inner else ""


def _ids(inner: list[str], ids: str) -> list[str]:
    """Return the ids of pictures: relative paths, or stems where no other picture has the same."""
    if ids == "path":
        return [printable(name) for name in inner]
    stems = [PurePosixPath(name).stem for name in inner]
    count = Counter(stems)
    named = zip(inner, stems, strict=True)
    return [printable(stem if count[stem] == 1 else name) for name, stem in named]


def _chosen(found: Iterable[str], rules: Rules, wanted: int | None, what: str) -> list[str]:
    """Return the classes to read, in order: the first `wanted` of those there, None for all."""
    known = {name: place for place, name in enumerate(rules.order)}
    there = sorted(set(found), key=lambda name: (known.get(name, len(known)), name))
    if rules.classes:
        there = [name for name in there if name in rules.classes]
    if not there or (wanted is not None and not 1 <= wanted <= len(there)):
        raise StoreError(
            f"data set {what}: classes = {wanted}, but {len(there)} are there; expected 1 to "
            f"{len(there)}, or None for all."
        )
    return there[:wanted]


def _titles(classes: list[str], titles: dict[str, str]) -> tuple[str, ...]:
    """Return what the classes are called; those of one title keep their own name beside it."""
    named = [titles.get(name, name) for name in classes]
    count = Counter(named)
    both = zip(named, classes, strict=True)
    return tuple(title if count[title] == 1 else f"{title} ({name})" for title, name in both)


def _attributes(pictures: list[_Picture]) -> dict[str, np.ndarray]:
    """Return the owner of each picture, "" for none, where boxes.csv knows of any."""
    owners = [printable(each.mark.owner) if each.mark else "" for each in pictures]
    return {"owner": np.array(owners)} if any(owners) else {}
