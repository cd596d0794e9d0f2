"""The READMEs quote results/ and nothing else; every verdict follows from its tables."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dejavu_utils import store

ROOT = Path(__file__).resolve().parents[2]


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "results" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


update, claims, seeds = _script("update"), _script("claims"), _script("seeds")
redraw = _script("redraw")
RESULTS = ROOT / "results"


@pytest.mark.parametrize("path", update.pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_readmes_agree_with_results(path):
    text = path.read_text()
    assert "<!-- results:" in text
    assert update.filled(text) == text, "run .venv/bin/python results/update.py"


def test_a_changed_number_is_noticed():
    text = (ROOT / "results" / "study" / "README.md").read_text()
    block = text.split("<!-- results:study:scores -->")[1].split("<!-- end -->")[0]
    changed = text.replace(block, block.replace("+0.", "+0.9", 1))
    assert changed != text and update.filled(changed) == text


def test_the_first_sentence_quotes_the_table():
    rows = pd.read_csv(ROOT / "results" / "scenes" / "scores.csv")
    rows = rows[(rows["epoch"] == rows["epoch"].max()) & rows["change"].isna()]
    row = rows.query(
        "criterion == 'vicreg' and rho == 0.2 and attacked == 'attacked'"
        " and layer == 'projector' and p == 100"
    )[["target", "reference"]].mean()
    said = f"{100 * row['target']:.0f} % against {100 * row['reference']:.0f} %"
    assert said in (ROOT / "README.md").read_text()


def test_readme_stays_a_page():
    """It grows by links only."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_an_unknown_block_is_named():
    with pytest.raises(SystemExit, match="no block study:score; there are"):
        update.filled("<!-- results:study:score -->\n<!-- end -->")


@pytest.mark.parametrize("name", ["study", "pictures"])
def test_every_verdict_is_recomputed_from_the_tables(name):
    kept = pd.read_csv(ROOT / "results" / name / "claims.csv", dtype=str).fillna("")
    made = claims.table(name).astype(str)
    assert kept.to_dict("records") == made.to_dict("records"), f"run results/claims.py {name}"


@pytest.mark.parametrize("name", ["study", "pictures"])
def test_every_claim_has_a_source_and_a_unit(name):
    table = claims.table(name)
    for row in table.itertuples():
        assert row.source.split(";")[0].split(",")[0] in claims.SOURCES
        judged = row.verdict not in ("not tested", "withdrawn")
        assert row.unit in ((claims.SEEDS, claims.IMAGES) if judged else ("",))
        assert row.verdict.endswith("for these encoders") <= (row.unit == claims.IMAGES)


def test_intervals_over_seeds_are_those_of_the_single_scores():
    kept = pd.read_csv(ROOT / "results" / "study" / "seeds.csv")
    pd.testing.assert_frame_equal(kept, seeds.summary("study"), rtol=1e-9)
    simclr = kept.query("criterion == 'simclr' and quantity == 'score'").iloc[0]
    assert simclr[["low", "high", "q", "p"]].round(3).tolist() == [-0.056, 0.18, 12.632, 0.002]


def test_heterogeneity_by_hand():
    q, p = seeds.heterogeneity(np.array([0.0, 1.0, 2.0]), 0.5)
    assert q == pytest.approx(4.0) and p == pytest.approx(np.exp(-2.0))  # chi-squared, 2 df
    assert seeds.image_variance(-1.959964, 1.959964, 3) == pytest.approx(3.0)


def test_only_intervals_over_seeds_are_bold():
    """A cell in bold is one that seeds.csv or a probe's interval over seeds supports."""
    for path in update.pages():
        for line in path.read_text().splitlines():
            if line.startswith("|") and "**" in line and "gold" not in line:
                assert any(name in line for name in update.NAMES.values()), line
    table = pd.read_csv(ROOT / "results" / "study" / "seeds.csv")
    for row in table.query("quantity == 'score'").itertuples():
        cell = f"{row.mean:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
        assert (f"**{cell}**" in update.scores("study")) == (row.low > 0)
    assert "**" not in update.scores("pictures")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.09, 0.12, "undecided"), (0.05, 0.1, "supported"), (0.11, 0.2, "contradicted")],
)
def test_reference_against_bayes_needs_its_whole_interval(low, high, verdict):
    assert update.reference_at_most(low, high, 0.1) == verdict


def test_a_copy_that_fails_leaves_the_old_results(tmp_path, monkeypatch):
    runs, results = tmp_path / "runs", tmp_path / "results"
    monkeypatch.setenv("DEJAVU_RUNS", str(runs))
    monkeypatch.setattr(update, "HERE", results)
    (results / "smoke").mkdir(parents=True)
    (results / "smoke" / "scores.csv").write_text("score\n0.5\n")
    (results / "smoke" / "README.md").write_text("words\n")
    store.write_table(runs / "smoke" / "tables" / "scores.csv", pd.DataFrame({"score": [0.7]}))
    with pytest.raises(FileNotFoundError, match="shares.csv is not there: run the stage"):
        update.copy("smoke")
    found = sorted(path.name for path in results.rglob("*"))
    assert found == ["README.md", "scores.csv", "smoke"]
    assert (results / "smoke" / "scores.csv").read_text() == "score\n0.5\n"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.2, "supported"), (-0.1, 0.1, "undecided"), (-2, -1, "contradicted")],
)
def test_verdicts(low, high, verdict):
    assert claims.verdict(pd.DataFrame([{"low": low, "high": high}])) == verdict


def test_claims_are_judged_by_their_intervals(tmp_path, monkeypatch):
    """Made-up tables: a claim flips when its interval does, and what nobody measured is not a
    verdict.
    """
    rows = {
        "criterion": "vicreg",
        "rho": 0.2,
        "layer": "projector",
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
    probe += [row | {"quantity": "held-out accuracy", "mean": 0.5} for row in probe]
    sweeps = [
        rows | {"sweep": s, "value": v, "p": 100, "score": 0.1, "low": -0.01, "high": 0.2}
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
    found = claims.table("made").set_index("id")["verdict"]
    assert (found[["P1", "P2", "P3"]] == "supported for these encoders").all()
    found = found.str.removesuffix(" for these encoders").to_dict()
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


def _checkpoints(gaps, accuracy):
    """Return tables in which the score rises by a hundredth a checkpoint."""
    rows = [
        {
            "criterion": "vicreg",
            "epoch": epoch,
            "quantity": quantity,
            "mean": mean,
            "low": mean - 0.01,
            "high": mean + 0.01,
            "n_held_out": 50,
        }
        for epoch, gap in enumerate(gaps)
        for quantity, mean in (
            ("train - held-out gap", gap),
            ("held-out accuracy", accuracy - gap),
        )
    ]
    scores = [
        {"criterion": "vicreg", "p": 100, "epoch": epoch, "score": 0.01 * epoch}
        for epoch in range(len(gaps))
    ]
    return {"fig2_probe": pd.DataFrame(rows), "scores": pd.DataFrame(scores)}


@pytest.mark.parametrize(
    ("gaps", "accuracy", "verdict"),
    [
        ([0.3, 0.2, 0.1], 0.8, "supported"),
        ([0.1, 0.2, 0.3], 0.8, "contradicted"),
        ([0.1, 0.2, 0.21], 0.8, "undecided"),
        ([0.3, 0.2, 0.1], 1.0, "withdrawn"),
        ([0.1, 0.2, 0.3], 1.0, "withdrawn"),
    ],
)
def test_p4_is_withdrawn_where_the_probe_knows_its_training_images(gaps, accuracy, verdict):
    assert claims.probe(_checkpoints(gaps, accuracy)).verdict == verdict


def test_a_claim_about_training_follows_the_seeds_where_they_are_known():
    step = {"criterion": "vicreg", "what": "last - first trained", "n": 100}
    step |= {"difference": 0.05, "low": 0.02, "high": 0.08}
    scores = [
        {"criterion": "vicreg", "p": 100, "epoch": epoch, "score": 0.01 * epoch}
        for epoch in range(3)
    ]
    tables = {"differences": pd.DataFrame([step]), "scores": pd.DataFrame(scores)}
    assert claims.grows(tables)[1:4:2] == ("supported", claims.IMAGES)

    row = {"criterion": "vicreg", "quantity": "last - first trained", "mean": 0.05}
    tables["seeds"] = pd.DataFrame([row | {"low": -0.01, "high": 0.11}])
    assert claims.grows(tables)[1:4:2] == ("undecided", claims.SEEDS)
    tables["seeds"] = pd.DataFrame([row | {"low": 0.01, "high": 0.09}])
    assert claims.grows(tables)[1:4:2] == ("supported", claims.SEEDS)


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
    """The two-model score is .1, so plain one-model scores may differ by .025; half the widest
    interval is .01. All other intervals move with `value`, too.
    """
    sign = {"supported": 1, "undecided": 0, "contradicted": -1}[rest]
    two = {
        "criterion": "vicreg",
        "reference": "two-model",
        "score": 0.1,
        "low": 0.095,
        "high": 0.105,
        "n": 100,
    }
    one = two | {"score": 0.1 + value, "low": 0.095 + value, "high": 0.105 + value}
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
        "other_measures": [gap | {"statistic": name} for name in statistics],
        "atypical": [
            {"difference": 0.1, "low": 0.05, "high": 0.2, "n": 10} | _bounds("net", 0.05 * sign)
        ],
    }
    tables = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    found = {key: claims.CLAIMS[key].judge(tables) for key in ("P14", "P15", "P16", "P17")}
    assert [one.verdict for one in found.values()] == [p14, rest, rest, rest]

    assert "which is +0.100" in found["P14"].value and f"{2.0**sign:.2f}" in found["P15"].value
    missing = {name: pd.DataFrame() for name in tables}
    assert {claims.CLAIMS[key].judge(missing)[1] for key in found} == {"not tested"}


def test_the_paired_interval_of_the_plain_one_model_score_is_taken_where_it_is():
    two = {"criterion": "vicreg", "reference": "two-model", "score": 0.1, "low": 0.0, "high": 0.2}
    ends = {"minus_two_model_low": -0.02, "minus_two_model_high": 0.02}
    paired = {"minus_two_model": 0.0} | ends
    one = two | {"reference": "resnet"} | paired
    rows = pd.DataFrame([two, one, one | {"reference": "naive_bayes"}]).assign(n=9)
    found = claims.one_model({"references": rows})
    assert found.verdict == "supported" and "paired" in found.value
    older = rows.drop(columns=list(paired))
    found = claims.one_model({"references": older})
    assert found.verdict == "undecided" and "widest possible" in found.value


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
def test_claims_about_settings_flip_with_their_tables(lam, probe, tau, size, width, found):
    """P8, P9, P10 and P12 from made-up changes of score and probe, each with an interval of
    +-0.01.
    """
    row = {"criterion": "vicreg", "score": 0.1, "seeds": 3, "n": 900}
    turned = [
        row
        | {"setting": name, "value": value}
        | _bounds("score_change", change)
        | _bounds("held_out_change", probe)
        for name, value, change in (
            ("constants.invariance", "25.0", 0.0),
            ("constants.invariance", "100.0", lam),
            ("encoder", "small16", width),
            ("encoder", "small32", 0.0),
        )
    ]
    turned += [
        row
        | {"criterion": "simclr", "setting": "constants.temperature", "value": value}
        | _bounds("score_change", 0.0)
        | _bounds("held_out_change", 0.0)
        for value in ("0.05", "0.2", "0.5")
    ]
    sizes = [
        row
        | {"setting": name, "value": value}
        | _bounds("score_change", change)
        | _bounds("held_out_change", 0.0)
        for name, change in (("trained", size), ("trained_steps", -0.3))
        for value, change in (("30", 0.0), ("120", change))
    ]
    seeds = [
        {
            "criterion": "simclr",
            "setting": "constants.temperature",
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
    assert claims.CLAIMS["P10b"].judge(tables)[1] == "contradicted"  # fixed steps are judged apart
    empty = dict.fromkeys(tables, pd.DataFrame())
    assert {
        judge(empty)[1]
        for judge in (claims.invariance, claims.temperature, claims.size, claims.width)
    } == {"not tested"}


def test_figures_are_drawn_again_from_the_tables_of_their_folder():
    names = [name for name, _ in redraw.figures(RESULTS / "study")]
    assert {f"{name}.png" for name in names} <= {path.name for path in RESULTS.glob("study/*.png")}
    figures = dict(redraw.figures(RESULTS / "pictures"))
    assert "fig5_known_truth" not in figures  # photographs have no known truth

    course = figures["fig2_score_and_probe_over_epochs"].axes[0]
    table = pd.read_csv(RESULTS / "pictures" / "scores.csv").query("ranking == 'own' and top == 1")
    first = table.query("criterion == 'vicreg' and layer == 'projector' and p == 20")
    line = next(line for line in course.lines if line.get_label() == "p = 20 %")
    assert list(line.get_ydata()) == list(first.sort_values("epoch")["score"])


def test_a_folder_without_tables_is_one_clear_error(capsys):
    assert redraw.main(["nowhere"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: nowhere cannot be drawn again") and "scores.csv" in said
