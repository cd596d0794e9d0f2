"""References side by side: planted memory, offsets and agreement come out as they were planted;
naive twins agree.
"""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from dejavu_utils.attack import agreement, many_model, one_model, scoring


def made(hit, n=150, seeds=(0,), attacked="attacked", reference="two-model", classes=5):
    """Return a table of the attack: `hit(i, role)` says whether image i is right; half of the
    images each direction.
    """
    rows = [
        {
            "id": f"{attacked}{i:04d}",
            "label": i % classes,
            "direction": "ab"[i % 2],
            "role": role,
            "seed": seed,
            "correct": float(hit(i, role)),
            "confidence": -(i % 7) / 7,
            "criterion": "vicreg",
            "rho": 0.2,
            "attacked": attacked,
            "reference": reference,
        }
        for seed in seeds
        for i in range(n)
        for role in ("target", "reference")
    ]
    return pd.DataFrame(rows)


def chance(seed, p):
    rng = np.random.default_rng(seed)
    return lambda i, role: rng.random() < p[role]


def test_the_member_difference_is_free_of_what_images_of_neither_set_show():
    """A classifier 20 points weaker than the vote, without any memory: a plain score of +.2, which
    the two-model score is not, and no difference of members and others.
    """
    table = pd.concat(
        [
            made(chance(0, {"target": 0.4, "reference": 0.4}), 4000),
            made(chance(1, {"target": 0.4, "reference": 0.4}), 4000, attacked="control"),
            *(
                made(
                    chance(2 + i, {"target": 0.4, "reference": 0.2}),
                    4000,
                    attacked=which,
                    reference="resnet",
                )
                for i, which in enumerate(("attacked", "control"))
            ),
        ]
    )
    rows = agreement.scores(table, resamples=300).set_index("reference")
    assert rows.loc["resnet", "low"] > 0.15 and rows.loc["resnet", "offset_low"] > 0.15
    assert (
        rows.loc["resnet", "member_difference_low"]
        < 0
        < rows.loc["resnet", "member_difference_high"]
    )
    assert rows.loc["resnet", "minus_two_model_low"] > 0.15
    assert np.isnan(rows.loc["two-model", "member_difference"]) and np.isnan(
        rows.loc["two-model", "minus_two_model"]
    )
    assert rows.loc["resnet", "member_difference"] == pytest.approx(
        rows.loc["resnet", "score"] - rows.loc["resnet", "offset"]
    )


def test_scores_are_those_of_the_attack_and_of_the_known_truth():
    table = made(chance(0, {"target": 0.5, "reference": 0.3}), 300, seeds=(0, 1))
    rows = agreement.scores(table, resamples=50).set_index("reference")
    one = scoring.score(table, resamples=50)
    for name in ("score", "low", "high", "target", "n"):
        assert rows.loc["two-model", name] == one[name]
    assert rows.loc["bayes", "reference_accuracy"] == pytest.approx(0.2 + 0.8 / 5)
    assert rows.loc["bayes", "score"] == pytest.approx(one["target"] - 0.36)
    assert list(agreement.scores(table.assign(rho=np.nan), resamples=10)["reference"]) == [
        "two-model"
    ]  # pictures


def test_kappa_and_odds_equal_the_library_and_the_hand():
    one, two = (
        made(chance(0, {"target": 0.5, "reference": 0.4})),
        made(chance(1, {"target": 0.5, "reference": 0.4})),
    )
    row = agreement.labels(
        pd.concat([one, two.assign(reference="resnet")]), resamples=200
    ).set_index("what")
    wide = [each.pivot(index="id", columns="role", values="correct") for each in (one, two)]
    for what, given in (
        ("memorized", [each["target"] > each["reference"] for each in wide]),
        ("reference", [each["reference"] > 0 for each in wide]),
    ):
        assert row.loc[what, "kappa"] == pytest.approx(cohen_kappa_score(*given))
        assert row.loc[what, "correlation"] == pytest.approx(np.corrcoef(*given)[0, 1])
        counts = pd.crosstab(*given).to_numpy() + 0.5
        assert row.loc[what, "odds"] == pytest.approx(
            counts[0, 0] * counts[1, 1] / counts[0, 1] / counts[1, 0]
        )
        assert (
            row.loc[what, "kappa_low"] < 0 < row.loc[what, "kappa_high"]
            and row.loc[what, "n"] == 150
        )


def test_the_same_test_twice_agrees_entirely():
    one = made(chance(0, {"target": 0.5, "reference": 0.4}))
    row = agreement.labels(pd.concat([one, one.assign(reference="start 1")]), resamples=100).iloc[0]
    assert row["kappa"] == row["correlation"] == row["kappa_low"] == 1 and row["one"] == row["two"]


def test_images_that_are_easy_for_every_model_are_no_memory():
    """Half of the images nobody can name: labels agree across trainings, those of images in neither
    set as well.
    """

    def easy(seed):
        rng = np.random.default_rng(seed)
        return lambda i, role: i % 4 < 2 and rng.random() < 0.5

    def memory(seed):
        rng = np.random.default_rng(seed)
        return lambda i, role: rng.random() < (0.9 if role == "target" and i % 4 < 2 else 0.3)

    nothing = chance(5, {"target": 0.3, "reference": 0.3})
    for own, control, found in ((easy, easy, False), (memory, lambda seed: nothing, True)):
        tables = [
            made(kind(seed), 3000, attacked=which, reference=name)
            for which, kind in (("attacked", own), ("control", control))
            for seed, name in ((len(which), "two-model"), (len(which) + 10, "start 1"))
        ]
        row = agreement.labels(pd.concat(tables), resamples=200).iloc[0]
        assert row["odds_low"] > 1 and (row["net_low"] > 1) == found


def test_tests_of_different_images_are_an_error():
    one = made(chance(0, {"target": 0.5, "reference": 0.4}))
    with pytest.raises(ValueError, match="do not judge the same images"):
        agreement.labels(
            pd.concat([one, one[one["id"] != one["id"].iloc[0]].assign(reference="resnet")])
        )


def half(pairs=4, n=40, p_in=0.8, p_out=0.3, seed=0):
    """Return the table of a many-model test with memory as it is planted."""
    rng = np.random.default_rng(seed)
    return made(
        lambda i, role: rng.binomial(pairs, p_in if role == "target" else p_out) / pairs,
        n,
        reference="many-model",
    ).assign(encoders=pairs)


def test_no_single_image_is_judged_by_few_encoders():
    few, many = (many_model.images(half(pairs)) for pairs in (4, 16))
    assert (
        few["memorized"].isna().all()
        and few["reason"].str.contains("8 encoders; a single image needs 32").all()
    )
    assert (
        many["memorized"].isin([0, 1]).all()
        and (many["reason"] == "").all()
        and many["memorized"].mean() > 0.5
    )


def test_the_standard_error_at_rate_a_half_is_a_third_with_eight_encoders():
    row = many_model.images(made(lambda i, role: 0.5, 2).assign(encoders=4)).iloc[0]
    assert row["memorization"] == 0 and row["error"] == pytest.approx(np.sqrt(2 * 0.25 / 4))
    sure = many_model.images(
        made(lambda i, role: float(role == "target"), 2).assign(encoders=4)
    ).iloc[0]
    assert sure["memorization"] == 1 and sure["error"] > 0.25  # all alike, of four: not certain


def test_without_memory_few_images_are_called_memorized():
    found = many_model.images(half(16, 4000, 0.4, 0.4))
    assert found["memorized"].mean() < 0.04 and abs(found["memorization"].mean()) < 0.01


def test_the_average_over_encoders_is_a_score():
    row = (
        agreement.scores(
            pd.concat([half(4, 400), made(chance(0, {"target": 0.8, "reference": 0.3}), 400)]),
            resamples=100,
        )
        .set_index("reference")
        .loc["many-model"]
    )
    assert row["low"] < 0.5 < row["high"] and row["high"] - row["low"] < 0.1
    assert row["score"] == pytest.approx(many_model.images(half(4, 400))["memorization"].mean())


def test_folds_of_a_class_are_even_and_no_image_is_judged_by_who_saw_it():
    ids, labels = np.array([f"i{i}" for i in range(60)]), np.repeat(np.arange(3), 20)
    fold = one_model.assign(ids, labels, 2, "0/half 1")
    assert (np.bincount(labels * 2 + fold) == 10).all()
    assert (fold != one_model.assign(ids, labels, 2, "0/half 2")).any()
