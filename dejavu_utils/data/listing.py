"""A reader of pictures in a child process of limited memory: its `Images` are here, all else is
not.

Whatever a folder or an archive holds is met there for the first time. What is listed was opened
there, and is later decoded in this process.
"""

import functools
import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dejavu_utils import limited
from dejavu_utils.data.images import Images
from dejavu_utils.data.lazy import Lazy
from dejavu_utils.data.tree import Tree


def in_child(read: Callable[..., Images]) -> Callable[..., Images]:
    """Return `read`, a reader of `path` with at most `limit_gib` GiB of memory, which then reads in
    a child process.

    StoreError says what was wrong with the data, or that it takes more memory; FileNotFoundError
    what is missing.
    """
    signature = inspect.signature(read)

    @functools.wraps(read)
    def listed(*arguments: Any, **options: Any) -> Images:
        given = signature.bind(*arguments, **options)
        given.apply_defaults()
        path = given.arguments["path"] = Path(given.arguments["path"])
        limit_gib = given.arguments["limit_gib"]
        with tempfile.TemporaryDirectory(prefix="dejavu-") as folder:
            arrays = Path(folder, "arrays.npz")

            def work() -> dict:
                return _texts(read(*given.args, **given.kwargs), arrays)

            texts = limited.run(work, path, limit_gib, memory=limit_gib)
            return _images(texts, arrays)

    return listed


def _texts(images: Images, path: Path) -> dict:
    """Return the texts of some pictures, and leave their numbers in the file `path`."""
    arrays = {
        "labels": images.labels,
        "sizes": images.sizes,
        "counts": np.array([len(boxes) for boxes in images.boxes]),
        "boxes": np.concatenate(images.boxes),
    }
    texts = {
        "ids": images.ids.tolist(),
        "classes": images.classes,
        "attributes": {name: values.tolist() for name, values in images.attributes.items()},
        "skipped": images.skipped,
    }
    if isinstance(images.pixels, Lazy):
        texts["root"] = os.fspath(images.pixels.tree.path)
        texts["names"] = images.pixels.names.tolist()
        arrays["digests"] = images.pixels.digests
    else:
        arrays["pixels"] = images.pixels.numpy()
    np.savez(path, **arrays)
    return texts


def _images(texts: dict, path: Path) -> Images:
    """Return the pictures whose texts and numbers `_texts` left."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    if "names" in texts:
        pixels = Lazy(Tree(Path(texts["root"])), texts["names"], arrays["digests"])
    else:
        pixels = torch.from_numpy(arrays["pixels"])
    return Images(
        ids=np.array(texts["ids"]),
        labels=arrays["labels"],
        boxes=np.split(arrays["boxes"], arrays["counts"].cumsum()[:-1]),
        classes=tuple(texts["classes"]),
        sizes=arrays["sizes"],
        pixels=pixels,
        attributes={name: np.array(values) for name, values in texts["attributes"].items()},
        skipped=[(name, reason) for name, reason in texts["skipped"]],
    )
