"""The files of a folder or a zip, read by relative name."""

import bisect
import functools
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from dejavu_utils import limited, store
from dejavu_utils.store import StoreError

# What a picture's name ends with. Whether this Python can read it is another question.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"),
)


# What a limited process may take its time for: far less than any machine does.
FILES_A_SECOND = 1_000
BYTES_A_SECOND = 250_000


def printable(name: str) -> str:
    """Return a file name as text that every table and page can hold, whatever bytes it is."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class Tree:
    """A folder or a zip file, read by relative name, from any number of threads.

    `files` are the names of the plain files, sorted; `left_out` (name, reason) of all else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.zip = self._archive() if path.is_file() else None

    @property
    def files(self) -> list[str]:
        return self._listed[0]

    @property
    def left_out(self) -> list[tuple[str, str]]:
        return self._listed[1]

    @functools.cached_property
    def _listed(self) -> tuple[list[str], list[tuple[str, str]]]:
        """Files and what is left out, looked up when first needed: a worker reads by name alone."""
        left_out: list[tuple[str, str]] = []
        found = self._members(left_out) if self.zip else self._walk(left_out)
        files = sorted(found)
        limited.allow(limited.PATIENCE + len(files) / FILES_A_SECOND)
        return files, left_out

    def _archive(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a damaged directory makes it stumble in many ways
            raise StoreError(
                f"{self.path} ({self.path.stat().st_size} bytes) is not a whole zip file "
                f"({error}): expected the archive as published. Delete it and fetch it again "
                "(`make data NAME=…`)."
            ) from error

    def _members(self, left_out: list[tuple[str, str]]) -> Iterator[str]:
        """Yield the files of a zip. A name that comes twice could be either, so it is none."""
        names = [info.filename for info in self.zip.infolist()]
        names = [name for name in names if name and not name.endswith("/")]
        for name, count in Counter(names).items():
            if count == 1:
                yield name
            else:
                left_out.append((name, "the zip holds this name more than once"))

    def _walk(self, left_out: list[tuple[str, str]]) -> Iterator[str]:
        """Yield the plain files of a folder. A link to what lies in it is not read twice."""
        root = os.path.realpath(self.path)
        seen = {root}

        def note(error: OSError) -> None:
            name = os.path.relpath(error.filename, self.path)
            left_out.append((name, f"folder cannot be read ({error.strerror})"))

        for folder, inner, names in os.walk(self.path, onerror=note, followlinks=True):
            place = os.path.relpath(folder, self.path)
            limited.allow(limited.PATIENCE)

            for name in sorted(inner):
                path = os.path.join(folder, name)
                target = os.path.realpath(path)
                if os.path.islink(path) and any(_overlap(target, each) for each in seen):
                    relative = os.path.normpath(f"{place}/{name}")
                    left_out.append((relative, "link to a folder that is read anyway"))
                    inner.remove(name)
                elif os.path.islink(path):
                    seen.add(target)

            for name in names:
                path = os.path.join(folder, name)
                relative = os.path.normpath(f"{place}/{name}")
                if not os.path.isfile(path):
                    left_out.append((relative, "no plain file"))
                elif os.path.islink(path) and _points_inside(path, root):
                    left_out.append((relative, "link to a file that is read anyway"))
                else:
                    yield relative

    def below(self, folder: str) -> list[str]:
        """Return the files in `folder` and in the folders inside it; "" is all of them."""
        if not folder:
            return self.files
        start = bisect.bisect_left(self.files, f"{folder}/")
        end = bisect.bisect_left(self.files, f"{folder}0")  # "0" comes right after "/"
        return self.files[start:end]

    def find(self, candidates: Sequence[str]) -> str | None:
        """Return the first of these folders that has content, here or one level below (archives
        often have a top).
        """
        tops = ["", *sorted({name[: name.index("/") + 1] for name in self.files if "/" in name})]
        for top in tops:
            for name in candidates:
                folder = f"{top}{'' if name == '.' else name}".rstrip("/")
                if self.below(folder):
                    return folder
        return None

    @functools.cached_property
    def bytes(self) -> int:
        """How large all files are together."""
        return sum(self.size(name) for name in self.files)

    def state(self, name: str) -> list[int] | None:
        """Return what changes whenever a file does, see `store.state`: of a member that of the
        zip.
        """
        return store.state(self.path if self.zip else self.path / name)

    def size(self, name: str) -> int:
        """Return the bytes of a file, as the zip's directory or the file system says."""
        return self.zip.getinfo(name).file_size if self.zip else os.stat(self.path / name).st_size

    def open(self, name: str) -> IO[bytes]:
        limited.allow(limited.PATIENCE + self.size(name) / BYTES_A_SECOND)
        return self.zip.open(name) if self.zip else (self.path / name).open("rb")

    def lines(self, name: str) -> list[list[str]]:
        """Return the tab- or space-separated fields of each line of a text file; nothing if it is
        not there. StoreError if it cannot be read.
        """
        if name not in self:
            return []
        try:
            with self.open(name) as file:
                text = file.read().decode()
        except Exception as error:  # a damaged or encrypted member fails in many ways
            raise StoreError(f"{self.path}: {name} cannot be read ({error}).") from error
        return [
            re.split(r"\t" if "\t" in line else r"\s+", line.strip())
            for line in text.splitlines()
            if line.strip()
        ]

    def __contains__(self, name: str) -> bool:
        at = bisect.bisect_left(self.files, name)
        return self.files[at : at + 1] == [name]


def _overlap(one: str, other: str) -> bool:
    """Return whether one of two folders lies in the other."""
    return os.path.commonpath([one, other]) in (one, other)


def _points_inside(link: str, root: str) -> bool:
    """Return whether a link leads to a file below `root`, but for hidden folders, tools' stores."""
    inside = os.path.relpath(os.path.realpath(link), root)
    return not inside.startswith("..") and not hidden(inside)


def hidden(name: str) -> bool:
    """Return whether a file or a folder above it is hidden, as copies of editors and Macs are."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
