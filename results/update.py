"""Copy tables and figures from runs/<profile> to results/<profile>, make its seeds.csv and
claims.csv, and rewrite the generated blocks.

    .venv/bin/python results/update.py study          # runs/study -> results/study, then blocks
    .venv/bin/python results/update.py study "k=10"   # the same for a run with P="k=10"
    .venv/bin/python results/update.py                # the blocks only, from what results/ holds

Blocks between `<!-- results:NAME -->` and `<!-- end -->` in README.md and in the README.md files
under results/ are generated; tests/results/test_results.py fails when they disagree with the
tables. NAME is one of WHOLE, or a folder and one of PARTS, such as `study:scores`. Figures that
contain real pictures are never copied.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
TABLES = ["scores", "shares", "differences", "controls", "truth", "fig2_probe", "curve"]
LATER = [
    "references",
    "agreement",
    "other_measures",
    "correlations",
    "atypical",
    "beyond_scores",
    "beyond_readable",
    "many_model",
    "trained",
    "mitigation",  # if there
    "mitigation_backbone",
    "mitigation_seeds",
    "reconstruction",
    "classifier",
]
sys.path.insert(0, str(HERE.parent))
from dejavu_utils.plots import NAMES, SETTINGS  # noqa: E402  the path comes first
from results import claims, evidence, evidence_report, recipe, seeds  # noqa: E402
from results import one_model as plan_of_one_model  # noqa: E402
from results import without_labels as measures_without_labels  # noqa: E402


def copy(profile: str, changes: str = "") -> None:
    """Copy tables, curves and provenance of runs/<profile>; galleries and examples only where the
    pictures are ours.

    `changes` is what was passed as P= to the command. What was there is replaced when everything
    has been read.
    """
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".") as folder:
        made = Path(folder) / profile
        made.mkdir()
        _collect(profile, changes, made)
        if (HERE / profile / "README.md").exists():
            shutil.copy(HERE / profile / "README.md", made)
        shutil.rmtree(HERE / profile, ignore_errors=True)
        made.rename(HERE / profile)


def _collect(profile: str, changes: str, target: Path) -> None:
    from dejavu_utils import store

    source = store.runs(profile)
    for name in [*TABLES, "criteria", "sweeps", "per_class", *LATER]:
        if name not in LATER or (source / "tables" / f"{name}.csv").exists():
            store.read_table(source / "tables" / f"{name}.csv").to_csv(
                target / f"{name}.csv", index=False
            )
    meta = json.loads((source / "notebooks" / "02_attack.ipynb.json").read_text())
    busy = store.read_table(source / "tables" / "losses.csv")[
        "seconds"
    ].sum()  # of all encoders, whenever trained
    jobs = store.cores()
    ours = meta["parameters"]["dataset"] == "scenes"
    for figure in sorted((source / "figures").glob("*.png")):
        if ours or figure.name.startswith("fig"):
            shutil.copy(figure, target)
    encoders = [
        json.loads(path.read_text()) for path in source.glob("encoders/*/epoch-*.safetensors.json")
    ]
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(
        git, cwd=HERE, capture_output=True, text=True, check=True
    ).stdout.strip()
    command = f"make figures PROFILE={profile}" + (f" P='{changes}'" if changes else "")
    entry = {
        "command": command,
        "commit": commit,
        "code": meta["code"],
        "encoders_trained_with": sorted({item["code"] for item in encoders}),
        "seeds": meta["parameters"]["seeds"],
        "parameters": meta["parameters"],
        "device": f"{meta['device']}, {_processor()}",
        "versions": meta["versions"],
        "training_minutes": round(busy / 60 / jobs, 1),
        "training_jobs_side_by_side": jobs,
        "attack_minutes": round(meta["seconds"] / 60, 1),
        "made": meta["created"],
    }
    (target / "provenance.json").write_text(json.dumps(entry, indent=1, ensure_ascii=False) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    return f"{sum(line.startswith('processor') for line in lines)} cores, {model}"


def _number(value: float, low: float, high: float, form: str = "+.3f") -> str:
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _verdict(low: float, high: float, null: float = 0.0) -> str:
    return "supported" if low > null else "contradicted" if high < null else "undecided"


def _bold(value: float, low: float, high: float) -> str:
    """Return a value with its interval over seeds, bold where the interval excludes 0."""
    mark = "" if low <= 0 <= high else "**"
    return f"{mark}{_number(value, low, high)}{mark}"


def _read(name: str, table: str) -> pd.DataFrame:
    found = pd.read_csv(HERE / name / f"{table}.csv", dtype={"value": str})
    return found.rename(columns={"knob": "setting"})  # its name in older tables


def _first(table: pd.DataFrame, rho: float) -> pd.DataFrame:
    """Return the rows at the first rho; on real pictures, where rho is missing, all."""
    return table[(table["rho"] == rho) | table["rho"].isna()]


def _by_seed(name: str) -> pd.DataFrame:
    """Return seeds.csv of a folder, empty where scores of single seeds were not kept."""
    path = HERE / name / "seeds.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=seeds.COLUMNS)


def _last_scores(name: str) -> pd.DataFrame:
    """Return the scores at the end of training and at the first rho."""
    scores = seeds.plain(_read(name, "scores")).query("layer == 'projector'")
    scores = _first(scores, scores["rho"].iloc[0])
    return scores[scores["epoch"] == scores["epoch"].max()]


def _scatter(row: pd.Series) -> list[str]:
    """Return the values of the seeds, and Cochran's Q with its p-value."""
    values = " ".join(f"{float(value):+.3f}" for value in row["values"].split())
    return [values, f"{row['q']:.1f} ({row['p']:.3f})"]


def scores(name: str) -> str:
    """Return a row per criterion: the score over seeds, seed by seed, and over images."""
    single = _by_seed(name)
    single = single[single["quantity"] == "score"].set_index("criterion")
    rows = []
    for criterion, group in _last_scores(name).groupby("criterion", sort=False):
        by_p = group.set_index("p")
        over_seeds = ["not kept", "", ""]
        if criterion in single.index:
            row = single.loc[criterion]
            over_seeds = [_bold(*row[["mean", "low", "high"]]), *_scatter(row)]
        images = [_number(*by_p.loc[p, ["score", "low", "high"]]) for p in (100, 20)]
        rows.append([NAMES[criterion], *over_seeds, *images, by_p.loc[100, "n"]])
    head = ["criterion", "score, over seeds", "seed by seed", "Q (p)"]
    head += ["score, over images", "score at p = 20 %, over images", "n"]
    return evidence.grid(head, rows)


def differences(name: str) -> str:
    """Return a row per criterion over images, then a row per difference kept seed by seed."""
    shares, steps = _read(name, "shares"), _read(name, "differences")
    rho = shares["rho"].iloc[0]
    shares = _first(shares, rho)
    shares = shares[shares["epoch"] == shares["epoch"].max()].set_index("criterion")
    steps = _first(steps, rho).set_index(["criterion", "what"])
    columns = {
        "last - untrained": "last − untrained",
        "last - first trained": "last − first trained checkpoint",
        "projector - backbone": "projector − backbone",
        "p = 20 % - all": "p = 20 % − all",
    }
    rows = []
    for criterion in shares.index:
        ratio = shares.loc[criterion, ["ratio", "ratio_low", "ratio_high"]]
        cells = [_number(*ratio, ".2f")]
        cells += [
            _number(*steps.loc[(criterion, what), ["difference", "low", "high"]])
            for what in columns
        ]
        rows.append([NAMES[criterion], *cells, shares.loc[criterion, "n"]])
    lines = [
        "Over images of these encoders:",
        "",
        evidence.grid(["criterion", "memorized / misrepresented", *columns.values(), "n"], rows),
    ]

    single = _by_seed(name)
    named = single["quantity"].str.startswith("-") | single["quantity"].isin(columns)
    single = single[named]
    if len(single):
        rows = [
            [
                NAMES[row["criterion"]],
                row["quantity"].replace(" - ", " − ").replace("- s", "− s"),
                _bold(*row[["mean", "low", "high"]]),
                *_scatter(row),
                row["n"],
            ]
            for _, row in single.iterrows()
        ]
        head = ["criterion", "difference of scores", "over seeds", "seed by seed", "Q (p)", "seeds"]
        lines += ["", "Over seeds, where the scores of single seeds were kept:", ""]
        lines += [evidence.grid(head, rows)]
    return "\n".join(lines)


def probes(name: str) -> str:
    """Return a row per criterion: what the probe says before and after, and what training cost."""
    probe = _read(name, "fig2_probe").sort_values("epoch")
    cost = HERE / name / "criteria.csv"
    cost = pd.read_csv(cost).set_index("criterion") if cost.exists() else None
    forms = {
        "held-out accuracy": ".3f",
        "train - held-out gap": "+.3f",
        "gap of a probe that saw neither": "+.3f",
    }
    rows = []
    for criterion, group in probe.groupby("criterion", sort=False):
        cells = []
        for quantity, form in forms.items():
            one = group[group["quantity"] == quantity]
            ends = [_number(*one.iloc[end][["mean", "low", "high"]], form) for end in (0, -1)]
            cells.append(" → ".join(ends))
        cells.append(int(group["n_held_out"].iloc[0]))
        if cost is not None:
            row = cost.loc[criterion]
            cells.append(_number(*row[["gain", "gain_low", "gain_high"]]))
            cells += [f"{row['images_per_second']:.0f}", f"{row['minutes']:.1f}"]
        rows.append([NAMES[criterion], *cells])
    head = ["criterion", "probe, held-out", "its train − held-out gap"]
    head += ["gap of a probe that saw neither", "n"]
    head += [] if cost is None else ["gain", "images/s", "minutes"]

    means = probe.pivot_table(index=["criterion", "epoch"], columns="quantity", values="mean")
    in_training = means["held-out accuracy"] + means["train - held-out gap"]
    note = (
        "From the untrained encoder to the last checkpoint, intervals over seeds. Accuracy on the "
        f"probe's own training images: {in_training.min():.3f} to {in_training.max():.3f} over "
        f"{len(in_training)} rows."
    )
    return f"{evidence.grid(head, rows)}\n\n{note}"


def reference_at_most(low: float, high: float, bayes: float) -> str:
    """Return the verdict on "the reference is at most the Bayes accuracy"."""
    if high <= bayes:
        return "supported"
    return "contradicted" if low > bayes else "undecided"


def truths(name: str) -> str:
    """Return a row per rho: target and reference against the known truth."""
    rows = []
    for row in _read(name, "truth").sort_values("rho").itertuples():
        target = _number(row.target, row.target_low, row.target_high, ".3f")
        reference = _number(row.reference, row.reference_low, row.reference_high, ".3f")
        fits = reference_at_most(row.reference_low, row.reference_high, row.bayes)
        rows.append(
            [
                f"{row.rho:g}",
                NAMES[row.criterion],
                target,
                reference,
                f"{row.chance:g}",
                f"{row.bayes:.2f}",
                fits,
                row.n,
            ]
        )
    head = ["ρ", "criterion", "target, over images", "reference, over images", "chance", "Bayes"]
    return evidence.grid([*head, "reference at most Bayes", "n"], rows)


def settings(name: str) -> str:
    """Return a row per setting of 04_mitigation: what its farthest value does to score and use."""
    single = _by_seed(name).set_index(["criterion", "quantity"])
    rows = []
    for row in _farthest(_read(name, "mitigation")):
        over_seeds = single.loc[(row["criterion"], f"{row['setting']} = {row['value']}")]
        images = "trained anew"
        if row["over"] == "images":
            images = _number(row["score_change"], row["score_change_low"], row["score_change_high"])
        useful = [row[f"held_out_change{end}"] for end in ("", "_low", "_high")]
        rows.append(
            [
                SETTINGS[row["setting"]],
                NAMES[row["criterion"]],
                row["value"],
                _bold(*over_seeds[["mean", "low", "high"]]),
                images,
                _bold(*useful),
                row["n"],
            ]
        )
    head = ["setting", "criterion", "value", "score, change, over seeds", "the same, over images"]
    return evidence.grid([*head, "held-out accuracy, change, over seeds", "n"], rows)


def _farthest(table: pd.DataFrame) -> list[dict]:
    """Return each setting's row at the value farthest from the default: the last one, or the first
    where the last is the default (early stopping).
    """
    rows = []
    changed = table[table["setting"] != "default"]
    for _, part in changed.groupby(["criterion", "setting"], sort=False):
        first, last = part.iloc[0], part.iloc[-1]
        is_default = last["score_change"] == 0 and last["held_out_change"] == 0
        rows.append((first if is_default else last).to_dict())
    return rows


def one_model(name: str) -> str:
    """Return a row per criterion and classifier: the plain one-model score beside the two-model."""
    table = _read(name, "references")
    plain = claims.plain_one_model({"references": table})
    measured = table.set_index(["criterion", "reference"])
    # The column had another name in tables of older runs.
    gap = "member_difference" if "member_difference" in table else "calibrated"
    rows = []
    for row in plain.to_dict("records"):
        member = measured.loc[(row["criterion"], row["reference"])]
        rows.append(
            [
                NAMES[row["criterion"]],
                row["reference"].replace("_", " "),
                f"{row['one']:+.3f}",
                f"{row['two']:+.3f}",
                _number(row["difference"], row["low"], row["high"]),
                _number(*member[[f"{gap}{end}" for end in ("", "_low", "_high")]]),
                row["n"],
            ]
        )
    head = ["criterion", "classifier of crops", "plain one-model score", "two-model score"]
    kind = "paired" if plain["paired"].all() else "widest possible"
    head += [f"plain − two-model, {kind}", "member − non-member difference", "n"]
    return evidence.grid(head, rows)


def without_labels(name: str) -> str:
    """Return a row per criterion: target minus reference of two measures that use no label, of the
    attacked images and of the control images, which neither encoder saw.
    """
    table = _read(name, "without_labels")
    criteria = table["criterion"].unique()
    table = table.set_index(["measure", "attacked", "criterion"]).sort_index()
    columns = [("alignment", "attacked"), ("alignment", "control")]
    columns += [("UnitMem", "attacked"), ("UnitMem", "control")]
    rows = []
    for criterion in criteria:
        cells = [
            table.loc[(*column, criterion), ["difference", "low", "high"]] for column in columns
        ]
        rows.append([NAMES[criterion], *(_number(*cell) for cell in cells)])
    head = [f"{measure}, {which} images" for measure, which in columns]
    return evidence.grid(["criterion", *head], rows)


def probe_course(name: str) -> str:
    """Return a row per criterion and epoch: accuracies and gaps of the two linear probes."""
    table = _read(name, "probes")
    table = _first(table, table["rho"].iloc[0])
    means = table.groupby(["criterion", "epoch"], sort=False)[
        ["train", "held_out", "gap", "fresh_gap"]
    ].mean()
    rows = [
        [NAMES[criterion], epoch, *(f"{value:.3f}" for value in row)]
        for (criterion, epoch), row in zip(means.index, means.to_numpy(), strict=True)
    ]
    head = ["criterion", "epoch", "training images", "held-out images", "gap"]
    return evidence.grid([*head, "gap of a probe that saw neither side"], rows)


def beyond(name: str) -> str:
    """Return a line per attribute beyond the class: what the crop reveals, and what a probe reads
    off full pictures.
    """
    read, lines = _read(name, "beyond_readable"), []
    for row in _read(name, "beyond_scores").to_dict("records"):
        accuracy = read.loc[read["attribute"] == row["attribute"], "accuracy"]
        lines.append(
            f"- The object's {row['attribute']}, inferred from the crop's neighbours within the "
            f"true class: score {_number(row['score'], row['low'], row['high'])} over images "
            f"(target {row['target']:.3f}, label alone {row['chance']:.3f}, n = {row['n']}). A "
            f"probe reads it off full pictures at {accuracy.min():.2f} to {accuracy.max():.2f}."
        )
    return "\n".join(lines)


def reconstruction(name: str) -> str:
    """Return a row per condition and attacked set: what a classifier reads off the drawings."""
    table = _read(name, "reconstruction").query("measure in ['class', 'attribute']")
    rows = [
        [
            row.condition,
            row.attacked,
            row.measure,
            f"{row.target:.3f}",
            f"{row.reference:.3f}",
            _number(row.score, row.low, row.high),
            row.n,
        ]
        for row in table.itertuples()
    ]
    head = ["condition", "drawn from", "reads", "target", "reference", "score, over images", "n"]
    return evidence.grid(head, rows)


def made(name: str) -> str:
    """Return where a folder's tables come from."""
    entry = json.loads((HERE / name / "provenance.json").read_text())
    sizes = entry["parameters"]["sizes"]
    controls = _read(name, "controls")
    # Before training, several criteria are one encoder.
    controls = controls.drop_duplicates(["score", "low", "high"])
    missed = int(((controls["low"] > 0) | (controls["high"] < 0)).sum())
    return (
        f"Negative controls: {missed} of {len(controls)} different intervals over images miss 0 "
        "(about 5 % should), [`controls.csv`](controls.csv).\n\n"
        f"`{entry['command']}`, seeds {', '.join(map(str, entry['seeds']))}, {sizes['classes']} "
        f"classes, {sizes['attacked']} attacked images a class in each of A and B, "
        f"{sizes['public']} public; {entry['device']}; at most {entry['training_minutes']} min of "
        f"training ({entry['training_jobs_side_by_side']} encoders side by side), "
        f"{entry['attack_minutes']} min of attack; code {entry['code']}; torch "
        f"{entry['versions']['torch']}."
    )


def judged(name: str) -> str:
    """Return the paper's claims with what we found, as far as they were tested."""
    table = _read(name, "claims").fillna("")
    table = table[table["verdict"] != "not tested"]
    columns = ["id", "claim", "source", "value", "unit", "n", "seeds", "verdict"]
    head = ["", "claim", "source", "what we found", "unit", "n", "seeds", "verdict"]
    return evidence.grid(head, table[columns].to_numpy().tolist())


def all_verdicts() -> str:
    """Return a row per claim with its source, and its verdicts: by the plans, and by the
    exploratory studies; each of scenes and of photographs.
    """
    by_plan = {name: evidence_report.answers(name) for name in evidence_report.ASKED}
    scenes = _read("study", "claims").set_index("id")
    photographs = _read("pictures", "claims").set_index("id")["verdict"]
    photographs = photographs.replace("not tested", "")
    rows = []
    for key, row in scenes.iterrows():
        planned = [found.get(key, "not asked") for found in by_plan.values()]
        explored = [row["verdict"], photographs[key]]
        rows.append([key, row["claim"], row["source"], *planned, *explored])
    head = ["", "claim", "source"]
    for unit in ("by plan, fresh seeds", "exploratory"):
        head += [f"scenes, {unit}", f"photographs, {unit}"]
    return evidence.grid(head, rows)


def coverage() -> str:
    """Return how often each kind of interval held the truth in simulated studies."""
    table = pd.read_csv(HERE / "coverage.csv")
    percent = 100 * table["coverage"]
    error = 100 * table["standard_error"]
    table["cell"] = [f"{a:.1f} ± {b:.1f}" for a, b in zip(percent, error, strict=True)]
    wide = table.pivot(index=["interval", "seeds"], columns="quantity", values="cell")
    quantities = list(table["quantity"].unique())
    repeats = table.groupby(["interval", "seeds"])["repeats"].first()
    order = list(dict.fromkeys(zip(table["interval"], table["seeds"], strict=True)))
    order = sorted(order, key=lambda key: list(table["interval"].unique()).index(key[0]))
    rows = [[*key, *wide.loc[key, quantities], repeats[key]] for key in order]
    return evidence.grid(["interval", "seeds", *quantities, "simulated studies"], rows)


def coverage_line() -> str:
    """Return the same in a sentence, for README."""
    table = pd.read_csv(HERE / "coverage.csv")

    def span(kind: str, *numbers: int) -> str:
        found = table[(table["interval"] == kind) & table["seeds"].isin(numbers)]["coverage"]
        low, high = 100 * np.array([found.min(), found.max()])
        return f"{low:.0f} to {high:.0f} %"

    def score(kind: str) -> str:
        rows = table[(table["interval"] == kind) & (table["quantity"] == "score")]
        return f"{100 * rows.set_index('seeds').loc[3, 'coverage']:.0f} %"

    return (
        "In simulated studies whose seeds differ as ours do, 95 % t-intervals over 3, 5 or 8 seeds "
        f"held the truth about new trainings in {span('t over seeds', 3, 5, 8)}. With 3 seeds, "
        f"intervals over the pooled images held a score in {score('bootstrap over images')} and a "
        f"percentile bootstrap over seeds in {score('bootstrap over seeds')} "
        "([table](#coverage))."
    )


def controls_block() -> str:
    """Return the table of the repeated controls, from results/controls.csv (a copy of
    runs/controls/controls.csv).
    """
    table = pd.read_csv(HERE / "controls.csv")
    lines = [
        "| control | truth | repeats | n | mean score | intervals that miss the truth | allowed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table.itertuples(index=False, name=None):
        name, truth, mean, _, repeats, n, missed, most, _ = row
        lines.append(f"| {name} | {truth:g} | {repeats} | {n} | {mean:+.4f} | {missed} | {most} |")
    return "\n".join(
        [
            *lines,
            "",
            "`make controls`, seeds 1000 and up, 95 % intervals; allowed: the 99.9 % range of "
            "a rate of 5 %. [`controls.csv`](controls.csv).",
        ]
    )


def found() -> str:
    """Return what was found, in at most five lines with intervals, for the top of README: by the
    plans as far as they were run.
    """
    asked = {"S2": "SimCLR", "C1": "Barlow Twins", "C2": "BYOL", "C3": "DINO"}
    said = _said("scenes")
    others = [f"{name} {said[claim]}" for claim, name in asked.items() if claim in said]
    lines = [
        f"- **It remembers.** The déjà vu score of VICReg is {said['S1']}; {'; '.join(others)}."
    ]
    if "S6" in said:
        lines.append(
            "- **It is not correlation, and the last layer holds most of it.** Where the "
            "background tells nothing (ρ = 0) VICReg's target beats chance, 0.1, by "
            f"{said['S6']}. Projector minus backbone: {said['S3']}."
        )
    if "S7" in said:
        lines.append(
            "- **Against a supervised net**, VICReg minus it, both at the projector: by label "
            f"inference {said['S7']}; without labels {said['S8']}. It depends on layer and "
            f"pictures{_against_on_photographs()} ([P6](results/README.md#the-papers-claims))."
        )
    if {"M1", "M2", "M3"} <= set(said):
        lines.append(
            "- **Settings that should lower it**, VICReg. λ = 100 instead of 25: score "
            f"{said['M1']}; linear probe {said['M2']}. Training on crops of at least 20 % of the "
            f"area instead of 4 %: score {said['M3']}."
        )
    return "\n".join([*lines, _found_on_photographs()])


def _against_on_photographs() -> str:
    said = _said("photographs")
    if "T6" not in said:
        return ""
    return f"; on photographs by label inference {said['T6']}; without labels {said['T7']}"


def _found_on_photographs() -> str:
    asked = {"T1": "VICReg", "T2": "SimCLR", "T5": "supervised"}
    said = _said("photographs")
    parts = [f"{name} {said[claim]}" for claim, name in asked.items() if claim in said]
    return f"- **Photographs**, ten classes of Tiny-ImageNet: {'; '.join(parts)}."


def _said(name: str) -> dict[str, str]:
    """Return {claim: "mean [low, high], verdict"} of the claims of a plan that were judged, with
    the number of seeds where some are missing.
    """
    planned = len(evidence.plan(name)["seeds"])
    said = {}
    for row in _read(name, "claims").query("verdict != 'not run'").to_dict("records"):
        seeds = int(row["seeds"])
        partly = f", provisional ({seeds} of {planned} seeds)" if seeds < planned else ""
        interval = _bold(row["mean"], row["low"], row["high"])
        said[row["claim"]] = f"{interval}, {row['verdict']}{partly}"
    return said


GPU = "tiny_imagenet"
PARTS: dict[str, Callable[[str], str]] = {
    "scores": scores,
    "differences": differences,
    "probes": probes,
    "truths": truths,
    "settings": settings,
    "one-model": one_model,
    "without-labels": without_labels,
    "probe-course": probe_course,
    "beyond": beyond,
    "reconstruction": reconstruction,
    "made": made,
    "claims": judged,
    **evidence_report.PARTS,
    "one-model-verdicts": plan_of_one_model.verdicts,
    "one-model-by-criterion": plan_of_one_model.by_criterion,
    "without-labels-over-seeds": measures_without_labels.block,
}
WHOLE: dict[str, Callable[[], str]] = {
    "claims": all_verdicts,
    "found": found,
    "controls": controls_block,
    "coverage": coverage,
    "coverage-line": coverage_line,
    "recipe": recipe.kept,
}
BLOCK = re.compile(r"<!-- results:(\S+) -->\n.*?<!-- end -->", re.DOTALL)


def block(name: str) -> str:
    """Return the generated text of one block."""
    if name in WHOLE:
        return WHOLE[name]()
    folder, _, part = name.partition(":")
    if part not in PARTS:
        raise SystemExit(
            f"there is no block {name}; there are {', '.join(WHOLE)}, and FOLDER: with "
            f"{', '.join(PARTS)}"
        )
    return PARTS[part](folder)


def filled(text: str) -> str:
    """Return a text with every generated block made anew."""

    def again(match: re.Match) -> str:
        return f"<!-- results:{match[1]} -->\n{block(match[1])}\n<!-- end -->"

    return BLOCK.sub(again, text)


def pages() -> list[Path]:
    """Return the files that hold generated blocks; the GPU's page is whole made by sitting.py."""
    folders = sorted(path for path in HERE.glob("*/README.md") if path.parent.name != GPU)
    return [HERE.parent / "README.md", HERE / "README.md", *folders]


if __name__ == "__main__":
    if sys.argv[1:]:
        copy(*sys.argv[1:3])
        seeds.write(sys.argv[1])
        claims.write(sys.argv[1])
    for path in pages():
        path.write_text(filled(path.read_text()))
    print("the generated blocks and results/ agree")
