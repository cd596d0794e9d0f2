"""Shared by the tests of the front door: a repository that `make` works in."""

import shutil
import sys

import pytest

from dejavu_utils import store

HERE = store.PACKAGE.parent


@pytest.fixture
def clone(repository):
    """A repository with the real Makefile and Snakefile, this environment, and two notebooks that
    need no torch.
    """
    repository.start = (
        "import dejavu_utils.notebook as nb\nparams = nb.parameters('{stage}', globals())"
    )
    root = repository.root
    shutil.copy(HERE / "Makefile", root)
    for name in ("Snakefile", "batch.py", "figures.py"):
        shutil.copy(HERE / "notebooks" / name, root / "notebooks")
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
