"""The paper's figures, drawn from tidy tables; every function returns a matplotlib figure and touches nothing else."""

from __future__ import annotations

import numpy as np

TARGET, REFERENCE, BAYES = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's colour-blind-safe palette
SPLIT = {"memorized": "#0072B2", "correlated": "#56B4E9", "misrepresented": "#D55E00", "unassociated": "#DDDDDD"}
NAMES = {"vicreg": "VICReg", "simclr": "SimCLR", "barlow": "Barlow Twins", "byol": "BYOL", "dino": "DINO",
         "supervised": "supervised"}


def _axes(columns: int, rows: int = 1, width: float = 3.6, height: float = 3.0, **options):
    """Return (figure, 2-D array of axes) in the house style."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(context="notebook", style="ticks", font_scale=0.85)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False,
                                layout="constrained", **options)
    sns.despine(figure)
    plt.close(figure)  # shown by whoever asked for it, never twice
    return figure, axes


def _line(axis, table, x: str, y: str, low: str, high: str, colour: str, label: str, style: str = "-") -> None:
    """Draw y over x with its interval as a band and a marker at each value."""
    table = table.sort_values(x)
    axis.plot(table[x], table[y], style, color=colour, marker="o", markersize=4, label=label)
    band = (table[name].astype(float) for name in (x, low, high))
    axis.fill_between(*band, color=colour, alpha=0.18, linewidth=0)


def _title(setting) -> str:
    name, rho = NAMES.get(setting["criterion"], setting["criterion"]), setting["rho"]
    return name if np.isnan(rho) else f"{name}, ρ = {rho:g}"


def examples(images, rects, labels, columns: int = 8):
    """Return training images with their boxes (dashed) and background crops (solid), and the crops below.

    `images` (n, 3, h, w) uint8, `rects` a list of (boxes (m, 4), crop (4,)), `labels` the names of the classes.
    """
    import matplotlib.patches as patches

    columns = min(columns, len(images))
    figure, axes = _axes(columns, 2, 1.35, 1.5)
    for i in range(columns):
        picture = np.moveaxis(np.asarray(images[i]), 0, -1)
        boxes, (x0, y0, x1, y1) = rects[i]
        axes[0, i].imshow(picture)
        for bx0, by0, bx1, by1 in boxes:
            axes[0, i].add_patch(patches.Rectangle((bx0 - 0.5, by0 - 0.5), bx1 - bx0, by1 - by0, fill=False, ls="--",
                                                   lw=1.5, ec="white"))
        axes[0, i].add_patch(patches.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, lw=2, ec=REFERENCE))
        axes[0, i].set_title(labels[i], fontsize=9)
        axes[1, i].imshow(picture[int(y0):int(y1), int(x0):int(x1)])
    for axis in axes.flat:
        axis.set_axis_off()
    return figure


def losses(table):
    """Return the training loss over epochs, a panel a criterion, a line an encoder.

    Columns: criterion, epoch, loss, name.
    """
    kinds = list(dict.fromkeys(table["criterion"]))
    figure, axes = _axes(len(kinds))
    for axis, kind in zip(axes[0], kinds, strict=True):
        for _, one in table[table["criterion"] == kind].groupby("name"):
            axis.plot(one["epoch"], one["loss"], lw=1, alpha=0.7)
        axis.set(title=NAMES.get(kind, kind), xlabel="epoch", ylabel="training loss")
    return figure


def over_p(curve):
    """Return accuracy of target and reference over the p % most confident examples: the paper's first figure.

    Columns: criterion, rho, p, target, target_low, target_high, reference, reference_low, reference_high, chance.
    """
    settings = [group for _, group in curve.groupby(["criterion", "rho"], sort=False, dropna=False)]
    figure, axes = _axes(len(settings), sharey=True)
    for axis, group in zip(axes[0], settings, strict=True):
        _line(axis, group, "p", "target", "target_low", "target_high", TARGET, "target")
        _line(axis, group, "p", "reference", "reference_low", "reference_high", REFERENCE, "reference", "--")
        axis.axhline(group["chance"].iloc[0], color="grey", lw=1, ls=":", label="chance")
        axis.set(title=_title(group.iloc[0]), xlabel="p: most confident examples (%)", ylim=(0, None))
    axes[0, 0].set_ylabel("label-inference accuracy")
    axes[0, 0].legend(frameon=False)
    return figure


def over_epochs(scores, probes):
    """Return the déjà vu score (top) and what the linear probe shows (bottom) over epochs, a column a criterion.

    `scores`: criterion, epoch, p, score, low, high. `probes`: criterion, epoch, quantity, mean, low, high.
    """
    kinds = list(dict.fromkeys(scores["criterion"]))
    figure, axes = _axes(len(kinds), 2, 4.0, 2.8, sharex=True, sharey="row")
    shades = dict(zip(sorted(scores["p"].unique(), reverse=True), (TARGET, "#CC79A7", BAYES), strict=False))
    colours = {"held-out accuracy": BAYES, "train - held-out gap": REFERENCE,
               "gap of a probe that saw neither": "#E69F00"}
    for column, kind in enumerate(kinds):
        for p, colour in shades.items():
            one = scores[(scores["criterion"] == kind) & (scores["p"] == p)]
            _line(axes[0, column], one, "epoch", "score", "low", "high", colour, f"p = {p:g} %")
        axes[0, column].axhline(0, color="grey", lw=1, ls=":")
        axes[0, column].set_title(NAMES.get(kind, kind))
        for quantity, one in probes[probes["criterion"] == kind].groupby("quantity", sort=False):
            _line(axes[1, column], one, "epoch", "mean", "low", "high", colours[quantity], quantity)
        axes[1, column].set(xlabel="epoch", ylim=(min(0, probes["low"].min()), 1))
    axes[0, 0].set_ylabel("déjà vu score")
    axes[1, 0].set_ylabel("linear probe (backbone)")
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(low, high + 0.3 * (high - low))  # room for the legend above the bands
    axes[0, 0].legend(frameon=False, loc="upper left", ncols=len(shades))
    figure.legend(*axes[1, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center",
                  ncols=1 if len(kinds) == 1 else 3, fontsize=8)
    return figure


def split(shares):
    """Return the four-way split over epochs, stacked, a panel a criterion. Columns: criterion, epoch and the shares."""
    kinds = list(dict.fromkeys(shares["criterion"]))
    figure, axes = _axes(len(kinds), sharey=True)
    for axis, kind in zip(axes[0], kinds, strict=True):
        one = shares[shares["criterion"] == kind].sort_values("epoch")
        x, base = np.arange(len(one)), np.zeros(len(one))
        for name in ("correlated", "misrepresented", "memorized"):
            axis.bar(x, one[name], bottom=base, color=SPLIT[name], label=name, width=0.7)
            base += one[name].to_numpy()
        axis.errorbar(x, base, yerr=[one["memorized"] - one["memorized_low"], one["memorized_high"] - one["memorized"]],
                      fmt="none", ecolor="black", elinewidth=1, capsize=2)
        axis.set_xticks(x, one["epoch"].astype(str))
        axis.set(title=NAMES.get(kind, kind), xlabel="epoch")
    axes[0, 0].set_ylabel("share of attacked images")
    axes[0, 0].set_ylim(0, 1.35 * axes[0, 0].get_ylim()[1])
    axes[0, 0].legend(frameon=False, loc="upper left", fontsize=8)
    return figure


def over_rho(table):
    """Return target, reference and Bayes accuracy against the background-object correlation ρ.

    Columns: criterion, rho, target, target_low, target_high, reference, reference_low, reference_high, bayes, chance.
    """
    figure, axes = _axes(1, width=4.6, height=3.4)
    axis, table = axes[0, 0], table.sort_values("rho")
    for role, colour, text, style in (("target", TARGET, "target (trained on the image)", "-"),
                                      ("reference", REFERENCE, "reference (not trained on it)", "--")):
        _line(axis, table, "rho", role, f"{role}_low", f"{role}_high", colour, text, style)
    axis.plot(table["rho"], table["bayes"], color=BAYES, lw=1.5, ls="-.", label="Bayes: all that the background tells")
    axis.axhline(table["chance"].iloc[0], color="grey", lw=1, ls=":", label="chance")
    axis.set(xlabel="ρ: background-object correlation", ylabel="label-inference accuracy", ylim=(0, None),
             title=NAMES.get(table["criterion"].iloc[0], ""))
    axis.legend(frameon=False, fontsize=8)
    return figure


def layers(scores):
    """Return the déjà vu score at the end of training by layer, all examples.

    Columns: criterion, layer, score, low, high.
    """
    kinds = list(dict.fromkeys(scores["criterion"]))
    order = [layer for layer in ("projector", "backbone") if layer in set(scores["layer"])]
    figure, axes = _axes(1, width=1.6 + 1.4 * len(kinds), height=3.2)
    for i, layer in enumerate(order):
        one = scores[scores["layer"] == layer].set_index("criterion").loc[kinds]
        x = np.arange(len(kinds)) + 0.3 * (i - 0.5)
        axes[0, 0].bar(x, one["score"], 0.28, color=(TARGET, "#56B4E9")[i], label=layer)
        axes[0, 0].errorbar(x, one["score"], yerr=[one["score"] - one["low"], one["high"] - one["score"]], fmt="none",
                            ecolor="black", elinewidth=1, capsize=3)
    axes[0, 0].axhline(0, color="grey", lw=1)
    axes[0, 0].set_xticks(np.arange(len(kinds)), [NAMES.get(kind, kind) for kind in kinds])
    axes[0, 0].set(ylabel="déjà vu score, all examples", ylim=(None, 1.3 * float(scores["high"].max())))
    axes[0, 0].legend(frameon=False, loc="upper right", ncols=2, fontsize=8)
    return figure


def gallery(rows, neighbours: int = 4):
    """Return a picture table: crop, true image, then the nearest public images under target and reference, with labels.

    `rows` is a list of dicts: crop, image, name, target (list of (picture, name)), reference (the same), title.
    """
    figure, axes = _axes(2 + 2 * neighbours, len(rows), 1.0, 1.18)
    for line, row in zip(axes, rows, strict=True):
        cells = [(row["crop"], "crop"), (row["image"], row["name"]), *row["target"][:neighbours],
                 *row["reference"][:neighbours]]
        for column, (axis, (picture, name)) in enumerate(zip(line, cells, strict=True)):
            axis.imshow(np.moveaxis(np.asarray(picture), 0, -1))
            right = column >= 2 and name == row["name"]
            short = name if len(name) < 13 else name[:11] + "…"
            style = {"color": BAYES, "fontweight": "bold"} if right else {"color": "black"}
            axis.set_title(short, fontsize=7.5, pad=2, **style)
            axis.set(xticks=[], yticks=[])
            frame = "black" if column < 2 else TARGET if column < 2 + neighbours else REFERENCE
            for spine in axis.spines.values():
                spine.set(visible=True, color=frame)
    return figure
