"""`make slides`: the executed tour as slides for a browser.

`.venv/bin/python notebooks/site/slides.py PROFILE` writes runs/PROFILE/slides/index.html. The
browser fetches reveal.js when it shows them; with REVEAL=folder in the environment, an unpacked
release of it, they need no network.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nbformat
import pages
from jinja2 import FileSystemLoader
from nbconvert import SlidesExporter

from dejavu_utils import store

TOUR = "00_tour"


def build(profile: str) -> Path:
    """Write the slides of a profile's tour and return their page; FileNotFoundError if it has not
    been executed, or REVEAL is no copy of reveal.js.
    """
    path = store.runs(profile) / "notebooks" / f"{TOUR}.ipynb"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run `make figures PROFILE={profile}`.")
    store.verify(path)
    out = store.runs(profile) / "slides"

    exporter = SlidesExporter(
        extra_loaders=[FileSystemLoader(pages.HERE)],
        template_file="slides.html.j2",
        exclude_input=True,
        reveal_theme="white",  # its letters are in the release: no font from elsewhere
        exclude_output_prompt=True,
        config=pages.shown_outputs(),
    )
    copy = os.environ.get("REVEAL")
    if copy:
        if not (Path(copy) / "dist" / "reveal.js").is_file():
            raise FileNotFoundError(f"REVEAL={copy} has no dist/reveal.js: unpack a release there.")
        shutil.copytree(Path(copy) / "dist", out / "reveal.js" / "dist", dirs_exist_ok=True)
        exporter.reveal_url_prefix = "reveal.js"

    body, _ = exporter.from_notebook_node(nbformat.read(path, as_version=4))
    with store.atomic(out / "index.html") as temporary:
        temporary.write_text(body, encoding="utf-8")
    return out / "index.html"


if __name__ == "__main__":
    sys.exit(pages.main(sys.argv[1:2], build))
