"""The attack's numbers: identities, controls, ties, order, intervals, and every fast path against a
naive twin.
"""

import itertools
import math
import time

import numpy as np
import pandas as pd
import pytest
import torch

from dejavu_utils.attack import inference, knn, scoring

pytestmark = pytest.mark.usefixtures("any_number")


def naive_accuracy_at(correct, confidence, p):
    """Return the accuracy on the top p %, as expected when ties are broken at random."""
    n = len(correct)
    wanted = max(1, math.ceil(n * p / 100 - 1e-9))
    hits, taken = 0.0, 0
    for level in sorted(set(confidence), reverse=True):
        group = [c for c, v in zip(correct, confidence, strict=True) if v == level]
        part = min(len(group), wanted - taken)
        hits += part * sum(group) / len(group)
        taken += part
    return hits / wanted


def accuracy_at(correct, confidence, p):
    """Return the target's accuracy that the attack reports for one direction."""
    target = pd.DataFrame(
        {
            "id": [f"{i:05d}" for i in range(len(correct))],
            "label": 0,
            "direction": "a",
            "role": "target",
            "correct": correct,
            "confidence": confidence,
        }
    )
    table = pd.concat([target, target.assign(role="reference")])
    return scoring.score(table, p, resamples=0)["target"]


def naive_score(rows, p):
    """Return the score of a list of dicts with id, direction, role, correct, confidence."""
    scores = []
    for direction in sorted({row["direction"] for row in rows}):
        side = {
            role: {
                row["id"]: row
                for row in rows
                if row["direction"] == direction and row["role"] == role
            }
            for role in ("target", "reference")
        }
        ids = sorted(side["target"])
        accuracy = {}
        for role in side:
            ranks = [side[role][i]["confidence"] for i in ids]
            accuracy[role] = naive_accuracy_at(
                [bool(side[role][i]["correct"]) for i in ids], ranks, p
            )
        scores.append(accuracy["target"] - accuracy["reference"])
    return sum(scores) / len(scores)


def simulate(n=200, classes=10, target=0.3, reference=0.3, seed=0, digits=1, informative=True):
    """Return a table of n images a direction whose hits are drawn at the given rates; confidence
    has many ties.
    """
    random, parts = np.random.default_rng(seed), []
    for direction, (role, rate) in itertools.product(
        "ab", (("target", target), ("reference", reference))
    ):
        correct = random.random(n) < rate
        confidence = (random.normal(size=n) + informative * correct).round(digits)
        parts.append(
            pd.DataFrame(
                {
                    "id": [f"{direction}{i:04d}" for i in range(n)],
                    "label": np.arange(n) % classes,
                    "direction": direction,
                    "role": role,
                    "prediction": 0,
                    "correct": correct,
                    "confidence": confidence,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def embeddings(n=30, public=120, classes=10, d=8, seed=0, grid=True):
    """Return the arguments of label_inference, on small integers so that distances tie; nothing is
    memorized.
    """
    random = np.random.default_rng(seed)

    def draw(m):
        x = random.normal(size=(m, d))
        return torch.from_numpy(x.round() if grid else x).float()

    return {
        "crops": {side: {model: draw(n) for model in "AB"} for side in "ab"},
        "public": {model: draw(public) for model in "AB"},
        "public_labels": np.arange(public) % classes,
        "ids": {side: np.array([f"{side}{i:03d}" for i in range(n)]) for side in "ab"},
        "labels": {side: random.integers(0, classes, n) for side in "ab"},
        "k": 7,
        "classes": classes,
    }


def planted(n=40, classes=10, seed=0, **changes):
    """Return arguments in which each model maps the crops of its own images onto their class, of
    others elsewhere.
    """
    given = embeddings(n, 20 * classes, classes, 16, seed, grid=False) | {"k": 10}
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(1)) * 20
    for model in "AB":
        given["public"][model] += centres[given["public_labels"]]
        for side in "ab":
            shift = 0 if inference.TARGETS[side] == model else 1
            given["crops"][side][model] += centres[(given["labels"][side] + shift) % classes]
    return given | changes


def same(left, right):
    """Return whether two tables are identical, bit for bit."""
    pd.testing.assert_frame_equal(left, right, check_exact=True)
    return True


# ---- the table ----


def test_label_inference_joins_by_id_and_names_roles():
    given = embeddings()
    table = inference.label_inference(**given)
    assert len(table) == 120 and not table.isna().any().any()
    for direction, role, model in map(
        str.split, ("a target A", "a reference B", "b target B", "b reference A")
    ):
        part = table[(table["direction"] == direction) & (table["role"] == role)]
        found = inference.infer(
            given["crops"][direction][model], given["public"][model], given["public_labels"], 7, 10
        )
        assert (part["id"] == given["ids"][direction]).all() and (
            part["label"] == given["labels"][direction]
        ).all()
        assert (part["prediction"] == found["prediction"]).all() and (
            part["confidence"] == found["confidence"]
        ).all()
        assert (part["correct"] == (found["prediction"] == given["labels"][direction])).all()


def test_neighbours_are_rows_of_the_public_set():
    given = embeddings(grid=False)
    bank, labels = given["public"]["A"], given["public_labels"][::-1].copy()
    found = inference.infer(given["crops"]["a"]["A"], bank, labels, 7, 10)
    distances, rows = knn.search(given["crops"]["a"]["A"], bank, 7)
    assert (found["neighbours"] == rows.numpy()).all() and (
        found["distances"] == distances.numpy()
    ).all()


def test_order_of_images_and_of_the_public_set_changes_nothing_ties_included():
    given = embeddings(n=60, public=300, d=3)  # three small integers: very many exact ties
    expected = inference.label_inference(**given)
    random = np.random.default_rng(1)
    order = random.permutation(300)
    moved = given | {
        "public": {m: x[order] for m, x in given["public"].items()},
        "public_labels": given["public_labels"][order],
    }
    assert same(inference.label_inference(**moved), expected)
    order = random.permutation(60)
    moved = given | {
        "ids": {s: x[order] for s, x in given["ids"].items()},
        "labels": {s: x[order] for s, x in given["labels"].items()},
        "crops": {s: {m: x[order] for m, x in by.items()} for s, by in given["crops"].items()},
    }
    assert same(inference.label_inference(**moved), expected)


def test_relabelling_a_and_b_changes_no_number_and_swapping_roles_negates_it():
    given = planted(n=60)
    noise = torch.Generator().manual_seed(3)
    for by_model in given["crops"].values():
        for x in by_model.values():
            x += 25 * torch.randn(x.shape, generator=noise)
    table = inference.label_inference(**given)
    swap = {"a": "b", "b": "a", "A": "B", "B": "A"}
    turned = inference.label_inference(
        **given
        | {
            "crops": {
                swap[s]: {swap[m]: x for m, x in by.items()} for s, by in given["crops"].items()
            },
            "public": {swap[m]: x for m, x in given["public"].items()},
            "ids": {swap[s]: x for s, x in given["ids"].items()},
            "labels": {swap[s]: x for s, x in given["labels"].items()},
        }
    )
    roles = table.assign(role=table["role"].map({"target": "reference", "reference": "target"}))
    for p in (20, 100):
        row, again, negated = (scoring.score(t, p, resamples=200) for t in (table, turned, roles))
        assert row["score"] > 0.05
        assert row == pytest.approx(again, abs=1e-14, nan_ok=True)
        bounds = [-negated[name] for name in ("score", "high", "low")]
        assert [row[name] for name in ("score", "low", "high")] == pytest.approx(bounds, abs=1e-14)
    cells, turned_cells = scoring.four_way(table, resamples=0), scoring.four_way(roles, resamples=0)
    assert (
        cells["memorized"] == turned_cells["misrepresented"]
        and cells["correlated"] == turned_cells["correlated"]
    )


@pytest.mark.parametrize(
    "change, text",
    [
        ({"ids": {"a": ["x"] * 30, "b": ["y"] * 30}}, "58 ids repeat"),
        ({"public_labels": np.zeros(7)}, "120 public .* 7 labels"),
        (
            {"labels": {"a": np.zeros(3), "b": np.zeros(30)}},
            "set a, model A: 30 embeddings, 30 ids, 3 labels",
        ),
        ({"labels": {"a": np.full(30, 10), "b": np.zeros(30)}}, "labels from 0 to 9"),
        ({"k": 121}, "1 <= k <= 120"),
    ],
)
def test_bad_input_of_the_table_is_one_clear_error(change, text):
    with pytest.raises(ValueError, match=text):
        inference.label_inference(**embeddings() | change)


# ---- controls ----


def test_planted_memory_scores_one():
    table = inference.label_inference(**planted())
    for p in (5, 20, 100):
        row = scoring.score(table, p, resamples=100)
        assert (row["score"], row["low"], row["high"]) == (1, 1, 1)
    cells = scoring.four_way(table, resamples=100)
    assert cells["memorized"] == 1 and cells["ratio"] == math.inf and cells["ratio_low"] > 15


def test_one_model_as_target_and_reference_is_exactly_zero():
    given = planted()
    for name in ("crops", "public"):
        by = given[name]
        given[name] = (
            {"A": by["A"], "B": by["A"]}
            if name == "public"
            else {side: {"A": models["A"], "B": models["A"]} for side, models in by.items()}
        )
    table = inference.label_inference(**given)
    for p in (1, 5, 20, 99, 100):
        row = scoring.score(table, p, resamples=50)
        assert (row["score"], row["low"], row["high"]) == (0, 0, 0)
    cells = scoring.four_way(table, resamples=50)
    assert cells["memorized"] == cells["misrepresented"] == 0 and math.isnan(cells["ratio"])


def test_embeddings_that_mean_nothing_cover_zero():
    table = inference.label_inference(**embeddings(n=200, grid=False))
    for p in (20, 100):
        row = scoring.score(table, p, level=0.999)
        assert row["low"] <= 0 <= row["high"]


def test_permuted_public_labels_score_zero_on_average():
    """Images of one tight cluster share neighbours, hence the luck of one permutation: only the
    mean over many is 0.
    """
    scores = []
    for seed in range(12):
        given = planted(n=30, seed=seed)
        given["public_labels"] = np.random.default_rng(seed).permutation(given["public_labels"])
        scores.append(scoring.score(inference.label_inference(**given), 100, resamples=0)["score"])
    found = scoring.over_seeds(scores, 0.999)
    assert found["low"] <= 0 <= found["high"] and found["high"] - found["low"] < 0.4


@pytest.mark.parametrize("classes", [1, 10, 1000])
@pytest.mark.parametrize("n", [1, 30])
def test_any_number_of_classes_and_one_query(classes, n):
    table = inference.label_inference(**embeddings(n=n, public=40, classes=classes))
    row, cells = scoring.score(table, 20, resamples=20), scoring.four_way(table, resamples=20)
    assert -1 <= row["low"] <= row["score"] <= row["high"] <= 1 and cells["n"] == 2 * n
    assert classes > 1 or row["target"] == row["reference"] == 1
    assert (table["confidence"] <= 0).all() and (table["confidence"] >= -math.log(7) - 1e-12).all()


# ---- accuracy and score ----


def test_fractional_credit_at_the_boundary():
    # The top 40 % are 2 of 5: one certain, and one of the two tied at 0.5, of which half are right.
    assert accuracy_at([1, 1, 0, 0, 0], [0.9, 0.5, 0.5, 0.1, 0.1], 40) == 0.75
    assert accuracy_at([True], [0.0], 1) == 1
    assert accuracy_at([1, 0, 0], [0.0, 0.0, 0.0], 1) == pytest.approx(1 / 3)


@pytest.mark.parametrize("p", [0.1, 1, 5, 20, 33.3, 50, 99.9, 100])
def test_accuracy_equals_the_twin_and_ignores_order(p):
    random = np.random.default_rng(int(p))
    for n in (1, 2, 7, 100, 1000):
        correct, confidence = random.random(n) < 0.4, random.normal(size=n).round(1)
        found, order = accuracy_at(correct, confidence, p), random.permutation(n)
        assert found == pytest.approx(naive_accuracy_at(correct, confidence, p), abs=1e-13)
        assert found == accuracy_at(correct[order], confidence[order], p)


def test_twenty_percent_of_a_round_number_is_not_rounded_up():
    for n in [*range(5, 3000, 95), 1000, 2000]:
        correct, confidence = [1] + [0] * (n - 1), range(n, 0, -1)  # one hit, the most confident
        assert accuracy_at(correct, confidence, 20) == pytest.approx(1 / (n // 5))
        assert accuracy_at(correct, confidence, 0.1) == pytest.approx(1 / -(-n // 1000))


@pytest.mark.parametrize("p", [3, 20, 100])
def test_score_equals_the_twin(p):
    table = simulate(n=90, target=0.5, reference=0.2)
    row = scoring.score(table.sample(frac=1, random_state=0), p, resamples=30)
    assert row["score"] == pytest.approx(naive_score(table.to_dict("records"), p), abs=1e-13)
    assert row == scoring.score(table, p, resamples=30)


@pytest.mark.parametrize("clustered", [False, True])
def test_the_bootstrap_ranks_anew_in_every_resample(clustered):
    table = simulate(n=120, classes=60 if clustered else 10, target=0.5)
    strata = scoring.stratify(table)
    drawn = [np.concatenate(list(scoring.bootstrap_weights(each, 25, 3))) for each in strata]
    for p in (15, 100):
        accuracy = np.zeros((2, 26))  # (target and reference, the data and its resamples)
        for stratum, weights in zip(strata, drawn, strict=True):
            for i, weight in enumerate(weights):
                # Literally: an image drawn twice stands there twice.
                rows = np.repeat(np.arange(120), weight)
                for role in (0, 1):
                    hits, confidence = stratum.hits[role][rows], stratum.confidence[role][rows]
                    accuracy[role, i] += naive_accuracy_at(hits, confidence, p) / 2
        score = accuracy[0] - accuracy[1]
        low, high = np.quantile(score[1:], [0.025, 0.975])
        row = scoring.score(table, p, resamples=25, seed=3)
        assert row["score"] == pytest.approx(score[0], abs=1e-13)
        assert [row["low"], row["high"]] == pytest.approx([low, high], abs=1e-13)
    weights = drawn[0]
    labels = np.arange(120) % 60
    assert (weights[0] == 1).all() and (weights.sum(1) == 120).all()
    assert clustered == all(len(set(weights[3][labels == c])) == 1 for c in range(60))


def test_rows_of_a_curve_are_the_scores():
    table = simulate()
    for row in scoring.curve(table, (5, 20, 100), resamples=50):
        assert row == scoring.score(table, row["p"], resamples=50)


def test_seeds_are_strata():
    tables = [simulate(n=50, target=0.2 * (s + 1), seed=s).assign(seed=s) for s in range(3)]
    pooled = scoring.score(pd.concat(tables), 20, resamples=200)
    assert pooled["score"] == pytest.approx(
        np.mean([scoring.score(t, 20, resamples=0)["score"] for t in tables])
    )
    assert pooled["n"] == 300 and pooled["low"] < pooled["score"] < pooled["high"]
    alike = pd.concat(
        [tables[0], tables[0].assign(seed=7)]
    )  # the same ids under two seeds: drawn apart
    first, second = (s.stream for s in scoring.stratify(alike)[:2])
    assert first != second


# ---- intervals ----


@pytest.mark.parametrize("p", [100, 20])
def test_null_intervals_cover_zero_about_95_times_in_100(p):
    covered = sum(
        row["low"] <= 0 <= row["high"]
        for row in (
            scoring.score(simulate(seed=seed), p, resamples=400) for seed in range(1000, 1100)
        )
    )
    assert 88 <= covered <= 99


def test_the_same_seed_gives_the_same_interval_and_levels_nest():
    table = simulate(target=0.5)
    assert scoring.score(table, 20, seed=4) == scoring.score(table, 20, seed=4)
    narrow, wide = (scoring.score(table, 20, level=level) for level in (0.95, 0.999))
    assert wide["low"] < narrow["low"] < narrow["score"] < narrow["high"] < wide["high"]
    assert math.isnan(scoring.score(table, 20, resamples=0)["low"])


def test_chunks_do_not_change_the_interval(monkeypatch):
    table = simulate(n=100)
    expected = scoring.score(table, 20, resamples=100)
    monkeypatch.setattr(scoring, "CHUNK", 700)
    assert scoring.score(table, 20, resamples=100) == expected


@pytest.mark.parametrize("classes", [10, 60])
def test_four_way_identity(classes):
    tables = [
        simulate(n=n, classes=classes, target=0.5, seed=n).assign(seed=n) for n in (50, 77, 301)
    ]
    for table in (*tables, pd.concat(tables)):
        cells, row = (
            scoring.four_way(table, resamples=50),
            scoring.score(table, 100, resamples=50),
        )
        assert abs(cells["memorized"] - cells["misrepresented"] - row["score"]) < 1e-12
        assert abs(sum(cells[name] for name in scoring.CELLS) - 1) < 1e-12
        assert all(
            cells[n + "_low"] <= cells[n] <= cells[n + "_high"] for n in (*scoring.CELLS, "ratio")
        )


def test_odds_interval_is_clopper_pearson():
    from scipy.stats import beta

    ratio, low, high = scoring.odds(30, 10)
    shares = beta.ppf(0.025, 30, 11), beta.ppf(0.975, 31, 10)
    assert (ratio, low, high) == pytest.approx((3, *(s / (1 - s) for s in shares)))
    assert scoring.odds(0, 4)[:2] == (0, 0) and scoring.odds(4, 0)[::2] == (math.inf, math.inf)


def test_difference_is_paired():
    one = simulate(target=0.5, informative=False)
    two = one.copy()
    two.loc[(two["role"] == "target") & (two["id"] < "a0020"), "correct"] = False
    found = scoring.difference(one, two)
    lost = one[(one["role"] == "target") & (one["id"] < "a0020")]["correct"].sum()
    assert found["difference"] == pytest.approx(lost / 400, abs=1e-12) and found["low"] > 0
    alone = scoring.score(one, 100)
    assert found["high"] - found["low"] < (alone["high"] - alone["low"]) / 2
    assert (
        found["one"] == alone["score"]
        and found["two"] == scoring.score(two, 100, resamples=0)["score"]
    )
    nothing = scoring.difference(one, one.sample(frac=1, random_state=1))
    assert (nothing["difference"], nothing["low"], nothing["high"]) == (0, 0, 0)
    shares = scoring.difference(one, one, p=(20, 100))
    assert shares["difference"] == scoring.score(one, 20, resamples=0)["score"] - alone["score"]
    with pytest.raises(ValueError, match="same images"):
        scoring.difference(one, one[one["id"] != "a0003"])


def test_over_seeds_is_the_t_interval():
    found = scoring.over_seeds([1.0, 2.0, 4.0])
    half = 4.302652729911275 * np.std([1, 2, 4], ddof=1) / 3**0.5
    assert (found["mean"], found["low"], found["high"]) == pytest.approx(
        (7 / 3, 7 / 3 - half, 7 / 3 + half)
    )
    single = scoring.over_seeds([0.5])
    assert single["mean"] == 0.5 and math.isnan(single["low"])
    for bad in ([], [math.nan]):
        with pytest.raises(ValueError, match="over_seeds"):
            scoring.over_seeds(bad)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda t: pd.concat([t, t.assign(epoch=2)]), "800 of 1600 rows repeat"),
        (lambda t: t[:0], "0 of 0 rows"),
        (lambda t: t[t["id"] != "a0001"][3:], "ids not the same"),
        (lambda t: t[t["role"] == "target"], "0 reference"),
        (lambda t: t.assign(confidence=np.nan), "NaN"),
    ],
)
def test_bad_tables_are_one_clear_error(change, text):
    with pytest.raises(ValueError, match=text):
        scoring.score(change(simulate()), 100)


@pytest.mark.parametrize("p", [0, -1, 101, math.nan])
def test_a_percentage_out_of_range_is_an_error(p):
    with pytest.raises(ValueError, match="0 < p <= 100"):
        scoring.score(simulate(n=20), p)


def test_fast_enough():
    table = simulate(n=1500, digits=9)
    scoring.four_way(table, resamples=1)
    for work in (lambda: scoring.score(table, 20), lambda: scoring.four_way(table)):
        start = time.process_time()  # what else runs on the machine does not count
        work()
        assert time.process_time() - start < 3  # 0.9 s and 0.1 s measured


def test_class_scores_answer_directly():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 7))
    scores[0] = 0.0  # all alike: the lowest class, and no confidence at all
    found = inference.infer_scores(scores)
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(found["confidence"], (shares * np.log(shares)).sum(1), rtol=1e-12)
    assert (found["prediction"] == scores.argmax(1)).all() and found["prediction"][0] == 0
    few = inference.infer_scores([[900.0, -900.0]])
    assert few["confidence"][0] == 0 and few["prediction"][0] == 0


# ---- the paper's rules ----


def test_ties_of_votes_go_to_the_nearer_or_to_the_lower_class():
    labels, distances = torch.tensor([[2, 2, 1, 1, 0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    ours = knn.vote(labels, distances, 3).prediction
    papers = knn.vote(labels, distances, 3, "lowest class").prediction
    assert ours.tolist() == [2] and papers.tolist() == [1]
    with pytest.raises(ValueError, match="expected one of"):
        knn.vote(labels, distances, 3, "first")


def test_confidence_in_class_scores_is_their_entropy_or_the_largest_logit():
    scores = torch.tensor([[4.0, 3.9, 0.0], [3.0, -9.0, -9.0]])
    ours = inference.infer_scores(scores)
    papers = inference.infer_scores(scores, "logit")
    assert ours["confidence"].argmax() == 1 and papers["confidence"].argmax() == 0
    assert papers["confidence"].tolist() == [4, 3]
    assert (ours["prediction"] == papers["prediction"]).all()


@pytest.mark.parametrize("n, p, up, down", [(7, 20, 2, 1), (10, 20, 2, 2), (3, 20, 1, 1)])
def test_the_top_share_is_rounded_up_or_down(n, p, up, down):
    assert scoring.top_count(n, p) == up and scoring.top_count(n, p, "down") == down
    table = simulate(n=n)
    found = scoring.score(table, p, resamples=0, rounding="down")["target"]
    sides = table[table["role"] == "target"].groupby("direction")
    naive = [
        naive_accuracy_at(one["correct"], one["confidence"], 100 * down / n - 1e-6)
        for _, one in sides
    ]
    assert found == pytest.approx(np.mean(naive))


def test_rules_name_what_is_wrong():
    for wrong in ({"ties": "x"}, {"confidence": "x"}, {"rounding": "x"}, {"keep": 0.0}):
        with pytest.raises(ValueError, match=f"rules: {next(iter(wrong))}"):
            inference.Rules(**wrong)
