"""The pages of `make report` and `make site`, the slides, and the set of `make student`: nothing is
fetched, no script runs but the search, pictures are described, links lead somewhere.
"""

import base64
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from PIL import Image

from dejavu_utils import store

HERE = store.PACKAGE.parent
NOTEBOOKS = sorted((HERE / "notebooks").glob("[0-9][0-9]_*.ipynb"))
EVIL = '<script>alert("x")</script>'
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def scripts():
    """The scripts of notebooks/site, as modules: they are no part of the package."""
    names = ("pages", "documents", "api", "publish", "slides")
    sys.path.insert(0, str(HERE / "notebooks" / "site"))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(HERE / "notebooks" / "site"))
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def pages(scripts):
    return scripts.pages


def picture(colour):
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def executed():
    """Return a notebook with every kind of output that ours have."""
    new = nbformat.v4
    widget = {
        WIDGET: {"model_id": "1", "version_major": 2, "version_minor": 0},
        "text/plain": "VBox(…)",
    }
    shown = [
        new.new_output("display_data", data=data)
        for data in (
            {"image/png": picture("red"), "text/plain": "<Figure>"},
            widget | {"image/png": picture("blue")},
            {"text/html": "<table><tr><td>7</td></tr></table>", "text/plain": "7"},
        )
    ]
    shown.append(new.new_output("stream", text=EVIL))
    cells = [
        new.new_markdown_cell(
            "# 2 · Attack\n\n**Claim.** It *works*.\n\n**Cost.** none\n\n[again](02_attack.ipynb)"
        ),
        new.new_markdown_cell("where $z_i$ is\n\n$$\\sum_i z_i^2$$"),
        new.new_code_cell(
            'run.figure("curve", figure, frame)',
            outputs=shown,
            execution_count=1,
            metadata={"alt": 'a "curve" that rises'},
        ),
        new.new_code_cell("k = 3", execution_count=2, metadata={"tags": ["injected-parameters"]}),
        new.new_code_cell(
            "print(42)",
            execution_count=3,
            metadata={"tags": ["solution"]},
            outputs=[new.new_output("stream", text="42")],
        ),
        new.new_markdown_cell(
            '<details class="solution"><summary>In words</summary>\n\nIt is **42**.\n\n</details>',
            metadata={"tags": ["solution"]},
        ),
    ]
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
    state = {
        "application/vnd.jupyter.widget-state+json": {
            "state": {},
            "version_major": 2,
            "version_minor": 0,
        }
    }
    return new.new_notebook(cells=cells, metadata={"widgets": state})


@pytest.fixture
def site(repository, pages):
    """Return {name: soup} of the pages of one executed notebook with a figure, a table of scores
    and claims.
    """
    folder = repository.root / "runs" / "tiny"
    meta = {"parameters": {"seeds": [3]}, "seconds": 4.4}
    with store.artifact(folder / "notebooks" / "02_attack.ipynb", meta) as temporary:
        temporary.write_text(nbformat.writes(executed()))
    for name in ("curve", "older"):
        with store.artifact(folder / "figures" / f"{name}.png") as temporary:
            temporary.write_bytes(base64.b64decode(picture("green")))
    store.write_table(folder / "figures" / "curve.csv", pd.DataFrame({"p": [100]}))
    row = {
        "criterion": "vicreg",
        "rho": 0.2,
        "epoch": 5,
        "layer": "projector",
        "p": 100,
        "score": 0.0434,
        "low": -0.01,
        "high": 0.09,
        "target": 0.2,
        "reference": 0.1566,
        "n": 600,
    }
    others = [
        {"p": 20},
        {"epoch": 1, "score": 0.77},
        {"layer": "backbone", "score": 0.66},
    ]
    store.write_table(
        folder / "tables" / "scores.csv", pd.DataFrame([row | other for other in [{}, *others]])
    )
    (repository.root / "results" / "study").mkdir(parents=True)
    claims = [
        ["P1", f"it, {EVIL}", "+0.1", "600", "3", "supported"],
        ["P2", "b", "", "", "", "not tested"],
    ]
    claims = pd.DataFrame(claims, columns=["id", "claim", "value", "n", "seeds", "verdict"])
    claims.to_csv(repository.root / "results" / "study" / "claims.csv", index=False)
    first = pages.build("tiny")
    assert first == folder / "report" / "index.html"
    return {
        path.stem: BeautifulSoup(path.read_text(), "html.parser")
        for path in first.parent.glob("*.html")
    }


def test_no_page_fetches_or_runs_anything(site):
    assert sorted(site) == ["02_attack", "index"]
    for soup in site.values():
        assert not soup.find_all(["script", "iframe", "object", "embed", "form"])
        assert [link["href"] for link in soup.find_all("link")] == ["data:,"]
        assert all(
            image["src"].startswith("data:image/png;base64,") for image in soup.find_all("img")
        )
        assert (
            "default-src 'none'"
            in soup.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
        )
        assert not [
            tag for tag in soup.find_all(True) if any(name.startswith("on") for name in tag.attrs)
        ]
        assert (
            soup.html["lang"] == "en"
            and len(soup.find_all("h1")) == 1
            and "width=device-width" in str(soup)
        )
        links = [link["href"] for link in soup.find_all("a") if not link["href"].startswith("#")]
        files = [link for link in links if not link.endswith(".html")]
        assert set(files) <= {"tables/curve.csv"}
        assert links and {link.removesuffix(".html") for link in links} - set(files) <= set(site)


def test_a_notebook_page_shows_results_first_and_folds_code_and_solutions(site):
    soup = site["02_attack"]
    colours = [
        Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))).getpixel((0, 0))
        for image in soup.find_all("img")
    ]
    assert colours == [(255, 0, 0), (0, 0, 255)]  # the figure, and what stands beside the widget
    assert {image["alt"] for image in soup.find_all("img")} == {'a "curve" that rises'}
    assert [text.get("display") for text in soup.find_all("math")] == [None, "block"]
    assert EVIL in soup.text and "7" in soup.table.text
    folded = soup.select("details.code")
    assert [fold.summary.text for fold in folded] == [
        "Code: cell-2",
        "Code: what the profile changes",
        "Code: cell-4",
    ]
    assert not any("open" in fold.attrs for fold in folded[:2])
    assert [fold.summary.text for fold in soup.select("details.solution")] == [
        "Solution",
        "In words",
    ]
    assert soup.select("details.solution")[1].strong.text == "42"
    assert (
        "42" in soup.select("details.solution")[0].text
        and "open" not in soup.select("details.solution")[0].attrs
    )


def test_the_index_says_what_the_tables_say(site, repository):
    soup = site["index"]
    assert "It works." in soup.text and "+4.3" in soup.text and "(−1.0 to +9.0)" in soup.text
    assert not re.search(r"77|66\.|55\.", soup.find("table").text)  # other epochs and layers
    assert (
        soup.img["alt"] == 'a "curve" that rises'
        and soup.select("section h3 a")[0]["href"] == "02_attack.html"
    )
    cells = [cell.text for cell in soup.select(".claims tbody td")]
    assert cells[4::5] == ["✓\xa0supported", "–\xa0not tested"] and EVIL in cells[1]
    assert "seeds [3]; executed in 4 s" in soup.text and store.code_version() in soup.text
    table = repository.root / "runs/tiny/report/tables/curve.csv"
    assert soup.figure.a["href"] == "tables/curve.csv" and table.read_text() == "p\n100\n"


def test_the_index_begins_with_the_answer(site):
    first = site["index"].h1.find_next_sibling("p").text
    assert "VICReg names the objects of images that it was trained on in 20.0 %" in first
    assert "in 15.7 %" in first and "+4.3 points (−1.0 to +9.0)" in first
    assert "undecided" in first and "over 600 images" in first
    assert "trained for 5 epochs" in first


def test_rows_of_the_most_confident_count_the_images_that_are_scored(site):
    rows = [row.find_all("td") for row in site["index"].table.tbody.find_all("tr")]
    assert [(row[0].small.text, row[-1].text) for row in rows] == [
        ("all", "600"),
        ("20 % most confident", "120"),
    ]


def test_the_page_of_some_notebooks_reads_nothing_of_the_others(site, repository, pages):
    """While others are made again, whose files may be old or damaged, as in a run after damage."""
    folder = repository.root / "runs" / "tiny"
    meta = {"parameters": {}, "seconds": 1.0}
    with store.artifact(folder / "notebooks" / "00_tour.ipynb", meta) as temporary:
        temporary.write_text(nbformat.writes(executed()).replace("curve", "course"))
    for path in (folder / "notebooks" / "02_attack.ipynb", folder / "tables" / "scores.csv"):
        path.write_bytes(b"damaged" + path.read_bytes())
    for path in (folder / "figures").glob("*.png"):
        path.write_bytes(b"damaged")

    with pytest.raises(store.StoreError, match="02_attack.ipynb is damaged"):
        pages.build("tiny")
    script = HERE / "notebooks" / "site" / "pages.py"
    runs = os.environ | {"DEJAVU_RUNS": str(folder.parent)}
    subprocess.run([sys.executable, script, "tiny", "00_tour"], env=runs, check=True)
    soup = BeautifulSoup((folder / "report" / "index.html").read_text(), "html.parser")
    assert "Nothing has been attacked yet" in soup.text and not soup.find_all("img")
    assert {link["href"] for link in soup.nav.find_all("a")} == {"index.html", "00_tour.html"}


def test_figures_that_no_notebook_draws_any_more_come_last(site):
    assert [image["alt"] for image in site["index"].find_all("img")][-1] == "older"


def test_what_cannot_be_shown_is_one_clear_error(repository, pages):
    with pytest.raises(
        FileNotFoundError, match=r"no executed notebook in .*runs/tiny/notebooks: run `make"
    ):
        pages.build("tiny")
    with pytest.raises(ValueError, match=r"TeX that cannot be drawn.*\\nonsense"):
        pages.mathml(r"\nonsense{x}")
    path = repository.root / "runs" / "tiny" / "notebooks" / "02_attack.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(store.StoreError, match="sidecar"):
        pages.build("tiny")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_text_of_each_notebook_can_be_shown(pages, path):
    body, _ = pages.exporter().from_notebook_node(nbformat.read(path, as_version=4))
    title, claim = pages.claim(nbformat.read(path, as_version=4))
    assert title and len(claim) > 40
    assert "<merror" not in body and "$$" not in body


def test_make_student_drops_solutions_and_nothing_else(tmp_path):
    subprocess.run(
        ["make", "student", f"OUT={tmp_path}"], cwd=HERE, check=True, capture_output=True
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in NOTEBOOKS]
    for path in NOTEBOOKS:
        ours, theirs = (
            json.loads((folder / path.name).read_text())["cells"]
            for folder in (path.parent, tmp_path)
        )
        kept = [cell for cell in ours if "solution" not in cell["metadata"].get("tags", [])]
        assert [(cell["id"], "".join(cell["source"])) for cell in theirs] == [
            (cell["id"], "".join(cell["source"])) for cell in kept
        ]


def test_a_page_names_no_folder_of_this_machine(pages):
    body = f"<pre>{store.runs('smoke')}/audit/a.html</pre><p>{store.root()}/README.md</p>"
    assert pages.without_folders(body) == "<pre>runs/smoke/audit/a.html</pre><p>README.md</p>"


def test_the_command_says_where_the_pages_are_or_what_is_missing(site, repository, pages, capsys):
    assert pages.main(["tiny"]) == 0
    printed = capsys.readouterr()
    first = repository.root / "runs" / "tiny" / "report" / "index.html"
    assert printed.out == f"open {first} in a browser\n"
    assert printed.err == "02_attack …\n"  # which page is being made
    assert pages.main(["tinny"]) == 1
    assert capsys.readouterr().err.startswith("error: no executed notebook in ")


@pytest.mark.parametrize("target", ["report", "site", "slides"])
def test_without_a_run_make_says_so_before_any_package_is_imported(target, tmp_path):
    done = subprocess.run(
        ["make", target, "PROFILE=smoke", f"PYTHON={sys.executable} -I -S"],
        cwd=HERE,
        capture_output=True,
        text=True,
        env=os.environ | {"DEJAVU_RUNS": str(tmp_path)},
    )
    assert done.returncode == 2
    first = done.stderr.splitlines()[0]
    assert first.startswith(f"error: no executed notebook in {tmp_path}/smoke/notebooks: run ")
    assert "`make figures PROFILE=smoke`" in first


# -- make site --------------------------------------------------------------------------------

DOCUMENTS = {
    "README.md": "# Home\n\n![A square](square.png) ![badge](https://example.org/badge.svg)\n\n"
    "[numbers](results/README.md#what-was-found) [code](notebooks/02_attack.ipynb) "
    "[elsewhere](https://example.org)\n\n```sh\nmake site\n```",
    "results/README.md": "# Numbers\n\n## What was found?\n\n| a | b |\n|---|---|\n| 1 | $x^2$ |"
    "\n\n[table](study/scores.csv) [home](..) [more](study)\n\n## `a_b`, and more\n\nwombat",
    "results/study/README.md": "# Study\n\n[back](../README.md#a_b-and-more)",
    "dejavu_utils/README.md": "# Module",
    "notebooks/TEACHING.md": "# Lecturers",
    "CHANGELOG.md": "# Changes",
    "notebooks/02_attack.ipynb": "{}",
}


def documented(root):
    """Write the documents of a small repository."""
    for name, text in DOCUMENTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "square.png").write_bytes(base64.b64decode(picture("red")))
    (root / "results" / "study" / "scores.csv").write_text("p\n100\n")


def leads_nowhere(soups):
    """Return the links between pages, given as {file: soup}, whose page or anchor is not there."""
    lost = []
    for name, soup in soups.items():
        for link in soup.find_all("a", href=True):
            page, _, anchor = link["href"].partition("#")
            other = soups.get(page or name)
            if "://" in page or page.startswith(("files/", "tables/")):
                continue
            if other is None or (anchor and not other.find(id=anchor)):
                lost.append(f"{name}: {link['href']}")
    return lost


@pytest.fixture
def whole(site, scripts, repository):
    """Return {file: soup} of the site, and its folder."""
    documented(repository.root)
    first = scripts.publish.build("tiny")
    assert first == repository.root / "runs" / "tiny" / "site" / "index.html"
    soups = {
        path.name: BeautifulSoup(path.read_text(), "html.parser")
        for path in first.parent.glob("*.html")
    }
    return soups, first.parent


def test_the_site_has_documents_notebooks_module_and_search(whole):
    soups, folder = whole
    assert sorted(soups) == [
        "02_attack.html",
        "api.html",
        "changelog.html",
        "dejavu_utils.html",
        "index.html",
        "notebooks-teaching.html",
        "results-study.html",
        "results.html",
        "run.html",
        "search.html",
    ]
    assert leads_nowhere(soups) == []
    home = soups["index.html"].main
    assert home.h1.text == "Home" and home.img["alt"] == "A square"
    assert [link["href"] for link in home.find_all("a")] == [
        "results.html#what-was-found",
        "02_attack.html",
        "https://example.org",
    ]
    assert (folder / "files" / "results" / "study" / "scores.csv").read_text() == "p\n100\n"
    parts = soups["results.html"].find("nav")
    texts = [link.text for link in parts.find_all("a")]
    assert texts == ["Home", "Notebooks", "Results", "Module", "More", "Search"]
    assert parts.find("a", attrs={"aria-current": True}).text == "Results"


def test_the_home_shows_the_film_of_a_tour_that_made_one(whole, scripts, repository):
    soups, _ = whole
    assert not soups["index.html"].find("figure")

    film = repository.root / "runs" / "tiny" / "figures" / "tour_film.png"
    with store.artifact(film) as temporary:
        temporary.write_bytes(base64.b64decode(picture("blue")))
    home = BeautifulSoup(scripts.publish.build("tiny").read_text(), "html.parser")
    shown = home.find("figure").img
    assert shown["src"].endswith(picture("blue")) and "plays once" in shown["alt"]


def test_a_table_of_a_document_keeps_numbers_and_intervals_on_a_line(scripts):
    text = "| what | score |\n|---|---|\n| it | +0.1 [+0.0, +0.2] |\n| two, three | **1 [0, 2]** |"
    soup = scripts.documents.rendered(text)
    numbers = [cell.text for cell in soup.find_all("td", class_="number")]
    assert numbers == ["+0.1 [+0.0, +0.2]", "1 [0, 2]"]
    shown = scripts.pages.accessible(str(soup))
    assert "[+0.0,\N{NO-BREAK SPACE}+0.2]" in shown and "[0,\N{NO-BREAK SPACE}2]" in shown
    assert "two, three" in shown


def test_a_number_and_its_percent_sign_stay_on_a_line_but_not_in_code(scripts):
    soup = scripts.documents.rendered("Here 25 % of them.\n\n```python\n7 % 3\n```\n")
    assert soup.p.text == "Here 25\N{NO-BREAK SPACE}% of them."
    assert "7 % 3" in soup.pre.text


def test_the_site_fetches_nothing_and_runs_the_search_alone(whole):
    soups, _ = whole
    for name, soup in soups.items():
        policy = soup.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
        assert policy.startswith("default-src 'none'; img-src data:; ")
        assert all(image["src"].startswith("data:") for image in soup.find_all("img"))
        running = [tag for tag in soup.find_all("script") if not tag.get("type")]
        assert bool(running) == (name == "search.html") == ("script-src" in policy)
    script = soups["search.html"].find_all("script")[1].string
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = soups["search.html"].find("meta", {"http-equiv": "Content-Security-Policy"})
    assert f"script-src 'sha256-{digest}'" in policy["content"]


def test_the_search_knows_every_section_and_where_it_is(whole):
    soups, _ = whole
    sections = json.loads(soups["search.html"].find(id="sections").string)
    found = [section for section in sections if "wombat" in section["text"].split()]
    assert [section["link"] for section in found] == ["results.html#a_b-and-more"]
    assert EVIL in " ".join(section["text"] for section in sections)  # data, and never markup


def test_the_module_page_says_how_functions_are_called(scripts):
    soup = BeautifulSoup(scripts.api.page().body, "html.parser")
    heading = soup.find(id="attack.scoring.score")
    shown = heading.find_next_sibling("p")
    assert shown.code.text.startswith("score(") and "->" in shown.text
    assert not soup.find(id=re.compile(r"\._"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("[gone](no/such.md)", r"README.md: the link no/such.md leads nowhere"),
        ("![](square.png)", r"README.md: the picture square.png has no description"),
        ("![A](gone.png)", r"README.md: the picture gone.png is not there"),
    ],
)
def test_what_a_document_lacks_is_one_clear_error(scripts, repository, tmp_path, text, message):
    documented(repository.root)
    (repository.root / "README.md").write_text(f"# Home\n\n{text}")
    with pytest.raises((OSError, ValueError), match=message):
        scripts.documents.documents(tmp_path)


def test_links_between_our_documents_lead_somewhere(scripts, tmp_path):
    found = scripts.documents.documents(tmp_path)
    soups = {page.name: BeautifulSoup(page.body, "html.parser") for page in found}
    books = {f"{path.stem}.html": BeautifulSoup("", "html.parser") for path in NOTEBOOKS}
    assert leads_nowhere(soups | books) == []
    assert len(soups) > 10


# -- make slides ------------------------------------------------------------------------------


def test_slides_show_pictures_and_text_and_no_code(scripts, repository, tmp_path, monkeypatch):
    book = executed()
    kinds = ["slide", "subslide", "-", "skip", "skip", "skip"]
    for cell, kind in zip(book.cells, kinds, strict=True):
        cell.metadata["slideshow"] = {"slide_type": kind}
    path = repository.root / "runs" / "tiny" / "notebooks" / "00_tour.ipynb"
    with pytest.raises(FileNotFoundError, match="run `make figures PROFILE=tiny`"):
        scripts.slides.build("tiny")
    with store.artifact(path) as temporary:
        temporary.write_text(nbformat.writes(book))
    monkeypatch.setenv("REVEAL", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="has no dist/reveal.js"):
        scripts.slides.build("tiny")
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "reveal.js").write_text("")

    shown = scripts.slides.build("tiny")
    soup = BeautifulSoup(shown.read_text(), "html.parser")
    assert "It works." in soup.text and "print(42)" not in soup.text
    assert len(soup.select(".slides > section")) == 1
    assert len(soup.select(".slides > section > section")) == 2
    asked = [tag.get("src") or tag.get("href") for tag in soup.find_all(["script", "link", "img"])]
    assert not [address for address in asked if address and "://" in address]
    assert (shown.parent / "reveal.js" / "dist" / "reveal.js").is_file()
