"""Whether the one-model test agrees with the two-model test, on the encoders of a plan.

    .venv/bin/python results/one_model.py one_model scores    # in the clone that trained them
    .venv/bin/python results/one_model.py one_model           # verdicts, from what the first left

Follows results/plan_one_model.md; "one_model_photographs" follows that plan. Takes some minutes.
The first writes scenes/one_model.csv, a row per seed, criterion and classifier of crops; the second
scenes/one_model_claims.csv.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from dejavu_utils import plots  # noqa: E402  the path comes first
from dejavu_utils.attack import one_model, scoring  # noqa: E402
from results import evidence, evidence_report  # noqa: E402


def scores(ours: dict[str, Any], folder: Path, out: Path) -> pd.DataFrame:
    """Return the scores of the pairs that were run of a plan's recipe as it is, at its first rho: a
    row per pair and kind of classifier, with `one_model` and `two_model` scores, `difference`, the
    accuracies of target, classifier and reference encoder, and the one-model score of images of
    neither set (`control`).
    """
    planned = evidence.plan(ours["plan"])
    epoch, k = planned["epochs"][-1], planned["k"]
    rows = []
    for piece in evidence.unchanged(planned, out):
        pair = evidence.pair_of(planned, piece, folder)
        guesses = evidence.unpack(out / f"{piece.name}.zip", "guesses")
        two = of(guesses[guesses["epoch"] == epoch].query("attacked == 'attacked'"))
        for kind in ours["kinds"]:
            one = of(one_model.table(pair, epoch, k, kind))
            control = of(one_model.table(pair, epoch, k, kind, attacked="control"))
            rows.append(
                {
                    "seed": piece.seed,
                    "criterion": piece.criterion,
                    "kind": kind,
                    "one_model": one["score"],
                    "two_model": two["score"],
                    "difference": one["score"] - two["score"],
                    "target": one["target"],
                    "classifier": one["reference"],
                    "reference": two["reference"],
                    "control": control["score"],
                    "n": one["n"],
                }
            )
        print(piece.name, flush=True)
    return pd.DataFrame(rows)


def of(guesses: pd.DataFrame) -> dict[str, float]:
    """Return target, reference, score and n of guesses at the projector."""
    return scoring.score(guesses.query("layer == 'projector'"), resamples=0)


def judged(found: pd.DataFrame, ours: dict[str, Any]) -> pd.DataFrame:
    """Return a row per claim: seeds, mean difference with its interval at the plan's level shared
    among the claims, the range that counts as agreement, and the verdict.
    """
    level = ours["level"] / len(ours["claims"])
    found = found[found["criterion"] == ours["criterion"]]
    rows = []
    for claim in ours["claims"]:
        of_kind = found[found["kind"] == claim["kind"]]
        values = of_kind["difference"].to_numpy()
        margin = ours["share"] * abs(of_kind["two_model"].mean())
        row = evidence.over_seeds(values, level)
        row = {key: row[key] for key in ("seeds", "mean", "low", "high", "sd")}
        verdict = "not run" if len(values) < ours["fewest"] else _verdict(row, margin)
        about = {"claim": claim["id"], "kind": claim["kind"], "says": claim["says"]}
        rows.append(about | row | {"margin": margin, "verdict": verdict})
    return pd.DataFrame(rows)


def _verdict(row: dict[str, float], margin: float) -> str:
    if -margin < row["low"] and row["high"] < margin:
        return "supported"
    excludes_0 = row["low"] > 0 or row["high"] < 0
    return "contradicted" if excludes_0 and abs(row["mean"]) > margin else "undecided"


# -- blocks -----------------------------------------------------------------------------------


def verdicts(name: str) -> str:
    """Return a row per claim, as results/<name>/README.md shows it."""
    rows = []
    for row in pd.read_csv(HERE / name / "one_model_claims.csv").to_dict("records"):
        interval = f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        cells = [row["claim"], row["says"], interval, f"±{row['margin']:.3f}"]
        rows.append([*cells, row["seeds"], row["verdict"]])
    head = ["", "claim", "one-model − two-model, 97.5 % over seeds", "agreement", "seeds"]
    return evidence.grid([*head, "verdict"], rows)


def by_criterion(name: str) -> str:
    """Return a row per criterion and kind of classifier: means over seeds with 95 % intervals."""
    table = pd.read_csv(HERE / name / "one_model.csv")
    rows = []
    for (criterion, kind), part in table.groupby(["criterion", "kind"], sort=False):
        columns = ("one_model", "two_model", "difference", "control")
        cells = [evidence_report.interval(part[column]) for column in columns]
        accuracies = [f"{part[column].mean():.3f}" for column in ("classifier", "reference")]
        called = kind.replace("_", " ")
        rows.append([plots.NAMES[criterion], called, *accuracies, *cells, len(part)])
    head = ["criterion", "classifier of crops", "it is right", "reference encoder is right"]
    head += ["one-model score", "two-model score", "difference", "one-model, images of neither set"]
    return evidence.grid([*head, "seeds"], rows)


def main(plan: str, *step: str) -> None:
    """Score the pairs of a plan, or judge the scores."""
    ours = evidence.plan(plan)
    name = ours["plan"]
    out = HERE / name
    if step == ("scores",):
        found = scores(ours, HERE.parent / "runs" / f"evidence-{name}", out)
        found.to_csv(out / "one_model.csv", index=False, float_format="%.6g")
        return
    table = judged(pd.read_csv(out / "one_model.csv"), ours)
    table.to_csv(out / "one_model_claims.csv", index=False, float_format="%.6g")
    print(table.to_string(index=False))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["scores"]):
        sys.exit(__doc__)
    main(*sys.argv[1:])
