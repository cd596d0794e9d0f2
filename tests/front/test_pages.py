"""The site of `make report` and the set of `make student`: nothing is fetched or runs, pictures are
described.
"""

import base64
import importlib.util
import io
import json
import re
import subprocess

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
def pages():
    spec = importlib.util.spec_from_file_location("pages", HERE / "notebooks" / "site" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
        new.new_markdown_cell("# 2 · Attack\n\n**Claim.** It *works*.\n\n**Cost.** none"),
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
        new.new_markdown_cell("It is **42**.", metadata={"tags": ["solution"]}),
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
    """Return {name: soup} of the site of one executed notebook with a figure, a table of scores and
    claims.
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
        "What it says",
    ]
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
    cells = [cell.text for cell in soup.select(".claims td")]
    assert cells[4::5] == ["✓\xa0supported", "–\xa0not tested"] and EVIL in cells[1]
    assert "seeds [3]; executed in 4 s" in soup.text and store.code_version() in soup.text
    table = repository.root / "runs/tiny/report/tables/curve.csv"
    assert soup.figure.a["href"] == "tables/curve.csv" and table.read_text() == "p\n100\n"


def test_the_index_begins_with_the_answer(site):
    first = site["index"].h1.find_next_sibling("p").text
    assert "VICReg names the objects of images that it was trained on in 20.0 %" in first
    assert "in 15.7 %" in first and "+4.3 points (−1.0 to +9.0)" in first
    assert "undecided" in first and "over 600 images" in first


def test_rows_of_the_most_confident_count_the_images_that_are_scored(site):
    rows = [row.find_all("td") for row in site["index"].table.tbody.find_all("tr")]
    assert [(row[0].small.text, row[-1].text) for row in rows] == [
        ("all", "600"),
        ("20 % most confident", "120"),
    ]


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


def test_the_command_says_where_the_pages_are_or_what_is_missing(site, repository, pages, capsys):
    assert pages.main(["tiny"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(repository.root / "runs" / "tiny" / "report" / "index.html")
    assert printed.err == "02_attack …\n"  # which page is being made
    assert pages.main(["tinny"]) == 1
    assert capsys.readouterr().err.startswith("error: no executed notebook in ")
