"""Intervals over seeds hold the truth about new trainings as often as they say; others do not."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dejavu_utils.attack import scoring
from results import coverage


@pytest.fixture(scope="module")
def world():
    return coverage.measured()


def _covered(rows):
    table = pd.DataFrame(rows)
    return table.set_index(["interval", "quantity"])["coverage"]


def test_a_simulated_study_is_scored_as_the_attack_scores_it(world):
    guesses = coverage.simulate(world, 1, 2, np.random.default_rng(1))
    quick = coverage.by_seed(guesses)
    one, two = (coverage.table(guesses, 0, criterion) for criterion in (0, 1))
    every, top = scoring.curve(one, [100, 20], resamples=0)
    change = scoring.difference(one, two, resamples=0)
    found = [every["score"], top["score"], change["difference"]]
    assert [quick[name].mean() for name in coverage.QUANTITIES] == pytest.approx(found)


def test_the_quick_intervals_are_those_of_the_module(world):
    values = coverage.by_seed(coverage.simulate(world, 1, 5, np.random.default_rng(2)))["score"]
    ends = np.concatenate(coverage.t_interval(values))
    row = scoring.over_seeds(values[0])
    assert ends == pytest.approx([row["low"], row["high"]])


def test_the_simulated_world_is_the_measured_one(world):
    values = coverage.by_seed(coverage.simulate(world, 400, 3, np.random.default_rng(3)))
    assert values["score"].mean() == pytest.approx(0.083, abs=0.004)
    assert values["score at p = 20 %"].mean() == pytest.approx(0.167, abs=0.01)
    assert 0.01 < world.spread < 0.03
    # Six criteria on three seeds: the pooled standard deviation of one seed's score.
    assert values["score"].std() == pytest.approx(0.026, abs=0.003)


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_t_intervals_over_seeds_hold_what_they_promise(world, seeds):
    random = np.random.default_rng(4)
    truth = coverage.truths(world, random)
    found = _covered(coverage.seed_level(world, seeds, 1000, truth, random))
    assert found["t over seeds"].between(0.93, 0.97).all()
    # A percentile bootstrap of so few numbers does not.
    assert (found["bootstrap over seeds"] < {3: 0.80, 5: 0.88, 8: 0.92}[seeds]).all()


def test_intervals_over_images_are_too_narrow_for_new_trainings(world):
    random = np.random.default_rng(5)
    truth = {name: np.nan for name in coverage.QUANTITIES}
    truth |= {"score": world.score, "difference of two criteria": world.score - world.other_score}
    wide = replace(world, spread=0.05)  # as far apart as SimCLR's seeds
    found = _covered(coverage.image_level(wide, 3, 20, truth, random, 100))
    assert found["bootstrap over images"]["score"] < 0.8
    assert found["bootstrap over images"]["difference of two criteria"] < 0.8


def test_the_published_table_says_so():
    table = pd.read_csv(coverage.HERE / "coverage.csv")
    table = table.set_index(["interval", "seeds", "quantity"]).sort_index()
    assert table.loc["t over seeds", "coverage"].between(0.93, 0.97).all()
    pooled = table.loc["bootstrap over images", "coverage"].unstack()
    assert (pooled[["score", "difference of two criteria"]] < 0.9).all(axis=None)
    few = table.loc["bootstrap over seeds", "coverage"].unstack()
    assert (few.loc[[3, 5, 8]] < 0.93).all(axis=None)


@pytest.mark.slow
def test_the_published_table_comes_out_again(world):
    kept = pd.read_csv(coverage.HERE / "coverage.csv")
    pd.testing.assert_frame_equal(coverage.run(world), kept, rtol=1e-6)
