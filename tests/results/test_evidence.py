"""A plan is followed in its order, and its claims are judged over seeds, by the rules it states."""

import json
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dejavu_utils import store

sys.path.insert(0, str(store.PACKAGE.parent))
from results import evidence

PLAN = {
    "dataset": "scenes",
    "seeds": [7, 8],
    "sizes": {"classes": 3, "attacked": 40, "shared": 0, "public": 20, "probe": 10, "control": 40},
    "epochs": [0, 2],
    "recipe": {"encoder": "small4", "projector": "8-8", "batch": 16},
    "crop": {"kind": "periphery", "min_side": 8},
    "k": 5,
    "level": 0.05,
    "fewest": 5,
    "order": [
        {"criteria": ["vicreg", "simclr"], "rhos": [0.2]},
        {"criteria": ["vicreg"], "rhos": [0.0]},
    ],
    "claims": [
        {
            "id": "S1",
            "says": "it remembers",
            "value": {"of": "score", "criterion": "vicreg"},
            "side": "above",
            "margin": 0.01,
        },
        {
            "id": "S2",
            "says": "above chance where the background tells nothing",
            "value": {"of": "target", "criterion": "vicreg", "rho": 0.0},
            "minus": 1 / 3,
            "side": "above",
        },
    ],
}


def test_pieces_come_block_by_block_and_seed_by_seed():
    names = [piece.name for piece in evidence.pieces(PLAN)]
    assert names == ["7-vicreg-0.2", "7-simclr-0.2", "8-vicreg-0.2", "8-simclr-0.2"] + [
        "7-vicreg-0",
        "8-vicreg-0",
    ]


def test_the_plan_is_read_from_its_page(tmp_path):
    text = "# A plan\n\nwords\n\n```yaml\nseeds: [1, 2]\n```\n\nmore words\n"
    (tmp_path / "plan_x.md").write_text(text)
    assert evidence.plan("x", tmp_path) == {"seeds": [1, 2]}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A finished piece in a folder, and its tables."""
    out = tmp_path_factory.mktemp("out")
    piece = evidence.Piece(7, "vicreg", 0.2)
    tables = evidence.measure(PLAN, piece, tmp_path_factory.mktemp("runs"))
    evidence.pack(out / f"{piece.name}.zip", tables, {"piece": piece._asdict()})
    return out, piece, tables


def test_a_piece_keeps_what_later_work_needs(measured):
    out, piece, tables = measured
    for name, table in tables.items():
        pd.testing.assert_frame_equal(evidence.unpack(out / f"{piece.name}.zip", name), table)
    guesses = tables["guesses"]
    assert set(guesses["epoch"]) == {0, 2} and set(guesses["layer"]) == set(evidence.LAYERS)
    assert set(guesses["attacked"]) == {"attacked", "control"}
    assert tables["audit"]["members"].tolist() == ["a", "b"]
    assert {"deja_vu", "alignment_gap", "member"} <= set(tables["audit_images"])
    made = json.loads(zipfile.ZipFile(out / f"{piece.name}.zip").read("made.json"))
    assert made["piece"]["seed"] == 7


def test_a_value_is_plain_arithmetic_of_the_kept_guesses(measured):
    out, piece, tables = measured
    rows = tables["guesses"].query("attacked == 'attacked' and epoch == 2 and layer == 'projector'")
    by_set = rows.groupby(["direction", "role"])["correct"].mean().unstack()
    score = (by_set["target"] - by_set["reference"]).mean()
    sizes = rows.groupby("direction")["id"].nunique()
    weighted = ((by_set["target"] - by_set["reference"]) * sizes).sum() / sizes.sum()
    found = evidence.value(out, piece, {"of": "score"}, PLAN)
    assert found == pytest.approx(score) or found == pytest.approx(weighted)
    probes = tables["probes"].query("epoch == 2 and layer == 'backbone'")
    assert evidence.value(out, piece, {"of": "gap"}, PLAN) == pytest.approx(probes["gap"].mean())
    found = evidence.values("x", out, PLAN).set_index(["claim", "seed"])["value"]
    assert found["S1", 7] == evidence.value(out, piece, {"of": "score"}, PLAN)
    assert np.isnan(found["S1", 8]) and np.isnan(found["S2", 7])  # not run


def long(**claims):
    rows = [
        {"claim": name, "seed": seed, "value": value}
        for name, values in claims.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["claim", "seed", "value"])


def test_intervals_and_p_are_students(measured):
    random = np.random.default_rng(0)
    values = random.normal(0.03, 0.02, 8)
    found = evidence.over_seeds(values, 0.05)
    known = stats.ttest_1samp(values, 0)
    interval = known.confidence_interval(0.95)
    assert found["p"] == pytest.approx(known.pvalue)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))


def test_the_smallest_effect_is_found_four_times_in_five():
    random = np.random.default_rng(1)
    smallest = evidence.over_seeds(random.normal(0, 1, 8) * 0 + [-1, 1] * 4, 0.05)["smallest"]
    spread = np.std([-1, 1] * 4, ddof=1)
    draws = random.normal(smallest, spread, (20_000, 8))
    power = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    assert 0.75 < power < 0.85


def test_holm_by_hand():
    assert evidence.holm(pd.Series([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    assert evidence.holm(pd.Series([0.6])) == pytest.approx([0.6])


def test_families_are_corrected_each_for_itself():
    noise = np.array([-1, 1, -1, 1, 0.5, -0.5]) * 0.02
    claim = {"side": "above", "margin": 0.0, "says": "", "value": {}}
    claims = [
        claim | {"id": "S1"},
        claim | {"id": "S2"},
        claim | {"id": "M1", "family": "settings"},
    ]
    found = evidence.judged(
        long(S1=0.02 + noise, S2=0.05 + noise, M1=0.02 + noise), PLAN | {"claims": claims}
    ).set_index("claim")
    assert found.loc["S1", "p_holm"] == found.loc["S1", "p"]  # the larger of two
    assert found.loc["S2", "p_holm"] == pytest.approx(2 * found.loc["S2", "p"])
    assert found.loc["M1", "p_holm"] == found.loc["M1", "p"]

    nothing = evidence.judged(long(S1=[], S2=[], M1=[]), PLAN | {"claims": claims})
    assert set(nothing["verdict"]) == {"not run"}


def test_a_change_of_the_recipe_is_merged_into_it_and_named():
    planned = PLAN | {
        "recipe": {"encoder": "small4", "views": {"grey": 0.0}},
        "changes": {"large-crops": {"views": {"scale_min": 0.2}, "batch": 8}},
        "order": [{"criteria": ["vicreg"], "rhos": [0.2], "changes": ["large-crops"]}],
    }
    assert [piece.name for piece in evidence.pieces(planned)] == [
        "7-vicreg-0.2-large-crops",
        "8-vicreg-0.2-large-crops",
    ]
    assert evidence.recipe(planned, "large-crops") == {
        "encoder": "small4",
        "views": {"grey": 0.0, "scale_min": 0.2},
        "batch": 8,
    }
    assert evidence.recipe(planned, "") == planned["recipe"]


def test_verdicts_follow_the_rules_that_the_plan_states():
    noise = np.array([-1, 1, -1, 1, 0.5, -0.5]) * 0.004
    fine = evidence.judged(long(S1=0.05 + noise, S2=0.002 + noise), PLAN).set_index("claim")
    assert fine["verdict"].to_dict() == {"S1": "supported", "S2": "undecided"}

    below = evidence.judged(long(S1=-0.05 + noise, S2=0.05 + noise), PLAN).set_index("claim")
    assert below["verdict"].to_dict() == {"S1": "contradicted", "S2": "supported"}

    small = evidence.judged(long(S1=0.008 + noise / 10, S2=0.05 + noise), PLAN).set_index("claim")
    assert small.loc["S1", "p_holm"] < 0.05 and small.loc["S1", "verdict"] == "undecided"  # margin

    few = evidence.judged(long(S1=[0.05, 0.06], S2=0.05 + noise), PLAN).set_index("claim")
    assert few.loc["S1", "verdict"] == "not run" and few.loc["S2", "verdict"] == "supported"
    assert few.loc["S2", "p_holm"] == few.loc["S2", "p"]  # one claim was judged


def test_no_piece_is_begun_that_would_not_end_in_time(measured, tmp_path, monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(evidence, "plan", lambda name: PLAN)
    monkeypatch.setattr(
        evidence, "measure", lambda planned, piece, folder: begun.append(piece) or {}
    )
    evidence.run("x", 0, tmp_path, tmp_path / "out", [7, 8])
    assert begun == []
    evidence.run("x", 1, tmp_path, tmp_path / "out", [8])
    assert [piece.seed for piece in begun] == [8, 8, 8]
    evidence.run("x", 1, tmp_path, tmp_path / "out", [7, 8])
    assert {piece.name for piece in begun} == {piece.name for piece in evidence.pieces(PLAN)}
    evidence.run("x", 1, tmp_path, tmp_path / "out", [7, 8])  # all are done
    assert len(begun) == 6
