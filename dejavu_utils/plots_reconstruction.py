"""Figures of `03_reconstruction`: what was drawn from a background crop, and what the judge reads
there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dejavu_utils import plots

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

OTHER = {"control": ", images of neither set", "whole": ", those not cropped"}


def samples(rows: list[dict]) -> Figure:
    """Return whole pictures, in the first column, and what a decoder draws of their representations
    beside them.

    `rows` as `reconstruct.redrawn` returns them: image, name, drawn (list of (picture, name that
    the judge reads)).
    """
    figure, axes = plots.subplots(1 + len(rows[0]["drawn"]), len(rows), 1.0, 1.18)
    for line, row in zip(axes, rows, strict=True):
        plots.show_picture(line[0], row["image"], row["name"], "black", False)
        for axis, (picture, name) in zip(line[1:], row["drawn"], strict=True):
            plots.show_picture(axis, picture, name, plots.TARGET, name == row["name"])
    return figure


def reconstructions(rows: list[dict], title: str = "") -> Figure:
    """Return the paper's first figure: crop, true image, what target and reference draw, and the
    nearest public images.

    `rows` as `reconstruct.gallery` returns them. Names over drawings are what the judge reads
    there.
    """
    roles = (("target", plots.TARGET), ("reference", plots.REFERENCE))
    drawn, near = (len(rows[0]["target"][kind]) for kind in ("drawn", "nearest"))
    figure, axes = plots.subplots(2 + 2 * (drawn + near), len(rows), 0.95, 1.15)
    for line, row in zip(axes, rows, strict=True):
        plots.show_picture(line[0], row["crop"], "crop", "black", False)
        plots.show_picture(line[1], row["image"], row["name"], "black", False)
        cells = [
            (*cell, colour)
            for kind in ("drawn", "nearest")
            for role, colour in roles
            for cell in row[role][kind]
        ]
        for axis, (picture, name, frame) in zip(line[2:], cells, strict=True):
            plots.show_picture(axis, picture, name, frame, name == row["name"])
    heads = [
        (2 + i * drawn, f"drawn from the crop by the {role}", colour)
        for i, (role, colour) in enumerate(roles)
    ]
    heads += [
        (2 + 2 * drawn + i * near, f"nearest to it, {role}", colour)
        for i, (role, colour) in enumerate(roles)
    ]
    for column, text, colour in heads:
        head = axes[0, column].annotate(
            text, (0, 1.3), xycoords="axes fraction", color=colour, fontsize=8
        )
        head.set_in_layout(
            False
        )  # it is wider than the column that it begins in, which must not grow with it
    figure.suptitle(
        f"{title}\n", fontsize=10, x=0.01, ha="left"
    )  # the second line keeps room for the heads
    return figure


def read_off(table: pd.DataFrame, chance: float, truth: float | None = None) -> Figure:
    """Return what the judge reads off the reconstructions, a line per condition: target and
    reference with intervals.

    Columns: condition, attacked, target, target_low, target_high, reference, reference_low,
    reference_high; one measure. `chance` and `truth`, the best that the background allows (scenes
    only), are drawn as lines.
    """
    figure, [[axis]] = plots.subplots(1, width=6.4, height=0.9 + 0.42 * len(table))
    rows = zip(table["condition"], table["attacked"], strict=True)
    names = [condition + OTHER.get(attacked, "") for condition, attacked in rows]
    for shift, role, colour in (
        (-0.12, "target", plots.TARGET),
        (0.12, "reference", plots.REFERENCE),
    ):
        values, low, high = (table[role + end].to_numpy(float) for end in ("", "_low", "_high"))
        axis.errorbar(
            values,
            np.arange(len(table)) + shift,
            xerr=[values - low, high - values],
            fmt="o",
            markersize=5,
            capsize=3,
            color=colour,
            label=role,
        )
    axis.axvline(chance, color="grey", lw=1, ls=":", label="chance")
    if truth is not None and np.isfinite(truth):
        axis.axvline(
            truth, color=plots.BAYES, lw=1.2, ls="-.", label="Bayes: all that the background tells"
        )
    axis.set_yticks(np.arange(len(table)), names)
    axis.invert_yaxis()
    axis.set_xlabel("the judge reads the right class off the reconstruction (share of all images)")
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=4
    )
    return figure
