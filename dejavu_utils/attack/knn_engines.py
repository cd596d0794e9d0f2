"""Engines that propose neighbours: faiss, or a matrix product in float32, TF32 or bfloat16.

`knn.search` proves its answer from what an `Engine` says about itself, whatever it proposes: it
returns no row in place of one that it finds nearer, and its sums are off by no more than it says.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PAIRS = 1 << 24  # distances in memory at a time
GROUP = 8  # distances of which the smallest is looked at first
MOST = 1024  # neighbours that faiss may be asked for on a GPU
FEW = 20  # queries times width, from which on faiss multiplies matrices


@dataclass(frozen=True)
class Engine:
    """A way to propose neighbours. `propose(queries, bank, keep)` returns the `keep` smallest
    squared distances (q, keep) float32, in any order, and their rows of the bank. Which of equal
    rows it returns is free. It is given finite points of `bits` significant bits on one device.

    It takes differences, or |q|^2 - 2 q.b + |b|^2, and adds in float32, in any order. `slack`: how
    many times an addition's error may be that of rounding to the nearest float32.
    """

    propose: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    bits: int = 24
    slack: float = 1.0


def named(name: str, device: torch.device) -> Engine:
    """Return the engine "torch" (a product in float32), "faiss", "tf32" or "bf16" (coarse products,
    for GPUs). "auto" is tf32 on a GPU, faiss on a CPU if it is installed, else torch. ValueError on
    other names.
    """
    if name == "auto":
        # On macOS, faiss and torch bring an OpenMP each, and two in one process may crash.
        usable = sys.platform == "linux" and importlib.util.find_spec("faiss") is not None
        on_cpu = "faiss" if usable else "torch"
        name = "tf32" if device.type == "cuda" else on_cpu

    if name not in ENGINES:
        raise ValueError(f'knn.search: engine "{name}"; expected auto, {", ".join(ENGINES)}.')
    return ENGINES[name]


def product(queries: Tensor, bank: Tensor, keep: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Propose from a matrix product of all pairs, its factors in `dtype`."""
    norms = bank.square().sum(1)  # (n,)
    values, rows = [], []

    for part in queries.split(max(1, room(PAIRS, queries.device) // len(bank))):
        distance = multiply(part * -2, bank, dtype).add_(norms)  # (b, n), less |q|^2
        value, row = smallest(distance, keep)
        values.append(value + part.square().sum(1, keepdim=True))
        rows.append(row)

    return torch.cat(values), torch.cat(rows)


def multiply(left: Tensor, right: Tensor, dtype: str) -> Tensor:
    """Return left @ right.T in float32, whatever precision the caller allows. On a CPU all three
    `dtype` multiply in float32: what was rounded before, keeps its value.
    """
    with precision(left.device.type, "high" if dtype == "tf32" else "highest"):
        if dtype == "bf16" and left.is_cuda:
            return torch.mm(left.bfloat16(), right.bfloat16().T, out_dtype=torch.float32)
        return torch.mm(left, right.T)


@contextlib.contextmanager
def precision(device: str, name: str) -> Iterator[None]:
    """Multiply float32 in the precision `name` ("highest", "high": TF32), without autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def smallest(values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return the `keep` smallest of each row of `values` (q, n), and their columns, in any order.

    They are among the `keep` groups whose smallest members are smallest, and a minimum is cheap.
    """
    groups = values.shape[1] // GROUP
    if groups < 2 * keep:
        return values.topk(keep, largest=False, sorted=False)

    grouped = values[:, : groups * GROUP].unflatten(1, (GROUP, groups))
    near = grouped.amin(1).topk(keep, largest=False, sorted=False).indices  # (q, keep)

    member = torch.arange(GROUP, device=values.device)[:, None] * groups  # (GROUP, 1)
    column = (near[:, None] + member).flatten(1)  # (q, GROUP * keep)
    rest = torch.arange(groups * GROUP, values.shape[1], device=values.device)
    column = torch.cat([column, rest.expand(len(values), -1)], 1)

    value, best = values.gather(1, column).topk(keep, largest=False, sorted=False)
    return value, column.gather(1, best)


def faiss_flat(queries: Tensor, bank: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Propose with faiss's search without an index, on a GPU with faiss-gpu's."""
    if queries.is_cuda and keep > MOST:
        return product(queries, bank, keep, "float32")

    import faiss  # after torch: both bring CUDA libraries, and torch's must be loaded first

    if queries.is_cuda:
        import faiss.contrib.torch_utils

        device = queries.device.index or 0
        return faiss.knn_gpu(_resources(device), queries, bank, keep, device=device)

    faiss.omp_set_num_threads(torch.get_num_threads())
    faiss.cvar.distance_compute_blas_threshold = FEW  # by default 128,000: six times slower
    value, row = faiss.knn(queries.numpy(), bank.numpy(), keep)
    return torch.from_numpy(value), torch.from_numpy(row)


@functools.cache
def _resources(device: int) -> Any:
    """Return faiss's memory on a GPU, reserved once a process."""
    import faiss

    with torch.cuda.device(device):
        return faiss.StandardGpuResources()


def rounded(points: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return points (n, d) rounded to `bits` significant bits, and how far each moved at most (n,):
    the distance between two points changes by no more than they move.
    """
    if bits == 24:
        return points, points.new_zeros(len(points))

    high = points * (2.0 ** (24 - bits) + 1)  # Veltkamp's splitting
    high = high - (high - points)

    width = points.shape[1]
    limits = torch.finfo(torch.float32)
    moved = torch.linalg.vector_norm(points - high, dim=1)
    moved = moved * (1 + width * limits.eps) + math.sqrt(width * limits.tiny)  # squares underflow
    return high, moved


def room(values: int, device: torch.device) -> int:
    """Return how many values to hold at a time: those that fit a CPU's caches, or more on a GPU."""
    return values * 8 if device.type == "cuda" else values


ENGINES = {
    "torch": Engine(functools.partial(product, dtype="float32")),
    "faiss": Engine(faiss_flat),
    # A matrix unit adds several products at once and cuts their last bits off.
    "tf32": Engine(functools.partial(product, dtype="tf32"), bits=11, slack=4),
    "bf16": Engine(functools.partial(product, dtype="bf16"), bits=8, slack=4),
}
