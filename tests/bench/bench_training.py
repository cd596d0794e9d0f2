"""Training throughput, side by side in one run: our loop, its limit (ready-made views), and the
usual pipeline.

Not a test: speed depends on what else runs. Every figure is the best of several, after a warm-up.
Images a second, all views of an image counted once.
"""

from __future__ import annotations

import json
import subprocess
import sys

import bench_common


def _training(recipe, device: str, sizes: dict):
    """Return a Training over random pictures, one epoch of so many steps."""
    import torch

    from dejavu_utils.models import train

    torch.set_num_threads(recipe.threads)
    pixels = torch.randint(
        0, 256, (sizes["steps"] * recipe.batch, 3, sizes["side"], sizes["side"]), dtype=torch.uint8
    )
    labels = torch.arange(len(pixels)) % 10
    return train.Training(pixels, recipe, 1000, "bench", device, labels, 10)


def measure(recipe, device: str, sizes: dict) -> dict:
    """Return images/s of our loop and of its limit: the same steps on views that are ready-made."""
    import torch

    training, images = _training(recipe, device, sizes), sizes["steps"] * recipe.batch
    ours = bench_common.best(training.run_epoch, device, sizes["repeats"])
    ready = next(training.feed.epoch(torch.Generator(device).manual_seed(0)))
    training.feed.epoch = lambda rng: (ready for _ in range(sizes["steps"]))
    return {
        "value": images / ours,
        "limit": images / bench_common.best(training.run_epoch, device, sizes["repeats"]),
    }


def _usual(recipe, device: str, sizes: dict, ours: dict) -> dict:
    """Return images/s of lightly's SimCLR transform in a DataLoader, with the best number of
    workers.
    """
    import numpy as np
    from lightly.transforms import SimCLRTransform
    from PIL import Image

    from dejavu_utils import store

    transform = SimCLRTransform(
        input_size=recipe.size, gaussian_blur=recipe.views.get("blur", 1.0) / 2
    )
    random, side, images = np.random.default_rng(0), sizes["side"], sizes["steps"] * recipe.batch
    pictures = [
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
        for _ in range(images)
    ]
    counts = (0, 1, 2, 8) if device == "cpu" else (8, store.cores())  # few feed no GPU
    took, workers = min(
        (_loaded(recipe, device, sizes, _Transformed(pictures, transform), workers), workers)
        for workers in dict.fromkeys(counts)
        if workers <= store.cores()
    )
    return {
        "value": images / took,
        "limit": ours["limit"],
        "note": f"{workers} workers; ours is {ours['value'] * took / images:.1f} times as fast",
    }


def _loaded(recipe, device: str, sizes: dict, pictures, workers: int) -> float:
    """Return seconds for an epoch of our loop that a DataLoader of so many workers feeds."""
    import torch

    training = _training(recipe, device, sizes)
    loader = torch.utils.data.DataLoader(
        pictures,
        recipe.batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )

    def epoch(rng):
        for views in loader:
            yield (
                [view.to(device) for view in views],
                torch.zeros(recipe.batch, dtype=torch.int64, device=device),
            )

    training.feed.epoch = epoch
    return bench_common.best(training.run_epoch, device, sizes["repeats"])


class _Transformed:
    def __init__(self, pictures, transform):
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int):
        return self.transform(self.pictures[i])


def rows(device: str, sizes: dict) -> list[dict]:
    """Return a row per setting: VICReg in each of `sizes["grid"]`, then every criterion."""
    from dejavu_utils.models import pairs, train

    found = []
    settings = [("vicreg", grid) for grid in sizes["grid"]] + [
        (criterion, {}) for criterion in sizes["criteria"]
    ]
    for criterion, changes in settings:
        recipe = pairs.recipe(criterion, sizes["recipe"] | changes)
        name = " ".join([criterion, *(f"{key}={value}" for key, value in changes.items())])
        how = (
            "images/s",
            device,
            str(train.precision(recipe.precision, device)).removeprefix("torch."),
        )
        ours = bench_common.row("training", name, *how, measure, recipe, device, sizes)
        found.append(ours)
        if changes and not (
            device == "cuda" and recipe.precision == "fp32"
        ):  # it takes minutes where workers feed it
            usual = "  the usual pipeline (lightly)"
            found.append(
                bench_common.row("training", usual, *how, _usual, recipe, device, sizes, ours)
            )
    if sizes["beside"]:
        how = "images/s", device, str(train.precision("auto", device)).removeprefix("torch.")
        found.append(
            bench_common.row(
                "training", "two jobs of 1 thread side by side", *how, _side_by_side, sizes
            )
        )
    return found


def _side_by_side(sizes: dict) -> dict:
    """Return images/s of two processes together: what `make figures` does on two cores."""
    code = (
        "import json, sys; sys.path[:0] = ['.', 'tests/bench']; import bench_training as b; "
        "from dejavu_utils.models import pairs; sizes = json.loads(sys.argv[1]); "
        "print(b.measure(pairs.recipe('vicreg', sizes['recipe'] | {'threads': 1}), 'cpu', "
        "sizes)['value'])"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(sizes)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    return {"value": sum(float(process.communicate()[0]) for process in both)}
