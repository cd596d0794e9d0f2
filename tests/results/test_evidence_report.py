"""The report of a plan says what its pieces hold: made-up pieces of three seeds."""

import sys

import numpy as np
import pandas as pd
import pytest

from dejavu_utils import store

sys.path.insert(0, str(store.PACKAGE.parent))
from results import evidence, evidence_report

CRITERIA = ["vicreg", "supervised"]
PLAN = {
    "seeds": [7, 8, 9],
    "epochs": [0, 2],
    "level": 0.05,
    "fewest": 2,
    "order": [{"criteria": CRITERIA, "rhos": [0.2]}, {"criteria": ["vicreg"], "rhos": [0.5]}],
    "claims": [
        {
            "id": "S1",
            "says": "VICReg remembers",
            "value": {"of": "score", "criterion": "vicreg"},
            "side": "above",
            "margin": 0.01,
        }
    ],
}
RIGHT = {7: 12, 8: 14, 9: 16}  # of 20 images the target names so many at the end, in seed 7, 8, 9


def guesses(seed):
    """Made-up guesses: the reference names 10 of 20 images, the target as many before training."""
    rows = []
    for attacked, epoch in (("attacked", 0), ("attacked", 2), ("control", 2)):
        trained = attacked == "attacked" and epoch == 2
        for layer in evidence.LAYERS:
            for direction in ("A", "B"):
                for role in ("target", "reference"):
                    hits = RIGHT[seed] if trained and role == "target" else 10
                    for image in range(20):
                        about = {"attacked": attacked, "epoch": epoch, "layer": layer}
                        about |= {"direction": direction, "role": role, "seed": seed}
                        about |= {"id": f"{direction}{image}", "label": 0, "rho": 0.2}
                        about |= {"criterion": "vicreg", "confidence": float(image)}
                        rows.append(about | {"correct": image < hits})
    return pd.DataFrame(rows)


def probes():
    rows = [
        {"epoch": epoch, "layer": layer, "model": model, "held_out": 0.5, "gap": 0.2}
        for epoch in (0, 2)
        for layer in evidence.LAYERS
        for model in ("A", "B")
    ]
    return pd.DataFrame(rows).assign(fresh_gap=0.1)


def audit():
    rows = [
        {"members": "a", "word": "memorizes"},
        {"members": "b", "word": "no evidence"},
    ]
    return pd.DataFrame(rows).assign(score=0.1, low=0.0, high=0.2, n=20, failed="")


@pytest.fixture()
def reported(tmp_path, monkeypatch):
    """A folder with the report of four of nine pieces."""
    out = tmp_path / "toy"
    for seed, criterion in [(7, "vicreg"), (8, "vicreg"), (9, "vicreg"), (7, "supervised")]:
        piece = evidence.Piece(seed, criterion, 0.2)
        tables = {"guesses": guesses(seed), "probes": probes(), "audit": audit()}
        evidence.pack(out / f"{piece.name}.zip", tables, {})
    monkeypatch.setattr(evidence, "plan", lambda name: PLAN)
    monkeypatch.setattr(evidence_report, "HERE", tmp_path)
    evidence_report.write("toy")
    return out


def test_scores_are_plain_arithmetic_of_the_guesses(reported):
    scores = pd.read_csv(reported / "scores.csv").query("layer == 'projector' and p == 100")
    end = scores.query("epoch == 2 and criterion == 'vicreg'").set_index(["attacked", "seed"])
    for seed, hits in RIGHT.items():
        assert end.loc[("attacked", seed), "score"] == pytest.approx(hits / 20 - 0.5)
        assert end.loc[("control", seed), "score"] == 0


def test_blocks_say_means_seeds_and_what_was_not_run(reported):
    line = evidence_report.verdicts("toy").splitlines()[-1]
    mean = evidence.over_seeds(np.array([0.1, 0.2, 0.3]), 0.05)
    assert f"+0.200 [{mean['low']:+.3f}, {mean['high']:+.3f}]" in line
    assert "+0.100 +0.200 +0.300" in line and "provisional" not in line

    text = evidence_report.ran("toy")
    assert "4 of the plan's 9 pieces" in text
    assert "- supervised-0.2: seeds 8, 9" in text and "- vicreg-0.5: seeds 7, 8, 9" in text

    assert "| VICReg | memorizes 3 | no evidence 3 |" in evidence_report.audits("toy")
    assert "| VICReg | 2 | +0.200" in evidence_report.course("toy")
    assert evidence_report.ends("toy").count("VICReg") == 1


def test_a_verdict_is_provisional_until_all_seeds_were_run(reported, monkeypatch):
    monkeypatch.setattr(evidence, "plan", lambda name: PLAN | {"seeds": [7, 8, 9, 10]})
    assert "provisional: 3 of 4 seeds" in evidence_report.verdicts("toy")


def test_figures_draw_every_seed(reported):
    (vicreg, supervised) = evidence_report.course_figure("toy").axes
    assert len(vicreg.lines) == 3 + 1 + 1 + 1  # seeds, mean, control, zero
    assert len(supervised.lines) == 1 + 1 + 1 + 1
    (axis,) = evidence_report.claims_figure("toy").axes
    assert sorted(axis.lines[0].get_xdata()) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("folder", evidence_report.ASKED)
def test_every_claim_that_answers_the_paper_is_in_a_plan(folder):
    plans = [evidence.plan(name) for name in (folder, "one_model", "one_model_photographs")]
    known = {claim["id"] for planned in plans for claim in planned["claims"]}
    asked = {claim for asking in evidence_report.ASKED[folder].values() for claim in asking}
    assert asked <= known


def test_the_papers_claims_are_answered_by_the_verdicts_of_the_plans(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence_report, "HERE", tmp_path)
    monkeypatch.setattr(evidence_report, "ASKED", {"toy": {"P1": ["S1", "S2"], "P14": ["O1"]}})
    assert evidence_report.answers("toy") == {}  # nothing was run

    (tmp_path / "toy").mkdir()
    rows = pd.DataFrame({"claim": ["S1"], "verdict": ["supported"]})
    rows.to_csv(tmp_path / "toy" / "claims.csv", index=False)
    rows = pd.DataFrame({"claim": ["O1"], "verdict": ["undecided"]})
    rows.to_csv(tmp_path / "toy" / "one_model_claims.csv", index=False)
    answers = {"P1": "S1 supported, S2 not run", "P14": "O1 undecided"}
    assert evidence_report.answers("toy") == answers


def test_a_column_that_says_the_same_everywhere_is_left_out(reported):
    assert "ρ" in evidence_report.ends("toy").splitlines()[0]  # scenes
    scores = pd.read_csv(reported / "scores.csv").assign(rho=0.0)
    scores.to_csv(reported / "scores.csv", index=False)
    head = evidence_report.ends("toy").splitlines()[0]
    assert "ρ" not in head and "change" not in head and "criterion" in head
