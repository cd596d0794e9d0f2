"""Data sets by manifest: find, download, verify, unpack, look inside. `python -m dejavu_utils.fetch NAME`."""

from __future__ import annotations

import http.client
import lzma
import os
import re
import shutil
import stat
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from dejavu_utils import store

CAP = 400 << 30  # bytes that an archive may unpack to
DAMAGED = (ValueError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, FileExistsError,
           NotADirectoryError)


class Tree:
    """A folder or a zip file, read by relative name, from any number of threads."""

    def __init__(self, path: Path):
        self.path, self.zip, self.children = path, None, {}
        if not path.is_file():
            return
        try:
            self.zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} ({path.stat().st_size} bytes) is not a whole zip file ({error}): expected the "
                             "archive as published. Delete it and fetch it again (`make data NAME=…`).") from error
        for name in self.zip.namelist():
            while name:
                folder, _, leaf = name.rstrip("/").rpartition("/")
                self.children.setdefault(folder, set()).add(leaf)
                name = folder

    def names(self, folder: str = "") -> list[str]:
        """Return what `folder` holds, sorted; nothing if it is not there."""
        if self.zip:
            return sorted(self.children.get(folder, ()))
        return sorted(os.listdir(self.path / folder)) if (self.path / folder).is_dir() else []

    def find(self, candidates: Sequence[str]) -> str | None:
        """Return the first of these folders that has content, here or one level below (archives often have a top)."""
        tops = [""] + [f"{name}/" for name in self.names()]
        return next((top + name for top in tops for name in candidates if self.names(top + name)), None)

    def open(self, name: str):
        return self.zip.open(name) if self.zip else (self.path / name).open("rb")

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def lines(self, name: str) -> list[list[str]]:
        """Return the tab- or space-separated fields of each line of a text file; nothing if it is not there."""
        folder, _, leaf = name.rpartition("/")
        text = self.read(name).decode() if leaf in self.names(folder) else ""
        return [re.split(r"\t" if "\t" in line else r"\s+", line.strip()) for line in text.splitlines() if line.strip()]


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
    found = store.digest(path)
    if not entry.get("sha256"):
        print(f"{what or path}: not verified, the manifest has no checksum; sha256 {found}", flush=True)
    elif found != entry["sha256"]:
        raise ValueError(f"{what or path} has the wrong checksum: sha256 {found} ({path.stat().st_size} bytes), "
                         f"expected {entry['sha256']} ({entry.get('bytes')} bytes). Delete it and get it again. "
                         + by_hand(entry, path.parent))


def _download(entry: dict, target: Path) -> None:
    """Write what is at the manifest's address to `target`, once it is whole and has the right checksum."""
    from tqdm import tqdm
    print(f"{entry['name']}: {entry['url']} -> {target}\nlicence: {entry['licence']}", flush=True)
    with store.atomic(target) as temporary:
        try:
            with urllib.request.urlopen(entry["url"], timeout=60) as answer, temporary.open("wb") as file:
                expected = int(answer.headers.get("Content-Length") or 0)
                with tqdm.wrapattr(answer, "read", expected, desc=entry["name"]) as body:
                    shutil.copyfileobj(body, file, 1 << 20)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            raise ConnectionError(f"cannot download {entry['name']} from {entry['url']} ({error}). "
                                  + by_hand(entry | {"url": None}, target.parent)) from error
        if expected and temporary.stat().st_size != expected:
            raise ConnectionError(f"{entry['url']} broke off after {temporary.stat().st_size} of {expected} bytes: "
                                  "nothing was kept, run the command again.")
        verify(entry, temporary, entry["url"])


def _check(members: list[tuple[str, int, bool]], cap: int) -> None:
    """Raise ValueError unless every member (name, bytes, is a plain file or folder) may be unpacked."""
    for name, _, plain in members:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise ValueError(f"{name!r} leads outside")
        if not plain:
            raise ValueError(f"{name!r} is a link or a device")
    if sum(size for _, size, _ in members) > cap:
        raise ValueError(f"it holds more than {cap} bytes")
    if len({PurePosixPath(name) for name, _, _ in members}) < len(members):
        raise ValueError("a name comes twice in it")


def unpack(archive: Path, target: Path, cap: int = CAP) -> Path:
    """Return `target`, a new folder with the content of a zip or tar; a single folder at its top is left out.

    All or nothing. ValueError if a member leads outside, is a link or a device, comes twice, if the archive is damaged,
    or if it holds more than `cap` bytes (no member unpacks to more than the archive says).
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    zipped, kinds = zipfile.is_zipfile(archive), (0, stat.S_IFREG, stat.S_IFDIR)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        content = Path(temporary) / "content"
        content.mkdir()
        try:
            with zipfile.ZipFile(archive) if zipped else tarfile.open(archive) as file:
                if zipped:
                    found = [(m.filename, m.file_size, stat.S_IFMT(m.external_attr >> 16) in kinds)
                             for m in file.infolist()]
                else:
                    found = [(m.name, m.size, m.isreg() or m.isdir()) for m in file]
                _check(found, cap)
                safe = {"filter": "data"} if not zipped and hasattr(tarfile, "data_filter") else {}
                file.extractall(content, **safe)
        except DAMAGED as error:
            raise ValueError(f"{archive} was not unpacked: {error}. Nothing of it was kept; delete it and fetch it "
                             "again.") from error
        top = list(content.iterdir())
        os.replace(top[0] if len(top) == 1 and top[0].is_dir() else content, target)
    return target


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
            return unpack(archive, base / entry["unpack"])
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
