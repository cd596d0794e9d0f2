"""The judge reads pictures that a decoder drew: a classifier that knows no encoder and no attacked
image.

It is trained as the supervised baseline is, on other images, and `accuracy` says how well it reads
real ones. `measure` compares what was drawn with the picture that it should show.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dejavu_utils import store
from dejavu_utils.data import datasets
from dejavu_utils.data.images import Images
from dejavu_utils.data.resampling import resample
from dejavu_utils.models import own_format, train
from dejavu_utils.models.encoders import embed

if TYPE_CHECKING:
    import pandas as pd

    from dejavu_utils.models.pairs import Pair

VIEWS = {
    "scale_min": 0.3,
    "strength": 0.2,
    "blur": 0.0,
}  # milder than an encoder's: most of the object should show
SIDE = 16  # px, of the object's box where similarity and colour are measured


@dataclass(frozen=True)
class Judge:
    """A classifier to be trained by `launch.fit_all([job])`, and how many values of a second
    attribute it tells apart.

    It reads class and attribute at once, as classes * values kinds of pictures; `values` 1 is no
    second attribute.
    """

    job: train.Job
    values: int

    def read(self, pictures: Tensor, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Return probabilities (n, classes, values) and features (n, d) of uint8 pictures (n, 3, s,
        s).
        """
        found = embed(
            own_format.load(self.job.checkpoint(max(self.job.epochs))),
            pictures,
            ("logits", "backbone"),
            device=device,
        )
        return found["logits"].double().softmax(1).unflatten(1, (-1, self.values)), found[
            "backbone"
        ]


def make(pair: Pair, size: int, epochs: int, folder: Path, device: str = "cpu") -> Judge:
    """Return the judge of a pair's data set, for `size`-px pictures; it is not trained yet.

    Of scenes it sees fresh ones in which the background says nothing (rho = 0), the same for every
    pair, and reads class and shade; of real pictures the public and the probe set, and reads the
    class.
    """
    images, values = [pair.parts[part] for part in ("public", "probe") if len(pair.parts[part])], 1
    if "shade" in images[0].attributes:
        classes, values = len(images[0].classes), 2
        each = sum(map(len, images)) // classes
        images = [datasets.read("scenes", classes=classes, per_class=each, rho=0.0, seed="judge")]
    kinds = [
        part.labels * values + (part.attributes["shade"] if values > 1 else 0) for part in images
    ]
    key = store.key(
        images=[part.digest for part in images],
        size=size,
        values=values,
        code=store.code_version(__name__),
    )
    source = folder / "pixels" / f"judge-{key}.safetensors"

    def write() -> None:
        pixels = torch.cat([part.squares(round(size * 8 / 7)) for part in images])
        labels = torch.from_numpy(np.concatenate(kinds))
        store.write_tensors(source, {"pixels": pixels, "labels": labels})

    store.once(source, write)
    recipe = dataclasses.replace(
        pair.jobs["A"].recipe,
        criterion="supervised",
        engine="own",
        size=size,
        constants={},
        views=VIEWS,
        processes=1,
        nodes=1,
    )
    learned = store.verify(source)["sha256"]
    code = store.code_version(train.__name__)
    where = folder / "judges" / store.key(pixels=learned, recipe=recipe, epochs=epochs, code=code)
    return Judge(
        train.Job(
            str(source),
            str(where),
            recipe,
            [epochs],
            "judge",
            device,
            len(pair.parts["public"].classes) * values,
        ),
        values,
    )


def accuracy(judge: Judge, images: Images, device: str = "cpu") -> pd.DataFrame:
    """Return how well the judge reads real pictures that it never saw: accuracy, low, high (95 %,
    Wilson's), n.

    A row for the class, and one for the second attribute within the true class if there is one.
    """
    import pandas as pd
    from scipy.stats import binomtest

    seen, _ = judge.read(images.squares(judge.job.recipe.size), device)
    right = {"class": seen.sum(2).argmax(1).numpy() == images.labels}
    if judge.values > 1:
        right["attribute"] = _attribute(seen, images) == 1
    intervals = {
        name: binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
        for name, hits in right.items()
    }
    return pd.DataFrame(
        [
            {
                "reads": name,
                "accuracy": hits.mean(),
                "low": intervals[name].low,
                "high": intervals[name].high,
                "n": len(hits),
            }
            for name, hits in right.items()
        ]
    )


def _attribute(seen: Tensor, images: Images) -> np.ndarray:
    """Return whether the second attribute is read rightly within the true class (n,): 1.0 or 0.0,
    NaN without one.
    """
    if seen.shape[2] == 1:
        return np.full(len(images), np.nan)
    told = seen[torch.arange(len(seen)), torch.as_tensor(images.labels)].argmax(1).numpy()
    return (told == images.attributes["shade"]).astype(float)


def measure(
    judge: Judge, drawn: Tensor, images: Images, device: str = "cpu"
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Return log class probabilities (n, classes) of pictures uint8 (n, samples, 3, s, s), and a
    dict of measures (n,).

    Of each image's samples probabilities and measures are averaged. `attribute`: 1 where the second
    attribute is read rightly within the true class; `ssim` and `colour`: structural similarity, and
    CIE 1976 difference of mean colours, of the object's box in both pictures; `feature`: 1 - cosine
    of the judge's features to those of the object alone.
    """
    n, samples, _, size, _ = drawn.shape
    flat, truth, boxes = drawn.flatten(0, 1), images.squares(size), object_boxes(images, size)
    seen, features = judge.read(flat, device)
    _, alone = judge.read(resample(truth, boxes, size).round().to(torch.uint8), device)
    seen = seen.unflatten(0, (n, samples)).mean(1)
    near = torch.cosine_similarity(features.unflatten(0, (n, samples)), alone[:, None], dim=2).mean(
        1
    )
    ssim, colour = _alike(
        resample(flat, boxes.repeat_interleave(samples, 0), SIDE),
        resample(truth, boxes, SIDE).repeat_interleave(samples, 0),
    )
    return seen.sum(2).clamp(min=1e-12).log(), {
        "attribute": _attribute(seen, images),
        "ssim": ssim.reshape(n, samples).mean(1),
        "colour": colour.reshape(n, samples).mean(1),
        "feature": 1 - near.numpy(),
    }


def object_boxes(images: Images, size: int) -> Tensor:
    """Return each picture's largest box (n, 4), in px of its centre square shrunk to `size` px; at
    least 2 px wide.
    """
    largest = np.array(
        [box[(box[:, 2:] - box[:, :2]).prod(1).argmax()] for box in images.boxes], float
    )
    side = images.sizes.min(1, keepdims=True)
    boxes = np.clip((largest - np.tile((images.sizes - side) / 2, 2)) / side * size, 0, size)
    start = np.minimum(boxes[:, :2], size - 2)
    return torch.from_numpy(np.c_[start, np.maximum(boxes[:, 2:], start + 2)])


def _alike(drawn: Tensor, truth: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the structural similarity of each two pictures (n, 3, s, s) in [0, 255], and their
    colours' distance.
    """
    from skimage.color import rgb2lab
    from skimage.metrics import structural_similarity

    ssim = [
        structural_similarity(one.numpy(), two.numpy(), channel_axis=0, data_range=255)
        for one, two in zip(drawn, truth, strict=True)
    ]
    lab = [rgb2lab(pictures.mean((2, 3)).numpy() / 255) for pictures in (drawn, truth)]
    return np.array(ssim), np.linalg.norm(lab[0] - lab[1], axis=1)
