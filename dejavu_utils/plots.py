"""The paper's figures, drawn from tidy tables; every function returns a matplotlib figure and
touches nothing else.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    import seaborn.objects as so
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe palette.
TARGET = "#0072B2"
REFERENCE = "#D55E00"
BAYES = "#009E73"
SPLIT = {
    "memorized": "#0072B2",
    "correlated": "#56B4E9",
    "misrepresented": "#D55E00",
    "unassociated": "#DDDDDD",
}
NAMES = {
    "vicreg": "VICReg",
    "simclr": "SimCLR",
    "barlow_twins": "Barlow Twins",
    "byol": "BYOL",
    "dino": "DINO",
    "supervised": "supervised",
}
PROBES = {
    "held-out accuracy": BAYES,
    "train - held-out gap": REFERENCE,
    "gap of a probe that saw neither": "#E69F00",
}
SETTINGS = {
    "default": "default",
    "constants.invariance": "invariance λ",
    "constants.temperature": "temperature τ",
    "views.scale_min": "smallest crop of the views",
    "weight_decay": "weight decay",
    "encoder": "trunk",
    "projector": "projector",
    "trained": "images a class, fixed epochs",
    "trained_steps": "images a class, fixed steps",
    "sizes.attacked": "images a class, the paper's design",
    "distinct": "near-duplicates removed above",
    "finetune": "epochs of fine-tuning on X",
    "layer": "layer released",
    "epoch": "stopped at epoch",
    "noise": "noise on the release",
    "bits": "bits a number (0: all)",
}
# What a gallery shows beside crop and image: the head and the colour of each list of pictures.
NEAREST = {
    "target": ("nearest public images: target", TARGET),
    "reference": ("nearest public images: reference", REFERENCE),
}
SAMPLED = {
    "target": ("sampled from the crop: target", TARGET),
    "reference": ("sampled from the crop: reference", REFERENCE),
    "nearest target": ("nearest", TARGET),
    "nearest reference": ("nearest", REFERENCE),
}
SHOWN = 8.6  # inches: the width at which pages show a figure that is wider


def png(pixels: torch.Tensor | np.ndarray, side: int = 0) -> bytes:
    """Return (3, h, w) uint8 pixels as a PNG, `side` px wide (0: as they are), with the pixels left
    as squares.
    """
    from PIL import Image

    file, image = io.BytesIO(), Image.fromarray(np.moveaxis(np.asarray(pixels), 0, -1))
    (image.resize((side, side), Image.Resampling.NEAREST) if side else image).save(file, "PNG")
    return file.getvalue()


def _set_style() -> None:
    import seaborn as sns

    # A class may be called $10_$20: no text of a figure is a formula.
    rc = {"legend.frameon": False, "text.parse_math": False}
    sns.set_theme(context="notebook", style="ticks", font_scale=0.85, rc=rc)


def _legible(figure: Figure) -> Figure:
    """Return a figure, its text enlarged as much as pages shrink it: never below 8 pt there."""
    import matplotlib.pyplot as plt
    from matplotlib.text import Text

    scale = max(1.0, figure.get_size_inches()[0] / SHOWN)
    for text in figure.findobj(Text):
        text.set_fontsize(scale * text.get_fontsize())
    for axis in figure.axes:  # matplotlib makes some tick labels only when a figure is drawn
        axis.tick_params(labelsize=scale * plt.rcParams["xtick.labelsize"])
    return figure


def subplots(
    columns: int, rows: int = 1, width: float = 3.6, height: float = 3.0, **options: Any
) -> tuple[Figure, np.ndarray]:
    """Return (figure, 2-D array of axes) in the house style."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    _set_style()
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        squeeze=False,
        layout="constrained",
        **options,
    )
    sns.despine(figure)
    plt.close(figure)  # shown by whoever asked for it, never twice
    return figure, axes


def drawn(plot: so.Plot, width: float = 6.0, height: float = 3.5) -> Figure:
    """Return a plot made with seaborn.objects as a figure in the house style; sizes in inches."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    _set_style()
    style = sns.axes_style("ticks") | sns.plotting_context("notebook", font_scale=0.85)
    figure = plt.figure(figsize=(width, height), layout="constrained")
    plot.theme(style).on(figure).plot()
    sns.despine(figure)
    for legend in figure.legends:  # it stands right of the axes, not on them
        legend.set_frame_on(False)
        figure.get_layout_engine().set(rect=(0, 0, 0.97, 1))
    plt.close(figure)
    return _legible(figure)


def subplot_columns(
    count: int, most: int, rows: int = 1, *size: float, **options: Any
) -> tuple[Figure, np.ndarray]:
    """Return (figure, `count` columns of `rows` axes), `most` of them side by side, the others
    below.
    """
    deep = -(-count // most)
    wide = -(-count // deep)
    figure, axes = subplots(wide, rows * deep, *size, **options)
    columns = axes.reshape(deep, rows, wide).swapaxes(1, 2).reshape(-1, rows)
    for unused in columns[count:].flat:
        unused.remove()
    return figure, columns[:count]


def _panels(
    table: pd.DataFrame, by: tuple[str, ...] = ("criterion",), rows: int = 1, **options: Any
) -> tuple[Figure, list[tuple[np.ndarray, pd.DataFrame]]]:
    """Return (figure, [(column of `rows` axes, its part of the table)]): a titled column per
    criterion (and rho).
    """
    groups, parts = zip(*table.groupby(list(by), sort=False, dropna=False), strict=True)
    figure, columns = subplot_columns(len(groups), 3, rows, **options)
    for column, (kind, *rho) in zip(columns, groups, strict=True):
        name = NAMES.get(kind, kind)
        column[0].set_title(f"{name}, ρ = {rho[0]:g}" if rho and not np.isnan(rho[0]) else name)
    return figure, list(zip(columns, parts, strict=True))


def label_left(axes: Iterable[Axes], text: str) -> None:
    """Label the y-axis of those axes that stand at the left edge of the figure."""
    for axis in axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(text)


def same_scale(axes: Sequence[Axes], room: float = 0.0) -> None:
    """Give all axes one y-scale, with `room` above, a share of it."""
    lows, highs = zip(*(axis.get_ylim() for axis in axes), strict=True)
    for axis in axes:
        axis.set_ylim(min(lows), max(highs) + room * (max(highs) - min(lows)))


def error_bars(table: pd.DataFrame, y: str, ends: str | None = None) -> list[pd.Series]:
    """Return how far the interval reaches below and above each value; its columns are <ends>low,
    <ends>high.
    """
    ends = f"{y}_" if ends is None else ends
    return [
        (table[y] - table[f"{ends}low"]).clip(lower=0),
        (table[f"{ends}high"] - table[y]).clip(lower=0),
    ]


def _label_ends(axis: Axes, ends: dict[str, tuple[float, str]]) -> None:
    """Write labels right of the axes instead of a legend, at the heights where lines end; a line of
    text apart, the lowest first. `ends` is {label: (y, colour)}; the y-limits must be final.
    """
    from matplotlib.colors import to_rgb

    figure = axis.get_figure()
    scale = max(1.0, figure.get_size_inches()[0] / SHOWN)  # as _legible enlarges it later
    rows = axis.get_subplotspec().get_gridspec().nrows
    line = scale * 0.22 * rows / figure.get_size_inches()[1]  # share of the axes' height
    low, high = axis.get_ylim()
    taken = -1.0  # up to this height
    for label, (y, colour) in sorted(ends.items(), key=lambda end: end[1][0]):
        text = textwrap.fill(label, 18)
        half = line * len(text.splitlines()) / 2
        height = max((y - low) / (high - low), taken + half)
        taken = height + half
        axis.annotate(
            text,
            (1, height),
            xycoords="axes fraction",
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
            color=[0.75 * part for part in to_rgb(colour)],  # darker: thin letters look paler
            annotation_clip=False,
        )


def _line_ends(axis: Axes) -> dict[str, tuple[float, str]]:
    """Return {label: (y at the right end, colour)} of the lines of some axes."""
    ends = {}
    for line in axis.get_lines():
        if not line.get_label().startswith("_"):
            ends[line.get_label()] = (line.get_ydata()[-1], line.get_color())
    return ends


def label_lines(axis: Axes) -> None:
    """Write what each line is at its right end, instead of a legend; the y-limits must be final."""
    _label_ends(axis, _line_ends(axis))


def _end_of_row(columns: Sequence[Axes]) -> Axes:
    """Return the axes at the right end of the first row."""
    wide = columns[0].get_subplotspec().get_gridspec().ncols
    return columns[wide - 1]


def _line(
    axis: Axes,
    table: pd.DataFrame,
    x: str,
    y: str,
    colour: str,
    label: str,
    style: str = "-",
    ends: str | None = None,
) -> None:
    """Draw y over x with its interval (see `error_bars`) as a band and a marker at each value."""
    table = table.sort_values(x)
    axis.plot(table[x], table[y], style, color=colour, marker="o", markersize=4, label=label)
    below, above = error_bars(table, y, ends)
    axis.fill_between(
        table[x], table[y] - below, table[y] + above, color=colour, alpha=0.18, linewidth=0
    )


def examples(
    images: torch.Tensor | Sequence[torch.Tensor],
    rects: list[tuple[np.ndarray, np.ndarray]],
    labels: Sequence[str],
) -> Figure:
    """Return training images with their boxes (dashed) and background crops (solid), and the crops
    below.

    `images` (n, 3, h, w) uint8, `rects` a list of (boxes (m, 4), crop (4,)), `labels` the names of
    the classes.
    """
    from matplotlib.patches import Rectangle

    figure, axes = subplots(len(images), 2, 1.35, 1.5)
    for (top, bottom), image, (boxes, crop), label in zip(
        axes.T, images, rects, labels, strict=True
    ):
        picture = np.moveaxis(np.asarray(image), 0, -1)
        top.imshow(picture)
        styles = [{"ls": "--", "lw": 1.5, "ec": "white"}] * len(boxes) + [
            {"lw": 2, "ec": REFERENCE}
        ]
        for (x0, y0, x1, y1), style in zip([*boxes, crop], styles, strict=True):
            top.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, **style))
        top.set_title(label, fontsize="small")
        x0, y0, x1, y1 = map(int, crop)
        bottom.imshow(picture[y0:y1, x0:x1])
    for axis in axes.flat:
        axis.set_axis_off()
    return _legible(figure)


def losses(table: pd.DataFrame) -> Figure:
    """Return the training loss over epochs, a panel a criterion, a line an encoder.

    Columns: criterion, epoch, loss, name, which ends in A or B.
    """
    import seaborn.objects as so
    from matplotlib.ticker import MaxNLocator

    rows = table.replace({"criterion": NAMES}).assign(encoder=table["name"].str[-1])
    plot = so.Plot(rows, x="epoch", y="loss", color="encoder", linestyle="encoder", group="name")
    plot = plot.facet("criterion", wrap=3).share(y=False)
    whole = so.Continuous().tick(MaxNLocator(4, integer=True))
    plot = plot.scale(color=[TARGET, REFERENCE], x=whole)
    plot = plot.add(so.Line(linewidth=1.2, alpha=0.8)).label(y="training loss", title="{}".format)
    panels = rows["criterion"].nunique()
    return drawn(plot, 3.4 * min(panels, 3) + 1, 2.8 * -(-panels // 3))


def over_p(curve: pd.DataFrame) -> Figure:
    """Return accuracy of target and reference over the p % most confident examples: the paper's
    first figure.

    Columns: criterion, rho, p, target, target_low, target_high, reference, reference_low,
    reference_high, chance.
    """
    figure, panels = _panels(curve, ("criterion", "rho"), sharey=True)
    for (axis,), part in panels:
        _line(axis, part, "p", "target", TARGET, "target")
        _line(axis, part, "p", "reference", REFERENCE, "reference", "--")
        axis.axhline(part["chance"].iloc[0], color="grey", lw=1, ls=":", label="chance")
        axis.set_xlabel("p: most confident examples (%)")
    figure.axes[0].set_ylim(bottom=0)  # at the end: it fixes the top, too, of all panels
    label_left(figure.axes, "label-inference accuracy")
    label_lines(_end_of_row(figure.axes))
    return _legible(figure)


def _probe_lines(axis: Axes, table: pd.DataFrame, low: float) -> None:
    for quantity, one in table.groupby("quantity", sort=False):
        _line(axis, one, "epoch", "mean", PROBES[quantity], quantity, ends="")
    axis.set(xlabel="epoch", ylim=(min(0, low), 1))
    axis.xaxis.get_major_locator().set_params(integer=True)


def probes(rows: pd.DataFrame) -> Figure:
    """Return what the linear probe shows over epochs, a panel a criterion; columns: criterion,
    epoch, quantity, mean, low, high.
    """
    figure, panels = _panels(rows, sharey=True)
    for (axis,), part in panels:
        _probe_lines(axis, part, rows["low"].min())
    label_left(figure.axes, "linear probe (backbone)")
    label_lines(_end_of_row(figure.axes))
    return _legible(figure)


def over_epochs(scores: pd.DataFrame, probes: pd.DataFrame) -> Figure:
    """Return the déjà vu score (top) and what the linear probe shows (bottom) over epochs, a column
    a criterion.

    `scores`: criterion, epoch, p, score, low, high. `probes`: criterion, epoch, quantity, mean,
    low, high.
    """
    width = 5.2 if scores["criterion"].nunique() == 1 else 4.0  # inches, labels included
    figure, panels = _panels(scores, rows=2, width=width, height=2.8, sharex=True)
    shades = dict(
        zip(sorted(scores["p"].unique(), reverse=True), (TARGET, "#CC79A7", BAYES), strict=False)
    )
    for (top, bottom), part in panels:
        for p, colour in shades.items():
            _line(top, part[part["p"] == p], "epoch", "score", colour, f"p = {p:g} %", ends="")
        top.axhline(0, color="grey", lw=1, ls=":")
        _probe_lines(
            bottom, probes[probes["criterion"] == part["criterion"].iloc[0]], probes["low"].min()
        )
        bottom.tick_params(labelbottom=True)  # also where other panels stand below
    tops, bottoms = zip(*(column for column, _ in panels), strict=True)
    label_left(tops, "déjà vu score")
    label_left(bottoms, "linear probe (backbone)")
    same_scale(tops)
    for column in (tops, bottoms):
        label_lines(_end_of_row(column))
    return _legible(figure)


def split(shares: pd.DataFrame) -> Figure:
    """Return the four-way split over epochs, stacked, a panel a criterion. Columns: criterion,
    epoch and the shares.
    """
    figure, panels = _panels(shares, sharey=True)
    for (axis,), one in panels:
        one = one.sort_values("epoch")
        x, base = np.arange(len(one)), np.zeros(len(one))
        for name in ("correlated", "misrepresented", "memorized"):
            axis.bar(x, one[name], bottom=base, color=SPLIT[name], label=name, width=0.7)
            base += one[name].to_numpy()
        axis.errorbar(
            x,
            base,
            yerr=error_bars(one, "memorized"),
            fmt="none",
            ecolor="black",
            elinewidth=1,
            capsize=2,
        )
        axis.set_xticks(x, one["epoch"].astype(str))
        axis.set_xlabel("epoch")
    figure.axes[0].set_ylim(bottom=0)
    label_left(figure.axes, "share of attacked images")
    last = _end_of_row(figure.axes)
    bars = {}
    for part in last.containers:
        if part.get_label() in SPLIT:
            end = part.patches[-1]
            bars[part.get_label()] = (end.get_y() + end.get_height() / 2, SPLIT[part.get_label()])
    _label_ends(last, bars)
    return _legible(figure)


def over_rho(table: pd.DataFrame) -> Figure:
    """Return target, reference and Bayes accuracy against the background-object correlation ρ.

    Columns: criterion, rho, target, target_low, target_high, reference, reference_low,
    reference_high, bayes, chance.
    """
    figure, [((axis,), table)] = _panels(table.sort_values("rho"), width=5.2, height=3.4)
    _line(axis, table, "rho", "target", TARGET, "target")
    _line(axis, table, "rho", "reference", REFERENCE, "reference", "--")
    axis.plot(
        table["rho"],
        table["bayes"],
        color=BAYES,
        lw=1.5,
        ls="-.",
        label="Bayes accuracy",
    )
    axis.axhline(table["chance"].iloc[0], color="grey", lw=1, ls=":", label="chance")
    axis.set(
        xlabel="ρ: background-object correlation",
        ylabel="label-inference accuracy",
        ylim=(0, None),
        xticks=table["rho"],
    )
    label_lines(axis)
    return _legible(figure)


def settings(rows: pd.DataFrame) -> Figure:
    """Return what settings do: the déjà vu score (top) and the held-out accuracy (bottom) over the
    values of each, a column a setting; values stand in the order of the table, at equal distances.

    `rows` are of `mitigation.changes`.
    """
    turned = rows[rows["setting"] != "default"]
    groups = list(turned.groupby(["criterion", "setting"], sort=False))
    figure, columns = subplot_columns(len(groups), 4, 2, 3.0, 2.3)
    for (top, bottom), ((criterion, setting), part) in zip(columns, groups, strict=True):
        _values(top, part, "score", TARGET, "all images")
        _values(top, part, "score_20", "#CC79A7", "the 20 % most confident")
        _values(bottom, part, "held_out", BAYES, "linear probe")
        top.axhline(0, color="grey", lw=1, ls=":")
        top.set_title(f"{NAMES.get(criterion, criterion)}:\n{SETTINGS.get(setting, setting)}")
        longest = part["value"].str.len().max()
        for axis in (top, bottom):
            axis.set_xticks(range(len(part)), part["value"], rotation=30 if longest > 5 else 0)
    tops, bottoms = zip(*columns, strict=True)
    same_scale(tops)
    same_scale(bottoms)
    label_left(tops, "déjà vu score")
    label_left(bottoms, "held-out accuracy")
    lines, labels = tops[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=2)
    return _legible(figure)


def _values(axis: Axes, part: pd.DataFrame, name: str, colour: str, label: str) -> None:
    """Draw a column of values with its interval as bars, at 0, 1, 2, …"""
    axis.errorbar(
        range(len(part)),
        part[name],
        yerr=error_bars(part, name),
        color=colour,
        marker="o",
        markersize=4,
        capsize=2,
        lw=1.2,
        label=label,
    )
    axis.margins(x=0.12)


def grid(lines: list[list[tuple]], head: str = "") -> Figure:
    """Return pictures in rows: `lines` are lists of (picture, text above it), as long as each
    other.
    """
    return _blocks([(head, "black", lines)], [""] * len(lines))


def gallery(
    rows: list[dict], count: int = 4, kinds: dict[str, tuple[str, str]] = NEAREST
) -> Figure:
    """Return a picture table, a row an image: crop and image, then under a head each the pictures
    that `kinds` {name: (head, colour)} names.

    `rows` is a list of dicts: crop, image, name, title (if the crop is to be called otherwise), and
    under each name in `kinds` a list of (picture, text), of which `count` are shown. A text that is
    the image's own name is green and bold.
    """
    first = []
    for row in rows:
        first.append([(row["crop"], row.get("title", "crop")), (row["image"], row["name"])])
    blocks = [("", "black", first)]
    for key, (head, colour) in kinds.items():
        blocks.append((head, colour, [row[key][:count] for row in rows]))
    return _blocks(blocks, [row["name"] for row in rows])


def _blocks(blocks: list[tuple[str, str, list[list[tuple]]]], names: list[str]) -> Figure:
    """Return blocks (head, colour, lines of (picture, text)) of pictures side by side; where they
    have a colour, a text that is the line's name is marked.
    """
    import matplotlib.pyplot as plt

    _set_style()
    heads = [head for head, _, _ in blocks]
    widths = [len(lines[0]) for _, _, lines in blocks]
    size = (1.05 * sum(widths), 0.4 + 1.25 * len(names))
    letters = min(12, 130 // sum(widths))  # of a text above a picture
    figure = plt.figure(figsize=size, layout="constrained")
    parts = figure.subfigures(1, len(blocks), width_ratios=widths, squeeze=False)
    for part, (head, colour, lines) in zip(parts[0], blocks, strict=True):
        if any(heads):
            # A blank head keeps rows level.
            part.suptitle(head or " ", color=colour, fontsize="small")
        axes = part.subplots(len(names), len(lines[0]), squeeze=False)
        for line, cells, name in zip(axes, lines, names, strict=True):
            for axis, (picture, text) in zip(line, cells, strict=True):
                short = text if len(text) <= letters else text[: letters - 1] + "…"
                _show(axis, picture, short, colour, text == name and colour != "black")
    plt.close(figure)
    return _legible(figure)


def _show(
    axis: Axes, picture: torch.Tensor | np.ndarray, text: str, frame: str, right: bool
) -> None:
    """Show a picture in a frame of a colour, under its text, which is green and bold where it is
    right.
    """
    axis.imshow(np.moveaxis(np.asarray(picture), 0, -1))
    style = {"color": BAYES, "fontweight": "bold"} if right else {"color": "black"}
    axis.set_title(text, fontsize="small", pad=2, **style)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=True, color=frame, linewidth=1.5)


def film(figures: Iterable[Figure], seconds: float = 0.9) -> bytes:
    """Return figures of one size as an animated PNG: each stays for `seconds`, the last for good.

    It plays once, in a few seconds, for readers whom motion disturbs; a viewer that cannot play it
    shows the first figure.
    """
    from PIL import Image

    pictures = []
    for figure in figures:
        file = io.BytesIO()
        figure.savefig(file, dpi=75)  # near the width at which pages show it
        pictures.append(Image.open(file).convert("RGB"))

    first, *others = pictures
    animated = io.BytesIO()
    options = {"duration": 1000 * seconds, "loop": 1, "optimize": True}
    first.save(animated, "PNG", save_all=True, append_images=others, **options)
    return animated.getvalue()
