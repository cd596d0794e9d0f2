"""Data sets by manifest: what data_manifests/<name>.yaml says, where the data is, whether it is
whole.

`make data NAME=…` (data_manifests/fetch.py) downloads them; `data.read` reads them.
"""

import os
from pathlib import Path

from dejavu_utils import store
from dejavu_utils.store import StoreError

LAYOUTS = ("scenes", "folder", "boxes")
CLASS_FROM = ("folder", "column", "prefix")
IDS = ("path", "stem")
CONVERT = ("voc", "imagenet", "yolo", "coco", "tiny_imagenet")
REQUIRED = ("title", "layout", "places", "min_side")
OPTIONAL = (
    *(
        "source",
        "how",
        "licence",
        "url",
        "file",
        "unpack",
        "sha256",
        "bytes",
        "verified",
        "images",
        "annotations",
        "convert",
    ),
    *("class_from", "ids", "classes", "names", "words", "image_size", "split", "notes"),
)
TEXTS = ("title", "source", "how", "licence", "url", "file", "unpack", "sha256", "words")
DEFAULTS = {
    "source": "your own",
    "how": "",
    "licence": "your own",
    "url": None,
    "file": "",
    "sha256": "",
    "images": [],
    "split": None,
}


def names() -> list[str]:
    """Return the names of all manifests, sorted."""
    return sorted(path.stem for path in (store.root() / "data_manifests").glob("*.yaml"))


def read(name: str) -> dict:
    """Return what data_manifests/<name>.yaml says, with its `name`; StoreError lists the names
    there are.
    """
    if name not in names():
        raise StoreError(
            f"no data set is called {name!r}: expected one of {', '.join(names())} "
            "(a data set of your own needs a file in data_manifests/)."
        )
    import yaml

    path = store.root() / "data_manifests" / f"{name}.yaml"
    try:
        entry = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:  # of odd values
        reason = " ".join(str(error).split())
        raise StoreError(f"data_manifests/{path.name} is no YAML file: {reason}") from error

    wrong = problems(entry)
    if wrong:
        raise StoreError(
            f"data_manifests/{path.name}: {'; '.join(wrong)}. data_manifests/README.md has a "
            "template."
        )
    empty = {key for key, value in entry.items() if value is None and key in DEFAULTS}
    return DEFAULTS | {key: entry[key] for key in entry if key not in empty} | {"name": name}


def problems(entry: object) -> list[str]:
    """Return what is wrong with a manifest, in words; nothing if it can be used."""
    if not isinstance(entry, dict):
        found = "nothing" if entry is None else type(entry).__name__
        return [f"found {found}, expected a mapping of names to values"]
    wrong = []
    missing = [name for name in REQUIRED if name not in entry]
    unknown = [str(name) for name in entry if name not in (*REQUIRED, *OPTIONAL)]
    if missing:
        wrong.append(f"{', '.join(missing)} missing")
    if unknown:
        wrong.append(f"{', '.join(unknown)} unknown (known: {', '.join((*REQUIRED, *OPTIONAL))})")

    for name, allowed in (
        ("layout", LAYOUTS),
        ("class_from", CLASS_FROM),
        ("ids", IDS),
        ("convert", CONVERT),
    ):
        if name in entry and entry[name] not in allowed:
            wrong.append(f"{name} is {entry[name]!r}, expected one of {', '.join(allowed)}")

    for name in TEXTS:
        value = entry.get(name)
        if value is not None and not isinstance(value, str):
            wrong.append(f"{name} is {value!r}, expected a text")

    for name in ("places", "images", "annotations"):
        value = entry.get(name, [])
        if not _texts(value):
            wrong.append(f"{name} is {value!r}, expected a list of names")

    if entry.get("layout") in ("folder", "boxes"):
        for name in ("places", "images"):
            if not entry.get(name):
                wrong.append(f"{name} is empty, expected a list such as [my_pictures]")

    if "min_side" in entry and not _whole(entry["min_side"]):
        wrong.append(f"min_side is {entry['min_side']!r}, expected a number of px")

    classes = entry.get("classes")
    if classes is not None and not _whole(classes) and not _texts(classes):
        wrong.append(f"classes is {classes!r}, expected a number or a list of names")
    if not _texts(entry.get("names", [])):
        wrong.append(f"names is {entry['names']!r}, expected a list of names of classes")

    size = entry.get("image_size")
    if size is not None and not (
        isinstance(size, list) and len(size) == 2 and all(map(_whole, size))
    ):
        wrong.append(f"image_size is {size!r}, expected [width, height] in px, or null")

    split = entry.get("split")
    inner = split.get("sizes") if isinstance(split, dict) else None
    if split is not None and not isinstance(inner, dict):
        wrong.append(f"split is {split!r}, expected rule, seed and sizes, or null")
    return wrong


def _whole(value: object) -> bool:
    return type(value) is int and value > 0


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def home(folder: str | Path | None = None) -> Path:
    """Return the folder of all data sets: `folder`, else $DEJAVU_DATA, else data/ in the
    repository.
    """
    return Path(folder or os.environ.get("DEJAVU_DATA") or store.home() / "data")


def locate(entry: dict, folder: str | Path | None = None) -> Path:
    """Return where a data set is: the first of its `places` in `folder`, or `folder` itself if it
    was given.
    """
    base = home(folder)
    found = [base / place for place in entry["places"] if (base / place).exists()]
    if folder is not None and (
        base.is_file() or any((base / images).is_dir() for images in entry["images"])
    ):
        found.append(base)
    if not found:
        raise FileNotFoundError(
            f"data set {entry['name']} is not in {base}: looked for {', '.join(entry['places'])}. "
            + by_hand(entry, base)
        )
    return found[0]


def by_hand(entry: dict, folder: Path) -> str:
    """Return what a person has to do to get a data set."""
    automatic = (
        f"`make data NAME={entry['name']}` fetches it, or by hand: " if entry.get("url") else ""
    )
    return (
        f"{automatic}{entry['how'].strip()} Put it into {folder} (or set DEJAVU_DATA to the "
        "folder that holds it). "
        f"Source: {entry['source']}. Licence: {entry['licence']}"
    )


def verify(entry: dict, path: Path, what: str = "") -> None:
    """Raise StoreError if the archive at `path` (called `what` in the message) has not the
    manifest's checksum.
    """
    found = store.digest(path)
    if not entry.get("sha256"):
        print(
            f"{what or path}: not verified, the manifest has no checksum; sha256 {found}",
            flush=True,
        )
    elif found != entry["sha256"]:
        raise StoreError(
            f"{what or path} has the wrong checksum: sha256 {found} ({path.stat().st_size} bytes), "
            f"expected {entry['sha256']} ({entry.get('bytes')} bytes). Delete it and get it again. "
            + by_hand(entry, path.parent)
        )
