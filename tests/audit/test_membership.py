"""The membership block: its numbers are those of a leak that was planted, or of none."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from dejavu_utils.audit import membership


def statistics(members, held_out, shift=0.0, seed=0):
    """Return statistics of independent normal numbers; déjà vu is larger by `shift` on members."""
    random = np.random.default_rng(seed)
    member = np.repeat([True, False], [members, held_out])
    columns = {name: random.normal(size=len(member)) for name in membership.STATISTICS}
    columns["deja_vu"] += shift * member
    ids = [f"picture {i}" for i in range(len(member))]
    return pd.DataFrame({"id": ids, "member": member} | columns)


def test_a_planted_leak_has_the_known_rates():
    shift = 2.0
    found = membership.summary(statistics(1500, 1500, shift)).set_index(["statistic", "fpr"])
    # a threshold's own false-positive rate is known the less the smaller it is
    for rate, tolerance in ((0.1, 0.03), (0.01, 0.1), (0.001, 0.2)):
        row = found.loc["deja_vu", rate]
        expected = norm.sf(norm.isf(rate) - shift)
        assert row["tpr_low"] - tolerance < expected < row["tpr_high"] + tolerance
        assert row["fpr_found"] <= rate and 0 < row["epsilon"] < math.log(expected / rate)
        assert row["auc_low"] < norm.cdf(shift / math.sqrt(2)) < row["auc_high"]
    others = found.drop("deja_vu", level="statistic")
    assert (others["auc_low"] < 0.5).all() and (0.5 < others["auc_high"]).all()
    assert (others["epsilon"] == 0).all()


def test_without_a_leak_the_bound_of_epsilon_is_above_0_in_less_than_one_of_twenty():
    leaks = 0
    for seed in range(40):
        found = statistics(150, 150, seed=seed)
        member = found["member"].to_numpy()
        for name in membership.STATISTICS:
            score = found[name].to_numpy()
            for rate in membership.RATES:
                threshold = np.quantile(score[~member], 1 - rate, method="inverted_cdf")
                counts = (int((score[member] > threshold).sum()), 150)
                counts += (int((score[~member] > threshold).sum()), 150)
                leaks += membership.at_threshold(*counts, tests=12)["epsilon"] > 0
    assert leaks <= 2  # of 40 audits, at most 2 expected


def test_one_threshold_by_hand():
    found = membership.at_threshold(30, 100, 2, 200)
    assert (found["tpr"], found["fpr_found"]) == (0.3, 0.01)
    assert found["tpr_low"] == pytest.approx(0.2124, abs=1e-4)  # Clopper-Pearson, 30 of 100
    assert found["tpr_high"] == pytest.approx(0.3998, abs=1e-4)
    assert found["epsilon"] == pytest.approx(math.log(0.21241 / 0.03565), abs=1e-3)
    assert membership.at_threshold(0, 100, 2, 200)["epsilon"] == 0


def test_no_rate_below_one_of_n_is_claimed():
    found = membership.summary(statistics(60, 50, 1.0)).query("fpr < 0.02")
    assert (found["fpr_found"] == 0).all() and (found["held_out"] == 50).all()


def test_auc_of_separate_and_of_equal_scores():
    apart = membership.auc(np.arange(50) + 100.0, np.arange(60.0))
    assert apart == {"auc": 1.0, "low": 1.0, "high": 1.0}
    same = membership.auc(np.zeros(50), np.zeros(60))
    assert same["auc"] == 0.5


def test_the_statistics_of_an_audit_and_their_csv(remembered):
    found, case = remembered.statistics, remembered.case
    assert list(found["id"]) == [*case.members.ids, *case.held_out.ids]
    assert found["member"].sum() == len(case.members)
    assert found[[*membership.STATISTICS]].notna().all(axis=None)
    assert found["similarity"].between(-1.001, 1.001).all() and (found["norm"] > 0).all()

    table = membership.as_csv(found)
    assert list(table) == ["id", "score", "member"] and set(table["member"]) == {0, 1}
    row = remembered.membership.query("statistic == 'deja_vu' and fpr == 0.1").iloc[0]
    assert row["auc_low"] > 0.5 and row["tpr_low"] > 0.1  # three in ten are remembered
