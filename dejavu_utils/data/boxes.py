"""One layout: a folder or zip of pictures, and boxes.csv. `load` and `folder` return `Images`.

boxes.csv has one row a box: image (relative path), width, height (of the frame that the box is in),
x0, y0, x1, y1 (px, half-open), class, and perhaps owner and split. data_manifests/convert.py writes
it from public layouts. Every file is used, or listed in `Images.skipped` with its reason.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import pandas as pd
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from dejavu_utils.data import converted, manifests, readers
from dejavu_utils.data.images import Images, threads
from dejavu_utils.data.lazy import Lazy, Tree, printable

NUMBERS = ("width", "height", "x0", "y0", "x1", "y1")
COLUMNS = ("image", *NUMBERS, "class")
OPTIONAL = ("owner", "split")
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
UNNAMED = "picture"  # the class of all pictures where there are none
OWN = ("boxes.csv", "boxes.unused.csv")
TABLES = (".txt", ".xml", ".json", ".csv", ".yaml", ".yml")  # convert.py lists what it did not use


@dataclass(frozen=True)
class Annotation:
    """The boxes of one picture, (m, 4), in a frame of `size` (width, height); its class is that of
    the largest one.
    """

    boxes: np.ndarray
    size: tuple[float, float]
    name: str
    owner: str
    split: str


@dataclass(frozen=True)
class Table:
    """boxes.csv by picture: what it says, and why some of it cannot be used."""

    found: dict[str, Annotation] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    listed: bool = False  # whether convert.py's list of unused files came with it


@dataclass(frozen=True)
class Rules:
    """How a data set tells ids and classes, and which pictures are its own."""

    # folder: the first one, column: boxes.csv, prefix: <class>_<number>, none: all of one class
    class_from: str = "folder"
    ids: str = "path"  # path, or stem: the bare name where no other picture has it
    classes: tuple[str, ...] = ()  # only these; () all of them
    order: tuple[str, ...] = ()  # of the classes; () alphabetical
    titles: dict[str, str] = field(default_factory=dict)  # what a class is called in figures
    size: tuple[int, int] | None = (
        None  # width, height of all pictures, which are then held decoded
    )


# The table


def read_table(file: IO[bytes] | Path, unused: IO[bytes] | Path | None = None) -> Table:
    """Return boxes.csv, and of the list of unused annotations the pictures that they belong to.

    ValueError if columns are missing or unknown. A picture of which one row makes no sense is
    refused as a whole: its object may be anywhere.
    """
    frame = _read_csv(file)
    missing = [name for name in COLUMNS if name not in frame]
    unknown = [name for name in frame if name not in (*COLUMNS, *OPTIONAL)]
    if missing or unknown:
        raise ValueError(
            f"boxes.csv: columns missing: {', '.join(missing) or 'none'}; unknown: "
            f"{', '.join(map(repr, unknown)) or 'none'}; expected {','.join(COLUMNS)} and perhaps "
            f"{','.join(OPTIONAL)}."
        )

    numbers = frame[list(NUMBERS)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    reasons = _row_reasons(numbers)
    for name in OPTIONAL:
        if name not in frame:
            frame[name] = ""

    found, refused = {}, {}
    texts = frame[["class", *OPTIONAL]].to_numpy(object)
    for image, rows in frame.groupby("image", sort=False).indices.items():
        reason = next((reasons[row] for row in rows if reasons[row]), "")
        if not reason and not _alike(numbers[rows, :2], texts[rows, 1:]):
            reason = "its rows differ in width, height, owner or split"
        if reason:
            refused[image] = reason
        else:
            found[image] = _annotation(numbers[rows], texts[rows])

    if unused is not None:
        listed = _read_csv(unused)
        listed = listed[listed["image"] != ""]
        details = listed["reason"] + (": " + listed["detail"]).where(listed["detail"] != "", "")
        refused |= dict(zip(listed["image"], details, strict=True))
    return Table(found, refused, tuple(frame.columns), unused is not None)


def _read_csv(file: IO[bytes] | Path) -> pd.DataFrame:
    """Return a table of texts, empty where nothing is; names may hold any bytes."""
    return pd.read_csv(file, dtype=str, keep_default_na=False, encoding_errors="surrogateescape")


def _row_reasons(numbers: np.ndarray) -> np.ndarray:
    """Return why each row (width, height, x0, y0, x1, y1) cannot be used; empty if it can."""
    width, height, x0, y0, x1, y1 = numbers.T
    with np.errstate(invalid="ignore"):
        checks = (
            (~np.isfinite(numbers).all(1), "a number in boxes.csv is missing or not finite"),
            ((width <= 0) | (height <= 0), "its width or height in boxes.csv is not above 0"),
            ((x0 > x1) | (y0 > y1), "a box ends before it starts"),
            ((x0 >= width) | (y0 >= height) | (x1 < 0) | (y1 < 0), "a box outside its picture"),
        )
    reasons = np.full(len(numbers), "", object)
    for wrong, reason in reversed(checks):
        reasons[wrong] = reason
    return reasons


def _alike(sizes: np.ndarray, texts: np.ndarray) -> bool:
    """Return whether all rows of a picture have the same frame, owner and split."""
    return bool((sizes == sizes[0]).all() and (texts == texts[0]).all())


def _annotation(numbers: np.ndarray, texts: np.ndarray) -> Annotation:
    """Return the rows of one picture; of several classes the largest box's, of equals the first."""
    boxes = numbers[:, 2:]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    name, owner, split = texts[np.argmax(areas)]
    return Annotation(boxes, (numbers[0, 0], numbers[0, 1]), _class_text(name), owner, split)


# Frames


def fit(
    boxes: np.ndarray, annotated: tuple[float, float], size: tuple[int, int], turn: int = 1
) -> np.ndarray:
    """Return boxes (m, 4) in px of the stored picture, clamped to it: float32.

    A uniform scale from the annotated frame to the picture's is applied. ValueError for any other
    difference: nobody can tell in which frame the boxes are, and a crop might show the object.
    """
    width, height = size
    if turn not in (0, 1):
        if turn < 5 or _same_shape(annotated, size):
            raise ValueError(f"EXIF orientation {turn}: the boxes may be of the turned picture")
        width, height = height, width

    if not _same_shape(annotated, (width, height)):
        raise ValueError(
            f"annotated in another shape ({annotated[0]:g} x {annotated[1]:g} px, the picture has "
            f"{size[0]} x {size[1]}), so its boxes may be anywhere"
        )

    limits = np.array([width, height, width, height], np.float64)
    if annotated != (width, height):
        boxes = boxes * (limits / [*annotated, *annotated])
    boxes = boxes.clip(0, limits)
    if turn not in (0, 1):
        boxes = _turned_back(boxes, turn, size)
    return boxes.astype(np.float32)


def _same_shape(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Return whether one size is the other's times a number, but for a pixel of rounding."""
    difference = abs(one[0] * other[1] - one[1] * other[0])
    return difference <= max(sum(one), sum(other))


def _turned_back(boxes: np.ndarray, turn: int, size: tuple[int, int]) -> np.ndarray:
    """Return boxes of the picture as it is shown (EXIF 5 to 8) in px of the picture as stored."""
    width, height = size
    x0, y0, x1, y1 = boxes.T
    across = {
        5: (y0, x0, y1, x1),
        6: (y0, height - x1, y1, height - x0),
        7: (width - y1, height - x1, width - y0, height - x0),
        8: (width - y1, x0, width - y0, x1),
    }
    return np.stack(across[turn], axis=1)


# Pictures, classes, ids


def _class_text(name: str) -> str:
    """Return a class name as NFC: a Mac's folders are NFD, look the same and are the same."""
    return unicodedata.normalize("NFC", printable(name))


def _class_of(inner: str, mark: Annotation | None, class_from: str) -> str:
    """Return the class of the picture at `inner`, relative to the folder of pictures; "": none."""
    if class_from == "column":
        return mark.name if mark else ""
    if class_from == "none":
        return UNNAMED
    if class_from == "prefix":
        return _class_text(PurePosixPath(inner).stem.rpartition("_")[0])
    return _class_text(inner.partition("/")[0]) if "/" in inner else ""


def _no_class(class_from: str) -> str:
    """Return the reason for a picture without a class."""
    return {
        "column": "no class: boxes.csv has no row for it, or no class in it",
        "prefix": "no class: its name is not <class>_<number>",
        "folder": "no class: it is in no class folder",
    }[class_from]


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
        raise ValueError(
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


# The reader


@dataclass(frozen=True)
class _Picture:
    id: str
    file: str
    name: str  # of its class
    mark: Annotation | None


def read(
    tree: Tree, images: str, table: Table, rules: Rules, classes: int | None = None, what: str = ""
) -> Images:
    """Return the pictures in the folder `images` ("": everywhere) of `tree`, sorted by id.

    `classes`: the first so many; None all. Pictures of one size (`rules.size`) are held decoded,
    others are decoded when asked for. ValueError if nothing can be read; `what` names the data set.
    """
    pictures, skipped = _pictures(tree, images, table, rules)
    names = _chosen((each.name for each in pictures), rules, classes, what or str(tree.path))
    place = {name: i for i, name in enumerate(names)}
    pictures = [each for each in pictures if each.name in place]
    pictures.sort(key=lambda each: (each.id, each.file))

    width, height = rules.size or (0, 0)
    pixels = torch.empty(len(pictures) if rules.size else 0, 3, height, width, dtype=torch.uint8)
    done = threads(
        lambda i: _one(tree, pictures[i], pixels[i] if rules.size else None), range(len(pictures))
    )

    good = [i for i, one in enumerate(done) if not isinstance(one, str)]
    bad = [i for i, one in enumerate(done) if isinstance(one, str)]
    skipped += [(pictures[i].file, done[i]) for i in bad]
    if not good:
        raise ValueError(
            f"{tree.path}: none of {len(pictures)} pictures could be read. {(skipped or [''])[0]}"
        )
    kept = [pictures[i] for i in good]
    boxes, sizes, lengths = zip(*(done[i] for i in good), strict=True)

    if not rules.size:
        pixels = Lazy(tree, [each.file for each in kept], lengths)
    elif bad:
        pixels = pixels[good]
    return Images(
        ids=np.array([each.id for each in kept]),
        labels=np.array([place[each.name] for each in kept], np.int64),
        boxes=list(boxes),
        classes=_titles(names, rules.titles),
        sizes=np.array(sizes),
        pixels=pixels,
        attributes=_attributes(kept),
        skipped=sorted((printable(name), printable(reason)) for name, reason in skipped),
    )


def _pictures(
    tree: Tree, images: str, table: Table, rules: Rules
) -> tuple[list[_Picture], list[tuple[str, str]]]:
    """Return the pictures that have a class, and every other file of the folder with its reason."""
    start = f"{images}/" if images else ""
    files, skipped = [], []
    for file in tree.below(images):
        reason = readers.not_a_picture(file[len(start) :])
        known = TABLES if table.listed else OWN if table.columns else ()
        if not reason:
            files.append(file)
        elif not file.lower().endswith(known):
            skipped.append((file, reason))
    skipped += [(name, reason) for name, reason in tree.left_out if name.startswith(start)]

    found = []
    inner = [file[len(start) :] for file in files]
    for file, own, name in zip(files, _ids(inner, rules.ids), inner, strict=True):
        mark = table.found.get(file)
        label = _class_of(name, mark, rules.class_from)
        if file in table.refused:
            skipped.append((file, table.refused[file]))
        elif not label:
            skipped.append((file, _no_class(rules.class_from)))
        else:
            found.append(_Picture(own, file, label, mark))

    gone = [name for name in table.found if name not in tree]
    if gone and len(gone) == len(table.found):
        raise ValueError(
            f"{tree.path}: none of the {len(gone)} pictures of boxes.csv is there, such as "
            f"{printable(gone[0])}; its column image must hold paths relative to that place."
        )
    return found, skipped + [(name, "boxes.csv names it, but there is none") for name in gone]


def _one(tree: Tree, picture: _Picture, row: Tensor | None) -> tuple | str:
    """Return (boxes, size, bytes) of one picture; or, in words, why it cannot be used."""
    try:
        size, length, turn = readers.measure(tree, picture.file, row)
        if picture.mark is None:
            return np.zeros((0, 4), np.float32), size, length
        return fit(picture.mark.boxes, picture.mark.size, size, turn), size, length
    except UnidentifiedImageError:  # its words hold an address in memory
        return "cannot be read (cannot identify a picture in it)"
    except Exception as error:  # decoders fail in many ways; every one is a line in `skipped`
        plain = type(error) is ValueError
        return str(error) if plain else f"cannot be read ({type(error).__name__}: {error})"


def _attributes(pictures: list[_Picture]) -> dict[str, np.ndarray]:
    """Return the owner of each picture, "" for none, where boxes.csv knows of any."""
    owners = [printable(each.mark.owner) if each.mark else "" for each in pictures]
    return {"owner": np.array(owners)} if any(owners) else {}


# Data sets by manifest, and folders


def load(entry: dict, path: Path, classes: int | None = None) -> Images:
    """Return the data set at `path` (a folder or a zip), read as its manifest `entry` says.

    `classes`: the first so many (sorted; None all).
    """
    if path.is_file() and path.name == entry.get("file") and entry.get("sha256"):
        manifests.verify(entry, path)
    tree = Tree(path)
    images = tree.find(entry["images"])
    if images is None:
        raise FileNotFoundError(
            f"{path} is not data set {entry['name']}: expected a folder "
            f"{' or '.join(entry['images'])} with its pictures. See "
            f"data_manifests/{entry['name']}.yaml."
        )
    images = images or _single_top(tree)
    made = converted.boxes_csv(entry, tree)
    if made is not None:
        table = read_table(made, made.with_name("boxes.unused.csv"))
    else:
        table = _own_table(tree)
    if entry["layout"] == "boxes" and not table.columns:
        raise FileNotFoundError(
            f"{path} holds no boxes.csv. Write it with data_manifests/convert.py, or name its "
            f"layout in data_manifests/{entry['name']}.yaml (`convert: voc`)."
        )

    size = entry.get("image_size")
    listed = entry.get("classes")
    rules = Rules(
        class_from=entry.get("class_from", "folder"),
        ids=entry.get("ids", "path"),
        classes=tuple(map(_class_text, listed)) if isinstance(listed, list) else (),
        order=tuple(map(str, entry.get("names", ()))),
        titles=_words(tree, entry.get("words", "")),
        size=tuple(size) if size else None,
    )
    return read(tree, images, table, rules, classes, entry["name"])


def _words(tree: Tree, name: str) -> dict[str, str]:
    """Return the titles of classes from a table of the data set: class, then its names."""
    files = [file for file in tree.files if name and PurePosixPath(file).name == name]
    lines = tree.lines(files[0]) if files else []
    return {line[0]: line[1].split(",")[0] for line in lines if len(line) > 1}


def _own_table(tree: Tree) -> Table:
    """Return the boxes.csv at the top of a data set, if it has one; paths are relative to it."""
    place = next((name for name in ("boxes.csv", *_top_tables(tree)) if name in tree), None)
    if place is None:
        return Table()
    unused = place.removesuffix("boxes.csv") + "boxes.unused.csv"
    with tree.open(place) as file:
        if unused not in tree:
            table = read_table(file)
        else:
            with tree.open(unused) as listed:
                table = read_table(file, listed)

    start = place.removesuffix("boxes.csv")
    found = {_placed(tree, start, name): mark for name, mark in table.found.items()}
    refused = {_placed(tree, start, name): reason for name, reason in table.refused.items()}
    return Table(found, refused, table.columns, table.listed)


def _top_tables(tree: Tree) -> list[str]:
    """Return the tables one folder below the top, where archives often begin."""
    return [name for name in tree.files if name.count("/") == 1 and name.endswith("/boxes.csv")]


def _placed(tree: Tree, start: str, name: str) -> str:
    """Return the name of a picture in `tree` that boxes.csv in the folder `start` calls `name`."""
    return f"{start}{name}" if f"{start}{name}" in tree else name


def folder(path: Path, what: str = "IMAGES", labels: bool = True) -> Images:
    """Return the pictures of a folder or zip with a folder for each class, or with a boxes.csv.

    Without `labels` folders mean nothing, and all pictures are of the one class UNNAMED.

    Where boxes.csv has classes, they count; else the class is the folder. ids are relative paths.
    ValueError, with what to do, if the pictures are in no class folders; `what` names the set.
    """
    tree = Tree(path)
    table = _own_table(tree)
    if not labels:
        return read(tree, "", table, Rules(class_from="none"), what=what)
    named = any(mark.name for mark in table.found.values())
    top = _single_top(tree)
    if not named:
        _check_folders(tree, top, what)
    rules = Rules(class_from="column" if named else "folder")
    return read(tree, top, table, rules, what=what)


def _single_top(tree: Tree) -> str:
    """Return the folder that holds all of a zip, as archives often have one; "" if none does."""
    tops = {file.partition("/")[0] for file in tree.files if not readers.not_a_picture(file)}
    flat = any("/" not in file for file in tree.files)
    return tops.pop() if tree.zip and len(tops) == 1 and not flat else ""


def _check_folders(tree: Tree, top: str, what: str) -> None:
    """Raise ValueError unless the pictures are in class folders, at least two of them."""
    start = f"{top}/" if top else ""
    inner = [file[len(start) :] for file in tree.below(top)]
    inner = [file for file in inner if not readers.not_a_picture(file)]
    flat = [file for file in inner if "/" not in file]
    depth: dict[str, set[int]] = {}
    for file in inner:
        if "/" in file:
            depth.setdefault(file.partition("/")[0], set()).add(file.count("/"))

    tables = [name for name in tree.files if name.endswith(("val_annotations.txt", "_boxes.txt"))]
    command = (
        f"python data_manifests/convert.py tiny_imagenet {tree.path} --out {tree.path}/boxes.csv"
    )
    splits = [name for name in depth if name.lower() in SPLITS]
    if splits and (set(depth) <= set(splits) or all(min(depth[name]) > 1 for name in splits)):
        raise ValueError(
            f"{what}: {tree.path} holds {', '.join(sorted(splits))}, which are splits and no "
            f"classes. Pass one of them, such as {tree.path}/{sorted(splits)[0]}."
        )
    if len(depth) >= 2:
        return
    if tables:
        advice = f"{printable(tables[0])} has their classes; write boxes.csv: `{command}`."
    elif flat:
        advice = (
            "Move them into a folder for each class, or write a boxes.csv with their classes "
            "(data_manifests/README.md). An audit does without classes by audit.labels=False."
        )
    elif depth:
        advice = f"Pass its folder {next(iter(depth))} if the class folders are in there."
    else:
        advice = "No picture was found."
    raise ValueError(
        f"{what}: the pictures in {tree.path} are in {len(depth)} folders, and {len(flat)} lie "
        f"directly in it; expected at least two folders, one for each class. {advice}"
    )


def unused(images: Images) -> str:
    """Return in one line how many files were not used, by reason and suffix; empty if all were."""
    if not images.skipped:
        return ""
    count = Counter()
    for name, reason in images.skipped:
        suffix = PurePosixPath(name).suffix.lower() or "no suffix"
        count[f"{suffix}: {_short(reason)}"] += 1
    listed = "; ".join(f"{number} {reason}" for reason, number in count.most_common())
    return f"{len(images.skipped)} files not used ({listed})"


def _short(reason: str) -> str:
    """Return a reason without its detail, which is of one picture only."""
    return re.split(r" \(|: ", reason, maxsplit=1)[0]
