"""`make site`: everything that there is to read, as one folder of static pages.

`.venv/bin/python notebooks/site/publish.py PROFILE` writes runs/PROFILE/site/: README.md as its
home, the pages of `make report`, every document that links lead to, the API, and a search.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import api
import documents
import pages
from bs4 import BeautifulSoup

from dejavu_utils import store

HERE = Path(__file__).resolve().parent
FILM = (
    "An animated picture that plays once: what target and reference find nearest to a background "
    "crop, from the untrained encoder to the last epoch."
)
ORDER = ("Home", "Notebooks", "Results", "Audit", "Module", "More")


def sections(page: pages.Page) -> list[dict[str, str]]:
    """Return the sections of a page for the search: link, title and text of each."""
    soup = BeautifulSoup(page.body, "html.parser")
    found = [{"link": page.name, "title": page.title, "text": ""}]
    for part in soup.find_all(["h1", "h2", "h3", "p", "li", "td", "pre"]):
        if part.name in ("h2", "h3"):
            link = f"{page.name}#{part['id']}" if part.get("id") else page.name
            title = f"{page.title}: {part.text.removesuffix('¶')}"
            found.append({"link": link, "title": title, "text": ""})
        elif part.name != "h1" and not part.find_parent(["p", "li", "td"]):
            found[-1]["text"] += " ".join(part.text.split()) + " "
    return found


def search(found: Sequence[pages.Page]) -> tuple[pages.Page, str]:
    """Return the search page over all pages, and its script."""
    script = (HERE / "search.js").read_text(encoding="utf-8")
    index = [section for page in found for section in sections(page)]
    data = json.dumps(index, ensure_ascii=False).replace("<", "\\u003c")
    template = pages.templates().get_template("search.html.j2")
    body = template.render(sections=data, script=script)
    return pages.Page("search.html", "Search", "Search", "Déjà vu: search", body), script


def with_film(home: pages.Page, profile: str, out: Path) -> pages.Page:
    """Return the home, before its first section the film of the profile's tour, if there is one."""
    path = store.runs(profile) / "figures" / "tour_film.png"
    if not path.is_file():
        return home
    film = pages.figure(path, FILM, out)
    figure = pages.templates().get_template("film.html.j2").render(film=film)
    before, section, after = home.body.partition("<h2")
    return replace(home, body=before + figure + section + after)


def build(profile: str) -> Path:
    """Write the site of a profile and return its home; FileNotFoundError if no notebook has been
    executed, ValueError or FileNotFoundError for a link or a picture that cannot be shown.
    """
    out = store.runs(profile) / "site"
    shutil.rmtree(out, ignore_errors=True)  # pages of documents that are gone
    home, *others = documents.documents(out)
    found = [with_film(home, profile, out), *others]
    found += pages.of_run(profile, out, first="run.html")
    found += pages.audits(store.runs(profile))
    found += [api.page()]
    found.sort(key=lambda page: ORDER.index(page.group))  # stable: within a group as found

    last, script = search(found)
    for page in [*found, last]:
        text = pages.shell(page, [*found, last], script if page is last else "")
        with store.atomic(out / page.name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return out / "index.html"


if __name__ == "__main__":
    sys.exit(pages.main(sys.argv[1:2], build))
