"""A data set by the name of its manifest, as `Images`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dejavu_utils import store
from dejavu_utils.data import boxes, manifests, scenes
from dejavu_utils.data.images import Images

if TYPE_CHECKING:
    pass


def read(
    name: str, folder: str | Path | None = None, **options: int | float | str | None
) -> Images:
    """Return a data set by the name of its manifest, as `Images`.

    "scenes" is made from `options` (see `scenes.make`); every other is looked for in `folder`
    ($DEJAVU_DATA, else data/), which may also be the data set itself, and read with the options of
    `boxes.load`. FileNotFoundError says how to get a data set that is missing.
    """
    entry = manifests.read(name)
    if entry["layout"] == "scenes":
        return scenes.make(**options)
    return boxes.load(entry, manifests.locate(entry, folder), **options)


def write_skipped(images: Images, path: str | Path) -> None:
    """Write the pictures that could not be read, and why, as a table (name, reason) to `path`, e.g.
    skipped.csv.
    """
    import pandas as pd

    store.write_table(path, pd.DataFrame(images.skipped, columns=["name", "reason"]))
