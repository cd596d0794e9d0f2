"""The one-model test on encoders of a plan: scores of a tiny pair, verdicts by the stated rule."""

import sys

import numpy as np
import pandas as pd
import pytest

from dejavu_utils import store
from dejavu_utils.attack import references
from dejavu_utils.models import launch, pairs

sys.path.insert(0, str(store.PACKAGE.parent))
from results import evidence, one_model

PLANNED = {
    "dataset": "scenes",
    "seeds": [7],
    "sizes": {"classes": 3, "attacked": 40, "shared": 0, "public": 20, "probe": 10, "control": 40},
    "epochs": [0, 2],
    "recipe": {"encoder": "small4", "projector": "8-8", "batch": 16},
    "crop": {"kind": "periphery", "min_side": 8},
    "k": 5,
    "order": [
        {"criteria": ["vicreg", "simclr"], "rhos": [0.2]},
        {"criteria": ["vicreg"], "rhos": [0.5]},
    ],
}
OURS = evidence.plan("one_model")


def test_scores_share_the_target_and_differ_by_their_references(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "plan", lambda name: PLANNED)
    piece = evidence.Piece(7, "vicreg", 0.2)
    folder, out = tmp_path / "runs", tmp_path / "out"
    pair = evidence.pair_of(PLANNED, piece, folder)
    launch.fit_all(pairs.jobs([pair]))
    guesses = references.two_model(pair, 2, PLANNED["k"])
    for rho in (0.2, 0.5):  # the plan asks for its first rho alone
        evidence.pack(out / f"{piece._replace(rho=rho).name}.zip", {"guesses": guesses}, {})

    found = one_model.scores({"plan": "toy", "kinds": ["naive_bayes"]}, folder, out)
    (row,) = found.to_dict("records")

    rows = guesses.query("attacked == 'attacked' and epoch == 2 and layer == 'projector'")
    right = rows.groupby("role")["correct"].mean()
    assert row["target"] == pytest.approx(right["target"])
    assert row["two_model"] == pytest.approx(right["target"] - right["reference"])
    assert row["one_model"] == pytest.approx(right["target"] - row["classifier"])
    assert row["difference"] == pytest.approx(right["reference"] - row["classifier"])
    assert row["n"] == rows["id"].nunique() and abs(row["control"]) <= 1


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (0.0, "supported"),
        (0.018, "supported"),  # within a quarter of .1, though not 0
        (0.024, "undecided"),  # its interval ends beyond
        (0.06, "contradicted"),
        (-0.06, "contradicted"),
    ],
)
def test_agreement_is_an_interval_within_a_quarter_of_the_score(difference, verdict):
    noise = 0.004 * np.array([-1, 1, -1, 1, 0.5, -0.5, 0.2, -0.2])
    rows = [
        {"seed": seed, "criterion": criterion, "kind": kind, "difference": value, "two_model": 0.1}
        for seed, value in enumerate(difference + noise)
        for criterion in ("vicreg", "simclr")
        for kind in OURS["kinds"]
    ]
    table = pd.DataFrame(rows)
    table.loc[table["criterion"] == "simclr", "difference"] = 1.0  # the claims are about VICReg
    found = one_model.judged(table, OURS)
    assert found["verdict"].tolist() == [verdict] * 2
    assert found["margin"].tolist() == pytest.approx([0.025] * 2)

    few = one_model.judged(table[table["seed"] < 4], OURS)
    assert few["verdict"].tolist() == ["not run"] * 2
