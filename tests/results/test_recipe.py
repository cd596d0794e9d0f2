"""The comparison of two recipes: its plan is what it trains, and what it says follows from
the numbers.
"""

import pandas as pd
import pytest

from results import evidence, recipe

SMALL = {"projector": "16-16", "batch": 16}
TINY = {
    "seeds": [20],
    "criteria": ["vicreg"],
    "recipes": {
        "old": {"epochs": 2, "changes": {"encoder": "small4"} | SMALL},
        "new": {"epochs": 1, "changes": {"encoder": "patch4"} | SMALL},
    },
    "dataset": "scenes",
    "rho": 0.2,
    "sizes": {"classes": 4, "attacked": 16, "shared": 0, "public": 20, "probe": 10, "control": 10},
    "crop": {"kind": "periphery", "min_side": 8},
    "k": 5,
    "margin": 0.01,
}


def _table(gain: float, criteria=("vicreg", "simclr"), seeds=range(20, 28)) -> pd.DataFrame:
    """Return a made-up table: the new recipe scores `gain` more, and takes half of the seconds."""
    rows = []
    for criterion in criteria:
        for seed in seeds:
            noise = 0.004 * (-1) ** seed
            about = {"criterion": criterion, "seed": seed, "score_20": 0.1, "held_out": 0.7}
            rows.append(about | {"recipe": "old", "score": 0.08, "seconds": 80.0})
            rows.append(about | {"recipe": "new", "score": 0.08 + gain + noise, "seconds": 40.0})
    return pd.DataFrame(rows)


def _said(table: pd.DataFrame) -> str:
    return recipe.verdict(recipe.differences(table), evidence.plan("recipe"))


def test_a_recipe_that_scores_the_same_is_not_inferior():
    assert _said(_table(0.0)) == "The new recipe is **not inferior**, for every criterion."


def test_an_interval_that_reaches_the_margin_shows_nothing():
    said = _said(pd.concat([_table(0.0, ["vicreg"]), _table(-0.008, ["simclr"])]))
    assert "**not shown** for simclr" in said


@pytest.mark.parametrize("table", [_table(0.0, ["vicreg"]), _table(0.0, seeds=range(20, 26))])
def test_there_is_no_verdict_before_every_seed_is_there(table):
    assert "no verdict" in _said(table)


def test_the_page_quotes_means_and_the_ratio_of_times():
    text = recipe.block(_table(0.02), evidence.plan("recipe"))
    assert "| simclr | déjà vu score | 0.080 | 0.100 | +0.020 |" in text
    assert "40 processor seconds instead of 80 (medians); within a seed it is 2.0 times" in text


def test_a_seed_that_only_one_recipe_was_run_on_is_left_out():
    stopped = pd.concat([_table(0.02, ["vicreg"]), _table(0.0, ["simclr"], [20]).head(1)])
    text = recipe.block(stopped, evidence.plan("recipe"))
    assert "no verdict" in text
    assert "+0.020" in text
    assert "simclr" not in text


def test_what_was_run_is_not_run_again(tmp_path):
    report = tmp_path / "report"
    recipe.run([20], TINY, tmp_path, report)
    table = recipe.rows(tmp_path, report)
    assert table["recipe"].tolist() == ["new", "old"]
    assert (table["seconds"] > 0).all()

    recipe.run([20], TINY, tmp_path, report)
    pd.testing.assert_frame_equal(recipe.rows(tmp_path, report), table)


def test_what_was_reported_is_not_run_again(tmp_path):
    report, elsewhere = tmp_path / "report", tmp_path / "elsewhere"
    report.mkdir()
    table = _table(0.02, ["vicreg"], [20])
    table.to_csv(report / "scores.csv", index=False)
    recipe.run([20], TINY, elsewhere, report)
    assert not elsewhere.exists()
    assert recipe.rows(elsewhere, report)["score"].tolist() == pytest.approx([0.104, 0.08])


def test_a_folder_without_results_names_the_next_command(tmp_path):
    with pytest.raises(SystemExit, match=r"recipe\.py run"):
        recipe.rows(tmp_path, tmp_path)
