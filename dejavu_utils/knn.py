"""Exact k-nearest-neighbour search and label votes, with the same answer for every tile size, backend and device.

The search has three steps. A float32 matrix product gives, for every pair, a *lower bound* of the squared distance:
the usual |b|^2 - 2 q.b + |q|^2 with the largest possible rounding error already subtracted. The `k + margin` smallest
bounds are candidates, and their distances are computed again in float64 from direct differences. If the k-th of those
is smaller than the largest bound kept, no other row can be closer, and the answer is proven; the few queries where it
is not go through the same steps in float64, and at last through all of the bank. The fast step decides only how long
the search takes, never what it returns.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "faiss")
PAIRS = 1 << 22  # (query, candidate) pairs ranked at a time
VALUES = 1 << 21  # float64 differences held at a time (16 MB: stays near the processor's caches)


class Votes(NamedTuple):
    """The neighbours' votes: `counts` (q, classes) int64, `ranking` (q, 5) int64, `confidence` (q,) float64 in nats."""

    counts: Tensor
    ranking: Tensor
    confidence: Tensor


def tree_sum(values: Tensor) -> Tensor:
    """Return the sum over the last axis, halving it until one value is left; `values` is overwritten.

    Library reductions choose their order by device and thread count. Element-wise additions do not, so this one gives
    the same bits everywhere, and its rounding error grows with log2 of the length only.
    """
    length = values.shape[-1]
    while length > 1:
        half = (length + 1) // 2
        values[..., : length - half] += values[..., half:length]
        length = half
    return values[..., 0].clone()


def _plain(queries: Tensor, bank: Tensor) -> bool:
    """Return whether float32 can hold the sums of squares; raise ValueError on NaN or infinity."""
    largest = 0.0
    for name, values in (("queries", queries), ("bank", bank)):
        extremes = torch.stack(torch.aminmax(values)).float() if values.numel() else torch.zeros(2)
        if not torch.isfinite(extremes).all():
            row = int((~torch.isfinite(values.float()).all(1)).nonzero()[0])
            raise ValueError(f"knn.search: {name} row {row} holds NaN or infinity (as float32); expected finite "
                             "embeddings. Look for a diverged checkpoint.")
        largest = max(largest, float(extremes.abs().max()))
    return 8 * queries.shape[1] * largest**2 < 1e37


def _check(queries: Tensor, bank: Tensor, k: int, backend: str, tile: int | None) -> None:
    """Raise ValueError unless the arguments of `search` fit together."""
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1] or queries.shape[1] == 0:
        raise ValueError(f"knn.search: queries {tuple(queries.shape)} and bank {tuple(bank.shape)}; expected (q, d) "
                         "and (n, d) of one width d. Were both embedded by the same model and layer?")
    if not 1 <= k <= len(bank):
        raise ValueError(f"knn.search: k = {k}; expected 1 <= k <= {len(bank)}, the bank's size. Lower k or enlarge X.")
    if backend not in BACKENDS or (tile is not None and tile < 1):
        raise ValueError(f"knn.search: backend {backend!r}, tile {tile}; expected one of {BACKENDS}, tile >= 1.")


@contextlib.contextmanager
def _full_precision(device: torch.device):
    """Make matrix products true float32: no TF32, no bfloat16, no autocast. The error bound assumes it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _slack(width: int, dtype: torch.dtype) -> float:
    """Return the largest error of a bound, as a share of |q|^2 + |b|^2, for any order of summation.

    A dot product of d terms errs by at most d u |q||b| to first order; 32 more cover centring, norms (taken in float64)
    and the last additions. Doubled for faiss, whose dot product carries |b|^2 as one more term.
    """
    unit = torch.finfo(dtype).eps / 2
    share = (width + 32) * (2 * unit + 2.0**-52)
    return share / (1 - share)


def _smallest_torch(queries: Tensor, bank: Tensor, norms: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return the `keep` smallest norms - 2 q.b per query and their columns, both (q, keep)."""
    bounds = torch.mm(queries * -2, bank.T).add_(norms)
    return bounds.topk(keep, largest=False, sorted=False)


def _smallest_faiss(queries: Tensor, bank: Tensor, norms: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return what `_smallest_torch` returns, from faiss's inner-product search on the CPU (float32 only)."""
    import faiss  # after torch: both bring CUDA libraries, and torch's must be loaded first

    left = torch.nn.functional.pad(queries, (0, 1), value=1.0).cpu().numpy()
    right = torch.cat([bank, norms[:, None] / -2], 1).cpu().numpy()
    inner, column = faiss.knn(left, right, keep, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(inner).to(queries.device) * -2, torch.from_numpy(column).to(queries.device)


def _candidates(queries: Tensor, bank: Tensor, keep: int, dtype: torch.dtype, backend: str, tile: int):
    """Return candidate columns (q, keep) and a bound (q,) float64 that every other row's distance reaches.

    The bank is streamed in tiles. Vectors are centred first: a common offset would swamp the differences.
    """
    centre = bank[:4096].float().mean(0).to(queries.device, dtype)
    width, smallest = queries.shape[1], (_smallest_faiss if backend == "faiss" else _smallest_torch)
    shrink = 1 - _slack(width, dtype)
    queries = queries.to(dtype) - centre
    best, column = queries[:, :0], torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), tile):
        part = bank[start : start + tile].to(queries.device).float().to(dtype) - centre
        norms = torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square() * shrink
        value, index = smallest(queries, part, norms.to(dtype), min(keep, len(part)))
        value, index = torch.cat([best, value], 1), torch.cat([column, index + start], 1)
        best, order = value.topk(min(keep, value.shape[1]), largest=False, sorted=False)
        column = index.gather(1, order)
    own = torch.linalg.vector_norm(queries, dim=1, dtype=torch.float64).square() * shrink
    return column, best.amax(1).double() + own - 8 * width * torch.finfo(dtype).tiny


def _rank(queries: Tensor, bank: Tensor, columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k smallest float64 squared distances among `columns` (q, c) and their columns; ties by column."""
    columns = columns.sort(1).values
    flat, width = columns.reshape(-1), columns.shape[1]
    distances = torch.empty(len(flat), dtype=torch.float64, device=queries.device)
    step = max(1, VALUES // queries.shape[1])
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        row = torch.arange(start, start + len(part), device=queries.device) // width
        other = bank[part.to(bank.device)].to(queries.device).float().double()
        difference = queries[row].double() - other
        distances[start : start + step] = tree_sum(difference.mul_(difference))
    distances = distances.reshape(columns.shape)
    order = torch.argsort(distances, dim=1, stable=True)[:, :k]
    return distances.gather(1, order), columns.gather(1, order)


def _attempt(queries: Tensor, bank: Tensor, k: int, keep: int, dtype: torch.dtype, backend: str, tile: int):
    """Return distances, columns and whether each row is proven, looking at `keep` candidates per query."""
    if keep == len(bank):
        column = torch.arange(keep, device=queries.device).expand(len(queries), keep)
        return *_rank(queries, bank, column, k), torch.ones(len(queries), dtype=torch.bool, device=queries.device)
    with _full_precision(queries.device):
        column, bound = _candidates(queries, bank, keep, dtype, backend, tile)
    distance, column = _rank(queries, bank, column, k)
    return distance, column, distance[:, -1] < bound


@torch.no_grad()
def search(queries: Tensor, bank: Tensor, k: int, backend: str = "auto", tile: int | None = None):
    """Return squared L2 distances (q, k) float64, ascending, and bank rows (q, k) int64; ties by the lower row.

    Exact in the float32 values of `queries` (q, d) and `bank` (n, d): half types widen, float64 is rounded. Identical
    for every `tile` (rows per block, either side), `backend` ("torch" or "faiss"; "auto" is torch, the faster one when
    measured) and device. Works on the device of `queries`; the bank may stay elsewhere and is streamed. ValueError on
    NaN, on widths that differ and on k > n. The paper's attack: L2, raw embeddings, neighbours in the public set X.
    """
    _check(queries, bank, k, backend, tile)
    plain = _plain(queries, bank)
    if "mps" in (queries.device.type, bank.device.type):  # Apple's GPU has no float64
        queries, bank = queries.cpu(), bank.cpu()
    queries = queries.float()
    tile = tile or (4096 if queries.device.type == "cpu" else 16384)
    distances = torch.empty(len(queries), k, dtype=torch.float64, device=queries.device)
    columns = torch.empty_like(distances, dtype=torch.int64)
    few, n = k + k // 4 + 16, len(bank)
    first = [(few, torch.float32, backend)] if plain else []
    todo = torch.arange(len(queries), device=queries.device)
    for keep, dtype, engine in [*first, (4 * few, torch.float64, "torch"), (n, torch.float64, "torch")]:
        keep, missed = min(keep, n), [todo[:0]]
        for rows in filter(len, todo.split(max(1, min(tile, PAIRS // keep)))):
            distances[rows], columns[rows], proven = _attempt(queries[rows], bank, k, keep, dtype, engine, tile)
            missed.append(rows[~proven])
        todo = torch.cat(missed)
    return distances, columns


def _negative_entropy(counts: Tensor, k: int) -> Tensor:
    """Return sum p log p (q,) float64 in nats for vote counts that sum to k.

    The counts are sorted first and their terms looked up, so two histograms with the same counts in other classes get
    the same bits: ties in confidence are real ties.
    """
    terms = torch.tensor([0.0, *(i / k * math.log(i / k) for i in range(1, k + 1))], dtype=torch.float64)
    largest = counts.topk(min(k, counts.shape[1]), dim=1).values
    return tree_sum(terms.to(counts.device)[largest])


def vote(labels: Tensor, distances: Tensor, classes: int) -> Votes:
    """Return the votes of k neighbours: counts (q, classes), top 5 classes (q, 5), confidence (q,) = -entropy in nats.

    `labels` (q, k) int, `distances` (q, k) ascending. A class with more votes comes first; ties go to the lower mean
    distance, then to the lower class index. -1 fills `ranking` where fewer than 5 classes have a vote.
    """
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"knn.vote: labels {int(labels.min())} to {int(labels.max())}; expected 0 to {classes - 1}.")
    labels, (rows, k) = labels.long(), labels.shape
    counts = torch.zeros(rows, classes, dtype=torch.int64, device=labels.device)
    sums = torch.zeros_like(counts, dtype=torch.float64)
    for i in range(k):  # one neighbour at a time: a fixed order of additions on every device
        counts.scatter_add_(1, labels[:, i : i + 1], torch.ones_like(labels[:, :1]))
        sums.scatter_add_(1, labels[:, i : i + 1], distances[:, i : i + 1].double())
    left, mean = counts.clone(), sums / counts.clamp(min=1)
    ranking = torch.full((rows, 5), -1, dtype=torch.int64, device=labels.device)
    for i in range(min(5, classes)):
        most = left.amax(1, keepdim=True)
        pick = torch.where(left == most, mean, torch.inf).argmin(1, keepdim=True)
        ranking[:, i : i + 1] = torch.where(most > 0, pick, -1)
        left.scatter_(1, pick, 0)
    return Votes(counts, ranking, _negative_entropy(counts, k))
