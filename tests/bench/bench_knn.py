"""How fast our exact k-NN is next to its peers and to the matrix product that it cannot do without,
in one run.

Not a test: speed depends on what else runs. The competitors take turns, each after one run that
does not count (their thread pools disturb each other), and the shortest wall time is shown; the
note has the processor time of the cheapest run, which a busy machine changes less, and the median
over the turns of peer's time / ours. GiB is, on a CPU, what one search adds to a fresh process. The
product is done in the precision that our search starts with: float32 on a CPU, TF32 on a GPU. The
peers work in float32 and prove nothing: the share of their neighbours that are the exact ones is
shown; of ours, the share that brute force in float64 finds as well for a few queries.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from statistics import median

import bench_common

OURS, LIMIT, CHECKED = "ours (exact, proven)", "matrix product alone", 8
PRECISION = {"torch": "float32", "tf32": "tf32", "bf16": "bfloat16"}  # of engines


def points(shape: tuple[int, int, int], device: str):
    """Return normal queries and bank of `shape` (q, n, d), the same on every run."""
    import torch

    source = torch.Generator(device).manual_seed(0)
    return [torch.randn(rows, shape[2], generator=source, device=device) for rows in shape[:2]]


def peers(q, x, k: int) -> dict:
    """Return name -> function that searches the k neighbours of queries `q` in the bank `x`."""
    import torch

    from dejavu_utils.attack import knn, knn_engines

    def faiss_index():
        import faiss

        index = faiss.IndexFlatL2(x.shape[1])
        index.add(x.numpy())
        return torch.cat(
            [torch.from_numpy(index.search(part.numpy(), k)[1]) for part in q.split(64)]
        )

    def faiss_call():
        import faiss

        return torch.from_numpy(faiss.knn(q.numpy(), x.numpy(), k)[1])

    def brute():
        from sklearn.neighbors import NearestNeighbors

        nearest = NearestNeighbors(n_neighbors=k, algorithm="brute")
        return torch.from_numpy(nearest.fit(x.numpy()).kneighbors(q.numpy())[1])

    found = {OURS: lambda: knn.search(q, x, k)[1]}
    if q.is_cuda:
        found["faiss flat, on the GPU"] = lambda: knn_engines.ENGINES["faiss"].propose(q, x, k)[1]
    else:
        found |= {
            "faiss flat, batches of 64": faiss_index,
            "faiss flat, one call": faiss_call,
            "scikit-learn brute": brute,
        }
    if len(q) * len(x) <= 1 << 31:  # all distances at once
        found["torch.cdist + topk"] = lambda: torch.cdist(q, x).topk(k, largest=False)[1]
    return found


def product(q, x, engine: str):
    """Return a function that multiplies all queries with all of the bank in the precision of an
    engine, into memory that is used again.
    """
    import torch

    from dejavu_utils.attack import knn_engines

    if engine == "bf16":
        q, x = q.bfloat16(), x.bfloat16()
    rows, columns = (16384, 16384) if q.is_cuda else (len(q), 4096)
    memory = q.new_empty(min(rows, len(q)) * min(columns, len(x)))

    def work():
        with knn_engines.precision(q.device.type, "high" if engine == "tf32" else "highest"):
            for some in q.split(rows):
                for part in x.split(columns):
                    torch.mm(some, part.T, out=memory[: len(some) * len(part)].view(len(some), -1))

    return work


def proven(q, x, k: int, engine: str) -> float:
    """Return the share of queries whose answer an engine's first candidates prove."""
    from dejavu_utils.attack import knn, knn_engines

    first = knn_engines.ENGINES[engine]
    keep = knn.few(k, x.shape[1], first)
    return float(knn.look(q, x, k, keep, first)[2].double().mean())


def exact(q, x, k: int):
    """Return the neighbours of a few queries by brute force in float64, straight from the
    differences.
    """
    import torch

    some, how = q[:CHECKED].double(), {"compute_mode": "donot_use_mm_for_euclid_dist"}
    distances = [torch.cdist(some, part.double(), **how) for part in x.split(4096)]
    return torch.cat(distances, 1).topk(k, largest=False)[1]


def race(work: dict, repeats: int, device: str) -> dict:
    """Return name -> `repeats` pairs of wall and processor seconds, the competitors taking
    turns.
    """
    times = {name: [] for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            run()
            cpu = time.process_time()
            wall = bench_common.seconds(run, device)
            times[name].append((wall, time.process_time() - cpu))
    return times


def memory(shape: tuple[int, int, int], k: int, name: str, threads: int) -> float:
    """Return the GiB that one search adds to the largest size of a fresh process with the data; NaN
    but on Linux.
    """
    if not os.path.exists("/proc/self/status"):
        return float("nan")
    code = (
        "import sys, torch; sys.path[:0] = ['.', 'tests/bench']; import bench_knn as b\n"
        f"torch.set_num_threads({threads}); b.peers(*b.points((1, {k}, 4), 'cpu'), "
        f"{k})[{name!r}]()  # imports\n"
        f"work = b.peers(*b.points({shape}, 'cpu'), {k})[{name!r}]\n"
        "size = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / "
        "2**20\n"
        "before = size(); work(); print(size() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def fitting(shape, free: float) -> tuple[int, int, int]:
    """Return `shape` (q, n, d), with fewer rows if the data would take more than half of `free`
    bytes.
    """
    q, n, d = shape
    share = min(1.0, free / 2 / (4 * d * (q + n)))
    return max(1, int(q * share)), max(1, int(n * share)), d


def rows(device: str, sizes: dict) -> list[dict]:
    """Return a row for each competitor and shape of `sizes["shapes"]`: seconds of a search."""
    import torch

    torch.set_num_threads(sizes["threads"])
    with contextlib.suppress(ModuleNotFoundError):
        import faiss  # after torch: both bring CUDA libraries

        faiss.omp_set_num_threads(sizes["threads"])
    found = []
    for shape in sizes["shapes"]:
        if device == "cuda":
            torch.cuda.empty_cache()
            shape = fitting(shape, torch.cuda.mem_get_info()[0])
        found += _rows(tuple(shape), device, sizes)
    return found


def _rows(shape: tuple[int, int, int], device: str, sizes: dict) -> list[dict]:
    q, x = points(shape, device)
    work, known = peers(q, x, sizes["k"]), {}
    return [
        bench_common.row(
            "k-NN",
            f"{' x '.join(map(str, shape))}: {name}",
            "s",
            device,
            "float32",
            _ours if name == OURS else _peer,
            work,
            name,
            q,
            x,
            known,
            sizes,
        )
        for name in work
    ]


def _ours(work: dict, name: str, q, x, known: dict, sizes: dict) -> dict:
    """Return seconds of our search and of the product alone, and keep our answer for the peers in
    `known`.
    """
    k, engine = sizes["k"], "tf32" if q.is_cuda else "torch"  # what "auto" is
    answer = work[OURS]()
    right = float((answer[:CHECKED] == exact(q, x, k)).float().mean())
    times = race({OURS: work[OURS], LIMIT: product(q, x, engine)}, sizes["turns"], q.device.type)
    limit = min(wall for wall, _ in times[LIMIT])
    known["answer"] = answer
    speed = 2 * len(q) * x.numel() / limit / 1e12
    share = f"{proven(q, x, k, engine):.1%} of the queries proven at this precision"
    note = f"k = {k}; product {speed:.3g} TFLOP/s; {share}; {_processor(times[OURS])}"
    return {
        "value": min(wall for wall, _ in times[OURS]),
        "limit": limit,
        "right": right,
        "note": note,
        "precision": PRECISION[engine],
    } | _memory(name, q, x, sizes)


def _peer(work: dict, name: str, q, x, known: dict, sizes: dict) -> dict:
    """Return seconds of a peer, racing ours, and the share of its neighbours that are the exact
    ones.
    """
    answer = work[name]()
    times = race({OURS: work[OURS], name: work[name]}, sizes["turns"], q.device.type)
    ratio = median(
        theirs[0] / mine[0] for theirs, mine in zip(times[name], times[OURS], strict=True)
    )
    right = float((answer == known["answer"]).float().mean()) if known else float("nan")
    return {
        "value": min(wall for wall, _ in times[name]),
        "right": right,
        "note": f"takes {ratio:.2f} times as long as ours; {_processor(times[name])}",
    } | _memory(name, q, x, sizes)


def _processor(pairs: list) -> str:
    return f"processor {min(cpu for _, cpu in pairs):.4f} s"


def _memory(name: str, q, x, sizes: dict) -> dict:
    measured = sizes["memory"] and not q.is_cuda
    return (
        {"gib": memory((*q.shape[:1], *x.shape), sizes["k"], name, sizes["threads"])}
        if measured
        else {}
    )
