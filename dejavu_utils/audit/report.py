"""The audit's report: one HTML page that needs no network, for screen, phone and paper.

The page is report.html.j2, its tables and galleries are parts.html.j2; here is what they show.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from dejavu_utils import plots, store
from dejavu_utils.attack import references, scoring
from dejavu_utils.audit import estimate, evidence, membership
from dejavu_utils.audit.findings import Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SHOWN = 50  # classes, and owners, in a table
NARROW = 4.0  # inches: a figure that a phone shows with letters of 8 pt
SIDE = 64  # px of a picture in a gallery
SIGNS = {
    "memorizes": ("▲", "#B34700"),
    "no evidence": ("●", "#0072B2"),
    "undecided": ("◆", "#757575"),
}
KINDS = {
    "memorized": "the encoder only",
    "correlated": "both",
    "misrepresented": "the reference only",
    "unassociated": "neither",
}
STATISTICS = {
    "deja_vu": "déjà vu",
    "alignment_gap": "alignment gap",
    "similarity": "similarity",
    "norm": "embedding norm",
}
# a row of a table -> (what it is called, a smaller note)
Namer = Callable[[dict], tuple[str, str]]


# -- numbers ----------------------------------------------------------------------------------


def points(value: float, sign: bool = True) -> str:
    """Return a share as percentage points, "+4.3" or "−0.7"; "–" where there is none."""
    if not np.isfinite(value):
        return "–"
    text = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return text.replace("-", "−")


def interval(low: float, high: float, n: int, sign: bool = True) -> str:
    """Return "(−0.7 to +4.3)", or "too few (n = 33)" where there is no interval."""
    if np.isfinite(low) and np.isfinite(high):
        return f"({points(low, sign)} to {points(high, sign)})"
    return f"too few (n = {n})" if n < scoring.FEWEST else "no interval"


def scored_images(row: dict) -> int:
    """Return how many images a row of scores is of: the top p % of the smaller set."""
    return int(scoring.top_count(estimate.fewest(row), row.get("p", 100)))


def numbers(found: Findings) -> str:
    """Return the score of the verdict with its interval and its number of images, as a line."""
    row = found.verdict
    n = min(len(images) for images in found.case.attacked.values())
    ends = interval(row.low, row.high, n)
    of = f"{row.n} members, layer {found.case.layers[0]}"
    about = "no interval: too few owners"
    if np.isfinite(row.low):
        about = f"95 % interval {ends[1:-1]}"
    elif n < scoring.FEWEST:
        about = f"no interval: {ends}"
    return f"{row.reading.capitalize()}: {points(row.score)} points, {about} ({of})."


# -- what the templates show ------------------------------------------------------------------


def scored(
    frame: pd.DataFrame, first: str, name: Namer, more: dict[str, Callable], level: int = 95
) -> dict[str, Any]:
    """Return what the macro `scored` draws of a table with score, low, high and n: names, points
    with interval, a line at 0, and `more`, {head: row -> text}.
    """
    values = frame[["low", "score", "high"]].to_numpy(float)  # (rows, 3)
    left = min(np.nanmin(values), 0) - 0.02
    right = max(np.nanmax(values), 0) + 0.02

    def place(value: float) -> float:
        return 100 * (value - left) / (right - left)

    rows = []
    for row in frame.to_dict("records"):
        title, note = name(row)
        has_interval = np.isfinite(row["low"]) and np.isfinite(row["high"])
        shown = {
            "name": title,
            "note": note,
            "points": points(row["score"]),
            "interval": interval(row["low"], row["high"], scored_images(row)),
            "zero": place(0),
            "dot": place(row["score"]),
            "low": place(row["low"]) if has_interval else None,
            "width": place(row["high"]) - place(row["low"]),
            "cells": [text(row) for text in more.values()],
        }
        rows.append(shown)
    return {"head": [first, f"points ({level} % interval)", *more], "rows": rows}


def gallery(found: Findings, ids: list[str], count: int = 4) -> list[list[dict[str, str]]]:
    """Return a list per member of pictures: its background crop, itself, and the public pictures
    nearest to the crop.
    """
    case = found.case
    names = case.public.classes
    own = evidence.part(found.guesses, case.layers[0])
    reference = own[own["role"] == "reference"].set_index("id")["prediction"]
    row_of = {name: i for i, name in enumerate(case.members.ids)}
    rows = np.array([row_of[name] for name in ids], np.int64)
    neighbours = found.inferred["members", case.layers[0], "target"]["neighbours"]

    lines = []
    for row, name in zip(rows, ids, strict=True):
        one = case.members.subset([row])
        label = one.labels[0]
        crop = case.squares(one, SIDE)[0]
        guess = names[reference[name]]
        whole = f"{name}: {names[label]}; the reference says {guess}"
        line = [
            _picture(crop, "crop", f"background crop of {name}", "own"),
            _picture(one.squares(SIDE)[0], names[label], whole, "own"),
        ]
        public = case.public.subset(neighbours[row, :count])
        for pixels, other in zip(public.squares(SIDE), public.labels, strict=True):
            style = "right" if other == label else ""
            line.append(_picture(pixels, names[other], f"public picture: {names[other]}", style))
        lines.append(line)
    return lines


def _picture(pixels: Any, caption: str, text: str, style: str) -> dict[str, str]:
    return {"source": _source(plots.png(pixels)), "caption": caption, "text": text, "style": style}


def _source(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def split(shares: dict[str, float]) -> list[dict[str, Any]]:
    """Return the four kinds of images: name, who is right, share, its text, interval, colour."""
    found = []
    for name in scoring.CELLS:
        ends = shares[f"{name}_low"], shares[f"{name}_high"]
        row = {
            "name": name,
            "who": KINDS[name],
            "share": shares[name],
            "text": points(shares[name], sign=False),
            "interval": interval(*ends, shares["n"], sign=False),
            "colour": plots.SPLIT[name],
        }
        found.append(row)
    return found


def membership_rows(summary: pd.DataFrame) -> list[list[str]]:
    """Return the rows of the membership table: statistic, AUC, then TPR at each rate."""
    rows = []
    for name, part in summary.groupby("statistic", sort=False):
        at = part.iloc[0]
        area = f"{at['auc']:.3f} ({at['auc_low']:.3f} to {at['auc_high']:.3f})"
        cells = [STATISTICS[name], area]
        for row in part.to_dict("records"):
            ends = interval(row["tpr_low"], row["tpr_high"], row["n"], sign=False)
            beyond = "*" if row["fpr"] < 1 / row["held_out"] else ""
            cells.append(f"{points(row['tpr'], sign=False)}{beyond} {ends}")
        rows.append(cells)
    return rows


def cut(crop: dict) -> str:
    """Return in words what crop is cut of each image."""
    if crop["kind"] == "periphery":
        return f"the largest rectangle outside every box, its sides over {crop['min_side']} px"
    return f"the {crop['corner']} corner, {crop['fraction']:g} of each side"


def provenance(found: Findings) -> dict[str, str]:
    """Return where a report comes from: encoders and their sha256, images, settings, versions."""
    case, settings = found.case, found.settings
    facts = {}
    for role, model in (("encoder", case.encoder), ("reference", case.reference)):
        if model is not None:
            facts[role] = f"{found.asked.get(role, '')}, {getattr(model, 'name', '')}".strip(", ")
            facts[f"{role}, sha256"] = getattr(model, "sha256", "")
    sets = case.attacked | ({"public": case.public} if case.labelled else {})
    for name, images in sets.items():
        facts[f"{name} images"] = f"{len(images)}, digest {images.digest[:16]}"
    facts["crop"] = cut(case.crop)
    facts["input"] = f"{case.size} px"
    facts["settings"] = (
        f"k {settings.k}, margin {settings.margin}, limit {settings.limit}, classifier "
        f"{settings.classifier}, seed {settings.seed}"
    )
    versions = store.versions().items()
    facts["versions"] = " · ".join(f"{name} {version}" for name, version in versions)
    facts["code"] = store.code_version()
    return facts


# -- figures ----------------------------------------------------------------------------------


def forest(found: Findings) -> tuple[Figure, str]:
    """Return the figure of the verdict, and its description: the score that decides, its two
    parts, and the controls, each with its interval.
    """
    scores = found.scores
    own = scores[(scores["layer"] == found.case.layers[0]) & (scores["p"] == 100)]
    deciding = own["reading"] == found.verdict.reading
    rows = pd.concat([own[deciding], own[~deciding]]).rename(columns={"reading": "name"})
    controls = found.controls.rename(columns={"control": "name"}).assign(p=100)
    controls["name"] = "control:\n" + controls["name"]
    table = pd.concat([rows, controls], ignore_index=True)
    colours = [SIGNS[found.verdict.word][1]] + ["#1a1a1a"] * (len(rows) - 1)
    colours += ["#777777"] * len(controls)

    deep = len(table) + table["name"].str.count("\n").sum()  # lines of text
    figure, axes = plots.subplots(1, 1, NARROW, 0.8 + 0.23 * deep)
    axis = axes[0, 0]
    axis.axvspan(0, 100 * found.verdict.margin, color="#eeeeee")
    axis.axvline(0, color="#777777", lw=1, ls="--")
    for y, (row, colour) in enumerate(zip(table.to_dict("records"), colours, strict=True)):
        axis.plot(100 * row["score"], y, "o", color=colour)
        axis.plot([100 * row["low"], 100 * row["high"]], [y, y], color=colour, lw=2)
    axis.set_yticks(range(len(table)), table["name"])
    axis.get_yticklabels()[0].set_fontweight("bold")
    axis.invert_yaxis()
    axis.set_xlabel(f"percentage points\n(grey band: up to {points(found.verdict.margin)})")

    lines = [
        f"{' '.join(row['name'].split())} {points(row['score'])} "
        f"{interval(row['low'], row['high'], scored_images(row))}"
        for row in table.to_dict("records")
    ]
    return figure, f"Scores with their intervals in percentage points: {'; '.join(lines)}."


def roc(statistics: pd.DataFrame) -> Figure:
    """Return the ROC of every membership statistic, on logarithmic axes."""
    from matplotlib.ticker import FuncFormatter, NullFormatter
    from sklearn.metrics import roc_curve

    figure, axes = plots.subplots(1, 1, NARROW, 4.2)
    axis = axes[0, 0]
    least = 1 / (~statistics["member"]).sum()
    drawn = {name: label for name, label in STATISTICS.items() if name in statistics}
    for name, label in drawn.items():
        false, true, _ = roc_curve(statistics["member"], statistics[name])
        axis.plot(false.clip(least), true.clip(least), drawstyle="steps-post", label=label)
    axis.plot([least, 1], [least, 1], color="#777777", lw=1, ls="--", label="chance")
    axis.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1))
    percent = FuncFormatter(lambda value, _: f"{100 * value:g} %")
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(percent)
        each.set_minor_formatter(NullFormatter())
    axis.set_xlabel("false-positive rate (held-out)")
    axis.set_ylabel("true-positive rate (members)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)  # a curve may be anywhere
    return figure


def _drawn(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return _source(file.getvalue())


# -- the page ---------------------------------------------------------------------------------


def templates() -> Environment:
    """Return the templates of this folder; whatever they show is escaped."""
    return Environment(
        loader=PackageLoader("dejavu_utils", "audit"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def css() -> str:
    """Return the style of all pages."""
    return (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def page(found: Findings) -> str:
    """Return the report as HTML: one file, no network, no script."""
    case = found.case
    figure, description = forest(found)
    statistics, summary = found.statistics, found.membership
    sign, colour = SIGNS[found.verdict.word]
    said = {True: "✓ finds nothing", False: "✗ finds something"}
    outcome = {"images": _count("n"), "": lambda row: said[bool(row["passed"])]}
    shown = {
        "css": css(),
        "case": case,
        "verdict": found.verdict,
        "sign": sign,
        "colour": colour,
        "numbers": numbers(found),
        "warning": found.warning,
        "forest": _drawn(figure),
        "description": description,
        "controls": scored(found.controls, "control", _control, outcome, 99),
        "summary": summary,
        "owned": statistics is not None and "owner" in statistics,
        "roc": "" if statistics is None else _drawn(roc(statistics)),
        "rates": [f"TPR at {100 * rate:g} % FPR" for rate in membership.RATES],
        "membership": [] if summary is None else membership_rows(summary),
        "meanings": {STATISTICS[name]: text for name, text in membership.STATISTICS.items()},
        "epsilon": 0.0 if summary is None else summary["epsilon"].max(),
        "facts": provenance(found),
    }
    if case.labelled:
        shown |= _of_guesses(found)
    return templates().get_template("report.html.j2").render(shown)


def _of_guesses(found: Findings) -> dict[str, Any]:
    """Return what the page shows of an audit with labels alone: scores, kinds, galleries, classes,
    owners.
    """
    own = evidence.part(found.guesses, found.case.layers[0]).assign(layer="projector")
    accuracy = (("encoder %", "target"), ("reference %", "reference"))
    shares = {name: _percent(key) for name, key in accuracy}
    images = {"images": _count("n")}
    scored_of = {"images": lambda row: str(scored_images(row))}
    cells = {name: _count(name) for name in scoring.CELLS}
    return {
        "scores": scored(found.scores, "score", _reading, shares | scored_of),
        "split": split(found.split),
        "memorized": gallery(found, references.choose(own, 6, "memorized")),
        "random": gallery(found, references.choose(own, 6, "random")),
        "classes": scored(found.classes.head(SHOWN), "class", _class, images | cells),
        "owners": _of_owners(found.owners, shares | images),
        "shown": min(SHOWN, len(found.classes)),
        "of_classes": len(found.classes),
    }


def _percent(key: str) -> Callable[[dict], str]:
    return lambda row: points(row[key], sign=False)


def _count(key: str) -> Callable[[dict], str]:
    return lambda row: f"{row[key]:.0f}"


def _reading(row: dict) -> tuple[str, str]:
    which = "all" if row["p"] == 100 else f"{row['p']:g} % most confident"
    return row["reading"], f"{row['layer']}, {which}"


def _class(row: dict) -> tuple[str, str]:
    return row["class"], ""


def _of_owners(owners: pd.DataFrame | None, more: dict[str, Callable]) -> dict[str, Any] | None:
    """Return what the macro `scored` draws of the owners with most pictures; None without any."""
    if owners is None or owners.empty:
        return None
    drawn = scored(owners.head(SHOWN), "owner", lambda row: (row["owner"], ""), more)
    return drawn | {"shown": min(SHOWN, len(owners)), "of": len(owners)}


def _control(row: dict) -> tuple[str, str]:
    return row["control"], ""


def write(path: str | Path, text: str, meta: dict) -> None:
    """Write a page with its sidecar, whole or not at all."""
    with store.artifact(path, meta) as temporary:
        temporary.write_text(text, encoding="utf-8")
