"""Embeddings of augmented views of images: what the linear probe trains on, and what UnitMem
averages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dejavu_utils.data.images import Images
from dejavu_utils.models import pairs, train
from dejavu_utils.models import views as augment
from dejavu_utils.models.encoders import Encoder

CHUNK = 512  # images at a time


def sources(pair: pairs.Pair, images: Images) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows and pixels (uint8) of the images, a chunk at a time, as the training had them:
    native pictures where all have one size, else squares a little larger than the views.
    """
    native = pairs.equal_sized(pair.parts)
    square = round(pair.size() * 8 / 7)

    for start in range(0, len(images), CHUNK):
        rows = slice(start, start + CHUNK)
        part = images.subset(np.arange(len(images))[rows])
        pixels = part.stacked if native else None
        yield rows, part.squares(square) if pixels is None else pixels


def draws(
    pair: pairs.Pair, images: Images, views: int, purpose: str, kinds: Sequence[str] = ("second",)
) -> list[augment.Draw]:
    """Return what is random about `views` views of each image, of these kinds in turn.

    The augmentation is the training's. A view depends on the pair's seed, the
    purpose and the images, never on an encoder: all encoders of a seed see the same views.
    """
    native = pairs.equal_sized(pair.parts) and images.stacked is not None
    square = round(pair.size() * 8 / 7)
    sizes = images.sizes if native else np.full((len(images), 2), square)

    augmentation = augment.Views(**pair.jobs["A"].recipe.views)
    generator = train.stream(pair.setting["seed"], purpose)
    return [
        augment.draw(
            kinds[i % len(kinds)], torch.as_tensor(sizes), augmentation, pair.size(), generator
        )
        for i in range(views)
    ]


@torch.inference_mode()
def embed_views(
    encoder: Encoder,
    pixels: Tensor,
    drawn: Iterable[augment.Draw],
    size: int,
    layers: Sequence[str],
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Return {layer: (views, n, d)} of the views of n images (uint8), in evaluation mode."""
    encoder.eval().to(device)
    pixels = pixels.to(device)
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    for each in drawn:
        there = augment.Draw(*(None if values is None else values.to(device) for values in each))
        view = augment.view(pixels, size, there)  # (n, 3, size, size)
        outputs = encoder.layers(view.contiguous(memory_format=torch.channels_last))
        for layer in layers:
            found[layer].append(outputs[layer].float().cpu())
    return {layer: torch.stack(parts) for layer, parts in found.items()}
