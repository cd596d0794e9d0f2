"""Exact k-nearest-neighbour search and label votes, with the same answer for every tile, backend
and device.

A fast matrix product gives, for every pair, a *lower bound* of the squared distance: |q|^2 - 2
q.b + |b|^2, less the largest possible error. The smallest bounds are candidates. The first k are
measured in float64, from differences, and so is every other that may be as close as the k-th of
them. If a candidate is left over, so is every other row: proven. The few queries where none is go
through the same steps more precisely, and at last with all of the bank.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "faiss")
BITS = {
    "faiss": 24,
    "highest": 24,
    "high": 11,
    "medium": 8,
}  # of factors, by engine: float32, float32, TF32, bfloat16
TIES = ("nearest", "lowest class")  # who wins of classes with equally many votes
FOLD, AGAIN, PAIRS = (
    8,
    4,
    1 << 20,
)  # bounds, and minima, whose minimum is looked at first; pairs ranked at a time
TILE, ROWS, DIFFERENCES, GPU = (
    1 << 21,
    512,
    1 << 17,
    32,
)  # bank values, queries, differences: fit in caches; GPU: more


class Votes(NamedTuple):
    """The neighbours' votes: `counts` (q, classes) int64, `ranking` (q, 5) int64, `confidence` (q,)
    float64 in nats.
    """

    counts: Tensor
    ranking: Tensor
    confidence: Tensor


def tree_sum(values: Tensor, left: int = 1) -> Tensor:
    """Return sums over the last axis, halved until at most `left` values are left; `values` is
    overwritten.

    Library reductions choose their order, element-wise additions do not: the same bits everywhere,
    and a small error.
    """
    while values.shape[-1] > left:
        values, rest = values.tensor_split(2, -1)  # where the length is odd, the middle one stays
        values.narrow(-1, 0, rest.shape[-1]).add_(rest)
    return values.clone()


def _check(queries: Tensor, bank: Tensor, k: int, backend: str, tile: int | None) -> None:
    """Raise ValueError unless the arguments of `search` fit together."""
    if (
        queries.ndim != 2
        or bank.ndim != 2
        or queries.shape[1] != bank.shape[1]
        or queries.shape[1] == 0
    ):
        raise ValueError(
            f"knn.search: queries {tuple(queries.shape)} and bank {tuple(bank.shape)}; expected "
            "(q, d) "
            "and (n, d) of one width d. Were both embedded by the same model and layer?"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(
            f"knn.search: k = {k}; expected 1 <= k <= {len(bank)}, the bank's size. Lower k or "
            "enlarge X."
        )
    if backend not in BACKENDS or (tile is not None and tile < 1):
        raise ValueError(
            f"knn.search: backend {backend!r}, tile {tile}; expected one of {BACKENDS}, tile >= 1."
        )


def _largest(name: str, values: Tensor) -> float:
    """Return the largest absolute value; raise ValueError on NaN or infinity."""
    largest = (
        float(torch.stack(torch.aminmax(values)).float().abs().amax()) if values.numel() else 0.0
    )
    if not math.isfinite(largest):
        row = int((~torch.isfinite(values.float()).all(1)).nonzero()[0])
        raise ValueError(
            f"knn.search: {name} row {row} holds NaN or infinity; expected finite float32. "
            "Diverged?"
        )
    return largest


def _points(
    rows: Tensor, centre: Tensor, engine: str, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return centred rows in the bits that `engine` multiplies, their |row|^2, and how far rounding
    moved each.
    """
    (points, rounded), lost = memory[:, : len(rows)], 1 << 24 - BITS[engine]
    torch.sub(rows.to(points.device).float().to(points.dtype), centre, out=points)
    moved = torch.zeros_like(points[:, 0])
    if lost > 1:
        torch.add(points.view(torch.int32), lost // 2, out=rounded.view(torch.int32)).bitwise_and_(
            -lost
        )
        points, moved = rounded, torch.linalg.vector_norm(points.sub_(rounded), dim=1)
    return points, torch.linalg.vector_norm(points, dim=1).square_(), moved


def _smallest(
    queries: Tensor, points: Tensor, norms: Tensor, best: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the norms - 2 q.b that belong among the `best` (q, keep) seen, infinity after them,
    and their columns.

    They are few, and the minimum of every FOLD says where to look. `queries` come times -2.
    """
    (q, keep), n, across = best.shape, len(points), len(points) + -len(points) % (FOLD * AGAIN)
    bounds = memory[: q * across].view(q, across)
    bounds[:, n:] = torch.inf
    torch.mm(queries, points.T, out=bounds[:, :n]).add_(norms)
    folds, limit = bounds.unflatten(1, (FOLD, -1)), best.amax(1, keepdim=True)
    lowest = folds.amin(1)
    if (
        keep < lowest.shape[1] and limit.isinf().any()
    ):  # `keep` minima are `keep` values: nothing larger is needed
        fewer = (
            lowest.unflatten(1, (AGAIN, -1)).amin(1)
            if lowest.shape[1] >= 2 * AGAIN * keep
            else lowest
        )
        limit = fewer.topk(keep, largest=False, sorted=False).values.amax(1, keepdim=True)
    row, place = (lowest <= limit).nonzero(as_tuple=True)
    found = folds[row, :, place]
    hit, fold = (found <= limit[row]).nonzero(as_tuple=True)
    row, found, new = row[hit], found[hit, fold], place[hit] + fold * lowest.shape[1]
    count = torch.bincount(row, minlength=q)
    slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    value = best.new_full((q, int(count.amax())), torch.inf)
    column = torch.zeros_like(value, dtype=torch.int64)
    value[row, slot], column[row, slot] = found, new
    return value, column


def _smallest_faiss(
    queries: Tensor, points: Tensor, norms: Tensor, best: Tensor, _: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `_smallest` returns, from faiss's inner-product search on the CPU."""
    import faiss  # after torch: both bring CUDA libraries, and torch's must be loaded first

    left = torch.nn.functional.pad(queries, (0, 1), value=1.0).neg().cpu().numpy()
    right = torch.cat([points, norms[:, None]], 1).cpu().numpy()
    inner, column = faiss.knn(
        left, right, min(best.shape[1], len(points)), metric=faiss.METRIC_INNER_PRODUCT
    )
    return -torch.from_numpy(inner).to(best.device), torch.from_numpy(column).to(best.device)


def candidates(
    queries: Tensor, bank: Tensor, keep: int, dtype: torch.dtype, engine: str, tile: int | None
) -> tuple[Tensor, Tensor]:
    """Return `keep` candidate columns per query and lower bounds of their squared distances,
    ascending, both (q, keep).

    The last bound holds for every other row, too. In any order of summation a dot product of d
    terms errs by d u |q||b| to first order, a norm by d u |b|^2; 32 more cover the rest. u
    doubles for faiss, whose product carries |b|^2, and is taken four times where a matrix unit
    may cut sums. A coarse engine rounds its factors first: that changes a distance by no more
    than it moves the two points, a length that is measured.
    """
    (q, width), smallest = queries.shape, _smallest_faiss if engine == "faiss" else _smallest
    more, tiny = GPU if queries.is_cuda else 1, torch.finfo(dtype).tiny
    share = (width + 32) * (
        torch.finfo(dtype).eps * {"highest": 1.5, "faiss": 3}.get(engine, 6) + 2.0**-52
    )
    share /= 1 - share
    step, tile = ROWS * more, min(len(bank), tile or max(256, TILE * more // width))
    centre = (
        bank[:: -(-len(bank) // 256)].double().mean(0).to(queries.device, dtype)
    )  # an offset swamps differences
    memory = queries.new_empty(
        2, max(q, tile), width, dtype=dtype
    )  # used again: fresh memory costs more than sums
    points, own, moved = _points(queries, centre, engine, memory)
    mine, furthest = points * -2, torch.zeros_like(own[0])
    best, column = (
        mine.new_full((q, keep), torch.inf),
        torch.zeros(q, keep, dtype=torch.int64, device=mine.device),
    )
    bounds = mine.new_empty(min(q, step) * (tile + FOLD * AGAIN))
    for start in range(0, len(bank), tile):
        points, norms, shift = _points(bank[start : start + tile], centre, engine, memory)
        norms, furthest = norms.mul_(1 - share), torch.maximum(furthest, shift.amax())
        for rows, low, at in zip(
            mine.split(step), best.split(step), column.split(step), strict=True
        ):
            value, new = smallest(rows, points, norms, low, bounds)
            value, order = torch.cat([low, value], 1).topk(keep, largest=False, sorted=False)
            low.copy_(value)
            at.copy_(torch.cat([at, new + start], 1).gather(1, order))
    best, order = best.sort(1)
    bound = best.double() + (own.double() * (1 - share) - 8 * width * tiny)[:, None]
    if BITS[engine] < 24:
        shift = (moved.double() + furthest.double())[:, None] * (1 + share) + 2 * math.sqrt(
            width * tiny
        )
        bound = bound.clamp_(min=0).sqrt_().sub_(shift).clamp_(min=0).square_()
    return column.gather(1, order), bound


def _distances(
    queries: Tensor, rows: Tensor, bank: Tensor, columns: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return squared distances (p, c) from the queries in `rows` (p,) to the bank's `columns` (p,
    c).
    """
    c, width, found = columns.shape[1], queries.shape[1], []
    step = max(
        1, DIFFERENCES * (GPU if queries.is_cuda else torch.get_num_threads()) // (width * c)
    )
    memory = queries.new_empty(min(step, len(rows)), c, width, dtype=dtype)
    for part, row in zip(columns.split(step), rows.split(step), strict=True):
        difference = memory[: len(row)]
        difference.view(-1, width).copy_(
            bank.index_select(0, part.flatten().to(bank.device)).float()
        )
        difference.sub_(queries.index_select(0, row).to(dtype)[:, None])
        found.append(tree_sum(difference.mul_(difference), left=16))
    return tree_sum(torch.cat(found))[..., 0]  # the last steps at once: they are many and small


def _attempt(
    queries: Tensor,
    bank: Tensor,
    k: int,
    keep: int,
    dtype: torch.dtype,
    engine: str,
    tile: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return distances, columns and whether each row is proven, looking at `keep` candidates per
    query.
    """
    with contextlib.ExitStack() as after:
        after.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        after.enter_context(torch.autocast(queries.device.type, enabled=False))
        torch.set_float32_matmul_precision("highest" if engine == "faiss" else engine)
        column, bound = candidates(queries, bank, keep, dtype, engine, tile)
    (q, width), distance = queries.shape, torch.full_like(bound, torch.inf)
    distance[:, :k] = _distances(
        queries, torch.arange(q, device=queries.device), bank, column[:, :k]
    )
    limit = distance[:, :k].amax(1, keepdim=True)
    proven = (bound[:, -1:] > limit) | (keep == len(bank))
    bound[:, :k] = torch.inf  # these are measured
    row, place = (proven & (bound <= limit)).nonzero(as_tuple=True)
    if (
        BITS[engine] < 24
    ):  # coarse bounds leave many in doubt: differences in float32, which are cheaper, settle most
        near = _distances(queries, row, bank, column[row, place][:, None], torch.float32)
        doubt = (
            near * (1 - (width + 32) * 2.0**-23) - 8 * width * torch.finfo(torch.float32).tiny
            <= limit[row]
        )
        row, place = row[doubt[:, 0]], place[doubt[:, 0]]
    distance[row, place] = _distances(queries, row, bank, column[row, place][:, None])[:, 0]
    column, order = column[:, : int(place.max()) + 1 if len(place) else k].sort(1)
    distance, order = distance.gather(1, order).sort(dim=1, stable=True)
    return distance[:, :k], column.gather(1, order[:, :k]), proven[:, 0]


@torch.no_grad()
def search(
    queries: Tensor, bank: Tensor, k: int, backend: str = "auto", tile: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return squared L2 distances (q, k) float64, ascending, and bank rows (q, k) int64; ties by
    the lower row.

    Exact in the float32 values of `queries` (q, d) and `bank` (n, d): half types widen, float64 is
    rounded. Identical for every `tile` (rows per block, either side), `backend` ("torch" or
    "faiss"; "auto" is torch, the faster one) and device. It works where `queries` are; the bank may
    stay elsewhere and is streamed. ValueError on NaN and bad sizes.
    """
    _check(queries, bank, k, backend, tile)
    if "mps" in (queries.device.type, bank.device.type):  # Apple's GPU has no float64
        queries, bank = queries.cpu(), bank.cpu()
    plain = (
        8 * queries.shape[1] * max(_largest("queries", queries), _largest("bank", bank)) ** 2 < 1e37
    )
    queries, n, few = queries.float(), len(bank), k + k // 2 + math.isqrt(queries.shape[1])
    matrix_unit = torch.cpu._is_amx_tile_supported()  # noqa: SLF001 torch has no public test
    coarse = {"cuda": "high", "cpu": "medium" if matrix_unit else "highest"}
    coarse = (
        coarse.get(queries.device.type, "highest") if n > 500 * k else "highest"
    )  # few rows: doubt costs more
    engines = dict.fromkeys(["faiss" if backend == "faiss" else coarse, "highest"]) if plain else {}
    plan = [
        (few if BITS[engine] < 24 else k + k // 8 + 8, torch.float32, engine) for engine in engines
    ]
    distances = torch.empty(len(queries), k, dtype=torch.float64, device=queries.device)
    columns, todo = (
        torch.empty_like(distances, dtype=torch.int64),
        torch.arange(len(queries), device=queries.device),
    )
    for keep, dtype, engine in [
        *plan,
        (4 * few, torch.float64, "highest"),
        (n, torch.float64, "highest"),
    ]:
        keep, missed = min(keep, n), [todo[:0]]
        block, more = (
            (16384, GPU) if queries.is_cuda else (4096, 1)
        )  # each reads all of the bank once
        for rows in filter(len, todo.split(max(1, min(tile or block, PAIRS * more // keep)))):
            distances[rows], columns[rows], proven = _attempt(
                queries[rows], bank, k, keep, dtype, engine, tile
            )
            missed.append(rows[~proven])
        todo = torch.cat(missed)
    return distances, columns


def _negative_entropy(counts: Tensor, k: int) -> Tensor:
    """Return sum p log p (q,) float64 in nats for vote counts that sum to k.

    The counts are sorted and their terms looked up: the same counts in other classes give the same
    bits, a real tie.
    """
    terms = torch.tensor(
        [0.0, *(i / k * math.log(i / k) for i in range(1, k + 1))], dtype=torch.float64
    )
    largest = counts.topk(min(k, counts.shape[1]), dim=1).values
    return tree_sum(terms.to(counts.device)[largest])[:, 0]


def vote(labels: Tensor, distances: Tensor, classes: int, ties: str = "nearest") -> Votes:
    """Return the votes of k neighbours: counts (q, classes), top 5 classes (q, 5), confidence (q,)
    = -entropy in nats.

    `labels` (q, k) int, `distances` (q, k) ascending. A class with more votes comes first; ties go
    to the lower mean distance, then to the lower class index, or with `ties="lowest class"` to the
    lower class index at once (the paper's code leaves them to the order of its classes). -1 fills
    `ranking` where fewer than 5 classes have a vote.
    """
    if ties not in TIES:
        raise ValueError(f"knn.vote: ties {ties!r}; expected one of {TIES}.")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"knn.vote: labels {int(labels.min())} to {int(labels.max())}; expected 0 to "
            f"{classes - 1}."
        )
    labels, (rows, k) = labels.long(), labels.shape
    counts = torch.zeros(rows, classes, dtype=torch.int64, device=labels.device)
    sums = torch.zeros_like(counts, dtype=torch.float64)
    for i in range(k):  # one neighbour at a time: a fixed order of additions on every device
        counts.scatter_add_(1, labels[:, i : i + 1], torch.ones_like(labels[:, :1]))
        sums.scatter_add_(1, labels[:, i : i + 1], distances[:, i : i + 1].double())
    left, mean = counts.clone(), sums / counts.clamp(min=1)
    if ties == "lowest class":
        mean = torch.zeros_like(mean)  # all equally near: argmin takes the first
    ranking = torch.full((rows, 5), -1, dtype=torch.int64, device=labels.device)
    for i in range(min(5, classes)):
        most = left.amax(1, keepdim=True)
        pick = torch.where(left == most, mean, torch.inf).argmin(1, keepdim=True)
        ranking[:, i : i + 1] = torch.where(most > 0, pick, -1)
        left.scatter_(1, pick, 0)
    return Votes(counts, ranking, _negative_entropy(counts, k))
