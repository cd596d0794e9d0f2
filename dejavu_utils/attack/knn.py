"""Exact k-nearest-neighbour search, and the vote of the neighbours' labels.

A fast engine proposes a few candidates for each query. Their distances are then measured in
float64, which decides the order. How far the engine can be off is known, so every row that it left
out has a lower bound on its distance. If that is larger than the k-th measured distance, no
neighbour was missed. The few queries without this proof look at more candidates, at last at all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dejavu_utils.attack import knn_engines

TIES = ("nearest", "lowest class")  # who wins of classes with equally many votes
EXTRA = 8  # candidates beyond k
MORE = 16  # times as many for a query without a proof
BLOCK = 1 << 16  # candidates that are kept at a time
BLOCK_OF_A_GPU = 1 << 25  # each block of queries reads the whole bank
TILE = 1 << 25  # values of the bank that an engine sees at a time
HUGE = 1e15  # coordinates whose squares may overflow float32: every row is measured
CACHE = 1 << 17  # values of float64 differences at a time
CACHE_OF_A_GPU = 1 << 26  # many small steps would cost more than they do


class Votes(NamedTuple):
    """The neighbours' votes: `counts` (q, classes) int64, `prediction` (q,) int64, `confidence`
    (q,) float64 in nats.
    """

    counts: Tensor
    prediction: Tensor
    confidence: Tensor


@torch.no_grad()
def search(
    queries: Tensor, bank: Tensor, k: int, engine: str = "auto", tile: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return squared L2 distances (q, k) float64, ascending, and bank rows (q, k) int64; ties by
    the lower row.

    Exact in the float32 values of `queries` (q, d) and `bank` (n, d): half types widen, float64 is
    rounded. Identical for every `engine` ("torch", "faiss", "tf32", "bf16"; "auto" is the fastest),
    `tile` (rows of the bank that the engine sees at a time) and device. It works where `queries`
    are; the bank may stay elsewhere and is streamed. ValueError on NaN and bad sizes.
    """
    _check(queries, bank, k, tile)

    if "mps" in (queries.device.type, bank.device.type):  # Apple's GPU has no float64
        queries, bank = queries.cpu(), bank.cpu()

    queries = queries.float()
    proposed_by = knn_engines.named(engine, queries.device)
    keep = few(k, queries.shape[1], proposed_by)
    if max(_largest("queries", queries), _largest("bank", bank)) > HUGE:
        keep = len(bank)

    distances, rows, proven = look(queries, bank, k, keep, proposed_by, tile)

    while not proven.all():
        keep = keep * MORE
        todo = (~proven).nonzero()[:, 0]
        more = look(queries[todo], bank, k, keep, knn_engines.ENGINES["torch"], tile)
        distances[todo], rows[todo], proven[todo] = more

    return distances, rows


def few(k: int, width: int, engine: knn_engines.Engine) -> int:
    """Return how many candidates prove most queries: sums of many terms are less certain."""
    return k + EXTRA + width // (256 if engine.bits == 24 else 32)


@torch.no_grad()
def look(
    queries: Tensor,
    bank: Tensor,
    k: int,
    keep: int,
    engine: knn_engines.Engine,
    tile: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `search` returns, from `keep` candidates per query, and whether each query's
    answer is proven (q,); all of them if `keep` is at least the size of the bank.
    """
    everything = keep >= len(bank)
    if everything:
        every = _first_copies(bank, k).to(queries.device)  # (m,)
        keep = len(every)

    centre = _centre(bank).to(queries.device)
    distances = queries.new_empty(len(queries), k, dtype=torch.float64)
    rows = torch.empty_like(distances, dtype=torch.int64)
    proven = torch.empty(len(queries), dtype=torch.bool, device=queries.device)
    room = BLOCK_OF_A_GPU if queries.is_cuda else BLOCK
    step = max(1, room // keep)

    for start in range(0, len(queries), step):
        query = queries[start : start + step]  # (b, d)
        here = slice(start, start + len(query))

        if everything:
            candidates = every.expand(len(query), -1)  # (b, m)
            bounds = torch.zeros_like(candidates)
        else:
            candidates, bounds = _candidates(query, bank, keep, centre, engine, tile)

        distances[here], rows[here] = _nearest(query, bank, candidates, bounds, k)
        proven[here] = everything | (bounds[:, -1] > distances[here, -1])

    return distances, rows, proven


def _centre(bank: Tensor) -> Tensor:
    """Return the point (d,) that is subtracted before an engine multiplies: near the middle of the
    bank, or zero where an offset that all rows share is small beside their differences.
    """
    some = bank[:: -(-len(bank) // 256)].float()  # about 256 rows
    centre = some.median(0).values  # a mean would follow outliers
    spread = (some - centre).square().sum(1).median()
    offset = centre.square().sum()
    return centre if offset > 4 * spread else torch.zeros_like(centre)


def _candidates(
    queries: Tensor,
    bank: Tensor,
    keep: int,
    centre: Tensor,
    engine: knn_engines.Engine,
    tile: int | None,
) -> tuple[Tensor, Tensor]:
    """Return `keep` candidate rows per query, and lower bounds of their squared distances,
    ascending; both (q, keep). The last bound holds for every other row, too.
    """
    shifted = bool(centre.any())
    points = queries - centre if shifted else queries
    points, moved = knn_engines.rounded(points, engine.bits)  # (q, d), (q,)

    value = points.new_empty(len(points), 0)
    column = torch.empty_like(value, dtype=torch.int64)
    longest = points.new_zeros(())
    furthest = points.new_zeros(())
    tile = tile or max(1, knn_engines.room(TILE, points.device) // points.shape[1])

    for start in range(0, len(bank), tile):
        part = bank[start : start + tile].to(points.device).float()
        part = part - centre if shifted else part
        part, part_moved = knn_engines.rounded(part, engine.bits)  # (t, d), (t,)
        new_value, new_column = engine.propose(points, part, min(keep, len(part)))

        value = torch.cat([value, new_value], 1)
        column = torch.cat([column, new_column + start], 1)
        if value.shape[1] > keep:
            value, best = value.topk(keep, largest=False, sorted=False)
            column = column.gather(1, best)

        longest = torch.maximum(longest, torch.linalg.vector_norm(part, dim=1).amax())
        furthest = torch.maximum(furthest, part_moved.amax())

    value, order = value.sort(1)
    bounds = _bounds(value.double(), points, longest.double(), engine.slack)
    bounds = bounds.sqrt() - moved.double()[:, None] - furthest.double()
    return column.gather(1, order), bounds.clamp(min=0).square()


def _bounds(value: Tensor, points: Tensor, longest: Tensor, slack: float) -> Tensor:
    """Return lower bounds (q, c) of the squared distances that an engine finds to be `value`, from
    `points` (q, d) to rows that are no longer than `longest`.

    A sum of d products errs by at most d u (|q|^2 + |b|^2) in any order, u = eps / 2. Two norms and
    twice a product are that twice; 32 more eps cover centring and the last additions. |b|^2 is at
    most longest^2, and at most 2 |q|^2 + 2 distance^2, which helps where a few rows are very long.
    """
    width = points.shape[1]
    limits = torch.finfo(torch.float32)
    error = slack * (width + 32) * limits.eps
    error /= 1 - error
    underflow = 8 * width * limits.tiny

    own = points.double().square().sum(1, keepdim=True)  # (q, 1)
    value = value - underflow
    of_all = value - error * (own + longest.square())
    of_each = (value - 3 * error * own) / (1 + 2 * error)
    return torch.maximum(of_all, of_each).clamp(min=0)


def _nearest(
    queries: Tensor, bank: Tensor, candidates: Tensor, bounds: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return the k smallest distances (q, k) among `candidates` (q, c), ascending, and their rows;
    ties by the lower row. `bounds` (q, c): no candidate is nearer than its bound.
    """
    distances = torch.full(candidates.shape, torch.inf, dtype=torch.float64, device=queries.device)

    query = torch.arange(len(queries), device=queries.device).repeat_interleave(k)
    row = candidates[:, :k].flatten()
    distances[:, :k] = _distances(queries, bank, query, row).view(-1, k)

    furthest = distances[:, :k].amax(1, keepdim=True)  # (q, 1)
    possible = bounds <= furthest
    possible[:, :k] = False  # these are measured
    query, place = possible.nonzero(as_tuple=True)
    distances[query, place] = _distances(queries, bank, query, candidates[query, place])

    rows, order = candidates.sort(1)  # a stable sort of distances leaves ties in this order
    distances, order = distances.gather(1, order).sort(dim=1, stable=True)
    return distances[:, :k], rows.gather(1, order[:, :k])


def _distances(queries: Tensor, bank: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """Return the squared distances (p,) float64 of pairs: places in `queries` and in `bank`."""
    room = CACHE_OF_A_GPU if queries.is_cuda else CACHE
    step = max(1, room // queries.shape[1])
    queries = queries.double()
    sums = []

    for left, right in zip(query.split(step), row.split(step), strict=True):
        difference = queries.index_select(0, left)  # (b, d)
        other = bank.index_select(0, right.to(bank.device)).float()
        difference -= other.to(queries.device)
        square = difference.mul_(difference)
        sums.append(tree_sum(square, 16))

    return tree_sum(torch.cat(sums), 1)[:, 0]  # the last steps at once: they are small


def tree_sum(values: Tensor, left: int) -> Tensor:
    """Return sums over the last axis, halved until at most `left` values are left; `values` is
    overwritten.

    Library reductions choose their order, element-wise additions do not: the same bits everywhere,
    and a small error.
    """
    while values.shape[-1] > left:
        values, rest = values.tensor_split(2, -1)  # where the length is odd, the middle one stays
        values.narrow(-1, 0, rest.shape[-1]).add_(rest)

    return values.clone()


def _first_copies(bank: Tensor, k: int) -> Tensor:
    """Return the rows of the bank, without those that k equal rows precede: they are no neighbours.

    An encoder that has collapsed gives every picture the same row.
    """
    group = bank.unique(dim=0, return_inverse=True)[1]  # (n,)
    order = group.argsort(stable=True)  # equal rows side by side, the lower first
    count = group.bincount()
    start = count.cumsum(0) - count
    copy = torch.arange(len(bank), device=bank.device) - start[group[order]]  # 0, 1, ... in a group
    return order[copy < k]


def _check(queries: Tensor, bank: Tensor, k: int, tile: int | None) -> None:
    """Raise ValueError unless the arguments of `search` fit together."""
    flat = queries.ndim == bank.ndim == 2
    if not flat or queries.shape[1] != bank.shape[1] or queries.shape[1] == 0:
        raise ValueError(
            f"knn.search: queries {tuple(queries.shape)} and bank {tuple(bank.shape)}; expected "
            "(q, d) and (n, d) of one width d. Were both embedded by the same model and layer?"
        )

    if not 1 <= k <= len(bank):
        raise ValueError(
            f"knn.search: k = {k}; expected 1 <= k <= {len(bank)}, the bank's size. Lower k or "
            "enlarge X."
        )

    if tile is not None and tile < 1:
        raise ValueError(f"knn.search: tile {tile}; expected at least 1.")


def _largest(name: str, values: Tensor) -> float:
    """Return the largest absolute value; raise ValueError on NaN or infinity."""
    if not values.numel():
        return 0.0

    low, high = torch.aminmax(values)
    largest = max(abs(float(low)), abs(float(high)))

    if not math.isfinite(largest):
        finite = torch.isfinite(values.float()).all(1)
        row = int((~finite).nonzero()[0])
        raise ValueError(
            f"knn.search: {name} row {row} holds NaN or infinity; expected finite float32. "
            "Diverged?"
        )

    return largest


def vote(labels: Tensor, distances: Tensor, classes: int, ties: str = "nearest") -> Votes:
    """Return the votes of k neighbours: counts (q, classes), prediction (q,), confidence (q,) =
    -entropy in nats.

    `labels` (q, k) int, `distances` (q, k) ascending. The class with most votes is predicted; ties
    go to the lower mean distance, then to the lower class index, or with `ties="lowest class"` to
    the lower class index at once (the paper's code leaves them to the order of its classes).
    """
    if ties not in TIES:
        raise ValueError(f"knn.vote: ties {ties!r}; expected one of {TIES}.")

    labels = labels.long()
    k = labels.shape[1]

    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"knn.vote: labels {int(labels.min())} to {int(labels.max())}; expected 0 to "
            f"{classes - 1}."
        )

    counts = labels.new_zeros(len(labels), classes)
    sums = torch.zeros_like(counts, dtype=torch.float64)
    for i in range(k):  # one neighbour at a time: a fixed order of additions on every device
        label = labels[:, i : i + 1]  # (q, 1)
        counts.scatter_add_(1, label, torch.ones_like(label))
        sums.scatter_add_(1, label, distances[:, i : i + 1].double())

    mean = sums / counts.clamp(min=1)  # (q, classes)
    if ties == "lowest class":
        mean = torch.zeros_like(mean)  # all equally near: argmin takes the first

    most = counts.amax(1, keepdim=True)  # (q, 1)
    tied = torch.where(counts == most, mean, torch.inf)
    prediction = tied.argmin(1)  # the first of equals

    return Votes(counts, prediction, _negative_entropy(counts, k))


def _negative_entropy(counts: Tensor, k: int) -> Tensor:
    """Return sum p log p (q,) float64 in nats for vote counts that sum to k.

    The counts are sorted and their terms looked up: the same counts in other classes give the same
    bits, a real tie.
    """
    terms = [0.0]
    for count in range(1, k + 1):
        share = count / k
        terms.append(share * math.log(share))

    table = torch.tensor(terms, dtype=torch.float64, device=counts.device)
    largest = counts.topk(min(k, counts.shape[1]), dim=1).values
    return tree_sum(table[largest], 1)[:, 0]
