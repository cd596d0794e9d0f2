"""Data sets by manifest: what data_manifests/<name>.yaml says, where the data is, whether it is
whole.

`make data NAME=…` (data_manifests/fetch.py) downloads them; `data.read` reads them.
"""

import os
from pathlib import Path

from dejavu_utils import store


def names() -> list[str]:
    """Return the names of all manifests, sorted."""
    return sorted(path.stem for path in (store.root() / "data_manifests").glob("*.yaml"))


def read(name: str) -> dict:
    """Return what data_manifests/<name>.yaml says, with its `name`; ValueError lists the names
    there are.
    """
    if name not in names():
        raise ValueError(
            f"no data set is called {name!r}: expected one of {', '.join(names())} "
            "(a data set of your own needs a file in data_manifests/)."
        )
    import yaml

    return yaml.safe_load((store.root() / "data_manifests" / f"{name}.yaml").read_text()) | {
        "name": name
    }


def home(folder: str | Path | None = None) -> Path:
    """Return the folder of all data sets: `folder`, else $DEJAVU_DATA, else data/ in the
    repository.
    """
    return Path(folder or os.environ.get("DEJAVU_DATA") or store.root() / "data")


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
    """Raise ValueError if the archive at `path` (called `what` in the message) has not the
    manifest's checksum.
    """
    found = store.digest(path)
    if not entry.get("sha256"):
        print(
            f"{what or path}: not verified, the manifest has no checksum; sha256 {found}",
            flush=True,
        )
    elif found != entry["sha256"]:
        raise ValueError(
            f"{what or path} has the wrong checksum: sha256 {found} ({path.stat().st_size} bytes), "
            f"expected {entry['sha256']} ({entry.get('bytes')} bytes). Delete it and get it again. "
            + by_hand(entry, path.parent)
        )
