"""The search is exact and the same for every tile, engine and thread count; votes follow the tie
rule.
"""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from dejavu_utils.attack import knn, knn_engines

ENGINES = list(knn_engines.ENGINES)


def naive_search(queries, bank, k):
    """Return distances and rows of the k nearest, one query at a time; ties by the lower row."""
    queries, bank = (
        np.asarray(queries, np.float32).astype(float),
        np.asarray(bank, np.float32).astype(float),
    )
    distances, rows = [], []
    for query in queries:
        all_distances = [math.fsum((query - other) ** 2) for other in bank]
        order = sorted(range(len(bank)), key=lambda i: (all_distances[i], i))[:k]
        rows.append(order)
        distances.append([all_distances[i] for i in order])
    return np.array(distances).reshape(len(queries), k), np.array(rows, dtype=int).reshape(
        len(queries), k
    )


def naive_vote(labels, distances, classes):
    """Return counts, the predicted class and -entropy of one query's neighbours."""
    counts = [sum(label == c for label in labels) for c in range(classes)]
    near = {c: distances[labels == c] for c in set(labels.tolist())}
    prediction = min(near, key=lambda c: (-len(near[c]), near[c].mean(), c))
    shares = [c / len(labels) for c in counts if c]
    return counts, prediction, math.fsum(p * math.log(p) for p in shares)


def points(n, d, seed, kind="normal"):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=source)
    # "grid": small integers, so distances are exact and often tie; "offset": a large common mean,
    # tiny differences. "pairs": two far clusters whose inner distances bfloat16 cannot see.
    pairs = x * 1e-3 + torch.arange(n)[:, None] % 2
    return {
        "normal": x,
        "pairs": pairs,
        "grid": x.mul(1.5).round(),
        "offset": x * 1e-3 + 7,
        "tiny": x * 1e-22,
        "huge": x * 1e25,
        "relu": x.relu() + 50 * (torch.arange(d) == 0),
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "grid", "offset", "tiny", "huge", "relu", "pairs"])
@pytest.mark.parametrize("n, d", [(1, 1), (2, 3), (7, 1), (64, 3), (257, 128)])
def test_search_equals_oracle(n, d, kind):
    queries, bank = points(5, d, 1, kind), points(n, d, 2, kind)
    for k in {1, min(5, n), n}:
        distances, rows = knn.search(queries, bank, k)
        expected, order = naive_search(queries, bank, k)
        np.testing.assert_allclose(distances, expected, rtol=1e-13)
        np.testing.assert_array_equal(rows, order)


@pytest.mark.parametrize("kind", ["normal", "grid", "offset"])
def test_same_bits_for_every_tile_engine_and_thread_count(kind):
    queries, bank = points(20, 16, 3, kind), points(150, 16, 4, kind)
    first = knn.search(queries, bank, 9)
    threads = torch.get_num_threads()
    for engine in ENGINES:
        for tile in (1, 64, 149, 1000):
            for count in (1, 2):
                torch.set_num_threads(count)
                found = knn.search(queries, bank, 9, engine, tile)
                torch.set_num_threads(threads)
                assert torch.equal(found[0], first[0]) and torch.equal(found[1], first[1]), (
                    engine,
                    tile,
                    count,
                )


def test_no_setting_of_precision_changes_the_answer():
    queries, bank = points(40, 64, 5), points(400, 64, 6)
    expected = knn.search(queries, bank, 7, "torch")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = knn.search(queries, bank, 7, "torch")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("d", [15, 17, 33, 48, 100, 257])
def test_any_width_equals_the_oracle(d, engine):
    queries, bank = points(5, d, 1), points(60, d, 2)
    expected, order = naive_search(queries, bank, 4)
    distances, rows = knn.search(queries, bank, 4, engine)
    np.testing.assert_allclose(distances, expected, rtol=1e-13)
    np.testing.assert_array_equal(rows, order)


def test_query_order_does_not_matter():
    queries, bank = points(50, 8, 7, "grid"), points(90, 8, 8, "grid")
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    distances, rows = knn.search(queries, bank, 11)
    again = knn.search(queries[order], bank, 11)
    assert torch.equal(again[0], distances[order]) and torch.equal(again[1], rows[order])


def test_ties_go_to_the_lower_row():
    bank = torch.zeros(200, 4)
    bank[50] = 1
    distances, rows = knn.search(torch.ones(2, 4), bank, 4)
    assert rows.tolist() == [[50, 0, 1, 2]] * 2
    assert distances.tolist() == [[0, 4, 4, 4]] * 2


def tied(case):
    """Return queries, bank and k where many rows are equally near, or where float32 is of no help.

    The bank is large enough that a few candidates are proposed at first, and not all of its rows.
    """
    queries, bank = points(12, 16, 13), points(600, 16, 14)
    wide, long = points(12, 64, 15), points(900, 64, 16)
    if case == "binary codes":
        return queries.sign(), bank.sign(), 5
    if case == "wide binary codes":
        return wide.sign(), long.sign(), 5
    if case == "one row copied":
        bank[100:300] = bank[100]
        return bank[95:105], bank, 7
    if case == "two rows copied":
        bank[0::3] = bank[0]
        bank[1::3] = bank[1]
        return bank[:6], bank, 30
    if case == "collapsed encoder":
        return torch.full((12, 16), 0.3), torch.full((600, 16), 0.3), 20
    if case == "collapsed on the public set alone":
        return queries, torch.full((600, 16), 0.3), 20
    if case == "nearly collapsed":
        return 0.3 + queries * 1e-7, 0.3 + bank * 1e-7, 20
    if case == "dead units":
        return queries.relu(), bank.relu() * (torch.arange(600) % 2)[:, None], 20
    if case == "one far outlier":
        bank[17] *= 1e6
        return queries, bank, 5
    if case == "squares that underflow":
        return queries * 1e-22, bank * 1e-22, 5
    if case == "the largest floats":
        return queries.clamp(-3, 3) * 1e38, bank.clamp(-3, 3) * 1e38, 5
    if case == "the smallest floats":
        return queries * 1e-40, bank * 1e-40, 5
    if case == "float16":
        return queries.half(), bank.half(), 5
    if case == "float16 whose squares overflow":
        return (queries * 1e4).half(), (bank * 1e4).half(), 5
    if case == "all of the bank":
        return queries, bank.mul(1.5).round(), 600
    raise KeyError(case)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "case",
    [
        "binary codes",
        "wide binary codes",
        "one row copied",
        "two rows copied",
        "collapsed encoder",
        "collapsed on the public set alone",
        "nearly collapsed",
        "dead units",
        "one far outlier",
        "squares that underflow",
        "the largest floats",
        "the smallest floats",
        "float16",
        "float16 whose squares overflow",
        "all of the bank",
    ],
)
def test_many_ties_and_extreme_values_equal_the_oracle(case, engine):
    queries, bank, k = tied(case)
    expected, order = naive_search(queries, bank, k)
    for tile in (None, 250):
        distances, rows = knn.search(queries, bank, k, engine, tile)
        np.testing.assert_array_equal(rows, order)
        np.testing.assert_allclose(distances, expected, rtol=1e-13)


@pytest.mark.parametrize("slack", [1, 4])
@pytest.mark.parametrize("others", ["long", "as long"])
def test_no_neighbour_is_missed_when_sums_are_at_their_worst(slack, others):
    """An engine that is off by nearly as much as it may be: it sees the nearest row too far, and
    all others too near.

    Query 1, rows near 2, on one axis: the case in which nothing in the bound is to spare. The
    other rows are far and lie around zero.
    """
    error = slack * (64 + 16) * torch.finfo(torch.float32).eps * (1 + 4)
    axis = torch.zeros(64)
    axis[0] = 1
    beyond = torch.tensor([1e-6] * 5 + [1.8 * error] * 14 + [0])  # of distance 1; nearest last
    near = (2 + beyond / 2)[:, None] * axis  # (20, 64)
    far = 4 * points(115, 64, 18)
    if others == "as long":
        far = 2 * torch.nn.functional.normalize(far)
    bank = torch.cat([near, -near, far, -far])

    def propose(queries, bank, keep):
        distance = torch.cdist(queries.double(), bank.double()).square()
        seen = distance - error
        seen[:, 19] = distance[:, 19] + error
        value, row = seen.topk(keep, largest=False)
        return value.float(), row

    engine = knn_engines.Engine(propose, slack=slack)
    _, rows, proven = knn.look(axis[None], bank, 5, 13, engine)
    assert 19 not in rows and not proven
    _, rows, proven = knn.look(axis[None], bank, 5, 60, engine)
    assert rows.tolist() == [[19, 0, 1, 2, 3]] and proven


@pytest.mark.parametrize("engine", ["tf32", "bf16"])
def test_no_neighbour_is_missed_when_factors_are_rounded_at_their_worst(engine):
    """Nearly all coordinates of the nearest row move outwards by half a unit in the last place; a
    hundred other rows hardly move.
    """
    unit = 2.0 ** (1 - knn_engines.ENGINES[engine].bits)  # between numbers from 1 to 2
    nearest = torch.full((1, 64), 1 + 0.51 * unit)
    nearest[0, 0] = 1 + 1.6 * unit  # in its precision it is behind the others
    others = torch.full((100, 64), 1 + 0.9 * unit)
    far = 4 * points(400, 64, 18)
    bank = torch.cat([others, nearest, -others, -nearest, far, -far])

    query = torch.zeros(1, 64)
    _, rows, proven = knn.look(query, bank, 5, 13, knn_engines.ENGINES[engine])
    assert 100 not in rows and not proven
    _, rows = knn.search(query, bank, 5, engine)
    assert rows.tolist() == [[100, 201, 0, 1, 2]]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("keep, n", [(1, 300), (10, 300), (300, 300), (10, 1003)])
def test_an_engine_proposes_the_nearest(engine, keep, n):
    bits = knn_engines.ENGINES[engine].bits
    queries = knn_engines.rounded(points(30, 12, 19), bits)[0]
    bank = knn_engines.rounded(points(n, 12, 20), bits)[0]
    value, row = knn_engines.ENGINES[engine].propose(queries, bank, keep)
    distance = torch.cdist(queries.double(), bank.double()).square()
    assert value.shape == row.shape == (30, keep)
    torch.testing.assert_close(value.double(), distance.gather(1, row), rtol=1e-5, atol=1e-5)
    nearest = distance.topk(keep, largest=False).values
    torch.testing.assert_close(value.double().sort(1).values, nearest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits, unit", [(24, 0), (11, 2.0**-11), (8, 2.0**-8)])
def test_points_are_rounded_to_so_many_bits_and_moved_no_further_than_said(bits, unit):
    some = points(50, 40, 21)
    high, moved = knn_engines.rounded(some, bits)
    mantissa, _ = torch.frexp(high)
    assert torch.equal(mantissa * 2**bits, (mantissa * 2**bits).round())
    assert ((high - some).abs() <= unit * some.abs()).all()
    assert ((high - some).double().norm(dim=1) <= moved).all()
    if bits == 8:
        assert torch.equal(high, some.bfloat16().float())


@pytest.mark.parametrize("engine", ENGINES)
def test_most_queries_need_one_look(engine):
    """Ordinary points are proven with the first candidates: a bound that is never reached would be
    slow.
    """
    queries, bank = points(200, 256, 9), points(1500, 256, 10)
    first = knn_engines.ENGINES[engine]
    *_, proven = knn.look(queries, bank, 20, knn.few(20, 256, first), first)
    assert proven.double().mean() > 0.9


@pytest.mark.skipif(sys.platform == "win32", reason="asks Unix for the largest size")
def test_memory_does_not_grow_with_the_queries():
    """Beside them and their answer; 60,000 at once took 160 MiB more."""
    code = """
import resource, torch
from dejavu_utils.attack import knn

def largest():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.set_num_threads(1)
queries, bank = torch.rand(60_000, 128), torch.rand(500, 128)
knn.search(queries[:3000], bank, 5)
few = largest()
knn.search(queries, bank, 5)
print(largest() - few)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    assert int(done.stdout) / unit < 60


def test_half_precision_banks_widen_exactly():
    queries, bank = points(10, 12, 11), points(60, 12, 12).half()
    found, expected = knn.search(queries, bank, 5), knn.search(queries, bank.float(), 5)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_no_queries():
    distances, rows = knn.search(torch.zeros(0, 3), torch.zeros(5, 3), 2)
    assert distances.shape == rows.shape == (0, 2)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"k": 6}, "expected 1 <= k <= 5"),
        ({"k": 0}, "k = 0"),
        ({"queries": torch.zeros(2, 4)}, "one width"),
        ({"queries": torch.zeros(3)}, "one width"),
        ({"bank": torch.full((5, 3), torch.nan)}, "bank row 0 holds NaN"),
        ({"queries": torch.tensor([[0, 0, 0], [0, 0, torch.inf]])}, "queries row 1"),
        ({"engine": "annoy"}, "annoy"),
        ({"tile": 0}, "tile 0"),
        ({"bank": torch.zeros(0, 3)}, "1 <= k <= 0"),
    ],
)
def test_bad_input_is_one_clear_error(change, text):
    with pytest.raises(ValueError, match=text):
        knn.search(**{"queries": torch.zeros(2, 3), "bank": torch.zeros(5, 3), "k": 2, **change})


@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
@pytest.mark.parametrize("queries, k", [(1, 1), (40, 7), (40, 100)])
def test_vote_equals_oracle(classes, queries, k):
    random = np.random.default_rng(classes + k)
    labels = random.integers(0, classes, (queries, k)) * (random.random((queries, k)) < 0.6)
    distances = np.sort(random.integers(0, 4, (queries, k)).astype(float), axis=1)
    votes = knn.vote(torch.from_numpy(labels), torch.from_numpy(distances), classes)
    for i in range(queries):
        counts, prediction, confidence = naive_vote(labels[i], distances[i], classes)
        assert votes.counts[i].tolist() == counts
        assert votes.prediction[i] == prediction
        assert abs(float(votes.confidence[i]) - confidence) < 1e-14


def test_tie_rule_votes_then_mean_distance_then_class():
    labels = torch.tensor([[2, 1, 1, 2, 0], [2, 1, 1, 2, 0], [3, 0, 0, 3, 3], [3, 2, 1, 0, 0]])
    distances = [[0.0, 1, 2, 5, 9], [1.0, 1, 2, 2, 9], [9.0, 9, 9, 9, 9], [0.0, 1, 2, 3, 4]]
    prediction = knn.vote(labels, torch.tensor(distances), 4).prediction
    assert prediction.tolist() == [1, 1, 3, 0]


def test_confidence_is_in_range_and_ties_are_exact():
    labels = torch.tensor([[0, 1, 1, 2, 2, 2], [5, 4, 4, 4, 9, 9], [3, 3, 3, 3, 3, 3]])
    confidence = knn.vote(labels, torch.zeros(3, 6), 10).confidence
    assert confidence[0] == confidence[1] and confidence[2] == 0
    spread = knn.vote(torch.arange(100)[None], torch.zeros(1, 100), 100).confidence
    assert abs(float(spread) + np.log(100)) < 1e-14


def test_a_label_outside_the_classes_is_an_error():
    with pytest.raises(ValueError, match="expected 0 to 2"):
        knn.vote(torch.tensor([[0, 3]]), torch.zeros(1, 2), 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["normal", "grid", "offset"])
def test_gpu_gives_the_same_bits(kind, engine):
    if engine == "faiss":
        faiss = pytest.importorskip("faiss")
        if not hasattr(faiss, "StandardGpuResources"):
            pytest.skip("faiss is installed without its GPU part")

    queries, bank = points(300, 200, 15, kind), points(2000, 200, 16, kind)
    expected = knn.search(queries, bank, 30)
    for side in ("cuda", "cpu"):  # the bank may stay on the CPU
        found = knn.search(queries.cuda(), bank.to(side), 30, engine)
        assert torch.equal(found[0].cpu(), expected[0]) and torch.equal(found[1].cpu(), expected[1])
    labels = torch.arange(2000) % 10
    cpu, gpu = (knn.vote(labels.to(v[0].device)[v[1]], v[0], 10) for v in (expected, found))
    assert all(torch.equal(left, right.cpu()) for left, right in zip(cpu, gpu, strict=True))
