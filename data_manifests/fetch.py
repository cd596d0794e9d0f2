"""`make data NAME=…`: download a data set by its manifest, verify it, unpack it; all of it or
nothing.
"""

from __future__ import annotations

import http.client
import lzma
import os
import shutil
import stat
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dejavu_utils import store
from dejavu_utils.data import manifests

CAP = 400 << 30  # bytes that an archive may unpack to
DAMAGED = (
    ValueError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
    FileExistsError,
    NotADirectoryError,
)


def _download(entry: dict, target: Path) -> None:
    """Write what is at the manifest's address to `target`, once it is whole and has the right
    checksum.
    """
    from tqdm import tqdm

    print(f"{entry['name']}: {entry['url']} -> {target}\nlicence: {entry['licence']}", flush=True)
    with store.atomic(target) as temporary:
        try:
            with (
                urllib.request.urlopen(entry["url"], timeout=60) as answer,
                temporary.open("wb") as file,
            ):
                expected = int(answer.headers.get("Content-Length") or 0)
                with tqdm.wrapattr(answer, "read", expected, desc=entry["name"]) as body:
                    shutil.copyfileobj(body, file, 1 << 20)
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            ConnectionError,
            TimeoutError,
        ) as error:
            raise ConnectionError(
                f"cannot download {entry['name']} from {entry['url']} ({error}). "
                + manifests.by_hand(entry | {"url": None}, target.parent)
            ) from error
        if expected and temporary.stat().st_size != expected:
            raise ConnectionError(
                f"{entry['url']} broke off after {temporary.stat().st_size} of {expected} bytes: "
                "nothing was kept, run the command again."
            )
        manifests.verify(entry, temporary, entry["url"])


def _check(members: list[tuple[str, int, bool]], cap: int) -> None:
    """Raise ValueError unless every member (name, bytes, is a plain file or folder) may be
    unpacked.
    """
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
    """Return `target`, a new folder with the content of a zip or tar; a single folder at its top is
    left out.

    All or nothing. ValueError if a member leads outside, is a link or a device, comes twice, if the
    archive is damaged, or if it holds more than `cap` bytes (no member unpacks to more than the
    archive says).
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
                    found = [
                        (m.filename, m.file_size, stat.S_IFMT(m.external_attr >> 16) in kinds)
                        for m in file.infolist()
                    ]
                else:
                    found = [(m.name, m.size, m.isreg() or m.isdir()) for m in file]
                _check(found, cap)
                safe = {"filter": "data"} if not zipped and hasattr(tarfile, "data_filter") else {}
                file.extractall(content, **safe)
        except DAMAGED as error:
            raise ValueError(
                f"{archive} was not unpacked: {error}. Nothing of it was kept; delete it and "
                "fetch it "
                "again."
            ) from error
        top = list(content.iterdir())
        os.replace(top[0] if len(top) == 1 and top[0].is_dir() else content, target)
    return target


def fetch(name: str, folder: str | Path | None = None) -> Path:
    """Return where a data set is after downloading, verifying and unpacking what is not there yet.

    ConnectionError (no network) and FileNotFoundError (no address: registration, or made by hand)
    say what to do.
    """
    entry, base = manifests.read(name), manifests.home(folder)
    if entry.get("url"):
        archive = base / entry["file"]
        if archive.exists():
            manifests.verify(entry, archive)
        else:
            _download(entry, archive)
        if entry.get("unpack"):
            return unpack(archive, base / entry["unpack"])
    if entry["layout"] == "scenes":
        raise ValueError(
            'scenes needs no download: it is made from what is installed, `read("scenes")`.'
        )
    found = manifests.locate(entry, folder)
    if found.name == entry.get("file") and found.is_file():
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
