"""How fast this machine trains, embeds and searches, each next to what limits it: `make bench` prints tables.

Not a test: speed depends on what else runs. Every figure is the best of three runs after a warm-up.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time

GRID = {"threads": [1, 2], "precision": ["fp32", "bf16"], "channels_last": [True, False], "compile": [False],
        "batch": [50, 200]}


def _best(work, repeats: int = 3) -> float:
    """Return the shortest of `repeats` wall times, in seconds, after one run that does not count."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def training_row(threads: int, precision: str, channels_last: bool, compile: bool, batch: int, steps: int = 6) -> dict:
    """Return images/s of our loop, of the same steps on ready-made views (the limit), and the share of that limit."""
    import torch

    from dejavu_utils import train
    from dejavu_utils.views import view

    torch.set_num_threads(threads)
    pixels = torch.randint(0, 256, (max(200, batch), 3, 48, 48), dtype=torch.uint8)
    recipe = train.Recipe(batch=batch, precision=precision, threads=threads, constants={})
    training = train.Training(pixels, recipe, 100, "bench")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    training.encoder.to(memory_format=layout)
    if compile:
        training.encoder.forward = torch.compile(training.encoder.forward)
    index, rng = torch.arange(batch), train.stream(0, "bench")
    ready = view(pixels[:batch], recipe.size, training.views, rng)

    def loop():
        for _ in range(steps):
            training._step(index, 1e-3, rng)

    ours = _best(loop)
    real, train.view = train.view, lambda *a, **k: ready
    try:
        limit = _best(loop)
    finally:
        train.view = real
    return {"images/s": steps * batch / ours, "limit": steps * batch / limit, "share": limit / ours}


def training_table() -> None:
    """Print the grid; two one-thread jobs side by side are how `train.fit_all` fills two cores."""
    print("training, SmallNet width 32, 32 px, two views an image (images/s)")
    for values in itertools.product(*GRID.values()):
        row = training_row(**dict(zip(GRID, values, strict=True)))
        setting = "  ".join(f"{name}={value!s:5}" for name, value in zip(GRID, values, strict=True))
        rates = f"ours {row['images/s']:6.0f}  limit {row['limit']:6.0f}  {row['share']:.0%} of it"
        print(f"  {setting}  {rates}", flush=True)
    row = training_row(1, "auto", True, True, 50)
    print(f"  threads=1 torch.compile batch=50: {row['images/s']:.0f}")
    code = ("import sys; sys.path[:0] = ['.', 'tests']; import bench; "
            "print(bench.training_row(1, 'auto', True, False, 50)['images/s'])")
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    total = sum(float(process.communicate()[0]) for process in both)
    print(f"  two jobs of one thread, batch 50, side by side: {total:.0f} together")


def search_table(queries: int = 2000, bank: int = 20000, width: int = 512, k: int = 20) -> None:
    """Print seconds of our exact search and of its peers on the same data."""
    import faiss
    import torch
    from sklearn.neighbors import NearestNeighbors

    from dejavu_utils import knn, store

    torch.set_num_threads(store.cores())
    q, x = torch.randn(queries, width), torch.randn(bank, width)

    def batches_of_64():
        index = faiss.IndexFlatL2(width)
        index.add(x.numpy())
        for chunk in q.split(64):
            index.search(chunk.numpy(), k)

    peers = {"ours (exact, float64 re-rank)": lambda: knn.search(q, x, k), "faiss flat, batches of 64": batches_of_64,
             "torch.cdist + topk": lambda: torch.cdist(q, x).topk(k, largest=False),
             "scikit-learn brute": lambda: NearestNeighbors(n_neighbors=k, algorithm="brute").fit(x).kneighbors(q),
             "matrix product alone": lambda: q @ x.T}
    print(f"k-NN, {queries} x {bank} x {width}, k = {k} (seconds)")
    for name, work in peers.items():
        print(f"  {name:32s} {_best(work):6.2f}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    import resource

    training_table()
    search_table()
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
