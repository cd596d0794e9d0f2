"""Data sets by manifest: find them, download them, verify them, unpack them. `python -m dejavu_utils.fetch NAME`."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from dejavu_utils import archives, store


def names() -> list[str]:
    """Return the names of all manifests, sorted."""
    return sorted(path.stem for path in (store.root() / "data_manifests").glob("*.yaml"))


def manifest(name: str) -> dict:
    """Return what data_manifests/<name>.yaml says, with its `name`; ValueError lists the names there are."""
    if name not in names():
        raise ValueError(f"no data set is called {name!r}: expected one of {', '.join(names())} "
                         "(a data set of your own needs a file in data_manifests/).")
    import yaml

    return yaml.safe_load((store.root() / "data_manifests" / f"{name}.yaml").read_text()) | {"name": name}


def home(folder: str | Path | None = None) -> Path:
    """Return the folder of all data sets: `folder`, else $DEJAVU_DATA, else data/ in the repository."""
    return Path(folder or os.environ.get("DEJAVU_DATA") or store.root() / "data")


def locate(entry: dict, folder: str | Path | None = None) -> Path:
    """Return where a data set is: the first of its `places` in `folder`, or `folder` itself if it was given."""
    base = home(folder)
    found = [base / place for place in entry["places"] if (base / place).exists()]
    if folder is not None and (base.is_file() or any((base / images).is_dir() for images in entry["images"])):
        found.append(base)
    if not found:
        raise FileNotFoundError(f"data set {entry['name']} is not in {base}: looked for {', '.join(entry['places'])}. "
                                + by_hand(entry, base))
    return found[0]


def by_hand(entry: dict, folder: Path) -> str:
    """Return what a person has to do to get a data set."""
    automatic = f"`make data NAME={entry['name']}` fetches it, or by hand: " if entry.get("url") else ""
    return (f"{automatic}{entry['how'].strip()} Put it into {folder} (or set DEJAVU_DATA to the folder that holds it). "
            f"Source: {entry['source']}. Licence: {entry['licence']}")


def verify(entry: dict, path: Path, what: str = "") -> None:
    """Raise ValueError if the archive at `path` (called `what` in the message) has not the manifest's checksum."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not entry.get("sha256"):
        print(f"{what or path}: not verified, the manifest has no checksum; sha256 {found}", flush=True)
    elif found != entry["sha256"]:
        raise ValueError(f"{what or path} has the wrong checksum: sha256 {found} ({path.stat().st_size} bytes), "
                         f"expected {entry['sha256']} ({entry.get('bytes')} bytes). Delete it and get it again. "
                         + by_hand(entry, path.parent))


def _download(entry: dict, target: Path) -> None:
    """Write what is at the manifest's address to `target`, once it is whole and has the right checksum."""
    print(f"{entry['name']}: {entry['url']} -> {target}\nlicence: {entry['licence']}", flush=True)
    with store.atomic(target) as temporary:
        try:
            with urllib.request.urlopen(entry["url"], timeout=60) as answer, temporary.open("wb") as file:
                expected = int(answer.headers.get("Content-Length") or 0)
                _copy(answer, file, expected)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            raise ConnectionError(f"cannot download {entry['name']} from {entry['url']} ({error}). "
                                  + by_hand(entry | {"url": None}, target.parent)) from error
        if expected and temporary.stat().st_size != expected:
            raise ConnectionError(f"{entry['url']} broke off after {temporary.stat().st_size} of {expected} bytes: "
                                  "nothing was kept, run the command again.")
        verify(entry, temporary, entry["url"])


def _copy(answer, file, expected: int) -> None:
    """Copy an answer to a file, with a line every five seconds."""
    shown = time.monotonic()
    while block := answer.read(1 << 20):
        file.write(block)
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(f"  {file.tell() >> 20} of {expected >> 20 or '?'} MB", flush=True)


def fetch(name: str, folder: str | Path | None = None) -> Path:
    """Return where a data set is after downloading, verifying and unpacking what is not there yet.

    ConnectionError (no network) and FileNotFoundError (no address: registration, or made by hand) say what to do.
    """
    entry, base = manifest(name), home(folder)
    if entry.get("url"):
        archive = base / entry["file"]
        if archive.exists():
            verify(entry, archive)
        else:
            _download(entry, archive)
        if entry.get("unpack"):
            return archives.unpack(archive, base / entry["unpack"])
    if entry["layout"] == "scenes":
        raise ValueError("scenes needs no download: it is made from what is installed, `read(\"scenes\")`.")
    found = locate(entry, folder)
    if found.name == entry.get("file") and found.is_file():
        verify(entry, found)
    return found


def main(arguments: list[str]) -> int:
    """Fetch the data sets named; return 0, or 1 after one line that says what is wrong."""
    try:
        for name in arguments:
            print(f"{name}: {fetch(name)}")
        if not arguments:
            print("usage: python -m dejavu_utils.fetch NAME")
            print(*(f"  {name}: {manifest(name)['title']}" for name in names()), sep="\n")
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
