"""Shared by all tests: a repository in a temporary folder, with notebooks made on the fly, and one
that `make` works in.
"""

import importlib.util
import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from dejavu_utils import store

PARAMETERS = (
    'profile = "laptop"  # name\nseed = 0  # integer\nrho = 0.5  # share\nk = 10  # neighbours\n'
)
START = 'import dejavu_utils.notebook as nb\nrun = nb.start("{stage}", globals())'

# Files that take long begin first, so that two processes (`make test`) end at about the same time.
LONG = (
    "test_sitting",
    "test_front",
    "test_damage",
    "test_evidence",
    "test_engine_vissl",
    "test_signals",
    "test_launch",
    "test_train",
    "test_notebook",
    "test_inputs",
)


def pytest_collection_modifyitems(items):
    """Put the files of LONG first, in their order."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def notebook(*sources, kernel="somebody-elses"):
    """Return a notebook as a dict: the first source is the parameters cell."""
    cells = [
        {
            "cell_type": "code",
            "id": f"cell-{i}",
            "metadata": {"tags": ["parameters"] if i == 0 else []},
            "source": source,
            "outputs": [],
            "execution_count": None,
        }
        for i, source in enumerate(sources)
    ]
    spec = {"name": kernel, "display_name": kernel, "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": spec}, "nbformat": 4, "nbformat_minor": 5}


class Repository:
    """A temporary repository root with notebooks and a profile."""

    def __init__(self, root):
        self.root, self.start = root, START
        (root / "notebooks" / "profiles").mkdir(parents=True)
        self.profile("tiny", "all: {seed: 3}")

    def profile(self, name, text):
        (self.root / "notebooks" / "profiles" / f"{name}.yaml").write_text(text)

    def add(self, stage, *bodies, parameters=PARAMETERS):
        path = self.root / "notebooks" / f"{stage}.ipynb"
        path.write_text(json.dumps(notebook(parameters, self.start.format(stage=stage), *bodies)))
        return path


@pytest.fixture
def any_number(monkeypatch):
    """Intervals of any number of images, for tests of their arithmetic on tables that a reader can
    check.
    """
    monkeypatch.setattr("dejavu_utils.attack.scoring.FEWEST", 1)


@pytest.fixture(scope="session")
def run_cells():
    """A function that runs cells of a real notebook, by id, on given names and returns all names
    afterwards; nothing is written.
    """
    import nbformat

    def run(stage, identifiers, **names):
        path = store.PACKAGE.parent / "notebooks" / f"{stage}.ipynb"
        book = nbformat.read(path, as_version=4)
        source = {cell["id"]: cell["source"] for cell in book["cells"]}
        quiet = SimpleNamespace(table=lambda *_: None, figure=lambda *_: None)
        names = {"run": quiet} | names
        for identifier in identifiers:
            exec(compile(source[identifier], identifier, "exec"), names)
        return names

    return run


@pytest.fixture(scope="session")
def batch():
    """The runner beside the notebooks, as a module: it is no part of the package."""
    spec = importlib.util.spec_from_file_location(
        "batch", store.PACKAGE.parent / "notebooks" / "batch.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A Repository that store.root() finds, in a folder with a space and an umlaut."""
    root = tmp_path / "a repository ä"
    root.mkdir()
    monkeypatch.setenv("DEJAVU_ROOT", str(root))
    monkeypatch.delenv("DEJAVU_RUNS", raising=False)
    return Repository(root)


def working(repository):
    """Return a repository with the real Makefile and Snakefile, this environment, and two notebooks
    that need no torch.
    """
    repository.start = (
        "import dejavu_utils.notebook as nb\nparams = nb.parameters('{stage}', globals())"
    )
    here, root = store.PACKAGE.parent, repository.root
    shutil.copy(here / "Makefile", root)
    for name in ("Snakefile", "batch.py", "figures.py"):
        shutil.copy(here / "notebooks" / name, root / "notebooks")
    shutil.copytree(
        store.PACKAGE, root / "dejavu_utils", ignore=shutil.ignore_patterns("__pycache__")
    )
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (root / ".venv" / "bin" / "python").chmod(0o755)
    (root / "requirements.lock").touch()
    (root / ".venv" / ".installed").touch()
    repository.add("01_training", "print('trained')")
    repository.add("02_attack", "print('attacked with', k)")
    return repository


@pytest.fixture
def clone(repository):
    """A repository that `make` works in."""
    return working(repository)


@pytest.fixture(scope="module")
def clone_of_all(tmp_path_factory):
    """A repository that `make` works in, the same one for all tests of a file."""
    root = tmp_path_factory.mktemp("a repository ä")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEJAVU_ROOT", str(root))
        patch.delenv("DEJAVU_RUNS", raising=False)
        yield working(Repository(root))
