"""What a file is before it is used: `measure` a picture, or say why it is none."""

import os
from pathlib import PurePosixPath
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from dejavu_utils.data.lazy import LARGEST, decoded, picture
from dejavu_utils.data.tree import SUFFIXES, Tree, hidden
from dejavu_utils.limited import LIMIT_GIB

ORIENTATION = 0x0112  # the EXIF tag


class Measured(NamedTuple):
    """What `measure` finds out about a picture."""

    size: tuple[int, int]  # width, height of the pixels, px
    turn: int  # EXIF orientation: 1 is none


def measure(
    tree: Tree, name: str, row: Tensor | None = None, limit_gib: float = LIMIT_GIB
) -> Measured:
    """Return size and orientation of a picture, its pixels put into `row` (3, h, w).

    Raises if it cannot be read, or has too many pixels for a budget of `limit_gib` GiB. Without
    `row`, a JPEG with an end marker is taken to be whole and not decoded: ImageNet would take half
    an hour.
    """
    largest = int(LARGEST * max(1.0, limit_gib / LIMIT_GIB))
    with tree.open(name) as file, picture(file, largest) as image:
        size = image.size
        if row is not None and size != (row.shape[2], row.shape[1]):
            raise ValueError(
                f"another size ({size[0]} x {size[1]} px, expected {row.shape[2]} x {row.shape[1]})"
            )

        turn = _orientation(image)
        if row is not None:
            row.copy_(decoded(image))

        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 2))
        whole = image.format in ("JPEG", "MPO") and file.read() == b"\xff\xd9"
        if row is None and not whole:
            image.load()
    return Measured(size, turn)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a picture's pixels: 1 is none.

    Of a TIFF that lies on its side Pillow turns the pixels itself.
    """
    try:
        turn = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data, which every viewer ignores
        return 1
    return 1 if image.format == "TIFF" and turn > 4 else turn


def not_a_picture(name: str) -> str:
    """Return why a file is not even tried; empty if its name is a picture's."""
    if hidden(name):
        return "hidden file or folder"
    if not name.lower().endswith(SUFFIXES):
        suffix = PurePosixPath(name).suffix.lower()
        return f"not a picture: {suffix or 'no suffix'}"
    return ""
