"""boxes.csv, the one form of annotations: `read_table` returns it by picture, `fit` boxes in px.

One row a box: image (relative path), width, height (of the frame that the box is in), x0, y0, x1,
y1 (px, half-open), class, and perhaps owner and split. data_manifests/convert.py writes it from
public layouts.
"""

from __future__ import annotations

import codecs
import io
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd

from dejavu_utils.data.tree import printable
from dejavu_utils.store import StoreError

NUMBERS = ("width", "height", "x0", "y0", "x1", "y1")
COLUMNS = ("image", *NUMBERS, "class")
OPTIONAL = ("owner", "split")
WHOLE = 20  # rows from which on a table is judged as a whole
COMMAS = 5_000  # in a line, more than any name of a file holds
SLACK = 0.05  # share of rows that may be wrong, and of its frame that a box may reach out


@dataclass(frozen=True)
class Annotation:
    """The boxes of one picture, (m, 4), in a frame of `size` (width, height); its class is that of
    the largest one.
    """

    boxes: np.ndarray
    size: tuple[float, float]
    name: str
    owner: str
    split: str


@dataclass(frozen=True)
class Table:
    """boxes.csv by picture: what it says, and why some of it cannot be used."""

    found: dict[str, Annotation] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    files: tuple[str, ...] = ()  # what it was read from, if that lies among the pictures
    listed: bool = False  # whether convert.py's list of unused files came with it


# The table


@pd.option_context("mode.string_storage", "python")  # that of pyarrow refuses names in Latin-1
def read_table(file: IO[bytes] | Path, unused: IO[bytes] | Path | None = None) -> Table:
    """Return boxes.csv, and of the list of unused annotations the pictures that they belong to.

    StoreError if columns are missing or unknown. A picture of which one row makes no sense is
    refused as a whole: its object may be anywhere.
    """
    frame = _read_csv(file, "boxes.csv")
    _check_columns(frame)
    columns = tuple(frame.columns)
    frame = frame.reindex(columns=[*COLUMNS, *OPTIONAL], fill_value="")
    numbers = frame[list(NUMBERS)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    _check_as_a_whole(numbers)
    texts = frame[["class", *OPTIONAL]].to_numpy(object)
    reasons = _row_reasons(numbers)

    found, refused = {}, {}
    for image, rows in frame.groupby("image", sort=False).indices.items():
        reason = next(filter(None, reasons[rows]), "")
        reason = reason or _disagreement(numbers[rows], texts[rows])
        if reason:
            refused[image] = reason
        else:
            found[image] = _annotation(numbers[rows], texts[rows])

    if unused is not None:
        refused |= _unused_reasons(unused)
    return Table(found, refused, columns, listed=unused is not None)


def _check_columns(frame: pd.DataFrame) -> None:
    """Raise StoreError if columns are missing or unknown."""
    missing = [name for name in COLUMNS if name not in frame]
    unknown = [repr(name) for name in frame if name not in (*COLUMNS, *OPTIONAL)]
    if missing or unknown:
        raise StoreError(
            f"boxes.csv: columns missing: {', '.join(missing) or 'none'}; unknown: "
            f"{', '.join(unknown) or 'none'}; expected {','.join(COLUMNS)} and perhaps "
            f"{','.join(OPTIONAL)}."
        )


def _check_as_a_whole(numbers: np.ndarray) -> None:
    """Raise StoreError where rows (width, height, x0, y0, x1, y1) show that the table means
    something else: one bad row is a line, but these would be wrong in the others, too.
    """
    width, height, x0, y0, x1, y1 = numbers.T
    n = len(numbers)
    if n < WHOLE:
        return
    with np.errstate(invalid="ignore"):
        turned = (x0 > x1) | (y0 > y1)
        out = (x1 > width + 1 + SLACK * width) | (y1 > height + 1 + SLACK * height)
        within = (np.maximum(x1, y1) <= 100) & (np.minimum(width, height) >= 200)
    checks = (
        (turned.mean() > SLACK, turned, "end before they start: are x1, y1 widths and heights?"),
        (out.mean() > SLACK, out, "reach far out of their frame, width x height: is it another?"),
        (within.all(), within, "lie in the first 100 px of large frames: in percent, or shares?"),
    )
    for wrong, rows, what in checks:
        if wrong:
            raise StoreError(
                f"boxes.csv: {rows.sum()} of {n} boxes {what} Expected x0, y0, x1, y1 in px of the "
                "frame, ends and no sizes (data_manifests/README.md). Write the table anew."
            )


def _unused_reasons(file: IO[bytes] | Path) -> dict[str, str]:
    """Return {picture: reason} of annotations that convert.py could not use."""
    listed = _read_csv(file, "boxes.unused.csv")
    if not {"image", "reason", "detail"} <= set(listed):
        raise StoreError("boxes.unused.csv: expected the columns image, reason, detail.")
    listed = listed[listed["image"] != ""]
    details = (": " + listed["detail"]).where(listed["detail"] != "", "")
    return dict(zip(listed["image"], listed["reason"] + details, strict=True))


def _read_csv(file: IO[bytes] | Path, name: str) -> pd.DataFrame:
    """Return a table of texts, empty where nothing is; names may hold any bytes.

    StoreError for a line of thousands of columns, of which pandas makes an index for minutes.
    """
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return _read_csv(opened, name)

    if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise StoreError(f"{name} is UTF-16: save it as UTF-8.")
    file.seek(0)

    lines = io.TextIOWrapper(file, encoding="latin-1")  # ends lines as pandas does
    for number, line in enumerate(lines, 1):
        found = line.count(",")
        if found > COMMAS:
            raise StoreError(
                f"{name}: line {number} has {found} commas, expected at most {COMMAS}: is it "
                "another file? Write the table anew."
            )
    lines.detach().seek(0)
    return pd.read_csv(file, dtype=object, keep_default_na=False, encoding_errors="surrogateescape")


def _row_reasons(numbers: np.ndarray) -> np.ndarray:
    """Return why each row (width, height, x0, y0, x1, y1) cannot be used; empty if it can."""
    width, height, x0, y0, x1, y1 = numbers.T
    with np.errstate(invalid="ignore"):
        first = (np.maximum(x1, y1) <= 1) & (np.maximum(width, height) > 10)
        checks = (
            (~np.isfinite(numbers).all(1), "a number in boxes.csv is missing or not finite"),
            ((width <= 0) | (height <= 0), "its width or height in boxes.csv is not above 0"),
            ((x0 > x1) | (y0 > y1), "a box ends before it starts"),
            ((x0 >= width) | (y0 >= height) | (x1 < 0) | (y1 < 0), "a box outside its picture"),
            (first, "a box in the first pixel: shares of the frame, not px?"),
        )
    reasons = np.full(len(numbers), "", object)
    for wrong, reason in reversed(checks):
        reasons[wrong] = reason
    return reasons


def _disagreement(numbers: np.ndarray, texts: np.ndarray) -> str:
    """Return what the rows of one picture do not agree in; empty if nothing."""
    if (numbers[:, :2] != numbers[0, :2]).any() or (texts[:, 1:] != texts[0, 1:]).any():
        return "its rows differ in width, height, owner or split"

    largest = _largest(numbers[:, 2:])
    same = (numbers == numbers[largest]).all(1)
    classes = sorted({class_text(name) for name in texts[same, 0]})
    if len(classes) > 1:
        return f"one box, two classes: {' and '.join(classes[:2])}"
    return ""


def _largest(boxes: np.ndarray) -> int:
    """Return the place of the largest of some boxes (m, 4), of equals the first."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return int(np.argmax(areas))


def _annotation(numbers: np.ndarray, texts: np.ndarray) -> Annotation:
    """Return the rows of one picture; of several classes that of the largest box."""
    boxes = numbers[:, 2:]
    name, owner, split = texts[_largest(boxes)]
    return Annotation(boxes, (numbers[0, 0], numbers[0, 1]), class_text(name), owner, split)


def class_text(name: str) -> str:
    """Return a class name as NFC: a Mac's folders are NFD, look the same and are the same."""
    return unicodedata.normalize("NFC", printable(name))


# Frames


def fit(
    boxes: np.ndarray, annotated: tuple[float, float], size: tuple[int, int], turn: int = 1
) -> np.ndarray:
    """Return boxes (m, 4) in px of the stored picture, clamped to it: float32.

    A uniform scale from the annotated frame to the picture's is applied. ValueError for any other
    difference: nobody can tell in which frame the boxes are, and a crop might show the object.
    """
    width, height = size
    if turn not in (0, 1):
        if turn < 5 or _same_shape(annotated, size):
            raise ValueError(f"EXIF orientation {turn}: the boxes may be of the turned picture")
        width, height = height, width

    if not _same_shape(annotated, (width, height)):
        raise ValueError(
            f"annotated in another shape ({annotated[0]:g} x {annotated[1]:g} px, the picture has "
            f"{size[0]} x {size[1]}), so its boxes may be anywhere"
        )

    limits = np.array([width, height, width, height], np.float64)
    if annotated != (width, height):
        boxes = boxes * (limits / [*annotated, *annotated])
    boxes = boxes.clip(0, limits)
    if turn not in (0, 1):
        boxes = _turned_back(boxes, turn, size)
    return boxes.astype(np.float32)


def _same_shape(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Return whether one size is the other's times a number, but for a pixel of rounding."""
    difference = abs(one[0] * other[1] - one[1] * other[0])
    return difference <= max(sum(one), sum(other))


def _turned_back(boxes: np.ndarray, turn: int, size: tuple[int, int]) -> np.ndarray:
    """Return boxes of the picture as it is shown (EXIF 5 to 8) in px of the picture as stored."""
    width, height = size
    x0, y0, x1, y1 = boxes.T
    across = {
        5: (y0, x0, y1, x1),
        6: (y0, height - x1, y1, height - x0),
        7: (width - y1, height - x1, width - y0, height - x0),
        8: (width - y1, x0, width - y0, x1),
    }
    return np.stack(across[turn], axis=1)
