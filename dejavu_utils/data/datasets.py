"""Data sets as `Images`: by the name of their manifest (`read`), or a folder or zip of one's own
(`folder`).
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections import Counter
from pathlib import Path, PurePosixPath

from dejavu_utils.data import converted, manifests, pictures, readers, scenes
from dejavu_utils.data.boxes import Table, class_text, read_table
from dejavu_utils.data.images import Images
from dejavu_utils.data.listing import in_child
from dejavu_utils.data.tree import SUFFIXES, Tree, hidden, printable
from dejavu_utils.limited import LIMIT_GIB
from dejavu_utils.store import StoreError

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


def read(
    name: str,
    folder: str | Path | None = None,
    limit_gib: float = LIMIT_GIB,
    **options: int | float | str | None,
) -> Images:
    """Return a data set by the name of its manifest, as `Images`.

    "scenes" is made from `options` (see `scenes.make`); every other is looked for in `folder`
    ($DEJAVU_DATA, else data/), which may also be the data set itself, and read with the options of
    `load`, by at most `limit_gib` GiB of memory. FileNotFoundError says how to get a data set that
    is missing.
    """
    entry = manifests.read(name)
    if entry["layout"] == "scenes":
        return scenes.make(**options)
    return load(entry, manifests.locate(entry, folder), limit_gib=limit_gib, **options)


@in_child
def load(
    entry: dict, path: Path, classes: int | None = None, limit_gib: float = LIMIT_GIB
) -> Images:
    """Return the data set at `path` (a folder or a zip), read as its manifest `entry` says.

    `classes`: the first so many (sorted; None all). Reading may take `limit_gib` GiB of memory.
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

    rules = _rules(entry, tree)
    return pictures.read(tree, images, table, rules, classes, entry["name"], limit_gib)


def _rules(entry: dict, tree: Tree) -> pictures.Rules:
    """Return what a manifest says of ids, classes and sizes."""
    size = entry.get("image_size")
    listed = entry.get("classes")
    return pictures.Rules(
        class_from=entry.get("class_from", "folder"),
        ids=entry.get("ids", "path"),
        classes=tuple(map(class_text, listed)) if isinstance(listed, list) else (),
        order=tuple(map(str, entry.get("names", ()))),
        titles=_words(tree, entry.get("words", "")),
        size=tuple(size) if size else None,
    )


def _words(tree: Tree, name: str) -> dict[str, str]:
    """Return the titles of classes from a table of the data set: class, then its names."""
    files = [file for file in tree.files if name and PurePosixPath(file).name == name]
    lines = tree.lines(files[0]) if files else []
    return {line[0]: line[1].split(",")[0] for line in lines if len(line) > 1}


@in_child
def folder(
    path: str | Path, what: str = "IMAGES", labels: bool = True, limit_gib: float = LIMIT_GIB
) -> Images:
    """Return the pictures of a folder or zip with a folder for each class, or with a boxes.csv.

    Without `labels` folders mean nothing, and all pictures are of one class, pictures.UNNAMED.
    Reading may take `limit_gib` GiB of memory.

    Where boxes.csv has classes, they count; else the class is the folder. ids are relative paths.
    StoreError, with what to do, if the pictures are in no class folders; `what` names the set.
    """
    tree = Tree(path)
    table = _own_table(tree)
    _check_one_split(table, what)
    if not labels:
        rules = pictures.Rules(class_from="none")
        return pictures.read(tree, "", table, rules, what=what, limit_gib=limit_gib)
    every = {file for file in tree.files if file.lower().endswith(SUFFIXES)}
    if table.refused and every <= table.refused.keys():
        reasons = pictures.most([*table.refused.items()])
        raise StoreError(f"{what}: no row of boxes.csv can be used{reasons}")
    named = any(mark.name for mark in table.found.values())
    top = _single_top(tree)
    if not named:
        _check_folders(tree, top, what)
    rules = pictures.Rules(class_from="column" if named else "folder")
    return pictures.read(tree, top, table, rules, what=what, limit_gib=limit_gib)


def _own_table(tree: Tree) -> Table:
    """Return the boxes.csv at the top of a data set, if it has one; paths are relative to it."""
    place = _table_place(tree)
    if not place:
        return Table()
    start = place[: -len("boxes.csv")]
    unused = f"{start}boxes.unused.csv"
    try:
        with tree.open(place) as file, contextlib.ExitStack() as more:
            listed = more.enter_context(tree.open(unused)) if unused in tree else None
            table = read_table(file, listed)
    except (StoreError, OSError, MemoryError):
        raise
    except Exception as error:  # a damaged member of a zip, or no table
        raise StoreError(f"{tree.path}: {place} cannot be read ({error}).") from error

    spelt = _spellings(tree)
    place_of = {name: _placed(tree, spelt, start, name) for name in [*table.found, *table.refused]}
    count = Counter(place_of.values())
    twice = {name: "boxes.csv spells its name in two ways" for name in count if count[name] > 1}
    found = {place_of[name]: mark for name, mark in table.found.items()}
    found = {name: mark for name, mark in found.items() if name not in twice}
    refused = {place_of[name]: reason for name, reason in table.refused.items()} | twice
    files = (place, unused) if table.listed else (place,)
    return Table(found, refused, table.columns, files, table.listed)


def _table_place(tree: Tree) -> str:
    """Return the name of boxes.csv at the top, or one folder below it, where archives often begin;
    "" if there is none. StoreError if there are several.
    """
    named = [name for name in tree.files if name.rpartition("/")[2].lower() == "boxes.csv"]
    tables = [name for name in named if name.count("/") <= 1 and not hidden(name)]
    places = [name for name in tables if "/" not in name] or tables
    if len(places) > 1:
        raise StoreError(
            f"{tree.path}: {' and '.join(map(printable, places))} are {len(places)} tables of "
            "boxes; expected one. Pass the folder of one of them, or move the others away."
        )
    return places[0] if places else ""


def _spellings(tree: Tree) -> dict[str, str]:
    """Return {name in NFC: name} of the files whose names have one spelling only in `tree`."""
    names = [name for name in tree.files if not name.isascii()]
    composed = [unicodedata.normalize("NFC", name) for name in names]
    count = Counter(composed)
    both = zip(composed, names, strict=True)
    return {one: name for one, name in both if count[one] == 1}


def _placed(tree: Tree, spelt: dict[str, str], start: str, name: str) -> str:
    """Return the name of a picture in `tree` that boxes.csv in the folder `start` calls `name`.

    A Mac spells é as two characters: a name that no file has is looked up in NFC, in `spelt`.
    """
    for full in (f"{start}{name}", name):
        if full in tree:
            return full
        composed = unicodedata.normalize("NFC", full)
        if composed in spelt:
            return spelt[composed]
    return name


def _single_top(tree: Tree) -> str:
    """Return the folder that holds all of a zip, as archives often have one; "" if none does."""
    tops = {file.partition("/")[0] for file in tree.files if not readers.not_a_picture(file)}
    flat = any("/" not in file for file in tree.files)
    return tops.pop() if tree.zip and len(tops) == 1 and not flat else ""


def _check_one_split(table: Table, what: str) -> None:
    """Raise StoreError if boxes.csv names several splits: a set of an audit is one of them."""
    count = Counter(mark.split for mark in table.found.values() if mark.split)
    if len(count) > 1:
        told = ", ".join(f"{printable(name)} ({n})" for name, n in sorted(count.items()))
        raise StoreError(
            f"{what}: boxes.csv names the splits {told}; expected pictures of one. Move those of "
            "one into a folder with a boxes.csv of its own, and pass that."
        )


def _check_folders(tree: Tree, top: str, what: str) -> None:
    """Raise StoreError unless the pictures are in class folders, at least two of them."""
    start = f"{top}/" if top else ""
    inner = [file.removeprefix(start) for file in tree.below(top)]
    inner = [file for file in inner if not readers.not_a_picture(file)]
    depth: dict[str, set[int]] = {}  # how deep the pictures of each folder are
    for file in inner:
        if "/" in file:
            depth.setdefault(file.partition("/")[0], set()).add(file.count("/"))

    splits = sorted(name for name in depth if name.lower() in SPLITS)
    nested = all(min(depth[name]) > 1 for name in splits)
    if splits and (set(depth) == set(splits) or nested):
        raise StoreError(
            f"{what}: {tree.path} holds {', '.join(splits)}, which are splits and no classes. "
            f"Pass one of them, such as {tree.path}/{splits[0]}."
        )
    if len(depth) < 2:
        flat = sum("/" not in file for file in inner)
        raise StoreError(
            f"{what}: the pictures in {tree.path} are in {len(depth)} folders, and {flat} lie "
            "directly in it; expected at least two folders, one for each class. "
            f"{_advice(tree, flat, next(iter(depth), ''))}"
        )


def _advice(tree: Tree, flat: int, folder: str) -> str:
    """Return what to do with pictures of which `flat` lie in no folder, the others in `folder`."""
    tables = [name for name in tree.files if name.endswith(("val_annotations.txt", "_boxes.txt"))]
    if tables:
        command = f"python data_manifests/convert.py tiny_imagenet {tree.path}"
        return (
            f"{printable(tables[0])} has their classes; write boxes.csv: "
            f"`{command} --out {tree.path}/boxes.csv`."
        )
    if flat:
        return (
            "Move them into a folder for each class, or write a boxes.csv with their classes "
            "(data_manifests/README.md). An audit does without classes by audit.labels=False."
        )
    if folder:
        return f"Pass its folder {folder} if the class folders are in there."
    if tree.left_out:
        name, reason = tree.left_out[0]
        return f"{len(tree.left_out)} files were left out, such as {printable(name)}: {reason}."
    return "No picture was found."


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
