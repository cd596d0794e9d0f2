"""The Markdown documents of the repository as pages of `make site`: README.md and all that it leads
to by links.
"""

from __future__ import annotations

import base64
import posixpath
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pages
from bs4 import BeautifulSoup, Tag
from nbconvert.filters.markdown_mistune import MarkdownWithMath

from dejavu_utils import store

FIRST = (
    "README.md",
    "results/README.md",
    "dejavu_utils/README.md",
    "notebooks/TEACHING.md",
    "CHANGELOG.md",
)
GROUPS = {"results": "Results", "dejavu_utils": "Module", "": "Home"}  # by folder; else "More"


def name_of(path: str) -> str:
    """Return the file of a document's or a notebook's page: results/study/README.md is on
    results-study.html.
    """
    if path == "README.md":
        return "index.html"
    if path.endswith(".ipynb"):
        return f"{Path(path).stem}.html"
    whole = path.removesuffix("/README.md").removesuffix(".md")
    return whole.replace("/", "-").lower() + ".html"


def slug(heading: str) -> str:
    """Return the anchor that code hosts give to a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def rendered(text: str) -> BeautifulSoup:
    """Return Markdown as HTML: headings have anchors, tables scroll where they are too wide,
    their numbers stay on one line, and so do a number and its %.
    """
    renderer = pages.Markdown(escape=False, exclude_anchor_links=True)
    soup = BeautifulSoup(MarkdownWithMath(renderer=renderer).render(text), "html.parser")
    for heading in soup.find_all(["h1", "h2", "h3", "h4"]):
        heading["id"] = slug(heading.text)
    for table in soup.find_all("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "wide words"}))
    for cell in soup.find_all("td"):
        if not re.search(r"[^\W\d_]{2}", cell.text):  # no word, so a number with its interval
            cell["class"] = "number"
    for text in soup.find_all(string=re.compile(r"\d %")):
        if not text.find_parent(["pre", "code"]):
            text.replace_with(re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text))
    return soup


def embed(image: Tag, folder: str, where: str) -> None:
    """Put a picture into the page; one from another host, such as a badge, becomes its text."""
    source = image["src"]
    if "://" in source:
        image.replace_with(image.get("alt", ""))
        return

    path = store.root() / folder / unquote(source)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: the picture {source} is not there.")
    if not image.get("alt"):
        raise ValueError(f"{where}: the picture {source} has no description: ![description](…).")
    image["src"] = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def follow(link: Tag, folder: str, where: str, out: Path) -> str | None:
    """Make a link of a document one of the site, and return the document that it leads to, or
    None. A file that is no document is copied into `out`/files.
    """
    target, mark, anchor = link["href"].partition("#")
    if "://" in target or not target:
        return None

    path = posixpath.normpath(posixpath.join(folder, unquote(target)))
    if (store.root() / path).is_dir():
        path = posixpath.normpath(f"{path}/README.md")
    if not (store.root() / path).is_file():
        raise FileNotFoundError(f"{where}: the link {link['href']} leads nowhere.")

    if path.endswith((".md", ".ipynb")):
        link["href"] = name_of(path) + mark + anchor
        return path if path.endswith(".md") else None
    link["href"] = f"files/{path}"
    copy = out / "files" / path
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(store.root() / path, copy)
    return None


def document(path: str, out: Path) -> tuple[pages.Page, list[str]]:
    """Return a document as a page, and the documents that it leads to."""
    folder = posixpath.dirname(path)
    soup = rendered((store.root() / path).read_text(encoding="utf-8"))
    for image in soup.find_all("img", src=True):
        embed(image, folder, path)
    found = [follow(link, folder, path, out) for link in soup.find_all("a", href=True)]

    stem = Path(path).stem
    short = posixpath.basename(folder) if stem == "README" else stem.lower()
    top = path.partition("/")[0] if folder else ""
    group = "More" if not folder and stem != "README" else GROUPS.get(top, "More")
    text = short.replace("_", " ") or "home"
    page = pages.Page(name_of(path), text, group, soup.h1.text, str(soup))
    return page, [other for other in found if other]


def documents(out: Path) -> list[pages.Page]:
    """Return every document that links lead to from FIRST, as pages; files that they link are
    copied into `out`. An error names the document and the link that leads nowhere.
    """
    left = list(FIRST)
    found: dict[str, pages.Page] = {}
    while left:
        path = left.pop(0)
        if path not in found:
            found[path], more = document(path, out)
            left += more
    return list(found.values())
