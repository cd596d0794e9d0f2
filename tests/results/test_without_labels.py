"""The measures without labels over a plan's seeds: which pairs are asked, what the block says."""

import sys

import numpy as np
import pandas as pd
from scipy import stats

from dejavu_utils import store

sys.path.insert(0, str(store.PACKAGE.parent))
from results import evidence, without_labels

PLANNED = {
    "seeds": [7, 8],
    "epochs": [0, 2],
    "dataset": "scenes",
    "sizes": {},
    "crop": {},
    "recipe": {},
    "changes": {"other": {}},
    "order": [
        {"criteria": ["vicreg"], "rhos": [0.2, 0.5]},
        {"criteria": ["vicreg"], "rhos": [0.2], "changes": ["other"]},
    ],
}


def test_only_pairs_of_the_recipe_as_it_is_that_were_run_are_asked(tmp_path, monkeypatch):
    asked = []

    def pair_of(planned, piece, folder):
        asked.append((piece.criterion, piece.rho, piece.seed))
        return asked[-1]

    def by_set(pair, epoch, attacked):
        assert epoch == 2
        row = dict.fromkeys(without_labels.COLUMNS, 0.0)
        return pd.DataFrame([row | {"criterion": pair[0], "attacked": attacked, "error": 1.0}])

    monkeypatch.setattr(evidence, "plan", lambda name: PLANNED)
    monkeypatch.setattr(evidence, "pair_of", pair_of)
    monkeypatch.setattr(without_labels.measures, "by_set", by_set)
    for name in ("7-vicreg-0.2", "7-vicreg-0.5", "7-vicreg-0.2-other"):
        (tmp_path / f"{name}.zip").touch()
    found = without_labels.measured("toy", tmp_path, tmp_path)
    assert asked == [("vicreg", 0.2, 7)]
    assert found["attacked"].tolist() == ["attacked", "control"]


def test_the_block_has_students_interval_over_seeds(tmp_path, monkeypatch):
    values = {"alignment": [0.1, 0.2, 0.4], "UnitMem": [0.01, 0.03, 0.02]}
    rows = [
        {"seed": seed, "criterion": "byol", "measure": measure, "attacked": attacked}
        | {"difference": value if attacked == "attacked" else -value}
        for measure, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
        for attacked in without_labels.SETS
    ]
    (tmp_path / "toy").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "toy" / "without_labels.csv", index=False)
    monkeypatch.setattr(without_labels, "HERE", tmp_path)
    (line,) = without_labels.block("toy").splitlines()[2:]
    assert line.startswith("| BYOL |") and line.endswith("| 3 |")
    for of_seeds in values.values():
        interval = stats.ttest_1samp(of_seeds, 0).confidence_interval(0.95)
        assert f"{np.mean(of_seeds):+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]" in line
        assert f"{-np.mean(of_seeds):+.3f}" in line  # the other set
