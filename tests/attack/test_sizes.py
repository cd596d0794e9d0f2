"""Everything that is computed from arrays holds at 1, 10 and 1,000 classes, with one query and in
one batch or many.
"""

import numpy as np
import pandas as pd
import pytest
import torch

from dejavu_utils.attack import inference, knn, scoring, summaries

pytestmark = pytest.mark.usefixtures("any_number")

SETTING = {
    "criterion": "vicreg",
    "rho": 0.2,
    "seed": 0,
    "epoch": 2,
    "layer": "projector",
    "k": 3,
    "attacked": "attacked",
}
everything = pytest.mark.parametrize(
    ("classes", "n"), [(1, 1), (1, 40), (10, 1), (10, 40), (1000, 1), (1000, 40)]
)


def table(classes, n, seed=0, **setting):
    """Return the attack on n images a direction, drawn at random: embeddings that mean nothing."""
    random = np.random.default_rng([classes, n, seed])

    def draw(rows):
        return torch.from_numpy(random.normal(size=(rows, 4))).float()

    labels = {side: random.integers(0, classes, n) for side in "ab"}
    crops, ids = (
        {side: make(side) for side in "ab"}
        for make in (
            lambda side: {model: draw(n) for model in "AB"},
            lambda side: [f"{side}{i}" for i in range(n)],
        )
    )
    found = inference.label_inference(
        crops,
        {model: draw(30) for model in "AB"},
        random.integers(0, classes, 30),
        ids,
        labels,
        3,
        classes,
    )
    return found.assign(**SETTING | setting)


def by_hand(rows):
    """Return the score over all examples: the mean over directions of target accuracy minus
    reference accuracy.
    """
    means = (
        rows.astype({"correct": float}).groupby(["direction", "role"])["correct"].mean().unstack()
    )
    return (means["target"] - means["reference"]).mean()


@everything
def test_scores_curves_splits_and_differences(classes, n):
    rows, other = table(classes, n), table(classes, n, seed=1)
    scores = summaries.scores(rows, [100, 20], resamples=20)
    assert (
        (scores["n"] == 2 * n).all() and len(scores) == 2 and scores["score"].between(-1, 1).all()
    )
    assert scores[scores["p"] == 100]["score"].to_numpy() == pytest.approx(by_hand(rows))
    split = summaries.shares(rows, resamples=20).iloc[0]
    assert split[list(scoring.CELLS)].sum() == pytest.approx(1)
    assert split["memorized"] - split["misrepresented"] == pytest.approx(by_hand(rows))
    curve = summaries.curve(rows, (50, 100), resamples=20)
    assert curve["chance"].iloc[0] == 1 / rows["label"].nunique() and len(curve) == 2
    other = other.assign(id=rows["id"], label=rows["label"])
    assert scoring.difference(rows, other, resamples=20)["difference"] == pytest.approx(
        by_hand(rows) - by_hand(other)
    )


@everything
def test_differences_and_the_known_truth(classes, n):
    ends = [
        table(classes, n, layer=layer, epoch=epoch)
        for layer in ("projector", "backbone")
        for epoch in (0, 1, 2)
    ]
    steps = summaries.differences(pd.concat(ends), [0, 1, 2])
    assert len(steps) == 4 and (steps["n"] == 2 * n).all()
    same = steps[
        steps["what"] != "p = 20 % - all"
    ]  # all layers and epochs are one and the same table
    assert (
        (same["difference"] == 0).all() and (same["low"] == 0).all() and (same["high"] == 0).all()
    )
    curve = summaries.curve(
        pd.concat([table(classes, n, rho=rho) for rho in (0.0, 0.5)]), (100,), resamples=5
    )
    truth = summaries.truth(curve, classes).set_index("rho")
    assert truth.loc[0.0, "bayes"] == 1 / classes and truth.loc[0.5, "bayes"] == pytest.approx(
        0.5 + 0.5 / classes
    )


@everything
def test_class_scores_and_one_query(classes, n):
    scores = torch.from_numpy(np.random.default_rng(n).normal(size=(n, classes)))
    found = inference.infer_scores(scores)
    assert (found["prediction"] == scores.numpy().argmax(1)).all()
    assert (found["confidence"] <= 1e-12).all() and (
        found["confidence"] >= -np.log(classes) - 1e-12
    ).all()


def test_one_batch_and_many_give_the_same():
    """infer votes 8,192 queries at a time: the answer to a query does not depend on who else was
    asked.
    """
    random = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(8200, 2, generator=random), torch.randn(40, 2, generator=random)
    labels = np.arange(40) % 10
    every, last = (
        inference.infer(queries, bank, labels, 5, 10),
        inference.infer(queries[-10:], bank, labels, 5, 10),
    )
    for name in every:
        np.testing.assert_array_equal(every[name][-10:], last[name])
    one = inference.infer(queries[:1], bank, labels, 5, 10)
    assert all((one[name][0] == every[name][0]).all() for name in every)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_one_query_against_any_bank(n):
    bank = torch.from_numpy(np.random.default_rng(n).normal(size=(n, 3))).float()
    distances, rows = knn.search(bank[:1], bank, n)
    expected = (bank.double() - bank[:1].double()).square().sum(1)
    order = torch.argsort(expected, stable=True)
    assert torch.equal(rows[0], order) and torch.allclose(
        distances[0], expected[order], rtol=1e-13, atol=0
    )


def test_one_number_a_seed_and_no_image_that_only_one_encoder_knows():
    one = scoring.over_seeds([0.5])
    assert one["mean"] == 0.5 and one["n"] == 1 and np.isnan(one["low"])
    assert scoring.odds(0, 0)[1:] == (0.0, float("inf"))
