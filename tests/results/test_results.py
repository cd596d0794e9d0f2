"""README quotes results/ and nothing else: its generated blocks equal what results/update.py makes
of the files.
"""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

from dejavu_utils import store

ROOT = Path(__file__).resolve().parents[2]


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "results" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


update, claims = _script("update"), _script("claims")


def test_readme_agrees_with_results():
    text = (ROOT / "README.md").read_text()
    assert update.readme(text) == text, "run .venv/bin/python results/update.py"


def test_a_changed_number_is_noticed():
    text = (ROOT / "README.md").read_text()
    if "<!-- results:" not in text:
        pytest.skip("README quotes no results yet")
    block = text.split("<!-- results:")[1].split("<!-- end -->")[0]
    changed = text.replace(block, block.replace("+0.", "+0.9", 1))
    assert changed != text and update.readme(changed) != changed


def test_a_copy_that_fails_leaves_the_old_results(tmp_path, monkeypatch):
    runs, results = tmp_path / "runs", tmp_path / "results"
    monkeypatch.setenv("DEJAVU_RUNS", str(runs))
    monkeypatch.setattr(update, "HERE", results)
    (results / "smoke").mkdir(parents=True)
    (results / "smoke" / "scores.csv").write_text("score\n0.5\n")
    store.write_table(runs / "smoke" / "tables" / "scores.csv", pd.DataFrame({"score": [0.7]}))
    with pytest.raises(FileNotFoundError, match="shares.csv is not there: run the stage"):
        update.copy("smoke")
    assert [path.name for path in results.rglob("*")] == ["smoke", "scores.csv"]
    assert (results / "smoke" / "scores.csv").read_text() == "score\n0.5\n"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.2, "supported"), (-0.1, 0.1, "undecided"), (-2, -1, "contradicted")],
)
def test_verdicts(low, high, verdict):
    assert update._verdict(low, high) == verdict


def test_claims_are_judged_by_their_intervals(tmp_path, monkeypatch):
    """Made-up tables: a claim flips when its interval does, and what nobody measured is not a
    verdict.
    """
    rows = {
        "criterion": "vicreg",
        "rho": 0.2,
        "layer": "projector",
        "ranking": "own",
        "seeds": 5,
        "n": 100,
    }
    scores = [
        rows
        | {
            "epoch": e,
            "p": p,
            "score": 0.001 * e,
            "low": 0.001 * e - 0.01,
            "high": 0.001 * e + 0.01,
        }
        for e in (0, 50, 100)
        for p in (20, 100)
    ]
    split = [rows | {"epoch": 100, "ratio": 2.0, "ratio_low": 1.5, "ratio_high": 2.5}]
    steps = [
        rows | {"what": what, "difference": 0.05, "low": 0.02, "high": 0.08}
        for what in ("p = 20 % - all", "last - first trained", "projector - backbone")
    ]
    steps += [
        rows | {"what": f"- supervised ({kind})", "difference": -0.05, "low": -0.08, "high": -0.02}
        for kind in ("projector", "logits")
    ]
    probe = [
        rows
        | {
            "epoch": e,
            "quantity": "train - held-out gap",
            "n_held_out": 50,
            "mean": 0.3 + 0.001 * e,
            "low": 0.29 + 0.001 * e,
            "high": 0.31 + 0.001 * e,
        }
        for e in (0, 50, 100)
    ]
    sweeps = [
        rows | {"sweep": s, "value": v, "p": 100, "top": 1, "score": 0.1, "low": -0.01, "high": 0.2}
        for s, v in (("fraction", 0.3), ("k", 5), ("k", 20))
    ]
    truth = [
        rows | {"rho": 0.0, "target": 0.2, "target_low": 0.15, "target_high": 0.25, "bayes": 0.1}
    ]
    (tmp_path / "made").mkdir()
    for name, table in (
        ("scores", scores),
        ("shares", split),
        ("differences", steps),
        ("fig2_probe", probe),
        ("truth", truth),
        ("sweeps", sweeps),
    ):
        pd.DataFrame(table).to_csv(tmp_path / "made" / f"{name}.csv", index=False)
    monkeypatch.setattr(claims, "HERE", tmp_path)
    found = claims.table("made").set_index("id")["verdict"].to_dict()
    assert list(found) == [f"P{i}" for i in (*range(1, 10), "10a", "10b", *range(11, 20))]
    assert {key for key, verdict in found.items() if verdict == "supported"} == {
        "P1",
        "P2",
        "P3",
        "P5",
        "P18",
    }
    assert {key for key, verdict in found.items() if verdict == "contradicted"} == {"P4", "P6"}
    assert (
        found["P11"] == found["P13"] == "undecided" and found["P8"] == found["P7"] == "not tested"
    )


@pytest.mark.parametrize(
    ("above", "verdict"), [(1, "contradicted"), (2, "undecided"), (3, "supported")]
)
def test_claim_about_several_criteria_counts_them(above, verdict):
    rows = [
        {
            "criterion": name,
            "epoch": 9,
            "p": 20,
            "score": 0.1,
            "low": 0.05 if i < above else -0.05,
            "high": 0.2,
            "n": 100,
        }
        for i, name in enumerate(claims.SSL[:4])
    ]
    assert claims.several({"scores": pd.DataFrame(rows)})[1] == verdict


def _bounds(name, value, width=0.01):
    return {name: value, f"{name}_low": value - width, f"{name}_high": value + width}


@pytest.mark.parametrize(
    ("value", "p14", "rest"),
    [
        (0.01, "supported", "supported"),
        (0.02, "undecided", "undecided"),
        (-0.2, "contradicted", "contradicted"),
    ],
)
def test_claims_about_references_flip_with_their_tables(value, p14, rest):
    """The two-model score is .1, so one-model scores may differ by .025; all other intervals move
    with `value`, too.
    """
    sign = {"supported": 1, "undecided": 0, "contradicted": -1}[rest]
    two = {
        "criterion": "vicreg",
        "reference": "two-model",
        "score": 0.1,
        "low": 0.05,
        "high": 0.15,
        "n": 100,
    }
    one = two | _bounds("calibrated", 0.1 + value) | _bounds("difference", value)
    odds = (
        _bounds("odds", 2.0**sign, 0.1)
        | _bounds("control_odds", 1.0)
        | _bounds("net", 2.0**sign, 0.1)
    )
    gap = {
        "auc": 0.5 + 0.05 * sign,
        "low": 0.49 + 0.05 * sign,
        "high": 0.51 + 0.05 * sign,
        "n": 100,
    }
    statistics = [f"{name}_gap" for name in ("confidence", "correct", "alignment", "similarity")]
    tables = {
        "references": [two, *(one | {"reference": kind} for kind in ("resnet", "naive_bayes"))],
        "agreement": [
            {"criterion": "vicreg", "reference": "start 1", "what": "memorized", "n": 100} | odds
        ],
        "companions": [gap | {"statistic": name} for name in statistics],
        "atypical": [
            {"difference": 0.1, "low": 0.05, "high": 0.2, "n": 10} | _bounds("net", 0.05 * sign)
        ],
    }
    tables = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    found = {key: claims.CLAIMS[key][1](tables) for key in ("P14", "P15", "P16", "P17")}
    assert [verdict for _, verdict, _ in found.values()] == [p14, rest, rest, rest]
    assert "+0.100 [+0.050, +0.150]" in found["P14"][0] and f"{2.0**sign:.2f}" in found["P15"][0]
    missing = {name: pd.DataFrame() for name in tables}
    assert {claims.CLAIMS[key][1](missing)[1] for key in found} == {"not tested"}


def test_what_other_images_show_as_well_does_not_support_p15():
    odds = _bounds("odds", 3.0) | _bounds("control_odds", 3.0) | _bounds("net", 1.0, 0.2)
    row = {"criterion": "vicreg", "reference": "start 1", "what": "memorized", "n": 100} | odds
    assert claims.again({"agreement": pd.DataFrame([row])})[1] == "undecided"


@pytest.mark.parametrize(
    ("lam", "probe", "tau", "size", "width", "found"),
    [
        (-0.05, 0.0, 0.1, 0.001, -0.05, ("supported", "supported", "supported", "supported")),
        (0.05, 0.0, 0.0, 0.2, 0.05, ("contradicted", "undecided", "contradicted", "contradicted")),
        (-0.05, -0.3, 0.1, 0.022, 0.0, ("contradicted", "supported", "undecided", "undecided")),
        (0.0, 0.0, 0.0, -0.2, 0.0, ("undecided", "undecided", "contradicted", "undecided")),
    ],
)
def test_claims_about_knobs_flip_with_their_tables(lam, probe, tau, size, width, found):
    """P8, P9, P10 and P12 from made-up changes of score and probe, each with an interval of
    +-0.01.
    """
    row = {"criterion": "vicreg", "score": 0.1, "seeds": 3, "n": 900}
    turned = [
        row
        | {"knob": knob, "value": value}
        | _bounds("score_change", change)
        | _bounds("held_out_change", probe)
        for knob, value, change in (
            ("constants.invariance", "25.0", 0.0),
            ("constants.invariance", "100.0", lam),
            ("encoder", "small16", width),
            ("encoder", "small32", 0.0),
        )
    ]
    turned += [
        row
        | {"criterion": "simclr", "knob": "constants.temperature", "value": value}
        | _bounds("score_change", 0.0)
        | _bounds("held_out_change", 0.0)
        for value in ("0.05", "0.2", "0.5")
    ]
    sizes = [
        row
        | {"knob": knob, "value": value}
        | _bounds("score_change", change)
        | _bounds("held_out_change", 0.0)
        for knob, change in (("trained", size), ("trained_steps", -0.3))
        for value, change in (("30", 0.0), ("120", change))
    ]
    seeds = [
        {
            "criterion": "simclr",
            "knob": "constants.temperature",
            "value": value,
            "seed": seed,
            "score": 0.1 + tau * place + (0.0 if tau else 0.03) * ((seed + place) % 3),
        }
        for seed in range(3)
        for place, value in enumerate(("0.05", "0.2", "0.5"))
    ]
    tables = {
        "mitigation": pd.DataFrame(turned),
        "mitigation_backbone": pd.DataFrame(turned),
        "mitigation_seeds": pd.DataFrame(seeds),
        "trained": pd.DataFrame(sizes),
    }
    judged = [
        judge(tables)[1]
        for judge in (claims.invariance, claims.temperature, claims.size, claims.width)
    ]
    assert tuple(judged) == found
    assert claims.CLAIMS["P10b"][1](tables)[1] == "contradicted"  # fixed steps are judged apart
    empty = dict.fromkeys(tables, pd.DataFrame())
    assert {
        judge(empty)[1]
        for judge in (claims.invariance, claims.temperature, claims.size, claims.width)
    } == {"not tested"}
