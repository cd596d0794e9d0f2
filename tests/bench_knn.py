"""How fast our exact k-NN is next to its peers, in one run: `make bench`, or bench_knn.py [repeats] [threads].

Not a test: speed depends on what else runs. The competitors take turns, each after one run that does not count (their
thread pools disturb each other), and the shortest wall time is shown, with the processor time of the cheapest run,
which a busy machine changes less, and the median over the turns of peer's time / ours. The peers work in float32 and
prove nothing: how many of their neighbours are the exact ones is shown, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from statistics import median

SHAPES = ((600, 2000, 512), (2000, 20000, 512), (500, 5000, 2048), (5000, 50000, 256))
LIMIT = "matrix product alone"


def peers(shape: tuple[int, int, int], k: int) -> dict:
    """Return name -> function that searches the k neighbours of the same normal data, of `shape` (q, n, d)."""
    import faiss
    import torch
    from sklearn.neighbors import NearestNeighbors

    from dejavu_utils import knn

    source = torch.Generator().manual_seed(0)
    q, x = (torch.randn(rows, shape[2], generator=source) for rows in shape[:2])
    product = torch.empty(shape[0], 4096)

    def batches_of_64():
        index = faiss.IndexFlatL2(shape[2])
        index.add(x.numpy())
        return torch.cat([torch.from_numpy(index.search(part.numpy(), k)[1]) for part in q.split(64)])

    def product_alone():  # into memory that is used again, at float32
        for part in x.split(4096):
            torch.mm(q, part.T, out=product.flatten()[: len(q) * len(part)].view(len(q), -1))

    nearest = NearestNeighbors(n_neighbors=k, algorithm="brute")
    return {"ours (exact, proven)": lambda: knn.search(q, x, k)[1], "faiss flat, batches of 64": batches_of_64,
            "faiss flat, one call": lambda: torch.from_numpy(faiss.knn(q.numpy(), x.numpy(), k)[1]),
            "torch.cdist + topk": lambda: torch.cdist(q, x).topk(k, largest=False)[1],
            "scikit-learn brute": lambda: torch.from_numpy(nearest.fit(x.numpy()).kneighbors(q.numpy())[1]),
            LIMIT: product_alone}


def race(work: dict, repeats: int) -> dict:
    """Return name -> `repeats` pairs of wall and processor seconds, the competitors taking turns."""
    times = {name: [] for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            run()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def memory(shape: tuple[int, int, int], k: int, name: str, threads: int) -> float:
    """Return the MiB that one search adds to the largest size of a fresh process with the data; NaN but on Linux."""
    if not os.path.exists("/proc/self/status"):
        return float("nan")
    code = ("import sys, torch; sys.path[:0] = ['.', 'tests']; import bench_knn\n"
            f"torch.set_num_threads({threads}); work = bench_knn.peers({shape}, {k})['{name}']\n"
            "size = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024\n"
            "before = size(); work(); print(size() - before)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def table(repeats: int = 5, threads: int | None = None, k: int = 20) -> None:
    """Print one table for every shape of `SHAPES`; `threads` are all cores by default."""
    import faiss
    import torch

    from dejavu_utils import store

    threads = threads or store.cores()
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    for shape in SHAPES:
        work = peers(shape, k)
        exact, *others = work
        expected, times = work[exact](), race(work, repeats)
        print(f"k-NN, {' x '.join(map(str, shape))}, k = {k}, {threads} threads, {repeats} turns\n"
              "                              seconds  processor  of ours  neighbours right  MiB added")
        for name, pairs in times.items():
            ratio = median(peer[0] / ours[0] for peer, ours in zip(pairs, times[exact], strict=True))
            wall, cpu = (min(column) for column in zip(*pairs, strict=True))
            right = "" if name == LIMIT else f"{float((work[name]() == expected).float().mean()):.4%}"
            print(f"  {name:26s}  {wall:8.4f}  {cpu:8.4f}  {ratio:6.2f}x  {right:>15s}  "
                  f"{memory(shape, k, name, threads):9.0f}", flush=True)
        share = median(limit[0] / ours[0] for limit, ours in zip(times[LIMIT], times[exact], strict=True))
        print(f"  ours takes {1 / share:.2f} times as long as the float32 product alone: {share:.0%} of that limit\n")


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    table(*map(int, sys.argv[1:3]))
