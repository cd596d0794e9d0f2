"""How fast this machine trains, embeds and searches, each next to what limits it: `make bench` prints tables.

Not a test: speed depends on what else runs. Every figure is the best of three runs after a warm-up.
"""

from __future__ import annotations

import os
import sys
import time


def _best(work, repeats: int = 3) -> float:
    """Return the shortest of `repeats` wall times, in seconds, after one run that does not count."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


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

    import bench_training

    bench_training.table()
    search_table()
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
