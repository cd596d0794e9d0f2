"""Pictures in a folder or a zip file, read by name and decoded when asked for."""

import bisect
import contextlib
import functools
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NoReturn, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "WEBP",
    "GIF",
)  # pictures only: Pillow also opens programs (EPS) and documents
LARGEST = 89_478_485  # px: from here on Pillow warns of a decompression bomb


class Tree:
    """A folder or a zip file, read by relative name, from any number of threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path) if path.is_file() else None
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{path} ({path.stat().st_size} bytes) is not a whole zip file ({error}): "
                "expected the "
                "archive as published. Delete it and fetch it again (`make data NAME=…`)."
            ) from error

    @functools.cached_property
    def files(self) -> list[str]:
        """The names of all files, sorted."""
        if self.zip:
            return sorted(name for name in self.zip.namelist() if not name.endswith("/"))

        def stop(error: OSError) -> NoReturn:
            raise error  # else a folder that may not be read would count as empty

        walk = os.walk(self.path, onerror=stop, followlinks=True)
        return sorted(
            f"{folder}/{name}"[len(f"{self.path}/") :]
            for folder, _, names in walk
            for name in names
        )

    def below(self, folder: str) -> list[str]:
        """Return the files in `folder` and in the folders inside it."""
        start, end = (
            bisect.bisect_left(self.files, folder + after) for after in "/0"
        )  # "0" comes right after "/"
        return self.files[start:end]

    def find(self, candidates: Sequence[str]) -> str | None:
        """Return the first of these folders that has content, here or one level below (archives
        often have a top).
        """
        tops = ["", *sorted({name[: name.index("/") + 1] for name in self.files if "/" in name})]
        return next(
            (top + name for top in tops for name in candidates if self.below(top + name)), None
        )

    def open(self, name: str) -> IO[bytes]:
        return self.zip.open(name) if self.zip else (self.path / name).open("rb")

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def lines(self, name: str) -> list[list[str]]:
        """Return the tab- or space-separated fields of each line of a text file; nothing if it is
        not there.
        """
        text = self.read(name).decode() if name in self else ""
        return [
            re.split(r"\t" if "\t" in line else r"\s+", line.strip())
            for line in text.splitlines()
            if line.strip()
        ]

    def __contains__(self, name: str) -> bool:
        at = bisect.bisect_left(self.files, name)
        return self.files[at : at + 1] == [name]


class Lazy(Sequence):
    """Pictures decoded when asked for: item i is uint8 (3, h, w). `stamps` are the sizes of the
    files.
    """

    def __init__(self, tree: Tree, names: Sequence[str], stamps: Sequence[int]) -> None:
        self.tree, self.names, self.stamps = (
            tree,
            np.asarray(names, dtype=object),
            np.asarray(stamps, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, index: np.ndarray) -> Self:
        return Lazy(self.tree, self.names[index], self.stamps[index])

    def __getitem__(self, i: int) -> Tensor:
        try:
            with self.tree.open(self.names[i]) as file, picture(file) as image:
                return decoded(image)
        except Exception as error:
            raise ValueError(
                f"{self.tree.path}: {self.names[i]} cannot be decoded ({error}). "
                "Repair or remove that picture and run the command again."
            ) from error


@contextlib.contextmanager
def picture(file: IO[bytes]) -> Iterator[Image.Image]:
    """Open a picture without decoding it; an error if it is none, or one of more than `LARGEST`
    px.
    """
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > LARGEST:
            raise ValueError(
                f"{image.width} x {image.height} px, more than {LARGEST}: a decompression bomb?"
            )
        yield image


def decoded(image: Image.Image) -> Tensor:
    """Return a picture as uint8 (3, h, w) RGB; greyscale becomes RGB. Raises if it is not whole."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy())
