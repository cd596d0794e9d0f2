"""Draws the figures of a folder of results again from its tables, in today's style.

    .venv/bin/python results/redraw.py study

Only what plots.py draws from a committed table: no number is computed here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from dejavu_utils import plots, summaries  # noqa: E402  the path comes first

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures(folder: Path) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure) for the tables of a folder; FileNotFoundError names a missing one."""
    scores = pd.read_csv(folder / "scores.csv")
    scores = scores.query("ranking == 'own' and top == 1")  # older tables have others, too
    rho = scores["rho"].iloc[0]
    names = ("curve", "shares", "fig2_probe")
    read = {name: pd.read_csv(folder / f"{name}.csv") for name in names}
    first = {name: summaries.first_rho(table, rho) for name, table in read.items()}

    projector = summaries.first_rho(scores, rho).query("layer == 'projector'")
    yield "fig1_accuracy_over_p", plots.over_p(first["curve"])
    yield "fig2_score_and_probe_over_epochs", plots.over_epochs(projector, first["fig2_probe"])
    yield "fig3_four_way_split", plots.split(first["shares"])

    truth = pd.read_csv(folder / "truth.csv")
    if len(truth):
        yield "fig5_known_truth", plots.over_rho(truth)

    if (folder / "mitigation.csv").is_file():
        rows = pd.read_csv(folder / "mitigation.csv", dtype={"value": str})
        rows = rows.rename(columns={"knob": "setting"})  # its name in older tables
        yield "mitigation_knobs", plots.settings(rows)


def main(names: list[str]) -> int:
    """Return the exit status after writing the figures of the named folders, or an error."""
    if not names:
        print("error: name a folder of results: results/redraw.py study", file=sys.stderr)
        return 1
    for name in names:
        try:
            for stem, figure in figures(HERE / name):
                figure.savefig(HERE / name / f"{stem}.png", dpi=120, bbox_inches="tight")
        except FileNotFoundError as error:
            print(f"error: {name} cannot be drawn again: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
