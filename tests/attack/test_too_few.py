"""Below scoring.FEWEST images there is no interval: the text says so, and a simulation says why."""

import math

import numpy as np
import pandas as pd
import pytest

from dejavu_utils.attack import scoring


def simulate(n, seed=0):
    """Return the attack on n images a direction: right at random, with many equal confidences."""
    random = np.random.default_rng(seed)
    tables = []
    for direction in "ab":
        for role in ("target", "reference"):
            rows = {"id": [f"{direction}{i:03d}" for i in range(n)], "label": np.arange(n) % 10}
            right = random.random(n) < 0.4
            rows |= {"direction": direction, "role": role, "correct": right}
            rows["confidence"] = random.integers(0, 9, n).astype(float)
            tables.append(pd.DataFrame(rows))
    return pd.concat(tables, ignore_index=True)


def test_below_fifty_images_there_is_no_interval_and_the_text_says_so():
    few, enough = simulate(n=24), simulate(n=25)  # images a direction
    row = scoring.score(few, resamples=50)
    ends = ("low", "high", "target_low", "target_high", "reference_low", "reference_high")
    assert all(math.isnan(row[name]) for name in ends) and math.isfinite(row["score"])
    assert scoring.interval_text(row) == f"{row['score']:+.3f}, too few (n = 48)"
    assert math.isnan(scoring.four_way(few, resamples=50)["memorized_low"])
    assert math.isnan(scoring.difference(few, few, resamples=50)["low"])
    row = scoring.score(enough, resamples=50)
    assert row["low"] <= row["score"] <= row["high"] and "[" in scoring.interval_text(row)


def test_of_the_top_share_the_images_in_it_count():
    table = simulate(n=100)
    found = {row["p"]: row for row in scoring.curve(table, (20, 25, 100), resamples=50)}
    assert math.isnan(found[20]["low"]) and math.isfinite(found[25]["low"])
    assert scoring.interval_text(found[20]).endswith("too few (n = 40)")
    assert math.isnan(scoring.difference(table, table, (20, 100), resamples=50)["low"])


def misses(n, up, down, tables=1000):
    """Return how often the 95 % bootstrap of `n` images misses the score up - down."""
    random = np.random.default_rng([n, round(100 * up), round(100 * down)])
    half, values = n // 2, np.zeros((tables, 500))
    for _ in "ab":
        seen = random.multinomial(half, [up, down, 1 - up - down], tables) / half
        drawn = random.multinomial(half, np.broadcast_to(seen[:, None], (tables, 500, 3)))
        values += (drawn[..., 0] - drawn[..., 1]) / n
    low, high = np.quantile(values, [0.025, 0.975], axis=1)
    return np.mean((low > up - down + 1e-12) | (high < up - down - 1e-12))


CASES = [(0.1, 0.1), (0.25, 0.25), (0.15, 0.05), (0.08, 0.02), (0.1, 0.0), (0.05, 0.0)]


@pytest.mark.slow
@pytest.mark.parametrize("up, down", CASES)
@pytest.mark.parametrize("n", [scoring.FEWEST, 100, 200])
def test_from_the_stated_number_on_intervals_hold_nine_times_in_ten(n, up, down):
    assert misses(n, up, down) < 0.115  # 9 % found, and three standard errors


def test_far_below_it_they_do_not():
    assert misses(34, 0.05, 0.0) > 0.13 and misses(20, 0.08, 0.02) > 0.13
    assert misses(34, 0.1, 0.1) < 0.08  # equally good encoders: too few is no matter of these


def test_the_simulated_table_is_the_bootstrap_of_the_score():
    """The multinomial draw is the resampling of `score`: the same interval, up to chance."""
    table = simulate(n=100)
    strata = scoring.stratify(table)
    values, random = np.zeros(4000), np.random.default_rng(0)
    for stratum in strata:
        gain = stratum.hits[0] - stratum.hits[1]
        shares = [(gain == 1).mean(), (gain == -1).mean(), (gain == 0).mean()]
        drawn = random.multinomial(100, shares, 4000)
        values += (drawn[:, 0] - drawn[:, 1]) / 200
    row = scoring.score(table, resamples=4000)
    assert [row["low"], row["high"]] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.02)
