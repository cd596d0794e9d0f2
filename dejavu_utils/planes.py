"""Figures of the mitigation notebook: a panel per knob, and the privacy-utility plane (the paper's §6)."""

from __future__ import annotations

from dejavu_utils import knobs
from dejavu_utils.plots import BAYES, NAMES, TARGET, _axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933", "#882255", "#44AA99")
MARKERS = "osD^vP*Xph"
PURPLE = "#CC79A7"


def per_knob(rows):
    """Return the déjà vu score (top) and the held-out accuracy (bottom) over the values of every knob, a column a knob.

    `rows` is of `tradeoff.rows`: values stand in the order of the table, at equal distances.
    """
    groups = list(rows[rows["knob"] != "default"].groupby(["criterion", "knob"], sort=False))
    wide = min(len(groups), 4)
    figure, axes = _axes(wide, 2 * -(-len(groups) // wide), 3.1, 2.3)
    columns = [axes[start:start + 2, i] for start in range(0, len(axes), 2) for i in range(wide)]
    for unused in columns[len(groups):]:
        for axis in unused:
            axis.remove()
    for (top, bottom), ((criterion, knob), part) in zip(columns, groups, strict=False):
        for name, label, colour in (("score", "all", TARGET), ("score_20", "p = 20 %", PURPLE)):
            _points(top, part, name, colour, label)
        _points(bottom, part, "held_out", BAYES, "held-out probe")
        top.axhline(0, color="grey", lw=1, ls=":")
        top.set_title(f"{NAMES.get(criterion, criterion)}: {knobs.NAMES.get(knob, knob)}", fontsize=8)
        top.set_xticklabels([])
        bottom.set_xticklabels(part["value"], fontsize=8, rotation=30 if part["value"].str.len().max() > 4 else 0)
    for share in (0, 1):
        _same_scale([column[share] for column in columns[:len(groups)]])
    for axis in figure.axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("held-out accuracy" if axis.get_subplotspec().rowspan.start % 2 else "déjà vu score")
    columns[0][0].legend(fontsize=8)
    return figure


def _points(axis, part, name: str, colour: str, label: str) -> None:
    """Draw a column of values with its interval as bars, at 0, 1, 2, …"""
    places = range(len(part))
    errors = [part[name] - part[f"{name}_low"], part[f"{name}_high"] - part[name]]
    axis.errorbar(places, part[name], yerr=[error.clip(lower=0) for error in errors], color=colour, marker="o",
                  markersize=4, capsize=2, lw=1.2, label=label)
    axis.set_xticks(places)
    axis.margins(x=0.12)


def _same_scale(axes) -> None:
    low, high = min(axis.get_ylim()[0] for axis in axes), max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, high)


def plane(rows):
    """Return privacy against utility: déjà vu score (all, and p = 20 %) over held-out accuracy, a line per knob.

    Down and to the right is better. Bars are 95 % intervals on both axes, rings mark the Pareto front (`front`).
    """
    figure, axes = _axes(2, 1, 5.0, 4.4, sharex=True)
    lines = list(rows.groupby(["criterion", "knob"], sort=False))
    for axis, name, text in zip(axes[0], ("score", "score_20"), ("all images", "the 20 % most confident"), strict=True):
        for i, ((criterion, knob), part) in enumerate(lines):
            label = f"{NAMES.get(criterion, criterion)}: {knobs.NAMES.get(knob, knob)}"
            errors = [[(part[column] - part[f"{column}_low"]).clip(lower=0),
                       (part[f"{column}_high"] - part[column]).clip(lower=0)] for column in ("held_out", name)]
            axis.errorbar(part["held_out"], part[name], xerr=errors[0], yerr=errors[1], color=COLOURS[i % 10], lw=1,
                          marker=MARKERS[i % 10], markersize=5, elinewidth=0.5, alpha=0.85, label=label)
        best = rows[rows["front"]]
        if name == "score":
            axis.plot(best["held_out"], best[name], "o", ms=12, mfc="none", mec="black", label="Pareto front")
        axis.axhline(0, color="grey", lw=1, ls=":")
        axis.set(xlabel="held-out accuracy of a linear probe", ylabel="déjà vu score", title=text)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure
