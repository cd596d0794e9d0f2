"""What the cells of 07_other_measures define: rank statistics, odds, errors of few encoders,
against libraries, by hand, and on planted data.
"""

import ast
import functools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, spearmanr
from scipy.stats.contingency import odds_ratio
from sklearn.metrics import roc_auc_score

import dejavu_utils as dv
from dejavu_utils import notebook
from dejavu_utils.attack import measures, scoring

pytestmark = pytest.mark.usefixtures("any_number")

NAMES = [*measures.GAPS, *measures.STATISTICS]


@pytest.fixture(scope="module")
def cells():
    """Return the functions that the notebook's cells define."""
    tree = ast.parse("\n".join(code for code in _code("07_other_measures")))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    names = {"np": np, "pd": pd, "dv": dv, "names": NAMES, "gaps": list(measures.GAPS)}
    exec(compile(ast.Module(functions, []), "07_other_measures", "exec"), names)
    return SimpleNamespace(**names)


@pytest.fixture(scope="module")
def after(run_cells, cells):
    """A function that returns all names after cells of the notebook have run on given ones."""
    defined = {"renamed": cells.renamed, "log_odds": cells.log_odds}
    return functools.partial(run_cells, "07_other_measures", np=np, pd=pd, dv=dv, **defined)


def _code(stage):
    """Yield the sources that are Python: cells of prose are not."""
    for source in notebook.cells(stage):
        try:
            ast.parse(source)
        except SyntaxError:
            continue
        yield source


def planted(n=20, seeds=(0,), classes=4, **columns):
    """Return a table of 2 n images a seed; a column is `f(member, rng)` of all its rows, else
    noise.
    """
    tables = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        rows = [
            (f"{side}{i:04d}", i % classes, side, model, (side == "a") == (model == "A"))
            for side in "ab"
            for i in range(n)
            for model in "AB"
        ]
        one = pd.DataFrame(rows, columns=["id", "label", "direction", "model", "member"])
        for name in NAMES:
            make = columns.get(name, lambda member, rng: rng.normal(size=len(member)))
            one[name] = make(one["member"].to_numpy(), rng)
        tables.append(one.assign(seed=seed, correct=rng.random(len(one)) < 0.5))
    return pd.concat(tables, ignore_index=True)


def test_auc_and_rank_correlation_are_those_of_the_libraries_ties_included(cells):
    tied = {
        "confidence": lambda member, rng: rng.integers(0, 5, len(member)) + member,
        "alignment_gap": lambda member, rng: rng.integers(0, 3, len(member)),
    }
    one = planted(**tied, seeds=(0, 1))
    encoders = [part for _, part in one.groupby(["seed", "model"])]
    found = dict(zip(NAMES, cells.auc(one), strict=True))
    for name in NAMES:
        by_encoder = [roc_auc_score(part["member"], part[name]) for part in encoders]
        assert found[name] == pytest.approx(np.mean(by_encoder), abs=1e-12)

    matrix = cells.rank_correlations(one)
    members = [part[part["member"]] for part in encoders]
    for i, name in enumerate(measures.GAPS):
        for j, other in enumerate(measures.GAPS):
            by_encoder = [spearmanr(part[name], part[other]).statistic for part in members]
            assert matrix[i, j] == pytest.approx(np.mean(by_encoder), abs=1e-12)


def test_what_is_remembered_is_told_apart(cells):
    sure = planted(similarity=lambda member, rng: member + rng.random(len(member)) / 2)
    found = measures.resampled(sure, cells.auc, 50)
    assert (found[:, NAMES.index("similarity")] == 1).all()


def labels(n, p, seed):
    """Return labels (n,) of independent images: half of them can have it, with probability p."""
    easy = np.arange(n) % 2 == 0
    return pd.Series(easy & (np.random.default_rng(seed).random(n) < p))


def test_odds_are_those_of_the_table_with_a_half_added_and_cover_independence(cells):
    one, two = labels(400, 0.8, 0), labels(400, 0.6, 1)
    log, error = cells.log_odds(one, two)
    counts = pd.crosstab(one, two).to_numpy()
    added = counts + 0.5
    assert np.exp(log) == pytest.approx(added[0, 0] * added[1, 1] / added[0, 1] / added[1, 0])
    interval = odds_ratio(counts, kind="sample").confidence_interval(0.95)
    assert np.exp(log - 1.96 * error) == pytest.approx(interval.low, rel=0.1)
    assert np.exp(log + 1.96 * error) == pytest.approx(interval.high, rel=0.1)
    assert log - 1.96 * error > 0  # images that are easy for both

    rng, missed = np.random.default_rng(0), 0
    for _ in range(200):
        log, error = cells.log_odds(*(pd.Series(rng.random(150) < p) for p in (0.3, 0.2)))
        missed += abs(log) > 1.96 * error
    assert missed <= binom.ppf(0.999, 200, 0.05)


def test_labels_that_are_alike_or_never_given_have_finite_odds(cells):
    same, never = labels(60, 0.5, 0), pd.Series(np.zeros(60, bool))
    assert np.isfinite(cells.log_odds(same, same)).all() and cells.log_odds(same, same)[0] > 4
    assert np.isfinite(cells.log_odds(same, never)).all()


def test_the_standard_error_of_few_encoders_is_large_and_never_nothing(cells):
    share, error = cells.share_and_error(2, 4)
    assert share == 0.5 and np.hypot(error, error) == pytest.approx(np.sqrt(2 * 0.25 / 4))
    share, error = cells.share_and_error(4, 4)
    assert share == 1 and np.hypot(error, error) > 0.25  # all alike, of four: not certain


def test_without_memory_few_images_are_called_memorized(cells):
    rng = np.random.default_rng(0)
    inside, outside = (cells.share_and_error(rng.binomial(16, 0.4, 4000), 16) for _ in "ab")
    memorization, error = inside[0] - outside[0], np.hypot(inside[1], outside[1])
    assert (memorization > 1.96 * error).mean() < 0.04


def test_measures_of_sets_have_an_interval_over_seeds_from_two_on(cells, monkeypatch):
    monkeypatch.setattr(scoring, "FEWEST", 50)
    rows = pd.DataFrame({"difference": [0.2, 0.1, 0.3], "error": 0.01, "n": 100})
    found, over_seeds = cells.intervals(rows), scoring.over_seeds([0.2, 0.1, 0.3])
    assert found["low"] == over_seeds["low"] and found["seeds"] == 3
    found = cells.intervals(rows.head(1))
    assert found["low"] == pytest.approx(0.2 - 1.96 * 0.01)
    assert np.isnan(cells.intervals(rows.head(1).assign(n=40))["low"])  # too few images


# Planted answers: the cells are run on tables whose result is known


def guessed(right, reference="two-model", which="attacked"):
    """Return the rows of an attack on n images a set: `right` {role: (n,) right or not}, the same
    in both sets.
    """
    tables = []
    for side in "ab":
        for role, hits in right.items():
            ids = [f"{which} {side}{i:04d}" for i in range(len(hits))]
            rows = {
                "id": ids,
                "label": np.arange(len(hits)) % 4,
                "correct": np.asarray(hits, float),
            }
            tables.append(pd.DataFrame(rows).assign(direction=side, role=role))
    about = {"criterion": "vicreg", "reference": reference, "attacked": which, "seed": 0}
    return pd.concat(tables, ignore_index=True).assign(confidence=0.0, **about)


def first(count, n=100):
    """Return n answers, of which the first `count` are right."""
    return np.arange(n) < count


def test_the_member_difference_is_free_of_the_classifier(after):
    """Own images 60 % against 45 %, others 40 % against 35 %: 15 - 5 points. A better classifier
    changes both scores and not their difference.
    """
    differences = []
    for better in (0, 20):
        classifier = {"attacked": first(45 + better), "control": first(35 + better)}
        own = guessed({"target": first(60), "reference": classifier["attacked"]}, "resnet")
        neither = guessed(
            {"target": first(40), "reference": classifier["control"]}, "resnet", "control"
        )
        scores = [{"criterion": "vicreg", "reference": "resnet"}]
        given = {"own": own, "neither": neither, "scores": scores, "kinds": ("resnet",)}
        row = after(["offset"], **given)["scores"][0]
        assert row["offset"] == pytest.approx(0.05 - better / 100)
        assert row["member_difference_low"] < 0.1 < row["member_difference_high"]
        differences.append(row["member_difference"])
    assert differences == pytest.approx([0.1, 0.1])


def test_the_member_difference_is_of_classifiers_alone(after):
    own = guessed({"target": first(60), "reference": first(45)})
    neither = guessed({"target": first(40), "reference": first(35)}, which="control")
    scores = [{"criterion": "vicreg", "reference": "two-model"}]
    given = {"own": own, "neither": neither, "scores": scores, "kinds": ("resnet",)}
    row = after(["offset"], **given)["scores"][0]
    assert row["offset"] == pytest.approx(0.05) and "member_difference" not in row


def by_gap(n, which):
    """Return the statistics of n images a set, of which image i has the alignment gap i."""
    rows = [
        {"id": f"{which} {side}{i:04d}", "direction": side, "alignment_gap": i, "member": member}
        for side in "ab"
        for i in range(n)
        for member in (True, False)
    ]
    return pd.DataFrame(rows).assign(attacked=which, seed=0)


def atypical(after, attacked, control):
    """Return the row of the cell `atypical`; both are {role: (100,) right or not}, by gap."""
    sets = {"attacked": attacked, "control": control}
    sets = {which: right for which, right in sets.items() if right}
    against = pd.concat([guessed(right, which=which) for which, right in sets.items()])
    seen = pd.concat([by_gap(100, which) for which in sets])
    given = {"everything_seen": seen, "against": against, "criteria": ["vicreg"]}
    return after(["atypical"], known=bool(control), **given)["atypical"]


def test_what_is_atypical_is_compared_with_what_no_encoder_saw(after):
    """The target alone is right of the ten images with the largest gap, the reference alone of the
    ten with the smallest: scores of 1 and -1. Among images of neither set 1 and 0.
    """
    top, bottom, none = np.arange(100) >= 90, np.arange(100) < 10, np.zeros(100, bool)
    row = atypical(after, {"target": top, "reference": bottom}, {"target": top, "reference": none})
    assert row["difference"] == 2 and row["net"] == 1
    assert row["n"] == 20  # a tenth of both sets
    unknown = atypical(after, {"target": top, "reference": bottom}, {})
    assert unknown["difference"] == 2 and "net" not in unknown


def test_atypical_images_of_no_memory_have_a_net_of_nothing(after):
    """Where whether an image is easy goes with its gap, in both sets alike, nothing is left."""
    easy = {"target": np.arange(100) >= 50, "reference": np.arange(100) >= 95}
    row = atypical(after, easy, easy)
    assert row["difference"] == pytest.approx(0.5) and row["net"] == pytest.approx(0)
    assert row["net_low"] < 0 < row["net_high"]


def called(counts, which):
    """Return what two tests say of images: `counts` both, only the first, only the second, none."""
    pairs = [(True, True), (True, False), (False, True), (False, False)]
    rows = [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]
    frame = pd.DataFrame(rows, columns=["two-model", "resnet"])
    about = {"criterion": "vicreg", "attacked": which, "what": "memorized"}
    return frame.assign(**about).set_index(list(about))


def agreement(after, attacked, control):
    """Return the row of the cells `agreement` and `net` for counts in either set."""
    labels = pd.concat([called(attacked, "attacked"), called(control, "control")])
    names = after(
        ["agreement", "net"],
        labels=labels,
        known=True,
        criteria=["vicreg"],
    )
    return names["agreed"].loc["vicreg", "resnet", "memorized"]


def test_net_odds_are_the_quotient_of_the_odds_of_both_sets(after):
    row = agreement(after, (40, 10, 10, 40), (20, 20, 20, 40))
    assert row["odds"] == pytest.approx(40.5**2 / 10.5**2)
    assert row["control_odds"] == pytest.approx(20.5 * 40.5 / 20.5**2)
    assert row["net"] == pytest.approx(row["odds"] / row["control_odds"])
    error = np.sqrt(2 / 40.5 + 2 / 10.5 + 3 / 20.5 + 1 / 40.5)
    assert row["net_high"] / row["net"] == pytest.approx(np.exp(1.96 * error))
    assert row["n"] == 100


def test_agreement_that_images_of_neither_set_show_too_is_no_memory(after):
    row = agreement(after, (40, 10, 10, 40), (40, 10, 10, 40))
    assert row["odds_low"] > 1 and row["net"] == pytest.approx(1)
    assert row["net_low"] < 1 < row["net_high"]
