"""Figures of the mitigation notebook: a panel per knob, and the privacy-utility plane (the paper's
§6).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dejavu_utils import plots
from dejavu_utils.mitigation import knobs
from dejavu_utils.plots import BAYES, TARGET

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999933",
    "#882255",
    "#44AA99",
)
MARKERS = "osD^vP*Xph"
PURPLE = "#CC79A7"


def per_knob(rows: pd.DataFrame) -> Figure:
    """Return the déjà vu score (top) and the held-out accuracy (bottom) over the values of every
    knob, a column a knob.

    `rows` is of `tradeoff.rows`: values stand in the order of the table, at equal distances.
    """
    groups = list(rows[rows["knob"] != "default"].groupby(["criterion", "knob"], sort=False))
    figure, columns = plots.subplot_columns(len(groups), 5, 2, 3.0, 2.3)
    for (top, bottom), ((criterion, knob), part) in zip(columns, groups, strict=True):
        for name, label, colour in (("score", "all", TARGET), ("score_20", "p = 20 %", PURPLE)):
            _points(top, part, name, colour, label)
        _points(bottom, part, "held_out", BAYES, "held-out probe")
        top.axhline(0, color="grey", lw=1, ls=":")
        top.set_title(_title(criterion, knob), fontsize=9)
        top.set_xticklabels([])
        bottom.set_xticklabels(
            part["value"], fontsize=8, rotation=30 if part["value"].str.len().max() > 4 else 0
        )
    for axes, text in zip(
        zip(*columns, strict=True), ("déjà vu score", "held-out accuracy"), strict=True
    ):
        plots.same_scale(axes)
        plots.label_left(axes, text)
    columns[0][0].legend(fontsize=8)
    return figure


def _points(axis: Axes, part: pd.DataFrame, name: str, colour: str, label: str) -> None:
    """Draw a column of values with its interval as bars, at 0, 1, 2, …"""
    places = range(len(part))
    axis.errorbar(
        places,
        part[name],
        yerr=plots.error_bars(part, name),
        color=colour,
        marker="o",
        markersize=4,
        capsize=2,
        lw=1.2,
        label=label,
    )
    axis.set_xticks(places)
    axis.margins(x=0.12)


def plane(rows: pd.DataFrame) -> Figure:
    """Return privacy against utility: déjà vu score (all, and p = 20 %) over held-out accuracy, a
    line per knob.

    Down and to the right is better. Bars are 95 % intervals on both axes, rings mark the Pareto
    front (`front`).
    """
    figure, axes = plots.subplots(2, 1, 5.4, 4.4, sharex=True)
    lines = list(rows.groupby(["criterion", "knob"], sort=False))
    turned = [name for name, _ in lines if name[1] != "default"]
    for axis, name, text in zip(
        axes[0], ("score", "score_20"), ("all images", "the 20 % most confident"), strict=True
    ):
        for i, (setting, part) in enumerate(lines):
            bars = {
                f"{end}err": plots.error_bars(part, column)
                for end, column in (("x", "held_out"), ("y", name))
            }
            colour = COLOURS[turned.index(setting) % 10] if setting in turned else "grey"
            axis.errorbar(
                part["held_out"],
                part[name],
                **bars,
                color=colour,
                lw=1.2,
                marker=MARKERS[i % 10],
                markersize=5,
                elinewidth=0.5,
                label=_title(*setting),
            )
        axis.axhline(0, color="grey", lw=1, ls=":")
        axis.set(xlabel="held-out accuracy of a linear probe", ylabel="déjà vu score", title=text)
    best = rows[rows["front"]]
    axes[0, 0].plot(
        best["held_out"], best["score"], "o", ms=12, mfc="none", mec="black", label="Pareto front"
    )
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    return figure


def spots(figure: Figure, rows: pd.DataFrame) -> list[tuple[Axes, float, float, str]]:
    """Return what `widgets.hover` says at each point of a `plane`: its setting, both numbers, their
    intervals, n.
    """
    found = []
    for axis, name in zip(figure.axes, ("score", "score_20"), strict=True):
        for row in rows.to_dict("records"):
            score, useful = (
                f"{row[one]:{form}} [{row[one + '_low']:{form}}, {row[one + '_high']:{form}}]"
                for one, form in ((name, "+.3f"), ("held_out", ".3f"))
            )
            text = (
                f"{_title(row['criterion'], row['knob'])}: {row['value']}\ndéjà vu score {score}, "
                f"n = {row['n']}\n"
                f"held-out accuracy {useful}"
                + "\non the Pareto front"
                * bool(row["front"] and name == "score")
            )
            found.append((axis, row["held_out"], row[name], text))
    return found


def _title(criterion: str, knob: str) -> str:
    return f"{plots.NAMES.get(criterion, criterion)}: {knobs.NAMES.get(knob, knob)}"
