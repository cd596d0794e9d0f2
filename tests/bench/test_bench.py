"""The benchmarks themselves: what a row says, and that the limit of k-NN is the same work in the
same precision.
"""

import importlib
import math

import pytest
import torch

from dejavu_utils import store


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark: they are scripts beside the tests and no package."""
    monkeypatch.syspath_prepend(store.PACKAGE.parent / "tests" / "bench")
    return importlib.import_module


def test_a_row_has_the_share_of_the_limits_speed(load, capsys):
    row = load("bench_common").row
    found = row(
        "training",
        "ours",
        "images/s",
        "cpu",
        "float32",
        lambda n: {"value": n, "limit": 200.0},
        150.0,
    )
    assert (
        found["share"] == 0.75 and "cores" in found["device"] and " 75%" in capsys.readouterr().out
    )
    assert (
        row("k-NN", "ours", "s", "cpu", "", lambda: {"value": 4.0, "limit": 1.0})["share"] == 0.25
    )
    assert math.isnan(row("k-NN", "peer", "s", "cpu", "", lambda: {"value": 4.0})["share"])


def test_a_row_that_could_not_be_measured_says_why(load):
    def absent():
        import not_there.at_all  # noqa: F401

    def large():
        raise torch.OutOfMemoryError("too large\nfor this card")

    rows = [
        load("bench_common").row("sampling", "x", "pictures/s", "cpu", "", work)
        for work in (absent, large)
    ]
    assert [row["note"] for row in rows] == [
        "skipped: not_there is not installed",
        "failed: OutOfMemoryError: too large",
    ]
    assert all(math.isnan(row["value"]) for row in rows)


def test_a_small_card_searches_fewer_rows_of_the_same_width(load):
    fitting = load("bench_knn").fitting
    assert fitting((100, 500, 8), 1e9) == (100, 500, 8)
    assert fitting((1000, 5000, 8192), 98_304_000) == (250, 1250, 8192)


@pytest.mark.parametrize(
    "engine, precision, dtype",
    [
        ("torch", "highest", torch.float32),
        ("tf32", "high", torch.float32),
        ("bf16", "highest", torch.bfloat16),
    ],
)
def test_the_product_multiplies_every_pair_once_in_the_engines_precision(
    load, monkeypatch, engine, precision, dtype
):
    seen, mm, before = [], torch.mm, torch.get_float32_matmul_precision()

    def watched(a, b, out):
        seen.append((out.numel(), a.shape[1], torch.get_float32_matmul_precision(), b.dtype))
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    load("bench_knn").product(torch.ones(7, 3), torch.ones(10_000, 3), engine)()
    assert sum(pairs for pairs, *_ in seen) == 70_000
    assert {each[1:] for each in seen} == {(3, precision, dtype)}
    assert torch.get_float32_matmul_precision() == before


def test_brute_force_gives_what_the_search_gives(load):
    bench = load("bench_knn")
    q, x = bench.points((10, 400, 8), "cpu")
    for name, work in bench.peers(q, x, 3).items():
        assert torch.equal(work()[:8], bench.exact(q, x, 3)), name


def test_the_share_of_proven_queries_is_reported(load):
    bench = load("bench_knn")
    q, x = bench.points((10, 400, 8), "cpu")
    assert bench.proven(q, x, 3, "torch") == 1
    same = torch.ones(400, 8)  # nothing is nearest: float32 proves nothing
    assert bench.proven(q, same, 3, "torch") == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sizes_are_those_that_the_recipes_know(load, device, monkeypatch):
    from dejavu_utils.models import pairs

    bench = load("bench")
    sizes = bench.sizes(device)
    for changes in sizes["grid"]:
        pairs.recipe("vicreg", sizes["recipe"] | changes)
    for criterion in sizes["criteria"]:
        pairs.recipe(criterion, sizes["recipe"])
    with pytest.raises(SystemExit, match="bench has no size stepps; there are: steps"):
        bench.rows({"stepps": 1})


@pytest.mark.slow
def test_how_cost_grows_is_measured_in_processes_of_their_own(load, monkeypatch):
    monkeypatch.chdir(store.PACKAGE.parent)
    scale = {
        "recipe": {"encoder": "small4", "projector": "8-8", "size": 16, "batch": 10},
        "images": [40],
        "attacks": [[30, 200], [20, 10**12]],
        "width": 8,
    }
    sizes = {"scale": scale, "side": 16, "k": 5, "threads": 1}
    trained, attacked, too_large = load("bench_scale").rows("cpu", sizes)
    assert trained["value"] > 0 and trained["unit"] == "images/s"
    assert attacked["value"] > 0 and 0.1 < attacked["gib"] < 4
    assert "failed" in too_large["note"] and math.isnan(too_large["value"])
