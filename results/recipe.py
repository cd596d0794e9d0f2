"""Does a cheaper recipe remember as much? What results/plan_recipe.md asks, run and reported.

    .venv/bin/python results/recipe.py run 20 22    # what is missing of these seeds
    .venv/bin/python results/recipe.py report       # results/recipe/scores.csv and README.md

Without seeds `run` takes all of the plan. Two processes may run at once, with different seeds. Each
pair leaves a file in runs/recipe/, so a kill costs only the pair that was being trained. What
scores.csv holds is not run again: `report` may be called, and its table committed, on the way.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from dejavu_utils import store  # noqa: E402  the path comes first
from dejavu_utils.attack import references, scoring  # noqa: E402
from dejavu_utils.models import launch, pairs  # noqa: E402
from results import evidence  # noqa: E402

REPORT = HERE / "recipe"
ORDER = ["criterion", "seed", "recipe"]
MEASURES = {
    "score": "déjà vu score",
    "score_20": "score at p = 20 %",
    "held_out": "probe, held-out accuracy",
}


def one(plan: dict, criterion: str, seed: int, name: str, folder: Path) -> dict:
    """Train one pair by the recipe `name` of the plan, and return its row: scores, probe accuracy
    and the processor seconds of an encoder.
    """
    last = plan["recipes"][name]["epochs"]
    params = {part: plan[part] for part in ("dataset", "sizes", "crop")}
    params["epochs"] = [last]
    params["recipe"] = plan["recipes"][name]["changes"]
    pair = pairs.one(params, folder, criterion, plan["rho"], seed)

    began = time.process_time()
    for job in pairs.jobs([pair]):
        launch.fit(job)
    seconds = (time.process_time() - began) / 2

    table = references.two_model(pair, last, plan["k"])
    table = table[table["layer"] == "projector"]
    everything, confident = scoring.curve(table, [100, 20], resamples=100)
    probes = references.probes(pair, last)
    return {
        "criterion": criterion,
        "seed": seed,
        "recipe": name,
        "score": everything["score"],
        "score_20": confident["score"],
        "held_out": probes["held_out"].mean(),
        "seconds": seconds,
    }


def run(seeds: list[int], plan: dict, folder: Path, report: Path) -> None:
    """Train and measure what is not yet in `folder` or in the table of `report`, in the plan's
    order, recipes of a seed one after the other.
    """
    table = reported(report)
    done = set(zip(table["criterion"], table["seed"], table["recipe"], strict=True))
    for seed in seeds:
        for criterion in plan["criteria"]:
            for name in plan["recipes"]:
                path = folder / "rows" / f"{criterion}-{seed}-{name}.json"
                if path.exists() or (criterion, seed, name) in done:
                    continue
                row = one(plan, criterion, seed, name, folder)
                with store.atomic(path) as temporary:
                    temporary.write_text(json.dumps(row))
                print(row, flush=True)


def reported(report: Path) -> pd.DataFrame:
    """Return the table of an earlier report, without rows if there is none."""
    path = report / "scores.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=[*ORDER, *MEASURES])


def rows(folder: Path, report: Path) -> pd.DataFrame:
    """Return what was run, and reported or not yet: a row per criterion, seed and recipe."""
    found = [json.loads(path.read_text()) for path in sorted((folder / "rows").glob("*.json"))]
    tables = [table for table in (reported(report), pd.DataFrame(found)) if len(table)]
    if not tables:
        raise SystemExit(f"recipe: nothing in {folder}; run results/recipe.py run first")
    whole = pd.concat(tables).drop_duplicates(ORDER)
    return whole.sort_values(ORDER, ignore_index=True)


def complete(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the seeds that both recipes were run on: a run may have been stopped
    between the two.
    """
    recipes = table.groupby(["criterion", "seed"])["recipe"].transform("nunique")
    return table[recipes == 2]


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Return new - old with its t-interval over seeds: a row per criterion and measure of a
    `complete` table.
    """
    found = []
    for criterion, part in table.groupby("criterion", sort=False):
        wide = part.pivot(index="seed", columns="recipe")
        for measure in MEASURES:
            old = wide[measure]["old"]
            new = wide[measure]["new"]
            about = {"criterion": criterion, "measure": measure}
            means = {"old": old.mean(), "new": new.mean()}
            found.append(about | means | scoring.over_seeds(new - old))
    return pd.DataFrame(found)


def ratios(table: pd.DataFrame) -> pd.Series:
    """Return how many times faster the new recipe is, by criterion: the median over seeds."""
    wide = table.pivot(index=["criterion", "seed"], columns="recipe", values="seconds")
    return (wide["old"] / wide["new"]).groupby("criterion", sort=False).median()


def verdict(compared: pd.DataFrame, plan: dict) -> str:
    """Return the sentence that the plan asks for; "no verdict" unless every seed is there."""
    scores = compared[compared["measure"] == "score"]
    complete = set(scores["criterion"]) == set(plan["criteria"])
    if not complete or (scores["n"] < len(plan["seeds"])).any():
        return "Not all of the plan's seeds are there: no verdict."

    inferior = scores[scores["low"] <= -plan["margin"]]["criterion"]
    if inferior.empty:
        return "The new recipe is **not inferior**, for every criterion."
    return f"That the new recipe is not inferior is **not shown** for {', '.join(inferior)}."


def block(table: pd.DataFrame, plan: dict) -> str:
    """Return the report's generated part: the verdict and a table, as Markdown."""
    table = complete(table)
    compared = differences(table)
    faster = ratios(table)
    rows = []
    for row in compared.itertuples():
        means = [f"{row.old:.3f}", f"{row.new:.3f}", f"{row.mean:+.3f}"]
        interval = f"{row.low:+.3f} to {row.high:+.3f}"
        rows.append([row.criterion, MEASURES[row.measure], *means, interval, row.n])
    head = ["criterion", "measure", "old", "new", "new - old", "95 % over seeds", "seeds"]
    lines = [verdict(compared, plan), "", evidence.grid(head, rows)]

    for criterion, ratio in faster.items():
        seconds = table[table["criterion"] == criterion].groupby("recipe")["seconds"].median()
        lines += [
            "",
            f"An encoder of {criterion} takes {seconds['new']:.0f} processor seconds instead of "
            f"{seconds['old']:.0f} (medians); within a seed it is {ratio:.1f} times as fast.",
        ]
    return "\n".join(lines)


PAGE = """# The recipe for two CPU cores, old and new

What [the plan](../plan_recipe.md) asked: `small32`, the old trunk, against `patch64`, the new one.
Made by `results/recipe.py report` from [scores.csv](scores.csv), a row a pair of encoders.

<!-- results:recipe -->
{}
<!-- end -->
"""


def kept() -> str:
    """Return the generated part of results/recipe/README.md, from the table beside it."""
    return block(pd.read_csv(REPORT / "scores.csv"), evidence.plan("recipe"))


def report(folder: Path) -> None:
    """Write results/recipe/: the table, and a page that says what it shows."""
    table = rows(folder, REPORT)
    REPORT.mkdir(exist_ok=True)
    table.to_csv(REPORT / "scores.csv", index=False, float_format="%.4f")
    (REPORT / "README.md").write_text(PAGE.format(kept()))


def main(arguments: list[str]) -> None:
    """Do what the command line says."""
    known = evidence.plan("recipe")
    folder = store.runs("recipe")
    if arguments[:1] == ["run"]:
        seeds = [int(seed) for seed in arguments[1:]] or known["seeds"]
        run(seeds, known, folder, REPORT)
    elif arguments == ["report"]:
        report(folder)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
