"""Training throughput, side by side in one run: our loop, its limit (ready-made views), and the usual pipeline.

Not a test: speed depends on what else runs. Every figure is the best of three, after a warm-up.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time

STEPS = 6


def best(work, repeats: int = 3) -> float:
    """Return the shortest of `repeats` wall times, in seconds, after one run that does not count."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def _training(recipe, device: str, side: int):
    """Return a Training over random pictures, one epoch of STEPS steps."""
    import torch

    from dejavu_utils import train

    torch.set_num_threads(recipe.threads)
    pixels = torch.randint(0, 256, (STEPS * recipe.batch, 3, side, side), dtype=torch.uint8)
    labels = torch.arange(len(pixels)) % 10
    return train.Training(pixels, recipe, 1000, "bench", device, labels, 10)


def row(recipe, device: str = "cpu", side: int = 48, usual: bool = True) -> dict:
    """Return images/s of our loop, of its limit and of the usual pipeline, with the shares, and peak memory (GiB)."""
    import torch

    training, images = _training(recipe, device, side), STEPS * recipe.batch
    ours = best(training.run_epoch)
    ready = next(training.feed.epoch(torch.Generator(device).manual_seed(0)))
    training.feed.epoch = lambda rng: (ready for _ in range(STEPS))
    limit = best(training.run_epoch)
    found = {"ours": images / ours, "limit": images / limit, "share": limit / ours}
    if usual:
        seconds, workers = min((_usual(recipe, device, side, workers), workers) for workers in (0, 1, 2, 8)
                               if workers <= (os.cpu_count() or 1))
        found |= {"usual": images / seconds, "times": seconds / ours, "workers": workers}
    return found | {"GiB": _peak(device)}


def _usual(recipe, device: str, side: int, workers: int) -> float:
    """Return seconds for the same images through lightly's SimCLR transform in a DataLoader of so many workers."""
    import numpy as np
    import torch
    from lightly.transforms import SimCLRTransform
    from PIL import Image

    transform = SimCLRTransform(input_size=recipe.size, gaussian_blur=recipe.views.get("blur", 1.0) / 2)
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
                for _ in range(STEPS * recipe.batch)]
    training = _training(recipe, device, side)
    loader = torch.utils.data.DataLoader(_Transformed(pictures, transform), recipe.batch, shuffle=True,
                                         num_workers=workers, drop_last=True, persistent_workers=workers > 0)

    def epoch(rng):
        for views in loader:
            yield [view.to(device) for view in views], torch.zeros(recipe.batch, dtype=torch.int64, device=device)

    training.feed.epoch = epoch
    return best(training.run_epoch)


class _Transformed:
    def __init__(self, pictures, transform):
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int):
        return self.transform(self.pictures[i])


def _peak(device: str) -> float:
    import resource

    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def table() -> None:
    """Print a row per setting; on a GPU the small-image ResNet, on a CPU what the notebooks train."""
    import torch

    from dejavu_utils import methods, pairs, store

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"training on {device}: images/s, all views of an image counted once\n"
          f"  {'setting':40} {'ours':>7} {'limit':>7} {'share':>6} {'usual':>7} {'times':>6}  peak GiB")
    for name, recipe, side in _settings(device, methods, pairs, store):
        found = row(recipe, device, side, usual=recipe.criterion == "vicreg")
        usual = f"{found['usual']:7.0f} {found['times']:5.1f}x" if "usual" in found else " " * 14
        print(f"  {name:40} {found['ours']:7.0f} {found['limit']:7.0f} {found['share']:6.0%} {usual}  "
              f"{found['GiB']:.1f}", flush=True)
    if device == "cpu":
        print(f"  two jobs of one thread side by side, what `make figures` does: {_side_by_side():.0f} together")


def _settings(device: str, methods, pairs, store):
    """Yield (name, recipe, side of the pictures in px)."""
    if device == "cuda":
        changes = {"encoder": "resnet18-s", "size": 64, "batch": 512, "projector": "2048-2048-2048"}
        grid = [{"precision": p, "compile": c} for p in ("fp32", "bf16") for c in (False, True)]
    else:
        changes, cores = {}, store.cores()
        grid = [{"threads": t, "precision": p} for t in dict.fromkeys((1, cores)) for p in ("fp32", "bf16")]
        grid += [{"encoder": "small8", "projector": "32-32-32", "threads": cores}, {"compile": True}]
    side = 64 if device == "cuda" else 48
    for each in grid:
        text = "vicreg " + " ".join(f"{key}={value}" for key, value in each.items())
        yield text, pairs.recipe("vicreg", changes | each), side
    for criterion in methods.METHODS:
        yield criterion, dataclasses.replace(pairs.recipe(criterion, changes)), side


def _side_by_side() -> float:
    code = ("import sys; sys.path[:0] = ['.', 'tests']; import bench_training as b; from dejavu_utils import pairs; "
            "print(b.row(pairs.recipe('vicreg', {}), usual=False)['ours'])")
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return sum(float(process.communicate()[0]) for process in both)
