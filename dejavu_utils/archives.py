"""Folders, zip and tar files: read by name from many threads, and unpacked safely."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

BLOCK = 1 << 20
CAP = 400 << 30  # bytes that an archive may unpack to
DAMAGED = (ValueError, FileExistsError, NotADirectoryError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
           tarfile.TarError)


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


def _members(archive: Path) -> Iterator[tuple]:
    """Yield (name, open file) for each regular file of a zip or tar; ValueError for a link or another kind."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise ValueError(f"{info.filename} is a link or a device")
                if not info.is_dir():
                    with file.open(info) as member:
                        yield info.filename, member
        return
    with tarfile.open(archive) as file:
        for info in file:
            if not (info.isreg() or info.isdir()):
                raise ValueError(f"{info.name} is a link or a device")
            if info.isreg():
                yield info.name, file.extractfile(info)


def unpack(archive: Path, target: Path, cap: int = CAP) -> Path:
    """Return `target`, a new folder with the content of a zip or tar; a single folder at its top is left out.

    All or nothing. ValueError if a member leads outside, is a link or a device, comes twice, if the archive is damaged,
    or if it holds more than `cap` bytes.
    """
    if target.exists():
        return target
    temporary, left = target.with_name(f".{target.name}-{os.getpid()}"), cap
    try:
        temporary.mkdir(parents=True)
        for name, member in _members(archive):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
                raise ValueError(f"{name!r} leads outside")
            out = temporary / path
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("xb") as file:
                while block := member.read(BLOCK):
                    left -= len(block)
                    if left < 0:
                        raise ValueError(f"it holds more than {cap} bytes")
                    file.write(block)
        top = list(temporary.iterdir())
        os.replace(top[0] if len(top) == 1 and top[0].is_dir() else temporary, target)
    except DAMAGED as error:
        raise ValueError(f"{archive} was not unpacked: {error}. Nothing of it was kept; delete it and fetch it again."
                         ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
