"""What the pieces of a plan show: tables and figures of results/<name>, and the generated blocks of
its README.

    .venv/bin/python results/evidence_report.py scenes

Reads what `results/evidence.py run` left. A row or a point is one seed; a mean has Student's
t-interval over seeds.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from dejavu_utils import plots  # noqa: E402  the path comes first
from dejavu_utils.attack import scoring  # noqa: E402
from results import evidence  # noqa: E402

KEYS = ["criterion", "rho", "change"]
PERCENT = (100, 20)
UNBROKEN = "\N{NO-BREAK SPACE}%"  # a number and its sign stay on one line
PROBES = {
    "held_out": "probe, held out",
    "gap": "its train − held-out gap",
    "fresh_gap": "gap of a probe that saw neither",
}
# What a claim of the paper (results/claims.py) is asked by, in the plan of each folder.
ASKED = {
    "scenes": {
        "P1": ["S1", "S5"],
        "P3": ["S4"],
        "P5": ["S3"],
        "P6": ["S7", "S8"],
        "P7": ["S1", "S2", "C1", "C2", "C3"],
        "P8": ["M1", "M2"],
        "P9": ["M4"],
        "P14": ["O1", "O2"],
        "P18": ["S6"],
    },
    "photographs": {
        "P1": ["T1"],
        "P3": ["T4"],
        "P5": ["T3"],
        "P6": ["T6", "T7"],
        "P7": ["T1", "T2"],
        "P14": ["O3", "O4"],
    },
}


# -- tables -----------------------------------------------------------------------------------


def present(name: str, out: Path) -> list[evidence.Piece]:
    """Return the pieces of a plan that were run, in its order."""
    planned = evidence.pieces(evidence.plan(name))
    return [piece for piece in planned if (out / f"{piece.name}.zip").exists()]


def gathered(
    name: str, out: Path, table: str, rows: Callable[[pd.DataFrame], pd.DataFrame]
) -> pd.DataFrame:
    """Return `rows` of one table of every piece that was run, with the piece's names."""
    found = []
    for piece in present(name, out):
        part = rows(evidence.unpack(out / f"{piece.name}.zip", table))
        found.append(part.assign(**piece._asdict()))
    if not found:
        raise SystemExit(f"no piece of plan_{name}.md is in {out}: run evidence.py run {name}")
    first = ["seed", *KEYS]
    whole = pd.concat(found, ignore_index=True)
    return whole[first + [column for column in whole if column not in first]]


def scored(guesses: pd.DataFrame) -> pd.DataFrame:
    """Return a row per attacked set, layer, epoch and p: target, reference, score, n."""
    rows = []
    for (attacked, layer, epoch), part in guesses.groupby(["attacked", "layer", "epoch"]):
        for row in scoring.curve(part, PERCENT, resamples=0):
            kept = {key: row[key] for key in ("p", "target", "reference", "score", "n")}
            rows.append({"attacked": attacked, "layer": layer, "epoch": epoch} | kept)
    return pd.DataFrame(rows)


def probed(probes: pd.DataFrame) -> pd.DataFrame:
    """Return a row per layer and epoch, the mean of encoders A and B."""
    return probes.groupby(["layer", "epoch"], as_index=False)[list(PROBES)].mean()


def said(audits: pd.DataFrame) -> pd.DataFrame:
    """Return what the audit said of set A (members) and of set B (never seen)."""
    return audits[["members", "word", "score", "low", "high", "n", "failed"]]


def write(name: str) -> None:
    """Write the tables and figures of results/<name>."""
    out = HERE / name
    tables = {
        "scores": gathered(name, out, "guesses", scored),
        "probes": gathered(name, out, "probes", probed),
        "audits": gathered(name, out, "audit", said),
    }
    for table, rows in tables.items():
        rows.to_csv(out / f"{table}.csv", index=False, float_format="%.6g")
    evidence.claims(name, out)
    course_figure(name).savefig(out / "course.png", dpi=150)
    claims_figure(name).savefig(out / "claims.png", dpi=150)


# -- figures ----------------------------------------------------------------------------------


def _read(name: str, table: str) -> pd.DataFrame:
    found = pd.read_csv(HERE / name / f"{table}.csv", dtype={"change": str})
    if "change" in found:
        found["change"] = found["change"].fillna("")
    return found


def _default(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the rows of the plan's first rho and of its recipe as it is."""
    rho = evidence.plan(name)["order"][0]["rhos"][0]
    return rows[(rows["rho"] == rho) & (rows["change"] == "")]


def _criteria(rows: pd.DataFrame) -> list[str]:
    return [name for name in plots.NAMES if name in set(rows["criterion"])]


def course_figure(name: str) -> Any:
    """Return the score over epochs: a panel a criterion, a thin line a seed, the mean above them;
    images of neither set at the end as hollow marks.
    """
    rows = _default(_read(name, "scores"), name).query("layer == 'projector' and p == 100")
    criteria = _criteria(rows)
    figure, axes = plots.subplot_columns(len(criteria), 3, sharex=True, sharey=True)
    for axis, criterion in zip(axes.flat, criteria, strict=False):
        part = rows[rows["criterion"] == criterion]
        members = part[part["attacked"] == "attacked"]
        for _, line in members.groupby("seed"):
            axis.plot(line["epoch"], line["score"], color=plots.TARGET, lw=0.8, alpha=0.4)
        mean = members.groupby("epoch")["score"].mean()
        axis.plot(mean.index, mean, color=plots.TARGET, lw=2.5, marker="o", ms=4)
        control = part[part["attacked"] == "control"]
        axis.plot(control["epoch"], control["score"], "o", mfc="none", color="grey", ms=5)
        axis.axhline(0, color="grey", lw=1, ls=":")
        axis.set_title(f"{plots.NAMES[criterion]}, {members['seed'].nunique()} seeds")
        axis.set_xlabel("epoch")
    plots.label_left(axes.flat, "déjà vu score")
    return figure


def claims_figure(name: str) -> Any:
    """Return a row per claim: a dot a seed, the mean with its interval, and the margin."""
    planned = evidence.plan(name)
    values = _read(name, "values").dropna()
    judged = _read(name, "claims").set_index("claim")
    shown = [claim for claim in planned["claims"] if claim["id"] in set(values["claim"])]
    figure, axes = plots.subplots(1, width=9.0, height=0.8 + 0.5 * len(shown))
    axis = axes[0, 0]
    for height, claim in enumerate(shown):
        row = judged.loc[claim["id"]]
        points = values.loc[values["claim"] == claim["id"], "value"]
        axis.plot(points, np.full(len(points), height), "o", color=plots.TARGET, alpha=0.4, ms=5)
        error = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
        axis.errorbar(row["mean"], height + 0.25, xerr=error, fmt="D", color="black", ms=4, lw=1.5)
    axis.axvline(0, color="grey", lw=1, ls=":")
    names = [f"{claim['says']} ({claim['id']})".replace(" %", UNBROKEN) for claim in shown]
    names = [textwrap.fill(name, 48) for name in names]
    axis.set_yticks(range(len(shown)), names)
    axis.invert_yaxis()
    figure.supxlabel("dots: seeds; diamond: mean with its 95 % t-interval", fontsize="small")
    return figure


# -- blocks -----------------------------------------------------------------------------------


def interval(values: pd.Series, form: str = "+.3f") -> str:
    """Return "mean [low, high]" over seeds; the value alone if there is one seed."""
    row = scoring.over_seeds(values)
    if row["n"] == 1:
        return f"{row['mean']:{form}}"
    return f"{row['mean']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"


def verdicts(name: str) -> str:
    """Return a row per claim of the plan: mean over seeds, seed by seed, p-values and verdict,
    which is provisional until all seeds were run.
    """
    planned = len(evidence.plan(name)["seeds"])
    values = _read(name, "values")
    rows = []
    for row in _read(name, "claims").to_dict("records"):
        points = values.loc[values["claim"] == row["claim"], "value"].dropna()
        by_seed = " ".join(f"{value:+.3f}" for value in points)
        verdict = row["verdict"]
        if verdict == "undecided":
            verdict += f" ({row['smallest']:.3f} would have shown)"
        if 0 < len(points) < planned:
            verdict += f", provisional: {len(points)} of {planned} seeds"
        mean = f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" if len(points) else ""
        p = f"{row['p_holm']:.2g}" if row["p_holm"] == row["p_holm"] else ""
        rows.append([row["claim"], row["says"], mean, by_seed, p, verdict])
    head = ["", "claim", "mean, 95 % over seeds", "seed by seed", "p (Holm)", "verdict"]
    return evidence.grid(head, rows)


def course(name: str) -> str:
    """Return a row per criterion and epoch: score and probes, over seeds."""
    scores = _default(_read(name, "scores"), name)
    scores = scores.query("attacked == 'attacked' and layer == 'projector'")
    probes = _default(_read(name, "probes"), name).query("layer == 'backbone'")
    rows = []
    for criterion in _criteria(scores):
        for epoch, part in scores[scores["criterion"] == criterion].groupby("epoch"):
            at = probes[(probes["criterion"] == criterion) & (probes["epoch"] == epoch)]
            by_p = [interval(part.loc[part["p"] == p, "score"]) for p in PERCENT]
            cells = [interval(at[key], ".3f" if key == "held_out" else "+.3f") for key in PROBES]
            seeds = part["seed"].nunique()
            rows.append([plots.NAMES[criterion], epoch, *by_p, *cells, seeds])
    head = ["criterion", "epoch", "score", "score at p = 20 %", *PROBES.values(), "seeds"]
    return evidence.grid(head, rows)


def ends(name: str) -> str:
    """Return a row per criterion, ρ and change of the recipe at the end of training: target,
    reference and score of the attacked images, and the score of images of neither set.
    """
    scores = _read(name, "scores").query("p == 100 and layer == 'projector'")
    scores = scores[scores["epoch"] == evidence.plan(name)["epochs"][-1]]
    rows = []
    for (criterion, rho, change), part in scores.groupby(KEYS, sort=False):
        members = part[part["attacked"] == "attacked"]
        control = part[part["attacked"] == "control"]
        cells = [interval(members["target"], ".3f"), interval(members["reference"], ".3f")]
        cells += [interval(members["score"]), interval(control["score"])]
        seeds = members["seed"].nunique()
        rows.append([plots.NAMES[criterion], f"{rho:g}", change, *cells, seeds])
    head = ["criterion", "ρ", "change", "target", "reference", "score", "images of neither set"]
    head.append("seeds")
    table = pd.DataFrame(rows, columns=head)
    for column, same in (("ρ", "0"), ("change", "")):
        if (table[column] == same).all():  # photographs have no ρ, a plan may have no changes
            table = table.drop(columns=column)
    return evidence.grid(list(table), table.to_numpy().tolist())


def audits(name: str) -> str:
    """Return a row per criterion: how often the audit of encoder A says what, of its own images
    and of images that it never saw.
    """
    rows = []
    table = _default(_read(name, "audits"), name)
    for criterion in _criteria(table):
        part = table[table["criterion"] == criterion]
        cells = []
        for members in ("a", "b"):
            words = part.loc[part["members"] == members, "word"].value_counts()
            cells.append(", ".join(f"{word} {count}" for word, count in words.items()))
        rows.append([plots.NAMES[criterion], *cells])
    return evidence.grid(
        ["criterion", "its own images (set A)", "images it never saw (set B)"], rows
    )


def calibration(name: str) -> str:
    """Return how often audits of n images say "memorizes", a row per n: false alarms, and what is
    found of each criterion's own images (made by results/calibration.py).
    """
    if not (HERE / name / "calibration.csv").exists():
        return "Not run yet."
    table = _read(name, "calibration")
    named = _criteria(table[table["criterion"] != "all"])
    rows = []
    for n, at in table.groupby("images"):
        never = at[(at["members"] == "b") & (at["criterion"] == "all")].iloc[0]
        of = f"{never['memorizes']} of {never['audits']}"
        alarms = f"{of}: {never['memorizes'] / never['audits']:.1%}"
        within = f"[{never['low']:.1%}, {never['high']:.1%}]"
        cells = [n, alarms, within, f"{never['no_evidence'] / never['audits']:.0%}"]
        own = at[at["members"] == "a"].set_index("criterion")
        for criterion in named:
            cells.append(f"{own.loc[criterion, 'memorizes'] / own.loc[criterion, 'audits']:.0%}")
        rows.append(cells)
    head = ["images", "false alarms", "95 %", "and says no evidence"]
    return evidence.grid([*head, *(f"found: {plots.NAMES[each]}" for each in named)], rows)


def ran(name: str) -> str:
    """Return which pieces were run and which were not."""
    out = HERE / name
    pieces = evidence.pieces(evidence.plan(name))
    done = present(name, out)
    lines = [f"{len(done)} of the plan's {len(pieces)} pieces were run."]
    left: dict[str, list[str]] = {}
    for piece in pieces:
        if piece not in done:
            _, _, setting = piece.name.partition("-")
            left.setdefault(setting, []).append(str(piece.seed))
    if left:
        lines += ["Not run:", ""]
        lines += [f"- {setting}: seeds {', '.join(seeds)}" for setting, seeds in left.items()]
    return "\n".join(lines)


def answers(name: str) -> dict[str, str]:
    """Return what the plan of results/<name> says of the paper's claims, such as {"P1": "S1
    supported, S5 undecided"}; empty before it was run.
    """
    verdict: dict[str, str] = {}
    for table in ("claims", "one_model_claims"):
        if (HERE / name / f"{table}.csv").exists():
            rows = _read(name, table)
            verdict |= dict(zip(rows["claim"], rows["verdict"], strict=True))
    if not verdict:
        return {}
    return {
        claim: ", ".join(f"{asked} {verdict.get(asked, 'not run')}" for asked in asking)
        for claim, asking in ASKED[name].items()
    }


PARTS: dict[str, Callable[[str], str]] = {
    "verdicts": verdicts,
    "course": course,
    "ends": ends,
    "audits": audits,
    "calibration": calibration,
    "ran": ran,
}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(sys.argv[1])
