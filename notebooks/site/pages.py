"""The pages of `make report`: the executed notebooks of a profile, its audits, and an index of what
they found.

`.venv/bin/python notebooks/site/pages.py PROFILE` writes runs/PROFILE/report/. No page needs a
network or a script. `make site` (publish.py) puts documents, an API page and a search beside them.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import math
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pandas as pd
from bs4 import BeautifulSoup
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined, pass_context
from markupsafe import Markup
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
MAIN = ("tour_epochs", "fig1_accuracy_over_p")  # the first figure of the first page
VERDICTS = {
    "supported": "✓",
    "contradicted": "✗",
    "undecided": "◆",
    "not tested": "–",
    "withdrawn": "–",
}


@dataclass(frozen=True)
class Page:
    """A page: its file, what links to it say, the group of links where it stands, title, body."""

    name: str
    text: str
    group: str
    title: str
    body: str  # HTML


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
        """Return Markdown as HTML with MathML; links to notebooks lead to pages, tables scroll."""
        html = MarkdownWithMath(renderer=Markdown(escape=False)).render(source)
        html = re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="\1.html"', html)
        wide = r'<div class="wide words">\1</div>'
        return re.sub(r"(<table>.*?</table>)", wide, html, flags=re.DOTALL)


def shown_outputs() -> Config:
    """Return which form of an output is shown: of a widget and the picture beside it, the
    picture.
    """
    shown = ["text/html", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]
    return Config({"NbConvertBase": {"display_data_priority": shown}})


def exporter() -> Exporter:
    """Return the exporter of a notebook's page."""
    return Exporter(
        extra_loaders=[FileSystemLoader(HERE)],
        template_file="cells.html.j2",
        exclude_output_prompt=True,
        config=shown_outputs(),
    )


def templates() -> Environment:
    """Return the templates beside this file, and those of the audit's report."""
    loader = ChoiceLoader([FileSystemLoader(HERE), report.templates().loader])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined)


def accessible(body: str) -> str:
    """Return HTML whose parts that scroll sideways can be reached with a keyboard, and in which a
    cell without a word is no head of a column. An interval in a table stays on one line.
    """
    parts = [
        "pre\\b",
        'div(?= class="?(?:wide|output_html|output_png)\\b)',
        "figure(?= class=drawn)",
    ]
    marked = re.sub(f"<({'|'.join(parts)}|p(?=><img))", r"<\1 tabindex=0", body)
    interval = r"(?<=\d), (?=[+\-−]?[\d.]+\][^<]*(?:</strong>)?</td>)"
    marked = re.sub(interval, ",\N{NO-BREAK SPACE}", marked)
    return re.sub(r"<th[^>]*></th>", "<td></td>", marked)


def without_folders(body: str) -> str:
    """Return HTML without the folders of this machine before runs/ and the clone's files: a page is
    published, and a home folder names its owner.
    """
    body = body.replace(f"{store.runs('any').parent}/", "runs/")
    for folder in (store.home(), store.root()):
        body = body.replace(f"{folder}/", "")
    return body


def shell(page: Page, pages: Sequence[Page], script: str = "") -> str:
    """Return the HTML of a page: links to each group's first page and to those of its own group,
    then its body. `script`, the only one that may run, is a part of the body.
    """
    from pygments.formatters import HtmlFormatter

    groups: dict[str, list[Page]] = {}
    for one in pages:
        groups.setdefault(one.group, []).append(one)

    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    code = f"{light} @media screen and (prefers-color-scheme:dark){{{dark}}}"
    allowed = ""
    if script:
        digest = hashlib.sha256(script.encode()).digest()
        allowed = f"; script-src 'sha256-{base64.b64encode(digest).decode()}'"
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            page=page,
            body=Markup(without_folders(accessible(page.body))),
            groups=groups,
            allowed=allowed,
            style=report.css() + (HERE / "style.css").read_text() + code,
        )
    )


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
        for name in re.findall(r'run\.(?:figure|film)\(\s*"(\w+)"', source)
    }


def claim(book: nbformat.NotebookNode) -> tuple[str, str]:
    """Return the title of a notebook and its claim, both as HTML."""
    first = MarkdownWithMath(renderer=Markdown(escape=False)).render(book.cells[0].source)
    soup = BeautifulSoup(first, "html.parser")
    said = next((p for p in soup.find_all("p") if p.text.startswith("Claim.")), "")
    return soup.h1.text.removesuffix("¶"), "".join(map(str, said.contents[1:])) if said else ""


def at_the_end(folder: Path, books: Collection[str]) -> pd.DataFrame | None:
    """Return the déjà vu scores at the projector at the end of training; None if there are none,
    or the notebook that makes them is not among `books`.
    """
    path = folder / "tables" / "scores.csv"
    if not path.is_file() or "02_attack" not in books:
        return None
    table = store.read_table(path).query("layer == 'projector'")
    return table[table["epoch"] == table["epoch"].max()]


def answer(scores: pd.DataFrame | None) -> str:
    """Return what was found of the first criterion, in a sentence or two."""
    if scores is None:
        return "Nothing has been attacked yet."
    row = scores[scores["p"] == 100].iloc[0].to_dict()
    name = NAMES.get(row["criterion"], row["criterion"])
    seen, unseen = (report.points(row[role], sign=False) for role in ("target", "reference"))
    interval = report.interval(row["low"], row["high"], row["n"])
    found = "so it is undecided whether it remembers them"
    if row["low"] > 0:
        found = "so it remembers some of them"
    return (
        f"Shown nothing but background, {name} names the objects of images that it was trained on "
        f"in {seen} % of cases, and an encoder that was not in {unseen} %. The difference is the "
        f"déjà vu score: {report.points(row['score'])} points {interval}, {found}. The 95 % "
        f"interval is over {row['n']} images of these encoders, which trained for {row['epoch']} "
        "epochs."
    )


def results(scores: pd.DataFrame) -> dict:
    """Return what the macro `scored` draws of the scores."""

    def name(row: dict) -> tuple[str, str]:
        rho = "" if math.isnan(row["rho"]) else f", ρ = {row['rho']:g}"
        which = "all" if row["p"] == 100 else f"{row['p']:g} % most confident"
        return f"{NAMES.get(row['criterion'], row['criterion'])}{rho}", which

    more = {
        "target %": lambda row: report.points(row["target"], False),
        "reference %": lambda row: report.points(row["reference"], False),
        "images": lambda row: str(report.scored_images(row)),
    }
    return report.scored(scores, "criterion", name, more)


def verdicts() -> list[list[str]]:
    """Return the paper's claims and our verdicts, a list a row, from results/study/claims.csv."""
    path = store.root() / "results" / "study" / "claims.csv"
    if not path.is_file():
        return []
    cells = []
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        sign = VERDICTS.get(row["verdict"].split(" for ")[0], "")
        n = row["n"] if row["n"].strip("0") else ""
        verdict = f"{sign}\N{NO-BREAK SPACE}{row['verdict']}"
        cells.append([row["id"], row["claim"], row["value"], n, verdict])
    return cells


def figure(path: Path, text: str, out: Path) -> dict[str, str]:
    """Return what the first page shows of a figure; the table behind it is copied to the pages."""
    store.verify(path)
    table = path.with_suffix(".csv")
    copy = ""
    if table.is_file():
        store.verify(table)
        copy = f"tables/{table.name}"
        with store.atomic(out / copy) as temporary:
            temporary.write_bytes(table.read_bytes())
    source = base64.b64encode(path.read_bytes()).decode()
    return {"source": source, "text": text or path.stem.replace("_", " "), "table": copy}


def index(
    folder: Path,
    books: dict[str, nbformat.NotebookNode],
    metas: list[dict],
    out: Path,
    whole: bool = True,
) -> str:
    """Return the body of the first page, with figures of other notebooks if `whole`."""
    left = {path.stem: path for path in sorted((folder / "figures").glob("*.png"))}
    main, chapters = None, []
    for (stem, book), meta in zip(books.items(), metas, strict=True):
        title, text = claim(book)
        page = f"{stem}.html"
        drawn = []
        for name, alt in described(book).items():
            if name not in left:
                continue
            one = figure(left.pop(name), alt, out)
            if main is None and name in MAIN:
                main = one | {"page": page}
            else:
                drawn.append(one)
        chapter = {"page": page, "title": title, "claim": Markup(text), "figures": drawn}
        chapter["seeds"] = meta["parameters"].get("seeds", "of the tables read")
        chapters.append(chapter | {"seconds": meta["seconds"]})

    scores = at_the_end(folder, books)
    last = metas[-1]
    versions = " · ".join(f"{name} {value}" for name, value in last["versions"].items())
    code = ", ".join(sorted({meta["code"] for meta in metas}))
    made = {"profile": folder.name, "device": last["device"], "code": code}
    made |= {"versions": versions, "made": last["created"]}
    page = templates().get_template("index.html.j2")
    return page.render(
        answer=answer(scores),
        main=main,
        scores=None if scores is None else results(scores),
        profile=folder.name,
        books=chapters,
        others=[figure(path, "", out) for path in left.values() if whole],
        claims=verdicts(),
        made=made,
    )


def audits(folder: Path) -> list[Page]:
    """Return the reports of the audits of a profile as pages."""
    found = []
    for path in sorted((folder / "audit").glob("*.html")):
        store.verify(path)
        text = path.read_text(encoding="utf-8")
        title = BeautifulSoup(text, "html.parser").title.text
        body = text.partition("</style>")[2].removesuffix("</html>")
        body = body.replace("<main>", "").replace("</main>", "")  # a page has one of its own
        found.append(Page(f"audit-{path.name}", f"audit of {path.stem}", "Audit", title, body))
    return found


def of_run(
    profile: str, out: Path, first: str = "index.html", only: Collection[str] = ()
) -> list[Page]:
    """Return the pages of a profile, `first` being the index; the tables behind its figures are
    written into `out`. FileNotFoundError if no notebook has been executed.

    `only`: the notebooks that are looked at, where not all are.
    """
    folder = store.runs(profile)
    paths = sorted((folder / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    paths = [path for path in paths if not only or path.stem in only]
    if not paths:
        raise FileNotFoundError(
            f"no executed notebook in {folder}/notebooks: run `make figures PROFILE={profile}`."
        )
    metas = [store.verify(path) for path in paths]
    books = {path.stem: nbformat.read(path, as_version=4) for path in paths}

    group = "Notebooks"
    found = index(folder, books, metas, out, whole=not only)
    pages = [Page(first, f"results of {profile}", group, f"Déjà vu: results of {profile}", found)]
    export = exporter()
    for stem, book in books.items():
        print(f"{stem} …", file=sys.stderr, flush=True)
        body, _ = export.from_notebook_node(book)
        pages.append(Page(f"{stem}.html", stem, group, claim(book)[0], body))
    return pages


def build(profile: str, *only: str) -> Path:
    """Write the pages of a profile, or of some of its notebooks `only`, and return the first;
    FileNotFoundError if no notebook has been executed.
    """
    folder = store.runs(profile)
    out = folder / "report"
    pages = of_run(profile, out, only=only)
    if not only or "05_audit" in only:
        pages += audits(folder)
    for page in pages:
        report.write(out / page.name, shell(page, pages), {"profile": profile})
    return out / "index.html"


def main(arguments: list[str], build: Callable[..., Path] = build) -> int:
    """Return the exit status after printing where the first page is, or what is missing."""
    try:
        print(f"open {build(*arguments or ['laptop'])} in a browser")
        return 0
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
