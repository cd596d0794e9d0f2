"""The classifier that reads reconstructions: it knows no encoder, no decoder and no attacked image.

It is trained as the supervised baseline is, on other images; `accuracy` says how well it reads real
ones.
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
from dejavu_utils.models import own_format, train
from dejavu_utils.models.encoders import embed

if TYPE_CHECKING:
    import pandas as pd

    from dejavu_utils.models.pairs import Pair

# Milder views than an encoder's: most of the object should show.
VIEWS = {"scale_min": 0.3, "strength": 0.2, "blur": 0.0}
SEED = "judge"  # what the published classifiers were seeded with; another word, other weights


@dataclass(frozen=True)
class Classifier:
    """A classifier, to be trained by `launch.fit_all([job])`, and how many values of a second
    attribute it tells apart.

    It predicts class and attribute at once, as classes * values kinds of pictures; `values` 1 is no
    second attribute.
    """

    job: train.Job
    values: int

    def read(self, pictures: Tensor, device: str = "cpu") -> Tensor:
        """Return probabilities (n, classes, values) of uint8 pictures (n, 3, s, s)."""
        network = own_format.load(self.job.checkpoint(max(self.job.epochs)))
        logits = embed(network, pictures, ("logits",), device=device)["logits"]
        return logits.double().softmax(1).unflatten(1, (-1, self.values))

    def classes(self, pictures: Tensor, device: str = "cpu") -> np.ndarray:
        """Return the most probable class (n,) of uint8 pictures (n, 3, s, s)."""
        return self.read(pictures, device).sum(2).argmax(1).numpy()


def make(pair: Pair, size: int, epochs: int, folder: Path, device: str = "cpu") -> Classifier:
    """Return the classifier of a pair's data set, for `size`-px pictures; it is not trained yet.

    Of scenes it learns from fresh ones in which the background says nothing (rho = 0), the same for
    every pair, and tells class and shade apart; of real pictures from the public and the probe set,
    and tells the class.
    """
    images = [pair.parts[part] for part in ("public", "probe") if len(pair.parts[part])]
    classes = len(images[0].classes)
    values = 1
    if "shade" in images[0].attributes:
        values = 2
        each = sum(map(len, images)) // classes
        images = [datasets.read("scenes", classes=classes, per_class=each, rho=0.0, seed=SEED)]

    source = _training_set(images, values, size, folder / "pixels")
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
    name = store.key(
        pixels=store.verify(source)["sha256"],
        recipe=recipe,
        epochs=epochs,
        code=store.code_version(train.__name__),
    )
    where = folder / "classifiers" / name
    job = train.Job(str(source), str(where), recipe, [epochs], SEED, device, classes * values)
    return Classifier(job, values)


def _training_set(images: list[Images], values: int, size: int, folder: Path) -> Path:
    """Return the file of pixels and kinds (class * values + attribute) that it learns from."""
    kinds = []
    for part in images:
        attribute = part.attributes["shade"] if values > 1 else 0
        kinds.append(part.labels * values + attribute)
    key = store.key(
        images=[part.digest for part in images],
        size=size,
        values=values,
        code=store.code_version(__name__),
    )
    path = folder / f"classifier-{key}.safetensors"

    def write() -> None:
        side = round(size * 8 / 7)  # a little more than the views
        pixels = torch.cat([part.squares(side) for part in images])
        labels = torch.from_numpy(np.concatenate(kinds))
        store.write_tensors(path, {"pixels": pixels, "labels": labels})

    store.once(path, write)
    return path


def accuracy(classifier: Classifier, images: Images, device: str = "cpu") -> pd.DataFrame:
    """Return how well real pictures are read that the classifier never saw: accuracy, low, high (95
    %, Wilson's), n.

    A row for the class, and one for the second attribute within the true class if there is one.
    """
    import pandas as pd
    from scipy.stats import binomtest

    probabilities = classifier.read(images.squares(classifier.job.recipe.size), device)
    right = {"class": probabilities.sum(2).argmax(1).numpy() == images.labels}
    if classifier.values > 1:
        right["attribute"] = attribute_right(probabilities, images) == 1

    rows = []
    for name, hits in right.items():
        test = binomtest(int(hits.sum()), len(hits))
        low, high = test.proportion_ci(method="wilson")
        row = {"reads": name, "accuracy": hits.mean(), "low": low, "high": high, "n": len(hits)}
        rows.append(row)
    return pd.DataFrame(rows)


def attribute_right(probabilities: Tensor, images: Images) -> np.ndarray:
    """Return whether the second attribute is read rightly within the true class (n,): 1.0 or 0.0,
    NaN where there is none.
    """
    if probabilities.shape[2] == 1:
        return np.full(len(images), np.nan)
    rows = torch.arange(len(images))
    within = probabilities[rows, torch.as_tensor(images.labels)]  # (n, values)
    predicted = within.argmax(1).numpy()
    return (predicted == images.attributes["shade"]).astype(float)
