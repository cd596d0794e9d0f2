"""Engines that propose neighbours: `propose(queries, bank, keep)` returns the `keep` smallest
squared distances (q, keep) as float32 has them, ascending, and their rows of the bank.

`knn.search` proves its answer from this alone: an engine works in full float32, from differences or
as |q|^2 - 2 q.b + |b|^2, and returns no row in place of one that it finds nearer. Which of equal
rows it returns is free. It is given finite float32 points on one device, none above 1e15 in size.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Engine = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]

PAIRS = 1 << 24  # distances in memory at a time; a GPU takes 16 times as many
MOST = 1024  # neighbours that faiss may be asked for on a GPU


def named(name: str, device: torch.device) -> Engine:
    """Return the engine "torch" or "faiss"; "auto" is faiss on a CPU if it is installed, else
    torch. ValueError on other names.
    """
    if name == "auto":
        # On macOS, faiss and torch bring an OpenMP each, and two in one process may crash.
        usable = sys.platform == "linux" and importlib.util.find_spec("faiss") is not None
        name = "faiss" if usable and device.type == "cpu" else "torch"

    engines = {"torch": torch_product, "faiss": faiss_flat}
    if name not in engines:
        raise ValueError(f'knn.search: engine "{name}"; expected auto, {" or ".join(engines)}.')
    return engines[name]


def torch_product(queries: Tensor, bank: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Propose from a matrix product of all pairs."""
    pairs = PAIRS * (16 if queries.is_cuda else 1)
    norms = bank.square().sum(1)  # (n,)
    values, rows = [], []

    with full_precision(queries.device.type):
        for part in queries.split(max(1, pairs // len(bank))):
            own = part.square().sum(1, keepdim=True)  # (b, 1)
            distance = torch.addmm(norms, part, bank.T, alpha=-2)  # (b, n)
            value, row = distance.topk(keep, largest=False)
            values.append(value + own)
            rows.append(row)

    return torch.cat(values), torch.cat(rows)


def faiss_flat(queries: Tensor, bank: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Propose with faiss's search without an index, on a GPU with faiss-gpu's."""
    if queries.is_cuda:
        return (
            _faiss_gpu(queries, bank, keep) if keep <= MOST else torch_product(queries, bank, keep)
        )

    import faiss  # after torch: both bring CUDA libraries, and torch's must be loaded first

    faiss.omp_set_num_threads(torch.get_num_threads())
    value, row = faiss.knn(queries.numpy(), bank.numpy(), keep)
    return torch.from_numpy(value), torch.from_numpy(row)


def _faiss_gpu(queries: Tensor, bank: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    import faiss
    import faiss.contrib.torch_utils

    device = queries.device.index or 0
    return faiss.knn_gpu(_resources(device), queries, bank, keep, device=device)


@functools.cache
def _resources(device: int) -> Any:
    """Return faiss's memory on a GPU, reserved once a process."""
    import faiss

    with torch.cuda.device(device):
        return faiss.StandardGpuResources()


@contextlib.contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Multiply in float32 whatever the caller allows: no TF32, no bfloat16, no autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
