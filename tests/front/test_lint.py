"""The notebooks read well and run anywhere: short cells, short functions that are used twice, more
prose than code, no outputs.
"""

import ast
import json
import re

import pytest

from dejavu_utils import parameters, store

NOTEBOOKS = sorted((store.PACKAGE.parent / "notebooks").glob("*.ipynb"))


def _lines(source):
    return [
        line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")
    ]


def lint_parameters(source):
    """Return what is wrong with a parameters cell: literals only, a comment each, 16 lines at
    most.
    """
    wrong = (
        []
        if parameters.literals(source)
        else ["the parameters cell is not `name = literal` lines only"]
    )
    bare = [line for line in _lines(source) if re.match(r"\w+\s*[:=]", line) and "#" not in line]
    wrong += [f"the parameter `{line.split('=')[0].strip()}` has no comment" for line in bare]
    return wrong + (
        ["the parameters cell has more than 16 lines"] if len(_lines(source)) > 16 else []
    )


def lint_cell(cell):
    """Return what is wrong with a code cell."""
    source, name, wrong = "".join(cell["source"]), cell["id"], []
    if cell["outputs"] or cell["execution_count"]:
        wrong.append(f"{name} has outputs: clear them")
    if re.search(
        r"^\s*[%!]|\b(exit|quit)\(|raises-exception", source + str(cell["metadata"]), re.MULTILINE
    ):
        return [*wrong, f"{name} has a magic, a shell command, or leaves the program"]
    if "parameters" in cell["metadata"].get("tags", []):
        return wrong + lint_parameters(source)
    return wrong + ([f"{name} has more than 15 lines"] if len(_lines(source)) > 15 else [])


def lint_definitions(sources):
    """Return what is wrong with the definitions of a notebook: functions of at most ten lines,
    each used at least twice, and no class.
    """
    text = "\n".join(source for source in sources if not re.search(r"^\s*[%!]", source, re.M))
    nodes = list(ast.walk(ast.parse(text)))
    used = [
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    ]
    wrong = []
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            wrong.append(f"`{node.name}` is a class: it belongs in dejavu_utils")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if len(_lines(ast.get_source_segment(text, node))) > 10:
                wrong.append(f"`{node.name}` has more than ten lines: it belongs in dejavu_utils")
            if used.count(node.name) < 2:
                wrong.append(f"`{node.name}` is used less than twice: write its lines in the cell")
    return wrong


def lint(path):
    """Return everything that is wrong with a notebook, as sentences."""
    content = json.loads(path.read_text())
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    text = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "markdown"]
    prose = " ".join(text).split()
    ids = [cell.get("id", "") for cell in content["cells"]]
    wrong = [problem for cell in code for problem in lint_cell(cell)]
    lesson = [cell for cell in code if "solution" not in cell["metadata"].get("tags", [])]
    wrong += lint_definitions(["".join(cell["source"]) for cell in lesson])
    if sum("parameters" in cell["metadata"].get("tags", []) for cell in code) != 1:
        wrong.append("not exactly one cell is tagged `parameters`")
    if content["metadata"].get("kernelspec", {}).get("name") != "python3":
        wrong.append("the kernel is not python3")
    readable = [
        name for name in ids if re.fullmatch(r"(?![0-9a-f]{8}$)[a-z][a-z0-9]*(-[a-z0-9]+)*", name)
    ]
    if len(set(readable)) < len(ids):
        wrong.append("cell ids are not unique readable names")
    if len(prose) < sum(len(_lines("".join(cell["source"]))) for cell in code):
        wrong.append("there is less prose (words) than code (lines)")
    return wrong


def lint_lesson(path):
    """Return what a notebook lacks as a lesson: claim, cost, something to notice, described
    pictures, exercises.
    """
    cells = json.loads(path.read_text())["cells"]
    source = {cell["id"]: "".join(cell["source"]) for cell in cells}
    first, every = source[cells[0]["id"]], "\n".join(source.values())
    needed = ("# ", "**Claim.** ", "**Cost.** ")
    wrong = [f"no `{part}` in the first cell" for part in needed if part not in first]
    wrong += [] if re.search(r"§|et al", first) else ["the first cell names no section of a paper"]
    cost = first.partition("**Cost.**")[2]
    wrong += [
        f"no cost of `{profile}`"
        for profile in ("smoke", "laptop", "study")
        if f"`{profile}`" not in cost
    ]
    wrong += [
        f"no `{heading}`"
        for heading in ("## What to notice", "## Exercises")
        if heading not in every
    ]
    kinds = [(tag, cell["cell_type"]) for cell in cells for tag in cell["metadata"].get("tags", [])]
    for kind in (("exercise", "markdown"), ("solution", "code"), ("solution", "markdown")):
        if kinds.count(kind) != 3:
            wrong.append(f"{kinds.count(kind)} {kind[1]} cells are tagged `{kind[0]}`, expected 3")
    # JupyterLab opens a hidden markdown cell when all cells are run, but no <details>.
    wrong += [
        f"{cell['id']} is a solution in words that is not folded in a <details>"
        for cell in cells
        if cell["cell_type"] == "markdown"
        and "solution" in cell["metadata"].get("tags", [])
        and not source[cell["id"]].startswith("<details")
    ]
    drawing = [
        cell
        for cell in cells
        if cell["cell_type"] == "code"
        and re.search(r"dv\.(plots|widgets)\.\w+\(|sns\.\w*plot\(", source[cell["id"]])
    ]
    return wrong + [
        f"{cell['id']} draws, but its metadata has no `alt`"
        for cell in drawing
        if not cell["metadata"].get("alt")
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    assert lint(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_a_lesson(path):
    assert lint_lesson(path) == []


@pytest.mark.parametrize(
    "profile",
    sorted((store.PACKAGE.parent / "notebooks" / "profiles").glob("*.yaml")),
    ids=lambda path: path.stem,
)
def test_profile_fits_the_notebooks(profile, monkeypatch, batch):
    monkeypatch.delenv("DEJAVU_ROOT", raising=False)
    assert batch.given(profile.stem, {}).keys() == {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", sorted(store.PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_everything_public_has_a_docstring(path):
    public = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_the_lecturers_page_sends_nobody_to_a_place_that_is_not_there():
    text = (store.PACKAGE.parent / "notebooks" / "TEACHING.md").read_text()
    books = {path.stem: " ".join(path.read_text().split()) for path in NOTEBOOKS}
    pages = [store.PACKAGE.parent / name for name in ("README.md", "results/README.md")]
    everywhere = " ".join([*books.values(), *(page.read_text() for page in pages)])
    assert set(re.findall(r"`(\d\d_\w+)`", text)) <= books.keys()
    answers = text.partition("## Ten misunderstandings")[2]
    headings = set(
        re.findall(
            r'[`"](?:, to)? "([A-Z][^"]+)"|README "([A-Z][^"]+)"|and "([A-Z][^"]+)"', answers
        )
    )
    assert len(headings) >= 7
    assert [
        name for found in headings for name in found if name and f"# {name}" not in everywhere
    ] == []
    parts = {int(number) for number in re.findall(r"part (\d)", answers)}
    assert all(f"## {number}. " in books["00_tour"] for number in parts)


def test_lint_finds_what_a_lesson_lacks(repository):
    path = repository.add("02_attack", "dv.plots.over_p(x)")
    content = json.loads(path.read_text())
    content["cells"][2]["metadata"]["tags"] = ["solution"]
    words = {"cell_type": "markdown", "id": "words", "metadata": {"tags": ["solution"]}}
    content["cells"].append(words | {"source": ["It is 42."]})
    path.write_text(json.dumps(content))
    found = " | ".join(lint_lesson(path))
    for part in (
        "no `**Claim.** ` in the first",
        "no section",
        "no cost of `study`",
        "no `## What to notice`",
        "0 markdown cells are tagged `ex",
        "1 code cells are tagged `sol",
        "1 markdown cells are tagged `sol",
        "words is a solution in words that is not folded",
        "cell-2 draws",
    ):
        assert part in found


def test_lint_finds_what_it_should(repository):
    path = repository.add(
        "02_attack",
        "def f():\n    pass",
        "%time 1",
        "exit()",
        "\n".join(["x = 1"] * 16),
        "class C:\n    pass",
        "def long():\n" + "    x = 1\n" * 10 + "long(), long()",
        "def fine():\n    return 1\nfine()\nfine()",
        parameters="k = 1\nseed = f()  # a call\n",
    )
    content = json.loads(path.read_text())
    content["cells"][1] |= {"id": "cell-0", "execution_count": 3}
    path.write_text(json.dumps(content))
    found = " | ".join(lint(path))
    for part in (
        "`f` is used less than twice",
        "`C` is a class",
        "`long` has more than ten lines",
        "cell-3 has a magic",
        "cell-4 has a magic",
        "more than 15 lines",
        "`k` has no comment",
        "literal` lines only",
        "has outputs",
        "kernel is not python3",
        "not unique",
        "less prose",
    ):
        assert part in found
    assert "`fine`" not in found


def test_the_tests_of_each_kind_of_fault_are_there():
    document = (store.PACKAGE / "audit" / "README.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", document))
    assert named  # of the kinds of fault
    tests = [path.read_text() for path in (store.PACKAGE.parent / "tests").rglob("test_*.py")]
    defined = {name for text in tests for name in re.findall(r"^def (test_\w+)", text, re.M)}
    assert named - defined == set()
