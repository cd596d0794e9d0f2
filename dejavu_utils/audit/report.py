"""The audit's report: one HTML page that needs no network, for screen, phone and paper."""

import base64
from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dejavu_utils import plots, store
from dejavu_utils.attack import scoring
from dejavu_utils.audit.subject import Subject

SHOWN = 50  # classes in the table
SIGNS = {
    "memorizes": ("▲", "#B34700"),
    "no evidence": ("●", "#0072B2"),
    "undecided": ("◆", "#555555"),
}
READINGS = {
    "audited": "audited images",
    "unseen": "unseen images",
    "calibrated": "audited images, calibrated",
}
KINDS = {
    "memorized": "the encoder only",
    "correlated": "both",
    "misrepresented": "the reference only",
    "unassociated": "neither",
}
CSS = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:62rem;margin:auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.15rem;margin:2rem 0 .5rem;border-bottom:1px solid #ccc}
h1,.facts td{overflow-wrap:anywhere}p,li{max-width:44rem}small{color:#555}
.verdict{border:3px solid;border-radius:.5rem;padding:.5rem 1rem;margin:1rem 0}.verdict p{color:#1a1a1a;margin:.4rem 0}
.verdict strong{font-size:1.9rem;line-height:1.2}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.25rem .5rem;border-bottom:1px solid #ddd;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal}
thead th{vertical-align:bottom;white-space:normal}
.facts td,.facts th{text-align:left;vertical-align:top;font-size:.85rem;white-space:normal}
.facts th{width:9rem;font-weight:400}.track{position:relative;height:1rem;min-width:9rem}.track *{position:absolute}
.track u{top:0;bottom:0;border-left:1px dashed #777}.track i{top:.5rem;border-top:3px solid #0072B2}
.track b{top:.24rem;width:.6rem;height:.6rem;margin-left:-.3rem;border-radius:50%;background:#0072B2}
.bar{display:flex;height:2rem;border:1px solid #777;margin:.5rem 0}.bar i{border-right:1px solid #fff}
.key{display:inline-block;width:.9em;height:.9em;border:1px solid #777;vertical-align:-.1em;margin-right:.3em}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:0 2rem}
.one{display:flex;gap:.3rem;margin:.2rem 0 .8rem;break-inside:avoid}
figure{margin:0;flex:1 1 0;min-width:0;font-size:.7rem;line-height:1.2;overflow-wrap:anywhere}
figure img{width:100%;display:block;border:3px solid #fff;image-rendering:pixelated}.own img{border-color:#777}
.right img{border-color:#009E73}.right figcaption{font-weight:700}
@media(max-width:40rem){body{padding:.7rem}.pair{grid-template-columns:1fr}th,td{padding:.25rem .3rem;font-size:.8rem}
.facts th{width:6rem}.track{min-width:7.5rem}ul{padding-left:1.2rem}}
@media print{body{font-size:10pt;max-width:none}figure{font-size:6pt}h2{break-after:avoid}
tr,.verdict,.bar{break-inside:avoid}.wide{overflow:visible}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def points(value: float, sign: bool = True) -> str:
    """Return a share as percentage points, "+4.3" or "−0.7"; "–" where there is none."""
    return (
        "–"
        if not np.isfinite(value)
        else f"{100 * value:{'+' if sign else ''}.1f}".replace("-", "−")
    )


def gallery(
    case: Subject,
    inferred: dict,
    rows: pd.DataFrame,
    ids: list[str],
    count: int = 4,
    side: int = 64,
) -> list[list[tuple]]:
    """Return a list per id of (pixels, caption, alternative text, CSS class): crop, image, nearest
    public pictures.
    """
    images, names, found = case.audited, case.public.classes, []
    said = rows[rows["role"] == "reference"].set_index("id")["prediction"]
    at = np.array([int(np.flatnonzero(images.ids == name)[0]) for name in ids], np.int64)
    near, chosen = (
        inferred["audited", case.layers[0], "target"]["neighbours"][at, :count],
        images.subset(at),
    )
    sets = zip(
        case.squares(chosen, side), chosen.squares(side), chosen.labels, near, ids, strict=True
    )
    for crop, picture, label, columns, name in sets:
        line = [
            (crop, "crop", f"background crop of {name}", "own"),
            (
                picture,
                names[label],
                f"{name}: {names[label]}; the reference says {names[said[name]]}",
                "own",
            ),
        ]
        public = case.public.subset(columns)
        line += [
            (
                pixels,
                names[other],
                f"public picture: {names[other]}",
                "right" if other == label else "",
            )
            for pixels, other in zip(public.squares(side), public.labels, strict=True)
        ]
        found.append(line)
    return found


def _picture(pixels: torch.Tensor | np.ndarray, caption: str, text: str, style: str) -> str:
    source = "data:image/png;base64," + base64.b64encode(plots.png(pixels)).decode()
    return (
        f'<figure class="{style}"><img src="{source}" '
        f'alt="{escape(text)}"><figcaption>{escape(caption)}</figure>'
    )


def _gallery(title: str, lines: list[list[tuple]]) -> str:
    rows = "".join(
        f"<div class=one>{''.join(_picture(*cell) for cell in line)}</div>" for line in lines
    )
    return f"<section><h3>{title}</h3>{rows or '<p>There is none.</p>'}</section>"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table; its cells are HTML already."""
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    return (
        "<div "
        f"class=wide><table><thead><tr>{titles}</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def scored(
    frame: pd.DataFrame, first: str, name: Callable[[dict], str], level: int, more: dict
) -> str:
    """Return a table of scores: `name(row)`, points, interval, a drawing of both with a line at 0,
    and `more`.
    """
    left, rows = min(frame["low"].min(), 0) - 0.02, []
    scale = 100 / (max(frame["high"].max(), 0) + 0.02 - left)
    for row in frame.to_dict("records"):
        zero, low, dot, high = (
            scale * (value - left) for value in (0, row["low"], row["score"], row["high"])
        )
        drawn = (
            f'<div class=track aria-hidden=true><u style="left:{zero:.1f}%"></u><i '
            f'style="left:{low:.1f}%;width:'
            f'{high - low:.1f}%"></i><b style="left:{dot:.1f}%"></b></div>'
        )
        text = f"<b>{points(row['score'])}</b> ({points(row['low'])} to {points(row['high'])})"
        rows.append([name(row), text + drawn, *(cell(row) for cell in more.values())])
    return table([first, f"points ({level} % interval)", *more], rows)


def _split(shares: dict) -> str:
    """Return the four-way split as a bar and a table."""
    bars = "".join(
        f'<i style="flex:{shares[name]:.4f};background:{plots.SPLIT[name]}"></i>'
        for name in scoring.CELLS
    )
    rows = [
        [
            f'<span class=key style="background:{plots.SPLIT[name]}"></span>{name}',
            KINDS[name],
            *(points(shares[name + end], sign=False) for end in ("", "_low", "_high")),
        ]
        for name in scoring.CELLS
    ]
    return f"<div class=bar aria-hidden=true>{bars}</div>" + table(
        ["kind", "who is right", "%", "from", "to"], rows
    )


def page(case: Subject, found: dict) -> str:
    """Return the report as HTML: one file, no network, no script.

    `found`: title; verdict, scores, classes, controls (of audit), split (attack.four_way);
    memorized, random (gallery); made (provenance).
    """
    verdict, classes = found["verdict"], found["classes"]
    sign, colour = SIGNS[verdict["word"]]
    reference = (
        "a second model"
        if case.reference is not None
        else "a classifier on crops that never saw the image"
    )
    number = {
        name: lambda row, key=key: f"{row[key]:.0f}"
        for name, key in (("images", "n"), *zip(scoring.CELLS, scoring.CELLS, strict=True))
    }
    share = {
        name: lambda row, key=key: points(row[key], False)
        for name, key in (("encoder %", "target"), ("reference %", "reference"))
    }
    crop = {
        "periphery": "a background crop was cut, which shows none of the object",
        "corner": "a corner was cut, which may show a part of the object",
    }[case.crop["kind"]]
    assumed = ""
    if case.assumed:
        assumed = f"<p>Assumed of the encoder: {escape('; '.join(case.assumed))}.</p>"
    facts = "".join(
        f"<tr><th scope=row>{escape(name)}<td>{escape(str(value))}"
        for name, value in found["made"].items()
    )
    return f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Audit of {escape(found["title"])}: {verdict["word"]}</title><style>{CSS}</style>
<h1>Does {escape(found["title"])} remember its training images?</h1>
<div class=verdict style="border-color:{colour}"><strong style="color:{colour}">{sign} {
        verdict["word"]
    }</strong>
<p>{escape(verdict["sentence"])}</p>
<p>Déjà vu score ({READINGS[verdict["reading"]]}; layer {escape(case.layers[0])}; {
        verdict["n"]
    } images):
<b>{points(verdict["score"])} points</b>, 95 % interval {points(verdict["low"])} to {
        points(verdict["high"])
    }.</p>{assumed}</div>
<h2>What was done</h2><p>From each image {
        crop
    }. The encoder's nearest public pictures to that crop vote for what the
object is. The score is how much more often they are right than {
        reference
    }, whose guesses are correlation and no
memory. Images that nobody trained on, where there are any, are treated alike: their score is the offset of the
reference, which need not be 0. The calibrated score is free of it. It compares the encoder with how often it would be
right without memory, as the unseen images tell.</p>
{scored(found["scores"], "score", _reading, 95, share | {"images": number["images"]})}
<h2>Four kinds of images</h2><p>Without memory, “memorized” and “misrepresented” would be equally frequent, if the
reference were as strong as the encoder. Some “memorized” images are therefore luck.</p>{
        _split(found["split"])
    }
<h2>Look at them</h2><p>Crop, whole image, and the public pictures that the encoder finds nearest to the crop. First
the most confidently memorized images, chosen because they are; the others are drawn at random.</p>
<div class=pair>{_gallery("Most memorized", found["memorized"])}{
        _gallery("Drawn at random", found["random"])
    }</div>
<h2>Class by class</h2><p>Not calibrated, and not corrected for the number of classes: the first rows look large by
selection.</p>{scored(classes.head(SHOWN), "class", lambda row: escape(row["class"]), 95, number)}
<p><small>{min(SHOWN, len(classes))} of {len(classes)} classes.</small></p>
<h2>Negative controls</h2><p>The same audit where there is nothing to find, on the same images. If one fails, there is
no verdict. About three audits in a hundred lose theirs by chance.</p>
{
        scored(
            found["controls"],
            "control",
            lambda row: escape(row["control"]),
            99,
            {
                "images": number["images"],
                "": lambda row: "✓ holds 0" if row["passed"] else "✗ does not hold 0",
            },
        )
    }
<h2>What could not be checked</h2><ul>{"".join(f"<li>{escape(each)}" for each in case.limits)}</ul>
<h2>Where this comes from</h2><div class=facts><table><tbody>{facts}</table></div>
<p><small>Method: Meehan et al. 2023 (arXiv 2304.13850), Kokhlikyan et al. 2024 (arXiv 2504.05651). Audit your own
models, before release; do not use this to learn about people who did not agree.</small></p></html>
"""


def _reading(row: dict) -> str:
    which = "all" if row["p"] == 100 else f"{row['p']:g} % most confident"
    return f"{READINGS[row['reading']]}<br><small>{escape(row['layer'])}, {which}</small>"


def write(path: str | Path, text: str, meta: dict) -> None:
    """Write a page with its sidecar, whole or not at all."""
    with store.artifact(path, meta) as temporary:
        temporary.write_text(text, encoding="utf-8")


def provenance(case: Subject, files: dict, params: dict) -> dict[str, str]:
    """Return what the report says about its own making: files and their sha256, images, settings,
    versions.
    """
    encoders = {"encoder": case.encoder} | (
        {"second model": case.reference} if case.reference is not None else {}
    )
    found = {}
    for (name, one), which in zip(encoders.items(), ("target", "reference"), strict=False):
        found |= {name: f"{files[which]}, {one.name}", f"{name}, sha256": one.sha256}
    sets = case.attacked | {"public": case.public}
    found |= {
        f"{name} images": f"{len(each)}, digest {each.digest[:16]}" for name, each in sets.items()
    }
    found |= {
        "crop": case.crop,
        "input": f"{case.size} px",
        "k": params["k"],
        "seed": params["seeds"][0],
    }
    versions = " · ".join(f"{name} {version}" for name, version in store.versions().items())
    return found | {"audit": params["audit"], "versions": versions, "code": store.code_version()}
