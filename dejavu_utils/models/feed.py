"""Feeds training with views: from uint8 pixels on the device, or from files that workers decode
ahead of time.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dejavu_utils import store
from dejavu_utils.data.lazy import Lazy
from dejavu_utils.data.resampling import resample
from dejavu_utils.data.tree import Tree
from dejavu_utils.models import views as augment

if TYPE_CHECKING:
    from dejavu_utils.data.images import Images
    from dejavu_utils.models.recipe import Recipe

Batch = tuple[list[Tensor], Tensor]  # views, each (n, 3, s, s), and labels (n,)


class Feed:
    """Batches of views of `images`, one epoch at a time; the same stream gives the same views,
    however they are made.

    `images` are one uint8 tensor (n, 3, H, W), kept on the device, or a lazy sequence of such
    pictures, decoded by workers; `sizes` (n, 2) are their widths and heights, `labels` (n,) their
    classes. Of several processes each yields its share of every batch: all draw the whole batch, so
    that together they see what one process would.
    """

    def __init__(
        self,
        images: Tensor | Lazy,
        sizes: Tensor,
        labels: Tensor,
        recipe: Recipe,
        large: int,
        device: str,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if recipe.batch % processes:
            raise ValueError(
                f"train: a batch of {recipe.batch} cannot be shared by {processes} processes: "
                f"make recipe.batch a multiple of {processes}"
            )
        if len(images) < recipe.batch:
            raise ValueError(
                f"train: a batch of {recipe.batch} needs as many images, found {len(images)}: "
                "lower recipe batch or raise sizes"
            )
        self.resident = isinstance(images, Tensor)
        self.images = images.to(device) if self.resident else images
        self.sizes, self.labels, self.device = sizes.to(device), labels.to(device), device
        self.batch, self.size, self.views = recipe.batch, recipe.size, augment.Views(**recipe.views)
        self.plan = augment.plan(self.views, recipe.size, large)
        share = recipe.batch // processes
        self.mine = slice(rank * share, (rank + 1) * share)
        self.workers = recipe.workers or max(1, store.cores() - 1)
        self.steps = len(images) // recipe.batch  # the last incomplete batch of an epoch is dropped

    def epoch(self, rng: torch.Generator) -> Iterator[Batch]:
        """Yield the batches of one epoch, in an order and with views drawn from `rng` (on the
        device).
        """
        make = self._resident if self.resident else self._decoded
        yield from make(self._steps(rng))

    def _steps(self, rng: torch.Generator) -> Iterator[tuple[Tensor, list[augment.Draw]]]:
        """Yield this process's rows of each batch and what is random about their views."""
        order = torch.randperm(len(self.images), generator=rng, device=rng.device)
        for i in range(self.steps):
            rows = order[i * self.batch : (i + 1) * self.batch]
            drawn = [
                augment.draw(kind, self.sizes[rows], self.views, size, rng)
                for size, kind in self.plan
            ]
            yield rows[self.mine], [each.part(self.mine) for each in drawn]

    def _resident(self, steps: Iterator[tuple[Tensor, list[augment.Draw]]]) -> Iterator[Batch]:
        for rows, drawn in steps:
            pixels = self.images[rows]
            made = [
                augment.view(pixels, size, each)
                for (size, _), each in zip(self.plan, drawn, strict=True)
            ]
            yield made, self.labels[rows]

    def _decoded(self, steps: Iterator[tuple[Tensor, list[augment.Draw]]]) -> Iterator[Batch]:
        waiting: deque = deque()

        # the loader asks for the crops of batches that come later, so their draws wait here
        def items() -> Iterator[tuple[int, list[tuple[int, Tensor, bool]]]]:
            for rows, drawn in steps:
                waiting.append((rows, drawn))
                cut = [
                    (size, each.rects.cpu(), each.flip.cpu())
                    for (size, _), each in zip(self.plan, drawn, strict=True)
                ]
                for i, row in enumerate(rows.tolist()):
                    yield row, [(size, rects[i], bool(flip[i])) for size, rects, flip in cut]

        loader = DataLoader(
            _Crops(self.images),
            self.mine.stop - self.mine.start,
            sampler=items(),
            num_workers=self.workers,
            prefetch_factor=4,
            pin_memory=self.device.startswith("cuda"),
        )
        for crops in loader:
            rows, drawn = waiting.popleft()
            ready = [part.to(self.device, non_blocking=True) for part in crops]
            yield (
                [augment.finish(*pair) for pair in zip(ready, drawn, strict=True)],
                self.labels[rows],
            )


def write_list(folder: Path, used: list[Images], meta: dict) -> Path:
    """Return the table of the lazy pictures of `used` (data.Images), named by its content: where
    each is and its label.

    Its order is that of `used`; the sidecar names the folder or zip file that holds the pictures.
    """
    import pandas as pd

    rows = [
        pd.DataFrame(
            {
                "name": [os.fsencode(name) for name in images.pixels.names],  # any bytes
                "digest": images.pixels.digests.astype(str),
                "label": images.labels,
                "width": images.sizes[:, 0],
                "height": images.sizes[:, 1],
            }
        )
        for images in used
    ]
    table, root = pd.concat(rows, ignore_index=True), str(used[0].pixels.tree.path)
    path = folder / f"{store.key(rows=table.to_csv(index=False))}.parquet"
    if not store.intact(path) or store.verify(path)["root"] != root:  # a copy of the data set
        store.write_table(path, table, meta | {"root": root})
    return path


def read_list(path: str | Path) -> dict:
    """Return lazy images, their sizes (n, 2) and labels (n,) from what `write_list` wrote: what
    `Feed` takes.
    """
    table = store.read_table(path)
    tree = Tree(Path(store.verify(path)["root"]))
    sizes = torch.from_numpy(table[["width", "height"]].to_numpy().copy())
    return {
        "images": Lazy(tree, [os.fsdecode(name) for name in table["name"]], table["digest"]),
        "sizes": sizes,
        "labels": torch.from_numpy(table["label"].to_numpy().copy()),
    }


class _Crops(Dataset):
    """Decodes one picture and cuts the crops that were drawn for it, as uint8: what a worker
    does.
    """

    def __init__(self, images: Lazy) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, list[tuple[int, Tensor, bool]]]) -> list[Tensor]:
        row, wanted = item
        pixels = self.images[row]
        return [_cut(pixels, rect, size, flip) for size, rect, flip in wanted]


def _cut(pixels: Tensor, rect: Tensor, size: int, flip: bool) -> Tensor:
    x0, y0, x1, y1 = rect.long().tolist()
    whole = torch.tensor([[0, 0, x1 - x0, y1 - y0]])
    crop = resample(pixels[None, :, y0:y1, x0:x1], whole, size, torch.tensor([flip]))[0]
    return crop.round().clamp(0, 255).to(torch.uint8)
