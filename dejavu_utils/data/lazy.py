"""Pictures in a folder or a zip file, decoded when asked for."""

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import IO, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dejavu_utils import limited
from dejavu_utils.data.tree import Tree

# Pictures only: Pillow also opens programs (EPS) and documents.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "AVIF", "HEIF")
# 8 bits a channel. The others hold 16 bits or fractions, which a conversion to RGB would clip.
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
LARGEST = (
    89_478_485  # px: from here on Pillow warns of a decompression bomb; of twice it reads none
)


class Lazy(Sequence):
    """Pictures decoded when asked for: item i is uint8 (3, h, w). `digests` are the hashes of the
    files (see `identity`).
    """

    def __init__(self, tree: Tree, names: Sequence[str], digests: Sequence[str]) -> None:
        self.tree = tree
        self.names = np.asarray(names, dtype=object)
        self.digests = np.asarray(digests, dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, index: np.ndarray) -> Self:
        return Lazy(self.tree, self.names[index], self.digests[index])

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
def picture(file: IO[bytes], largest: int = 2 * LARGEST) -> Iterator[Image.Image]:
    """Open a picture of at most `largest` px without decoding it; an error if it is none, or one
    that cannot be used.
    """
    with Image.open(file, formats=_readable()) as image:
        if image.width * image.height > largest:
            raise ValueError(
                f"more than {largest} px ({image.width} x {image.height}), a decompression bomb? "
                f"Where you trust it, {limited.MORE}"
            )
        if image.mode not in MODES:
            raise ValueError(
                f"16-bit or floating-point picture (mode {image.mode}); expected 8 bits a channel"
            )
        yield image


@functools.cache
def _readable() -> list[str]:
    """Return those of `FORMATS` that this Python reads: HEIF wants pillow-heif."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `picture` says it
    return [name for name in FORMATS if name in Image.OPEN]


def decoded(image: Image.Image) -> Tensor:
    """Return a picture as uint8 (3, h, w) RGB; greyscale becomes RGB. Raises if it is not whole.

    Pixels stay as they are stored, as torchvision's and timm's loaders read them in training: an
    EXIF orientation is not applied.
    """
    pixels = np.asarray(image.convert("RGB"))  # (h, w, 3)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
