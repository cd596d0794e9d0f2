"""Write the public address, the one field of [project.urls] in pyproject.toml, to where it is
shown: the badge in README.md, CITATION.cff, and the first cell of the tour. `make address`.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
HOSTED = "https://colab.research.google.com"
TOUR = "notebooks/00_tour.ipynb"


def address(root: Path) -> str:
    """Return the public address of the repository, "" if there is none yet."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "").rstrip("/")


def badge(url: str) -> str:
    """Return the badge that opens the tour on a hosted notebook, as Markdown; "" without one."""
    place = urlsplit(url)
    if place.netloc != "github.com":  # the only host that such links know
        return ""
    link = f"{HOSTED}/github{place.path}/blob/main/{TOUR}"
    return f"[![Open the tour in Colab]({HOSTED}/assets/colab-badge.svg)]({link})"


def texts(root: Path) -> dict[str, str]:
    """Return {file: what it should be} of all files that show the address."""
    url = address(root)
    readme = (root / "README.md").read_text(encoding="utf-8")
    block = "<!-- address -->\n" + f"{badge(url)}\n".lstrip("\n") + "<!-- end -->"
    readme = re.sub(r"<!-- address -->\n.*?<!-- end -->", lambda _: block, readme, flags=re.S)

    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    citation = re.sub(r"^repository-code: .*\n", "", citation, flags=re.M)
    if url:
        citation += f'repository-code: "{url}"\n'

    tour = json.loads((root / TOUR).read_text(encoding="utf-8"))
    for cell in tour["cells"]:
        if cell["id"] == "install":
            line = re.compile(r'^address = ".*"')
            cell["source"] = [line.sub(f'address = "{url}"', each) for each in cell["source"]]
    notebook = json.dumps(tour, indent=1, ensure_ascii=False) + "\n"
    return {"README.md": readme, "CITATION.cff": citation, TOUR: notebook}


def main(root: Path = ROOT) -> None:
    """Write all of them."""
    for name, text in texts(root).items():
        (root / name).write_text(text, encoding="utf-8")
    print(f"the address is {address(root) or 'not known yet: see [project.urls]'}")


if __name__ == "__main__":
    main()
