"""`make data NAME=…`: download a data set by its manifest, verify it, unpack it; all of it or
nothing. Then read its annotations into boxes.csv.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import pooch
import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dejavu_utils import limited
from dejavu_utils.data import converted, manifests, tree
from dejavu_utils.limited import GIB, LIMIT_GIB
from dejavu_utils.store import StoreError

pooch.get_logger().setLevel("WARNING")
CAP = 20 * GIB  # bytes that an archive may unpack to
TIMEOUT = 60  # s without an answer


def _download(entry: dict, target: Path) -> None:
    """Write what is at the manifest's address to `target`, once it is whole and has the right
    checksum.
    """
    print(f"{entry['name']}: {entry['url']} -> {target}\nlicence: {entry['licence']}", flush=True)
    checksum = f"sha256:{entry['sha256']}" if entry["sha256"] else None
    try:
        pooch.retrieve(
            entry["url"],
            known_hash=checksum,
            fname=target.name,
            path=target.parent,
            downloader=pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT),
        )
    except requests.RequestException as error:
        raise ConnectionError(
            f"cannot download {entry['name']} from {entry['url']} ({error}); nothing was kept. "
            + manifests.by_hand(entry | {"url": None}, target.parent)
        ) from error
    except ValueError as error:  # pooch removed the file
        raise ValueError(
            f"{entry['url']} has the wrong checksum: {error} "
            + manifests.by_hand(entry | {"url": None}, target.parent)
        ) from error
    if checksum is None:
        manifests.verify(entry, target, entry["url"])  # says that it was not verified


def unpack(archive: Path, target: Path, cap: int = CAP, limit_gib: float = LIMIT_GIB) -> Path:
    """Return `target`, a new folder with the content of a zip or tar; a single folder at its top is
    left out.

    All or nothing. It is unpacked in a child process that may take `limit_gib` GiB of memory.
    StoreError if a member leads outside, is a link or a device, comes twice, if the archive is
    damaged, or if it holds more than `cap` bytes or than there is space for (no member unpacks to
    more than the archive says).
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        content = Path(temporary) / "content"
        content.mkdir()
        limited.run(lambda: _extract(archive, content, cap), archive, limit_gib, limit_gib)

        top = list(content.iterdir())
        single = len(top) == 1 and top[0].is_dir()
        os.replace(top[0] if single else content, target)
    return target


def _extract(archive: Path, folder: Path, cap: int) -> None:
    """Unpack an archive into `folder`, after a look at what it says of its members."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                total = _checked((_zipped(item) for item in file.infolist()), cap)
            unpacked = pooch.Unzip(extract_dir=str(folder))
        else:
            with tarfile.open(archive) as file:
                total = _checked((_tarred(item) for item in file), cap)
            unpacked = pooch.Untar(extract_dir=str(folder))

        free = shutil.disk_usage(folder).free
        if total > free:
            raise ValueError(f"it holds {total} bytes, and there are {free} left")
        limited.allow(limited.PATIENCE + total / tree.BYTES_A_SECOND)
        unpacked(str(archive), "download", None)
    except MemoryError:
        raise
    except Exception as error:  # each library stumbles over damage in its own ways
        raise StoreError(
            f"{archive} was not unpacked: {' '.join(str(error).split())}. Nothing of it was kept; "
            "delete it and fetch it again."
        ) from error


Member = tuple[str, int, bool]  # its name, its bytes, whether it is a plain file or folder


def _zipped(item: zipfile.ZipInfo) -> Member:
    plain = stat.S_IFMT(item.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
    return item.filename, item.file_size, plain


def _tarred(item: tarfile.TarInfo) -> Member:
    return item.name, item.size, item.isreg() or item.isdir()


def _checked(members: Iterable[Member], cap: int) -> int:
    """Return how many bytes all members have; ValueError unless each of them may be unpacked."""
    total, seen = 0, set()
    for name, size, plain in members:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise ValueError(f"{name!r} leads outside")
        if not plain or size < 0:
            raise ValueError(f"{name!r} is a link or a device")
        if path in seen:
            raise ValueError(f"{name!r} comes twice in it")
        seen.add(path)
        total += size
        if total > cap:
            raise ValueError(f"it holds more than {cap} bytes")
        limited.allow(limited.PATIENCE + size / tree.BYTES_A_SECOND)  # a tar is read to its end
    return total


def fetch(name: str, folder: str | Path | None = None) -> Path:
    """Return where a data set is after downloading, verifying and unpacking what is not there yet.

    Its annotations are read into boxes.csv, too. ConnectionError (no network) and FileNotFoundError
    (no address: registration, or made by hand) say what to do.
    """
    entry = manifests.read(name)
    if entry["layout"] == "scenes":
        raise ValueError(
            'scenes needs no download: it is made from what is installed, `read("scenes")`.'
        )
    found = _found(entry, folder)
    converted.boxes_csv(entry, tree.Tree(found))
    return found


def _found(entry: dict, folder: str | Path | None) -> Path:
    """Return the data set's folder or archive, downloaded and unpacked if it has an address."""
    base = manifests.home(folder)
    if entry["url"]:
        archive = base / entry["file"]
        if archive.exists():
            manifests.verify(entry, archive)
        else:
            _download(entry, archive)
        if entry.get("unpack"):
            return unpack(archive, base / entry["unpack"])

    found = manifests.locate(entry, folder)
    if found.name == entry["file"] and found.is_file():
        manifests.verify(entry, found)
    return found


def main(arguments: list[str]) -> int:
    """Fetch the data sets named; return 0, or 1 after one line that says what is wrong."""
    try:
        for name in arguments:
            print(f"{name}: {fetch(name)}")
        if not arguments:
            print("usage: make data NAME=…, one of:")
            print(
                *(f"  {name}: {manifests.read(name)['title']}" for name in manifests.names()),
                sep="\n",
            )
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
