"""The site behind `make report`: the executed notebooks of a profile as pages, and an index of what
they found.

`.venv/bin/python notebooks/site/pages.py PROFILE` writes runs/PROFILE/report/. No page needs a
network or a script.
"""

from __future__ import annotations

import base64
import csv
import re
import sys
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
from bs4 import BeautifulSoup
from jinja2 import FileSystemLoader, pass_context
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from traitlets.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dejavu_utils import store
from dejavu_utils.audit import report
from dejavu_utils.plots import NAMES

if TYPE_CHECKING:
    from jinja2.runtime import Context

HERE = Path(__file__).resolve().parent
VERDICTS = {
    "supported": "✓",
    "contradicted": "✗",
    "undecided": "◆",
    "not tested": "–",
    "withdrawn": "–",
}


class Markdown(IPythonRenderer):
    """Markdown whose TeX becomes MathML, which a browser draws without a script."""

    def inline_math(self, body: str) -> str:
        return mathml(body)

    def block_math(self, body: str) -> str:
        return f"<div class=wide>{mathml(body, block=True)}</div>"


def mathml(tex: str, block: bool = False) -> str:
    """Return TeX as MathML; ValueError quotes the TeX that docutils does not know."""
    from docutils.utils.math import MathError
    from docutils.utils.math.latex2mathml import tex2mathml

    try:
        return tex2mathml(tex.strip(), as_block=block)
    except MathError as error:
        raise ValueError(
            f"TeX that cannot be drawn without a script: {tex.strip()!r}: {error} Write it with "
            "commands "
            r"that docutils knows, such as \left( for \big(."
        ) from None


class Exporter(HTMLExporter):
    """A notebook as HTML, with MathML."""

    @pass_context
    def markdown2html(self, context: Context, source: str) -> str:
        """Return Markdown as HTML with MathML."""
        return MarkdownWithMath(renderer=Markdown(escape=False)).render(source)


def exporter() -> Exporter:
    """Return the exporter: of a widget and the picture beside it, it shows the picture."""
    shown = ["text/html", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]
    return Exporter(
        extra_loaders=[FileSystemLoader(HERE)],
        template_file="cells.html.j2",
        exclude_output_prompt=True,
        config=Config({"NbConvertBase": {"display_data_priority": shown}}),
    )


def shell(title: str, body: str, links: dict[str, str], here: str) -> str:
    """Return a page: `body` below links to the other pages; `links` maps file names to texts."""
    from pygments.formatters import HtmlFormatter

    style = (
        report.css()
        + (HERE / "style.css").read_text()
        + HtmlFormatter(style="default").get_style_defs(".highlight")
    )
    current = {True: " aria-current=page", False: ""}
    nav = "".join(
        f'<a href="{name}"{current[name == here]}>{escape(text)}</a>'
        for name, text in links.items()
    )
    return f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel=icon href="data:,"><title>{escape(title)}</title>
<style>{style}</style>
<nav aria-label="all pages">{nav}</nav><main>{body}</main></html>
"""


def described(book: nbformat.NotebookNode) -> dict[str, str]:
    """Return {figure name: its description}, which is `alt` in the metadata of the cell that made
    it.
    """
    cells = [
        (cell.source, cell.metadata.get("alt", ""))
        for cell in book.cells
        if cell.cell_type == "code"
    ]
    return {
        name: alt
        for source, alt in cells
        for name in re.findall(r'run\.figure\(\s*"(\w+)"', source)
    }


def claim(book: nbformat.NotebookNode) -> tuple[str, str]:
    """Return the title of a notebook and its claim, both as HTML."""
    first = MarkdownWithMath(renderer=Markdown(escape=False)).render(book.cells[0].source)
    soup = BeautifulSoup(first, "html.parser")
    said = next((p for p in soup.find_all("p") if p.text.startswith("Claim.")), "")
    return soup.h1.text.removesuffix("¶"), "".join(map(str, said.contents[1:])) if said else ""


def results(folder: Path) -> str:
    """Return the déjà vu scores at the end of training as a table with drawn intervals."""
    path = folder / "tables" / "scores.csv"
    if not path.is_file():
        return "<p>02_attack has not run with this profile.</p>"
    table = store.read_table(path).query("layer == 'projector'")
    table = table[table["epoch"] == table["epoch"].max()]

    def name(row: dict) -> tuple[str, str]:
        rho = "" if row["rho"] != row["rho"] else f", ρ = {row['rho']:g}"
        which = "all" if row["p"] == 100 else f"{row['p']:g} % most confident"
        return f"{NAMES.get(row['criterion'], row['criterion'])}{rho}", which

    more = {
        "target %": lambda row: report.points(row["target"], False),
        "reference %": lambda row: report.points(row["reference"], False),
        "images": lambda row: str(row["n"]),
    }
    return report.parts().scored(report.scored(table, "criterion", name, more))


def verdicts() -> str:
    """Return the paper's claims and our verdicts, from results/study/claims.csv."""
    path = store.root() / "results" / "study" / "claims.csv"
    if not path.is_file():
        return f"<p>There is no {path.name}: results/claims.py makes it from a study.</p>"
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    head = ["", "claim", "what we found", "images", "verdict"]
    cells = []
    for row in rows:
        sign = VERDICTS.get(row["verdict"].split(" for ")[0], "")
        n = row["n"] if row["n"].strip("0") else ""
        verdict = f"{sign}\N{NO-BREAK SPACE}{row['verdict']}"
        cells.append([row["id"], row["claim"], row["value"], n, verdict])
    return f"<div class=claims>{report.parts().table(head, cells)}</div>"


def figures(folder: Path, texts: dict[str, tuple[str, str]]) -> str:
    """Return every figure of a profile with its description; `texts` maps its name to (page,
    description).
    """
    found = []
    for path in sorted((folder / "figures").glob("*.png")):
        store.verify(path)
        page, alt = texts.get(path.stem, ("", ""))
        alt, source = (
            alt or path.stem.replace("_", " "),
            base64.b64encode(path.read_bytes()).decode(),
        )
        link = (
            f' <a href="{page}">{Path(page).stem}</a>, <code>figures/{path.stem}.csv</code>'
            if page
            else ""
        )
        found.append(
            f'<figure><img src="data:image/png;base64,{source}" alt="{escape(alt)}">'
            f"<figcaption>{escape(alt)}{link}</figcaption></figure>"
        )
    return "".join(found) or "<p>There is none yet.</p>"


def index(folder: Path, books: dict[str, nbformat.NotebookNode], metas: list[dict]) -> str:
    """Return the body of the first page."""
    rows = [
        f'<li><a href="{stem}.html">{escape(title)}</a><br>{text}<br><small>seeds '
        f"{meta['parameters'].get('seeds', 'of the tables read')}; executed in "
        f"{meta['seconds']:.0f} s</small>"
        for (stem, book), meta in zip(books.items(), metas, strict=True)
        for title, text in [claim(book)]
    ]
    texts = {
        name: (f"{stem}.html", alt)
        for stem, book in books.items()
        for name, alt in described(book).items()
    }
    made = {
        "profile": folder.name,
        "device": metas[-1]["device"],
        "code": ", ".join(sorted({meta["code"] for meta in metas})),
        "versions": " · ".join(f"{name} {value}" for name, value in metas[-1]["versions"].items()),
        "made": metas[-1]["created"],
    }
    facts = "".join(
        f"<tr><th scope=row>{name}<td>{escape(str(value))}" for name, value in made.items()
    )
    return f"""<h1>Does a vision model remember its training images?</h1>
<p>What the notebooks found with the profile <b>{escape(folder.name)}</b>. Only the profile <b>study</b> has several
seeds; the others draw figures and judge nothing.</p>
<h2>The notebooks</h2><ul>{"".join(rows)}</ul>
<h2>Déjà vu scores at the end of training</h2>
<p>Target minus reference accuracy, in percentage points. A score whose interval holds 0 is undecided.</p>
{results(folder)}
<h2>Figures</h2>{figures(folder, texts)}
<h2>The paper's claims</h2>
<p>Judged on the study whose tables are in <code>results/</code>, not on this run.</p>{verdicts()}
<h2>Where this comes from</h2><div class=facts><table><tbody>{facts}</table></div>
<p><small>Audit your own models, before release; do not use this to learn about people who did not agree.</small></p>"""


def build(profile: str) -> Path:
    """Write the pages of a profile and return the first; FileNotFoundError if no notebook has been
    executed.
    """
    folder = store.runs(profile)
    paths = sorted((folder / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise FileNotFoundError(
            f"no executed notebook in {folder}/notebooks: run `make figures PROFILE={profile}`."
        )
    metas = [store.verify(path) for path in paths]
    books = {path.stem: nbformat.read(path, as_version=4) for path in paths}
    links = {"index.html": "Results"} | {f"{stem}.html": stem for stem in books}
    out, export = folder / "report", exporter()
    for audit in sorted((folder / "audit").glob("*.html")):
        name = f"audit-{audit.name}"
        links[name] = f"audit of {audit.stem}"
        report.write(out / name, audit.read_text(encoding="utf-8"), store.verify(audit))
    for stem, book in books.items():
        body, _ = export.from_notebook_node(book)
        report.write(
            out / f"{stem}.html",
            shell(claim(book)[0], body, links, f"{stem}.html"),
            {"profile": profile},
        )
    first = shell("Déjà vu: results", index(folder, books, metas), links, "index.html")
    report.write(out / "index.html", first, {"profile": profile})
    return out / "index.html"


def main(arguments: list[str]) -> int:
    """Return the exit status after printing where the first page is, or what is missing."""
    try:
        print(build(*arguments or ["laptop"]))
        return 0
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:2]))
