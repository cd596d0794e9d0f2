"""What two measures that need no label say of the encoders of a plan, a row per pair and measure.

    .venv/bin/python results/without_labels.py scenes    # in the clone that trained them: minutes

Of the pairs of the plan's recipe as it is, at its first rho and last epoch: mean alignment
(projector) and mean UnitMem (units of the backbone), target minus reference, of the attacked images
and of images of neither set. Writes results/<plan>/without_labels.csv. No plan asked this.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from dejavu_utils import plots  # noqa: E402  the path comes first
from dejavu_utils.attack import measures  # noqa: E402
from results import evidence, evidence_report  # noqa: E402

COLUMNS = ["seed", "criterion", "measure", "attacked", "target", "reference", "difference", "n"]
SETS = {"attacked": "training images", "control": "images of neither set"}


def measured(name: str, folder: Path, out: Path) -> pd.DataFrame:
    """Return COLUMNS of every pair that was run of the plan's recipe as it is, at its first rho."""
    planned = evidence.plan(name)
    tables = []
    for piece in evidence.unchanged(planned, out):
        pair = evidence.pair_of(planned, piece, folder)
        for attacked in ("attacked", "control"):
            table = measures.by_set(pair, planned["epochs"][-1], attacked=attacked)
            tables.append(table[COLUMNS])
        print(piece.name, flush=True)
    return pd.concat(tables, ignore_index=True)


def block(name: str) -> str:
    """Return a row per criterion, as results/<name>/README.md shows it: target minus reference of
    both measures, with intervals over seeds.
    """
    table = pd.read_csv(HERE / name / "without_labels.csv")
    asked = [(measure, of) for measure in ("alignment", "UnitMem") for of in SETS]
    rows = []
    for criterion, part in table.groupby("criterion", sort=False):
        cells = []
        for measure, attacked in asked:
            here = (part["measure"] == measure) & (part["attacked"] == attacked)
            cells.append(evidence_report.interval(part.loc[here, "difference"]))
        rows.append([plots.NAMES[criterion], *cells, part["seed"].nunique()])
    head = [f"{measure}, {SETS[attacked]}" for measure, attacked in asked]
    return evidence.grid(["criterion", *head, "seeds"], rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    name = sys.argv[1]
    found = measured(name, HERE.parent / "runs" / f"evidence-{name}", HERE / name)
    found.to_csv(HERE / name / "without_labels.csv", index=False, float_format="%.6g")
