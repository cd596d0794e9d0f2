"""Copy what README quotes from runs/<profile> to results/<name>, with its provenance, and rewrite
README's tables.

    .venv/bin/python results/update.py study          # runs/study -> results/study, then README
    .venv/bin/python results/update.py study "k=10"   # the same for a run with P="k=10"
    .venv/bin/python results/update.py                # README only, from what results/ holds

README's blocks between `<!-- results:<name> -->` and `<!-- end -->` are generated;
tests/results/test_results.py fails when they disagree with results/. Figures that contain real
pictures are never copied.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
TABLES = ["scores", "shares", "differences", "controls", "truth", "fig2_probe", "curve"]
LATER = [
    "references",
    "agreement",
    "companions",
    "correlations",
    "atypical",
    "beyond_scores",
    "beyond_readable",
    "many_model",
    "trained",
    "mitigation",  # if there
    "mitigation_backbone",
    "mitigation_seeds",
    "mitigation_directions",
    "reconstruction",
    "judge",
]
sys.path.insert(0, str(HERE.parent))
from dejavu_utils.plots import NAMES  # noqa: E402  the path comes first


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


def _cell(value: float, low: float, high: float, null: float = 0.0, form: str = "+.3f") -> str:
    """Return a value with its interval: bold where the claim is supported, in italics where it is
    contradicted.
    """
    mark = {"supported": "**", "contradicted": "*", "undecided": ""}[_verdict(low, high, null)]
    return f"{mark}{_number(value, low, high, form)}{mark}"


def _first(table, rho):
    """Return the rows at the first rho; on real pictures, where rho is missing, all."""
    return table[(table["rho"] == rho) | table["rho"].isna()]


def claims(name: str) -> list[str]:
    """Return a table with a row per criterion and a column per claim of results/<name>."""
    table = {key: pd.read_csv(HERE / name / f"{key}.csv") for key in TABLES}
    scores = table["scores"].query("layer == 'projector' and ranking == 'own'")
    last, rho = scores["epoch"].max(), scores["rho"].iloc[0]
    scores, shares = _first(scores[scores["epoch"] == last], rho), _first(table["shares"], rho)
    shares = shares[shares["epoch"] == last].set_index("criterion")
    steps = _first(table["differences"], rho).set_index(["criterion", "what"])
    differences = [
        "last - untrained",
        "last - first trained",
        "projector - backbone",
        "p = 20 % - all",
    ]
    lines = [
        "| criterion | score, all | score, p = 20 % | memorized / misrepresented | grows: last − "
        "untrained | "
        "last − first trained checkpoint | projector − backbone | p = 20 % − all | n |",
        "|---" * 9 + "|",
    ]
    for criterion, group in scores.groupby("criterion", sort=False):
        by_p, ratio = group.set_index("p"), shares.loc[criterion]
        cells = [_cell(*by_p.loc[p, ["score", "low", "high"]]) for p in (100, 20)]
        cells += [_cell(*ratio[["ratio", "ratio_low", "ratio_high"]], 1, ".2f")]
        cells += [
            _cell(*steps.loc[(criterion, what), ["difference", "low", "high"]])
            for what in differences
        ]
        lines.append("| " + " | ".join([NAMES[criterion], *cells, str(by_p.loc[100, "n"])]) + " |")
    return lines


def learned(name: str) -> list[str]:
    """Return a table with a row per criterion: what the probe says before and after, and what
    training cost.
    """
    probe = pd.read_csv(HERE / name / "fig2_probe.csv").sort_values("epoch")
    cost = HERE / name / "criteria.csv"
    cost = pd.read_csv(cost).set_index("criterion") if cost.exists() else None
    lines = [
        "| criterion | probe, held-out | its train − held-out gap | gap of a probe that saw "
        "neither | n |" + (" gain | images/s | minutes |" if cost is not None else ""),
        "|---" * (5 if cost is None else 8) + "|",
    ]
    for criterion, group in probe.groupby("criterion", sort=False):
        cells = []
        for quantity in (
            "held-out accuracy",
            "train - held-out gap",
            "gap of a probe that saw neither",
        ):
            one = group[group["quantity"] == quantity]
            form = ".3f" if "accuracy" in quantity else "+.3f"
            cells.append(
                " → ".join(
                    _number(*one.iloc[end][["mean", "low", "high"]], form) for end in (0, -1)
                )
            )
        cells.append(str(int(group["n_held_out"].iloc[0])))
        if cost is not None:
            row = cost.loc[criterion]
            cells += [
                _number(*row[["gain", "gain_low", "gain_high"]]),
                f"{row['images_per_second']:.0f}",
                f"{row['minutes']:.1f}",
            ]
        lines.append(f"| {NAMES[criterion]} | " + " | ".join(cells) + " |")
    return lines


def truths(name: str) -> list[str]:
    """Return a table of target and reference against the known truth, a row per rho; nothing on
    real pictures.
    """
    truth = (
        pd.read_csv(HERE / name / "truth.csv")
        if (HERE / name / "truth.csv").stat().st_size > 5
        else []
    )
    if not len(truth):
        return []
    lines = [
        "",
        "| ρ | criterion | target, above chance | reference | chance | Bayes | reference at most "
        "Bayes | n |",
        "|---" * 8 + "|",
    ]
    for row in truth.sort_values("rho").itertuples():
        fits = "supported" if row.reference_low <= row.bayes else "contradicted"
        target = _cell(row.target, row.target_low, row.target_high, row.chance, ".3f")
        lines.append(
            f"| {row.rho:g} | {NAMES[row.criterion]} | {target} | "
            f"{_number(row.reference, row.reference_low, row.reference_high, '.3f')} | "
            f"{row.chance:g} | "
            f"{row.bayes:.2f} | {fits} | {row.n} |"
        )
    return lines


def turned(name: str) -> list[str]:
    """Return a table with a row per knob of 04_mitigation: what its farthest value does to score
    and usefulness.
    """
    path = HERE / name / "mitigation_directions.csv"
    if not path.exists():
        return []
    lines = [
        "",
        "| knob | criterion | value | score, change | held-out accuracy, change | interval over | "
        "seeds | n |",
        "|---" * 8 + "|",
    ]
    for row in pd.read_csv(path, dtype={"value": str}).to_dict("records"):
        cells = []
        for column in ("score_change", "held_out_change"):
            low, high = row[f"{column}_low"], row[f"{column}_high"]
            mark = "" if low <= 0 <= high else "**"
            cells.append(f"{mark}{_number(row[column], low, high)}{mark}")
        cells = [
            row["knob"],
            NAMES[row["criterion"]],
            row["value"],
            *cells,
            row["over"],
            row["seeds"],
            row["n"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [
        *lines,
        "",
        "Changes from the default (released: the projector); **bold**: the interval excludes 0, "
        "on "
        f"either side. [`results/{name}/mitigation.csv`](results/{name}/mitigation.csv).",
    ]


def more_than_label(name: str) -> list[str]:
    """Return a line per attribute beyond the class: what the crop reveals, and what a probe reads
    off full pictures.
    """
    scores, lines = HERE / name / "beyond_scores.csv", []
    for row in pd.read_csv(scores).to_dict("records") if scores.exists() else []:
        read = pd.read_csv(HERE / name / "beyond_readable.csv")
        read = read.loc[read["attribute"] == row["attribute"], "accuracy"]
        lines += [
            "",
            f"More than the class: the object's {row['attribute']}, inferred from the crop's "
            "neighbours "
            f"within the true class, score {_cell(row['score'], row['low'], row['high'])} "
            f"(target {row['target']:.3f}, label alone {row['chance']:.3f}, n = {row['n']}); a "
            "probe reads it "
            f"off full pictures at {read.min():.2f} to {read.max():.2f}. "
            f"[`results/{name}/beyond_scores.csv`](results/{name}/beyond_scores.csv).",
        ]
    return lines


def block(name: str) -> str:
    """Return the generated text of one README block."""
    entry = json.loads((HERE / name / "provenance.json").read_text())
    sizes = entry["parameters"]["sizes"]
    controls = pd.read_csv(HERE / name / "controls.csv")
    controls = controls.drop_duplicates(
        ["score", "low", "high"]
    )  # untrained, several criteria are one encoder
    missed = int(((controls["low"] > 0) | (controls["high"] < 0)).sum())
    lines = [
        *claims(name),
        "",
        *learned(name),
        *truths(name),
        *turned(name),
        *more_than_label(name),
    ]
    lines += [
        "",
        f"Negative controls: {missed} of {len(controls)} different intervals miss 0 (about 5 % "
        "should), "
        f"[`results/{name}/controls.csv`](results/{name}/controls.csv).",
        f"`{entry['command']}`, seeds {', '.join(map(str, entry['seeds']))}, {sizes['classes']} "
        "classes, "
        f"{sizes['attacked']} attacked images a class in each of A and B, {sizes['public']} "
        "public; "
        f"{entry['device']}; at most {entry['training_minutes']} min of training "
        f"({entry['training_jobs_side_by_side']} encoders side by side), "
        f"{entry['attack_minutes']} min of attack; code {entry['code']}; "
        f"torch {entry['versions']['torch']}. "
        f"Tables and figures: [`results/{name}/`](results/{name}/).",
    ]
    return "\n".join(lines)


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
            "a rate of 5 %. [`results/controls.csv`](results/controls.csv).",
        ]
    )


def judged(name: str) -> str:
    """Return the table of the paper's claims and our verdicts, from results/<name>/claims.csv (by
    results/claims.py).

    On the study all claims are listed, elsewhere those that were tested.
    """
    table = pd.read_csv(HERE / name / "claims.csv")
    table = table if name == "study" else table[table["verdict"] != "not tested"]
    lines = ["| | claim | what we found | n | seeds | verdict |", "|---|---|---|---|---|---|"]
    for row in table.itertuples(index=False):
        counts = (row.n, row.seeds) if row.n else ("", "")
        lines.append(
            f"| {row.id} | {row.claim} | {row.value} | {counts[0]} | {counts[1]} | {row.verdict} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"`.venv/bin/python results/claims.py {name}`, from the tables in "
            f"`results/{name}/`; [`results/{name}/claims.csv`](results/{name}/claims.csv).",
        ]
    )


def readme(text: str) -> str:
    """Return README's text with every generated block made anew."""
    for folder in sorted(path.parent.name for path in HERE.glob("*/provenance.json")):
        text = _replaced(text, folder, block(folder))
        if (HERE / folder / "claims.csv").exists():
            text = _replaced(text, f"claims:{folder}", judged(folder))
    return _replaced(text, "controls", controls_block())


def _replaced(text: str, name: str, content: str) -> str:
    start, end = f"<!-- results:{name} -->", "<!-- end -->"
    if start not in text:
        raise SystemExit(
            f"README.md has no block {start} … {end}: add one where results/{name} is to be quoted"
        )
    before, rest = text.split(start, 1)
    return f"{before}{start}\n{content}\n{end}{rest.split(end, 1)[1]}"


if __name__ == "__main__":
    if sys.argv[1:]:
        copy(*sys.argv[1:3])
    path = HERE.parent / "README.md"
    path.write_text(readme(path.read_text()))
    print("README.md and results/ agree")
