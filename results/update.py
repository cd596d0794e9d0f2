"""Copy what README quotes from runs/<profile> to results/<name>, with its provenance, and rewrite README's tables.

    .venv/bin/python results/update.py study          # runs/study -> results/study, then README
    .venv/bin/python results/update.py                # README only, from what results/ holds

README's blocks between `<!-- results:<name> -->` and `<!-- end -->` are generated; tests/test_results.py fails when
they disagree with results/. Figures that contain real pictures are never copied.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
TABLES = ["scores", "shares", "differences", "controls", "truth", "fig2_probe", "curve"]
NAMES = {"vicreg": "VICReg", "simclr": "SimCLR"}


def copy(profile: str) -> None:
    """Copy tables, curves and provenance of runs/<profile>; galleries and examples only where the pictures are ours."""
    from dejavu_utils import store

    source, target = store.runs(profile), HERE / profile
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in TABLES:
        store.read_table(source / "tables" / f"{name}.csv").to_csv(target / f"{name}.csv", index=False)
    meta = json.loads((source / "notebooks" / "02_attack.ipynb.json").read_text())
    busy = store.read_table(source / "tables" / "losses.csv")["seconds"].sum()  # of all encoders, whenever trained
    jobs = store.cores()
    ours = meta["parameters"]["dataset"] == "scenes"
    for figure in sorted((source / "figures").glob("*.png")):
        if ours or figure.name.startswith("fig"):
            shutil.copy(figure, target)
    encoders = [json.loads(path.read_text()) for path in source.glob("encoders/*/epoch-*.safetensors.json")]
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    entry = {"command": f"make figures PROFILE={profile}", "commit": commit, "code": meta["code"],
             "encoders_trained_with": sorted({item["code"] for item in encoders}), "seeds": meta["parameters"]["seeds"],
             "parameters": meta["parameters"], "device": f"{meta['device']}, {_processor()}",
             "versions": meta["versions"],
             "training_minutes": round(busy / 60 / jobs, 1), "training_jobs_side_by_side": jobs,
             "attack_minutes": round(meta["seconds"] / 60, 1), "made": meta["created"]}
    (target / "provenance.json").write_text(json.dumps(entry, indent=1, ensure_ascii=False) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{sum(line.startswith('processor') for line in lines)} cores, {model}"


def _number(value: float, low: float, high: float, form: str = "+.3f") -> str:
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _verdict(low: float, high: float, null: float = 0.0) -> str:
    return "supported" if low > null else "contradicted" if high < null else "undecided"


def rows(name: str) -> list[list[str]]:
    """Return the rows of README's table for results/<name>: claim, criterion, value with interval, n, verdict."""
    table = {key: pd.read_csv(HERE / name / f"{key}.csv") for key in TABLES}
    out = []
    scores = table["scores"].query("layer == 'projector' and ranking == 'own'")
    last = scores["epoch"].max()
    first = scores["rho"].iloc[0]
    main = scores[(scores["epoch"] == last) & ((scores["rho"] == first) | scores["rho"].isna())]
    for p, text in ((100, "déjà vu score, all examples"), (20, "déjà vu score, p = 20 %")):
        for row in main[main["p"] == p].itertuples():
            value = _number(row.score, row.low, row.high)
            out.append([text, NAMES[row.criterion], value, row.n, _verdict(row.low, row.high)])
    shares = table["shares"]
    for row in shares[(shares["epoch"] == last) & ((shares["rho"] == first) | shares["rho"].isna())].itertuples():
        value = _number(row.ratio, row.ratio_low, row.ratio_high, ".2f")
        verdict = _verdict(row.ratio_low, row.ratio_high, 1)
        out.append(["memorized / misrepresented", NAMES[row.criterion], value, row.n, verdict])
    for name, text in (("last - untrained", "grows: last checkpoint − untrained"),
                       ("last - first trained", "grows: last − first trained checkpoint"),
                       ("projector - backbone", "projector − backbone"), ("p = 20 % - all", "p = 20 % − all examples")):
        chosen = table["differences"][table["differences"]["what"] == name]
        for row in chosen[(chosen["rho"] == first) | chosen["rho"].isna()].itertuples():
            out.append([text, NAMES[row.criterion], _number(row.difference, row.low, row.high), row.n,
                        _verdict(row.low, row.high)])
    return out + _probe_rows(table["fig2_probe"]) + _truth_rows(table["truth"])


def _probe_rows(probe) -> list[list[str]]:
    out = []
    for (criterion, quantity), group in probe.groupby(["criterion", "quantity"], sort=False):
        group = group.sort_values("epoch")
        form = ".3f" if "accuracy" in quantity else "+.3f"
        ends = [_number(row["mean"], row["low"], row["high"], form) for row in (group.iloc[0], group.iloc[-1])]
        out.append([f"linear probe, {quantity}: untrained → end", NAMES[criterion], " → ".join(ends),
                    int(group["n_held_out"].iloc[0]), "reported"])
    return out


def _truth_rows(truth) -> list[list[str]]:
    out = []
    for row in truth.sort_values("rho").itertuples():
        value = _number(row.target, row.target_low, row.target_high, ".3f")
        verdict = _verdict(row.target_low, row.target_high, row.chance)
        text = f"ρ = {row.rho:g}: target above chance {row.chance:g}"
        out.append([text, NAMES[row.criterion], value, row.n, verdict])
        if row.rho == 0:
            verdict = "supported" if row.reference_low <= row.chance else "contradicted"
            text = f"ρ = 0: reference not above chance {row.chance:g}"
        else:
            above, below = row.reference_low > row.chance, row.reference_low <= row.bayes
            verdict = "supported" if above and below else "contradicted" if not below else "undecided"
            text = f"ρ = {row.rho:g}: reference above chance {row.chance:g}, at most Bayes {row.bayes:.2f}"
        value = _number(row.reference, row.reference_low, row.reference_high, ".3f")
        out.append([text, NAMES[row.criterion], value, row.n, verdict])
    return out


def block(name: str) -> str:
    """Return the generated text of one README block."""
    entry = json.loads((HERE / name / "provenance.json").read_text())
    sizes = entry["parameters"]["sizes"]
    controls = pd.read_csv(HERE / name / "controls.csv")
    missed = int(((controls["low"] > 0) | (controls["high"] < 0)).sum())
    lines = ["| claim | criterion | value [95 % interval] | n | verdict |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows(name)]
    lines += ["", f"Negative controls: {missed} of {len(controls)} intervals miss 0 (about 5 % should, by chance), "
              f"[`results/{name}/controls.csv`](results/{name}/controls.csv).",
              f"`{entry['command']}`, seeds {', '.join(map(str, entry['seeds']))}, {sizes['classes']} classes, "
              f"{sizes['attacked']} attacked images a class in each of A and B, {sizes['public']} public; "
              f"{entry['device']}; at most {entry['training_minutes']} min of training "
              f"({entry['training_jobs_side_by_side']} encoders side by side), "
              f"{entry['attack_minutes']} min of attack; code {entry['code']}; "
              f"torch {entry['versions']['torch']}. "
              f"Tables and figures: [`results/{name}/`](results/{name}/)."]
    return "\n".join(lines)


def controls_block() -> str:
    """Return the table of the repeated controls, from results/controls.csv (a copy of runs/controls/controls.csv)."""
    table = pd.read_csv(HERE / "controls.csv")
    lines = ["| control | truth | repeats | n | mean score | intervals that miss the truth | allowed |",
             "|---|---|---|---|---|---|---|"]
    for row in table.itertuples(index=False, name=None):
        name, truth, mean, _, repeats, n, missed, most, _ = row
        lines.append(f"| {name} | {truth:g} | {repeats} | {n} | {mean:+.4f} | {missed} | {most} |")
    return "\n".join([*lines, "", "`make controls`, seeds 1000 and up, 95 % intervals; allowed: the 99.9 % range of "
                      "a rate of 5 %. [`results/controls.csv`](results/controls.csv)."])


def readme(text: str) -> str:
    """Return README's text with every generated block made anew."""
    for folder in sorted(path.parent.name for path in HERE.glob("*/provenance.json")):
        text = _replaced(text, folder, block(folder))
    return _replaced(text, "controls", controls_block())


def _replaced(text: str, name: str, content: str) -> str:
    start, end = f"<!-- results:{name} -->", "<!-- end -->"
    if start not in text:
        raise SystemExit(f"README.md has no block {start} … {end}: add one where results/{name} is to be quoted")
    before, rest = text.split(start, 1)
    return f"{before}{start}\n{content}\n{end}{rest.split(end, 1)[1]}"


if __name__ == "__main__":
    for profile in sys.argv[1:]:
        copy(profile)
    path = HERE.parent / "README.md"
    path.write_text(readme(path.read_text()))
    print("README.md and results/ agree")
